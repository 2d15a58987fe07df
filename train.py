"""
Train a model: python train.py [config/NAME.py] [--flag=value ...]

    python train.py                                   # config/tiny.py: a small Hymba on Python's standard library
    python train.py config/hymba_125m.py --batch_size=8 --grad_accum=4
    python train.py config/tiny.py --pattern=TTTT --out_dir=out/tiny_T
    python train.py config/tiny.py --resume           # continue from out/tiny/last
    torchrun --nproc_per_node=4 train.py config/hymba_350m.py

A config file is Python that assigns flags; the command line overrides it. The flags are the fields of flags.TrainConfig
and of model.HymbaConfig. Everything random is a function of (seed, step), so that a resumed run repeats to the bit what
an uninterrupted one would have done. Ctrl-C and SIGTERM save a checkpoint and exit with 0.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import cost
import ops
import pictures
import prepare
import sample
from files import brief, memory, naming, writing_file
from flags import TrainConfig, parse, run
from model import Hymba, HymbaConfig
from run_folder import check_folder, metrics_so_far, recorded, resume, run_folder, take_over
from tokenizer import Tokenizer, load_tokenizer
from training import (
    StepGraphs,
    compile_blocks,
    compile_kernels,
    draw_windows,
    even_starts,
    learning_rate,
    mean_loss,
    optimizer_for,
    to_device,
)

# ----------------------------------------------------------------------------------------------------------------------
# A run: what it needs is opened and checked before any time is spent


@dataclass
class Data:
    """Token files: the training set (and the one for annealing), the validation set, and what meta.json says."""

    folder: Path
    train: list[np.ndarray]
    val: np.ndarray
    meta: dict
    record: int  # windows begin at its multiples: 1, or the length of a record
    checksums: dict[str, str]  # of all of them
    tokenizer: Tokenizer | None  # None if nothing needs it
    tokenizer_file: bytes | None  # tokenizer.tiktoken of the data set, which goes into every checkpoint


@dataclass
class Run:
    """One training run in one of `world` processes."""

    cfg: TrainConfig
    data: Data
    model: Hymba
    optimizer: torch.optim.Optimizer
    stages: list[tuple[int, int]]  # (first step, block_size)
    device: torch.device
    rank: int
    world: int
    early: Sequence[Future] = ()  # kernels that are being compiled
    step: int = 0  # steps done
    best: float = math.inf  # validation loss

    def __post_init__(self):
        self.out = Path(self.cfg.out_dir)
        if self.cfg.overwrite and not self.cfg.resume and (self.out / "last").exists():
            self.out /= "new"  # until the first checkpoint; see take_over
        self.on_gpu = self.device.type == "cuda"
        self.compiles, self.graphs = self.cfg.compile and self.on_gpu, None
        if self.compiles:
            compile_blocks(self.model)
        self.parallel = self.model
        if self.world > 1:
            self.parallel = DistributedDataParallel(self.model, device_ids=[self.device.index] if self.on_gpu else None)

    @property
    def metrics(self) -> Path:
        return self.out / "metrics.jsonl"

    def gradients(self, pieces: list[np.ndarray]) -> Tensor:
        """Add to the parameters' gradients the mean over pieces (n, T + 1) of tokens; returns the mean loss."""
        loss = torch.zeros((), device=self.device)
        if self.compiles and self.world == 1:
            shape = len(pieces[0]), pieces[0].shape[1] - 1
            if self.graphs is None or self.graphs.idx.shape != shape:
                self.graphs = None  # frees its memory
                self.graphs, self.early = StepGraphs(self.model, *shape, len(pieces), self.early), ()
            self.graphs.zero_gradients()
            for piece in pieces:
                loss += self.graphs.loss(piece, backward=True)
            return loss
        for i, piece in enumerate(pieces):
            with nullcontext() if self.world == 1 or i == len(pieces) - 1 else self.parallel.no_sync():
                piece_loss = mean_loss(self.parallel, *to_device(piece, self.device)) / len(pieces)
                piece_loss.backward()
            loss += piece_loss.detach()
        return loss

    def batch(self, step: int) -> tuple[int, int, int]:
        """Of a step: block_size, sequences in one forward pass, and sequences of this process in all of its passes."""
        T = next(length for first, length in reversed(self.stages) if step >= first)
        tokens = self.cfg.batch_size * self.stages[0][1]
        return T, max(1, tokens // T), tokens * self.cfg.grad_accum // T


def start_process(cfg: TrainConfig) -> tuple[torch.device, int, int]:
    """This process's device, its number, and how many there are (torchrun starts several)."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank}, WORLD_SIZE={world} in the environment: unset both, or start with torchrun")
    rank, world = int(rank), int(world)
    device = sample.pick_device(cfg.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"more processes than GPUs: --nproc_per_node must be {torch.cuda.device_count()} or less")
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not cfg.kernels:
        ops.use_kernels(False)
    return device, rank, world


def open_data(cfg: TrainConfig, rank: int, world: int) -> Data:
    """The data sets of a run, and their tokenizer. The data set "python" is prepared if it is not there."""
    folder = Path(cfg.data_dir) / cfg.dataset
    if cfg.dataset == "python" and not folder.exists() and rank == 0:
        prepare.prepare(["python"], data_dir=cfg.data_dir)
    if world > 1:
        dist.barrier()
    (train, meta), (val, _) = (prepare.open_split(folder, split, cfg.data_command) for split in ("train", "val"))
    spec, file = meta["tokenizer"], folder / "tokenizer.tiktoken"
    local = spec == "bytes" or spec.startswith("bpe:")  # others are downloads, which a run without a sample can spare
    try:
        tokenizer = load_tokenizer(spec, folder, meta.get("tokenizer_sha256")) if local or cfg.sample_tokens else None
    except ConnectionError as e:
        raise ConnectionError(f"{e}; or train without a sample at the end: --sample_tokens=0") from None
    except ValueError as e:
        raise ValueError(f"{folder / 'meta.json'}: {e}") from None
    if tokenizer and (tokenizer.n_vocab, tokenizer.eot_token) != (meta["vocab_size"], meta["eot"]):
        raise ValueError(
            f"{folder / 'meta.json'} is corrupt: its vocabulary is not that of the tokenizer {brief(spec)}"
        )
    file = file.read_bytes() if file.is_file() else None
    checksums = {split: meta[split]["sha256"] for split in ("train", "val")}
    if cfg.sample_tokens:
        tokenizer.encode_ordinary(cfg.prompt)
    data = Data(folder, [train], val, meta, meta.get("record", 1), checksums, tokenizer, file)
    if cfg.anneal_dataset:
        other = Path(cfg.data_dir) / cfg.anneal_dataset
        second, second_meta = prepare.open_split(other, "train")
        second_file = other / "tokenizer.tiktoken"
        second_file = second_file.read_bytes() if second_file.is_file() else None
        if spec != second_meta["tokenizer"] or file != second_file or data.record != second_meta.get("record", 1):
            raise ValueError(f"{cfg.dataset} and {cfg.anneal_dataset} have different tokenizers: prepare both alike")
        data.train.append(second)
        checksums["anneal"] = second_meta["train"]["sha256"]
    return data


def parse_stages(cfg: TrainConfig, block_size: int) -> list[tuple[int, int]]:
    """[(first step, block_size)] of the length curriculum; one stage if there is none."""
    if not cfg.length_stages:
        return [(0, block_size)]
    try:
        stages = [tuple(map(int, stage.split(":"))) for stage in cfg.length_stages.split(",")]
        lengths, steps = zip(*stages, strict=True)
    except ValueError:
        raise ValueError(f"length_stages={brief(cfg.length_stages)}: write length:steps,length:steps") from None
    if min(steps) < 1 or sum(steps) != cfg.max_steps:
        stages = brief(cfg.length_stages)
        raise ValueError(f"length_stages={stages} is {sum(steps)} steps, but max_steps={cfg.max_steps}")
    per_step = cfg.batch_size * cfg.grad_accum * lengths[0]
    for length in lengths:
        if length < 1 or per_step % length or (per_step // length) % max(1, cfg.batch_size * lengths[0] // length):
            raise ValueError(f"length_stages: {per_step} tokens a step do not divide into sequences of {length}")
    return [(sum(steps[:i]), length) for i, length in enumerate(lengths)]


def configure(cfg: TrainConfig, model_args: dict, data: Data) -> tuple[HymbaConfig, list[tuple[int, int]]]:
    """The architecture and the stages of its block_size. Raises ValueError for what does not go with the data."""
    vocab = data.meta["vocab_size"]
    model_args = {"vocab_size": -(-vocab // 64) * 64} | model_args  # rounded up: GPUs like multiples of 64
    if model_args["vocab_size"] < vocab:
        size = model_args["vocab_size"]
        raise ValueError(f"vocab_size={size} is too small for data set {cfg.dataset}: it has {vocab}")
    config = HymbaConfig(**model_args)
    stages = parse_stages(cfg, config.block_size)
    config.block_size = stages[0][1]
    longest = max(length for _, length in stages)
    for name, tokens in [("train", data.train[0]), ("val", data.val), ("anneal", data.train[-1])]:
        if len(tokens) <= longest:
            raise ValueError(f"the {name} data has {len(tokens)} tokens: too few for sequences of {longest} + 1")
    if data.record > 1 and {length + 1 for _, length in stages} != {data.record}:
        raise ValueError(f"records of data set {cfg.dataset} need block_size={data.record - 1}, at all stages")
    return config, stages


def check_room(cfg: TrainConfig, config: HymbaConfig, device: torch.device, world: int) -> None:
    """Raise ValueError if the model cannot fit into the memory, or its checkpoints onto the disk."""
    with torch.device("meta"):
        n = Hymba(config).num_params()
    tokens = cfg.batch_size * (config.block_size + config.n_meta)
    hidden = config.n_hidden * (config.n_expert_active if config.n_expert else 1)
    kept = config.n_layer * (10 * config.n_embd + 4 * hidden)  # for backward, bytes a token: what any needs
    need = 16 * n + kept * tokens  # weight, gradient and two moments
    drawn = 10 * cfg.batch_size * cfg.grad_accum * world * config.block_size  # a step's text, before it is divided
    if need > memory(device) or drawn > memory(torch.device("cpu")):
        raise ValueError(
            f"{n:,} parameters and {tokens:,} tokens at a time need {need / 1e9:,.0f} GB of "
            f"{memory(device) / 1e9:,.0f}, and the text of a step {drawn / 1e9:,.0f} GB: lower "
            "n_layer, n_embd, n_hidden, vocab_size, batch_size or grad_accum"
        )
    there = next(folder for folder in [Path(cfg.out_dir), *Path(cfg.out_dir).absolute().parents] if folder.exists())
    need = 32 * n  # last (weights and two moments) and best, each twice while it is replaced
    if (free := shutil.disk_usage(there).free) < need:
        raise ValueError(f"{there} has {free / 1e6:.1f} MB free, but checkpoints need {need / 1e6:.1f} MB")


def start(
    cfg: TrainConfig, config: HymbaConfig, stages: list[tuple[int, int]], data: Data,
    device: torch.device, rank: int, world: int,
) -> Run:  # fmt: skip
    """A run at its first step, or with --resume at the step of its last checkpoint."""
    torch.manual_seed(cfg.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    T, micro = stages[0][1], cfg.batch_size
    early = compile_kernels(config, micro, T, device) if cfg.compile and device.type == "cuda" and world == 1 else []
    model = Hymba(config).to(device)
    run = Run(cfg, data, model, optimizer_for(model, cfg), stages, device, rank, world, early)
    threads = resume(run) if cfg.resume else 0
    if device.type == "cpu" and world == 1:
        torch.set_num_threads(cfg.threads or threads or faster_threads(run))
    if rank == 0:
        run.metrics.parent.mkdir(parents=True, exist_ok=True)
        with writing_file(run.metrics) as new:
            new.write_text("".join(metrics_so_far(run)))
        active = f" ({cost.active_params(model):,} for each token)" if config.n_expert else ""
        size = f"{model.num_params():,} parameters{active}, {cost.flops_per_token(model) / 1e6:,.3g} MFLOP a token"
        where = f"{device} x {world}" if world > 1 else f"{device}"
        print(f"{config.pattern}: {size}, {len(data.train[0]):,} training tokens, on {where}", flush=True)
    return run


def faster_threads(run: Run) -> int:
    """One thread or all, whichever takes a forward and backward pass faster just now.

    Threads wait for each other hundreds of times in a step. Where something else keeps one core busy, they all wait
    for the thread on that core, and one alone is several times as fast.
    """
    T, micro, _ = run.batch(run.step)
    windows = draw_windows(run.data.train, 0.0, (0,), min(micro, max(1, 1024 // T)), T)
    took = {torch.get_num_threads(): math.inf, 1: math.inf}  # seconds
    for n in [*took, *took] if len(took) > 1 else []:
        torch.set_num_threads(n)
        begin = time.perf_counter()
        mean_loss(run.model, *to_device(windows, run.device)).backward()
        took[n] = min(took[n], time.perf_counter() - begin)
    run.optimizer.zero_grad(set_to_none=True)
    return min(took, key=took.get)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_step(run: Run, step: int) -> Tensor:
    """One step of the optimizer; step counts from 0. Returns the loss and the gradient's norm (2,), on the device."""
    cfg = run.cfg
    T, micro, n_local = run.batch(step)
    run.model.config.block_size = T  # RoPE's base follows it
    decaying = cfg.anneal_dataset and step >= cfg.max_steps - cfg.decay_steps
    mix = cfg.anneal_mix if decaying else 0.0
    windows = draw_windows(run.data.train, mix, (cfg.seed, step), n_local * run.world, T, run.data.record)
    pieces = np.split(windows[run.rank * n_local : (run.rank + 1) * n_local], n_local // micro)
    loss = run.gradients(pieces)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip or math.inf)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    run.optimizer.step()
    if not run.graphs:  # gradients of CUDA graphs stay where they are
        run.optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, norm.to(run.device)])


def evaluate(run: Run) -> tuple[float, float | None]:
    """Validation loss in nats per token and in bits per byte (None if tokens stand for no text), over evenly spaced
    windows.

    What was compiled for training is used here, too: without gradients, it would have to be compiled anew.
    """
    val, record, (T, micro, _) = run.data.val, run.data.record, run.batch(run.step - 1)
    starts = even_starts(len(val), T, run.cfg.eval_windows, record)[run.rank :: run.world]
    total = torch.zeros(2, device=run.device)
    for i in range(0, len(starts), micro):
        windows = np.stack([val[s : s + T + 1] for s in starts[i : i + micro]]).astype(np.int64)
        if run.graphs:
            loss = run.graphs.loss(windows)
        else:
            with torch.set_grad_enabled(run.compiles):
                loss = mean_loss(run.model, *to_device(windows, run.device)).detach()
        total += torch.stack([loss, torch.ones_like(loss)]) * len(windows)
    if run.world > 1:
        dist.all_reduce(total)
    loss = (total[0] / total[1]).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"validation loss {loss} at step {run.step}: try a lower learning_rate")
    size, is_text = run.data.meta["val"], run.data.meta["tokenizer"] != "none"
    return loss, loss / math.log(2) * size["tokens"] / size["bytes"] if is_text else None


def save(run: Run, name: str) -> None:
    """Write the checkpoint out_dir/name; "last" with the optimizer's state."""
    if run.rank:
        return
    best = run.best if run.best < math.inf else None
    extra = {"step": run.step, "best_val_loss": best, "threads": torch.get_num_threads()} | recorded(run)
    optimizer = run.optimizer if name == "last" else None
    checkpoint.save_training(run.out / name, run.model, optimizer, extra, run.data.tokenizer_file)
    if name == "last" and run.out.name == "new":
        take_over(run.out.parent)
        run.out = run.out.parent


def write_metrics(run: Run, *lines: dict) -> None:
    if run.rank == 0:
        with naming(run.metrics), run.metrics.open("a") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)


def read_steps(run: Run, pending: list[Tensor], n_stop: int) -> tuple[list[float], list[float], bool]:
    """Losses and gradient norms of the steps that are not logged yet, and whether any process got a signal.

    This waits for the device. Raises FloatingPointError for what is not finite.
    """
    seen = torch.cat([torch.stack(pending).flatten(), torch.tensor([float(n_stop)], device=run.device)])
    if run.world > 1:
        dist.all_reduce(seen)
    *seen, stops = seen.tolist()
    losses, norms = [u / run.world for u in seen[::2]], [u / run.world for u in seen[1::2]]
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), run.step - len(pending) + 1):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            last = run.out / "last"
            where = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
            raise FloatingPointError(
                f"loss {loss}, gradient norm {norm} at step {step}: {where}; try a lower learning_rate"
            )
    return losses, norms, bool(stops)


@contextmanager
def signals(world: int) -> Iterator[list[int]]:
    """A list of the SIGINTs and SIGTERMs that came. A second one acts at once, but not where torchrun passes on what
    the terminal has sent already."""
    received, before = [], {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received.append(number)
        if world == 1:
            signal.signal(number, before[number])

    for s in before:
        signal.signal(s, note)
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def train(run: Run, received: list[int]) -> bool:
    """All steps, with logs, evaluations and checkpoints. Returns False if a signal ended them early."""
    cfg, terminal = run.cfg, sys.stderr.isatty()
    bar = tqdm(total=cfg.max_steps, initial=run.step, unit="step", disable=not (run.rank == 0 and terminal))
    pending, since = [], time.perf_counter()  # loss and gradient norm of each step, still on the device
    shape = None  # for which the model is compiled
    for step in range(run.step, cfg.max_steps):
        shape, before = run.batch(step)[:2], shape
        if run.compiles and shape != before and run.rank == 0:
            text = "compiling (with --compile=False, slower steps start at once)"
            bar.set_postfix_str(text) if terminal else print(text, flush=True)
        pending.append(train_step(run, step))
        run.step = done = step + 1
        bar.update()
        evaluating = done % cfg.eval_interval == 0 or done == cfg.max_steps
        if not (evaluating or done % cfg.log_interval == 0 or (received and run.world == 1)):
            continue  # nothing above waits for the device; once in a while, look at what came out

        losses, norms, stopping = read_steps(run, pending, len(received))
        T, _, n_local = run.batch(step)
        speed = len(pending) * n_local * run.world * T / (time.perf_counter() - since)
        first = done - len(pending) + 1
        write_metrics(run, *(
            {"step": k, "loss": loss, "grad_norm": norm, "lr": learning_rate(cfg, k - 1), "tokens_per_s": round(speed)}
            for k, (loss, norm) in enumerate(zip(losses, norms, strict=True), first)
        ))  # fmt: skip
        if run.model.config.n_expert:  # of the last forward pass
            ffns = [block.ffn for block in run.model.blocks]
            load = [[round(share, 4) for share in ffn.load.tolist()] for ffn in ffns]
            balance = sum(ffn.balance.item() for ffn in ffns) / len(ffns)
            write_metrics(run, {"step": done, "expert_balance": balance, "expert_load": load})
        if run.rank == 0:
            mfu = cost.estimate_mfu(run.model, speed / run.world)
            text = f"loss {losses[-1]:.4f}, {speed:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")
            bar.set_postfix_str(text)
            if not terminal:
                print(f"step {done}/{cfg.max_steps}: {text}", flush=True)
        pending.clear()
        names = ["last"] if evaluating or stopping else []
        if evaluating:
            val_loss, bpb = evaluate(run)
            write_metrics(run, {"step": done, "val_loss": val_loss, "val_bpb": bpb})
            if run.rank == 0:
                also = "" if bpb is None else f", {bpb:.4f} bits per byte"
                tqdm.write(f"step {done}: validation loss {val_loss:.4f}{also}")
            if val_loss < run.best:
                run.best = val_loss
                names.append("best")
        for name in names:
            save(run, name)
        if stopping and done < cfg.max_steps:
            break
        since = time.perf_counter()
    bar.close()
    return run.step == cfg.max_steps


def main(argv: list[str]) -> None:
    cfg, model_args = parse(argv, __doc__)
    check_folder(cfg)
    device, rank, world = start_process(cfg)
    data = open_data(cfg, rank, world)
    config, stages = configure(cfg, model_args, data)
    check_room(cfg, config, device, world)
    with run_folder(cfg, rank, world):
        run = start(cfg, config, stages, data, device, rank, world)
        with signals(world) as received:
            finished = train(run, received)
        if rank == 0 and finished:
            pictures.plot_loss(run.metrics, run.out / "loss.png")
            if cfg.sample_tokens:
                with torch.compiler.set_stance("force_eager"):  # the engine does not compile
                    sample.stream(sample.Engine(run.model), data.tokenizer, cfg.prompt, cfg.sample_tokens)
        elif rank == 0:
            print(f"stopped after step {run.step}: --resume continues from {run.out / 'last'}")
    if world > 1:
        dist.barrier()  # gloo may hang when one process leaves while another still talks
        dist.destroy_process_group()


if __name__ == "__main__":
    run("train.py", main, "--batch_size (and raise --grad_accum), --block_size, or --n_embd")
