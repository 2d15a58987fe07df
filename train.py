"""
Train a model: python train.py [config/NAME.py] [--flag=value ...]

    python train.py                                   # config/tiny.py: a small Hymba on Python's standard library
    python train.py config/hymba_125m.py --batch_size=8 --grad_accum=4
    python train.py config/tiny.py --pattern=TTTT --out_dir=out/tiny_T
    python train.py config/tiny.py --resume           # continue from out/tiny/last
    torchrun --nproc_per_node=4 train.py config/hymba_350m.py

A config file is Python that assigns flags; the command line overrides it. The flags are the fields of TrainConfig
below and of model.HymbaConfig. Everything random is a function of (seed, step), so that a resumed run repeats to the
bit what an uninterrupted one would have done. Ctrl-C and SIGTERM save a checkpoint and exit with 0.
"""

import argparse
import difflib
import json
import math
import os
import runpy
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import prepare
import sample
from model import Hymba, HymbaConfig


@dataclass
class TrainConfig:
    """All flags that are not the architecture's."""

    out_dir: str = ""  # checkpoints and metrics; empty: out/ and the config file's name
    resume: bool = False  # continue from out_dir/last
    overwrite: bool = False  # start anew although out_dir holds a checkpoint
    data_dir: str = "data"
    dataset: str = "python"
    anneal_dataset: str = ""  # data annealing: this data set is mixed in while the rate decays (Hymba, Sec. 2.5)
    anneal_mix: float = 0.5  # its share of the sequences then
    length_stages: str = ""  # length curriculum, "2048:9000,8192:1000": block_size:steps, tokens per step constant
    batch_size: int = 8  # sequences of block_size in one forward pass of one process
    grad_accum: int = 1  # such passes before each optimizer step
    max_steps: int = 1000
    schedule: str = "wsd"  # warmup-stable-decay, or cosine
    warmup_steps: int = 100
    decay_steps: int = 200  # of wsd: the last ones, linearly down to min_lr
    learning_rate: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # 0: off
    eval_interval: int = 250  # steps between evaluations, each followed by a checkpoint
    eval_windows: int = 64  # validation sequences, the same each time
    log_interval: int = 10
    device: str = ""  # empty: cuda, else mps, else cpu
    compile: bool = True  # torch.compile, on CUDA only
    seed: int = 1337
    prompt: str = "def "  # of the sample at the end; empty: none
    sample_tokens: int = 300

    def __post_init__(self):
        if self.schedule not in ("wsd", "cosine"):
            raise ValueError(f"schedule='{self.schedule}': use wsd or cosine")
        for name in ("batch_size", "grad_accum", "max_steps", "eval_interval", "eval_windows", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("grad_clip", "warmup_steps", "decay_steps", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.min_lr <= self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} must lie between 0 and learning_rate={self.learning_rate}")
        if not 0 <= self.anneal_mix <= 1:
            raise ValueError(f"anneal_mix={self.anneal_mix}: must lie between 0 and 1")


def parse(argv: list[str]) -> tuple[TrainConfig, dict]:
    """Flags from a config file and the command line: the training configuration and the HymbaConfig arguments.

    Raises ValueError for an unknown flag or a value of the wrong type, naming what was meant.
    """
    flags = {f.name: f for f in [*fields(TrainConfig), *fields(HymbaConfig)]}
    types = {"int": int, "float": float, "str": str, "bool": bool} | {t: t for t in (int, float, str, bool)}
    parser = argparse.ArgumentParser(
        "train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default=str(Path(__file__).parent / "config" / "tiny.py"))
    for f in flags.values():
        parser.add_argument(
            f"--{f.name}", nargs="?", const="True", metavar=types[f.type].__name__, help=f"[{f.default}]"
        )
    known, unknown = parser.parse_known_args(argv)
    given = {name: value for name, value in vars(known).items() if name != "config" and value is not None}
    if not Path(known.config).is_file():
        choices = ", ".join(sorted(str(p) for p in Path("config").glob("*.py")))
        raise ValueError(f"no config file {known.config}; there are {choices or 'none in config/'}")
    values = {k: v for k, v in runpy.run_path(known.config).items() if not k.startswith("_")}
    for name in [*values, *(arg.split("=")[0].lstrip("-") for arg in unknown)]:
        if name not in flags:
            close = difflib.get_close_matches(name, flags, 1)
            hint = f"did you mean {close[0]}?" if close else "python train.py --help lists all flags"
            raise ValueError(f"unknown flag '{name}': {hint}")
    if "pattern" in given or "n_layer" in given:  # whichever is given replaces both of the file's
        values.pop("pattern", None), values.pop("n_layer", None)
    for name, value in (values | given).items():
        kind = types[flags[name].type]
        try:
            if kind is bool and value not in (True, False, "True", "False"):
                raise ValueError
            if not isinstance(value, str) and type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError
            values[name] = str(value) == "True" if kind is bool else kind(value)
        except ValueError:
            raise ValueError(f"{name}={value!r}: must be {kind.__name__}") from None
    values.setdefault("out_dir", f"out/{Path(known.config).stem}")
    names = {f.name for f in fields(TrainConfig)}
    train = TrainConfig(**{k: v for k, v in values.items() if k in names})
    return train, {k: v for k, v in values.items() if k not in names}


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """The rate of a step (0, 1, ...): linear warmup, then constant and linear decay (wsd), or a half cosine."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    span = (
        cfg.max_steps - cfg.warmup_steps
        if cfg.schedule == "cosine"
        else min(cfg.decay_steps, cfg.max_steps - cfg.warmup_steps)
    )
    left = min(1.0, (cfg.max_steps - step) / max(1, span))  # 1 before the decay, then down towards 0
    share = 0.5 - 0.5 * math.cos(math.pi * left) if cfg.schedule == "cosine" else left
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)


def parse_stages(cfg: TrainConfig, block_size: int) -> list[tuple[int, int]]:
    """[(first step, block_size)] of the length curriculum; one stage if there is none."""
    if not cfg.length_stages:
        return [(0, block_size)]
    try:
        stages = [tuple(map(int, stage.split(":"))) for stage in cfg.length_stages.split(",")]
        lengths, steps = zip(*stages, strict=True)
    except ValueError:
        raise ValueError(f"length_stages='{cfg.length_stages}': write length:steps,length:steps") from None
    if sum(steps) != cfg.max_steps:
        raise ValueError(f"length_stages='{cfg.length_stages}' is {sum(steps)} steps, but max_steps={cfg.max_steps}")
    per_step = cfg.batch_size * cfg.grad_accum * lengths[0]
    for length in lengths:
        if length < 1 or per_step % length or (per_step // length) % max(1, cfg.batch_size * lengths[0] // length):
            raise ValueError(f"length_stages: {per_step} tokens a step do not divide into sequences of {length}")
    return [(sum(steps[:i]), length) for i, length in enumerate(lengths)]


def draw(sets: list[np.ndarray], mix: float, seed: tuple[int, ...], n: int, T: int) -> np.ndarray:
    """n random windows of T + 1 tokens (n, T + 1), each from sets[1] with probability mix: a function of seed."""
    rng = np.random.default_rng(seed)
    which, where = rng.random(n) < mix, rng.random(n)
    windows = []
    for second, u in zip(which, where, strict=True):
        data = sets[int(second)]
        start = int(u * (len(data) - T))
        windows.append(data[start : start + T + 1])
    return np.stack(windows).astype(np.int64)


def optimizer_for(model: Hymba, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear layers alone.

    Not on norms, biases, A_log and D: they are scales, for which zero is no neutral value. Not on embeddings and
    meta tokens: a rare token's row would shrink at every step and grow only when it is seen, and small rows make the
    first norm's gradients large.
    """
    decay = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("proj.weight")]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)


def save_checkpoint(folder: Path, model: Hymba, optimizer, extra: dict, tokenizer_file: Path) -> None:
    """Write a checkpoint beside folder and rename it into place: wherever this stops, a whole one is left."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new, **extra)
        if optimizer is not None:
            names = {p: name for name, p in model.named_parameters()}
            state = {f"{names[p]}.{k}": v for p, s in optimizer.state.items() for k, v in s.items()}
            save_file(state, new / "optimizer.safetensors")
        if tokenizer_file.is_file():
            shutil.copy(tokenizer_file, new)
    except SafetensorError as e:  # a full disk, say
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"cannot write {folder}: {e}") from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, model: Hymba, optimizer, tokenizer: str, tokenizer_file: Path) -> dict:
    """Load weights and optimizer state in place; returns config.json.

    ValueError for a checkpoint of another architecture or tokenizer.
    """
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # the machine stopped between save_checkpoint's two renames
        old.rename(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"nothing to resume: {folder} holds no checkpoint; leave --resume out to start one")
    extra = json.loads((folder / "config.json").read_text())
    mine, theirs = asdict(model.config), asdict(HymbaConfig(**extra["model"]))
    differ = [k for k in mine if mine[k] != theirs[k] and k not in ("block_size", "kernels")]
    if differ:
        changes = ", ".join(f"{k}={theirs[k]!r} there and {mine[k]!r} here" for k in differ)
        raise ValueError(f"{folder} is a checkpoint of another architecture: {changes}")
    ranks = [f.read_bytes() if f.is_file() else b"" for f in (tokenizer_file, folder / tokenizer_file.name)]
    if extra["tokenizer"] != tokenizer or ranks[0] != ranks[1]:
        raise ValueError(f"{folder} was trained with another tokenizer ({extra['tokenizer']}) than this data set's")
    model.load_state_dict(Hymba.from_pretrained(folder).state_dict())
    try:
        state = load_file(folder / "optimizer.safetensors")
    except (SafetensorError, FileNotFoundError) as e:
        raise ValueError(f"{folder / 'optimizer.safetensors'} is corrupt: {e}") from None
    for name, p in model.named_parameters():  # copies: the file is mapped, and about to be replaced
        s = {k: state[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {k: v.to(p.device if k != "step" or p.is_cuda else "cpu", copy=True) for k, v in s.items()}
    return extra


def plot_loss(metrics: Path, picture: Path) -> None:
    """Training and validation loss against the step, from the JSON lines."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no loss.png: pip install matplotlib to get one")
        return
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    plt.figure(figsize=(7, 4))
    for key, style in [("loss", {"lw": 0.7}), ("val_loss", {"marker": "o"})]:
        points = [(line["step"], line[key]) for line in lines if key in line]
        plt.plot(*zip(*points, strict=True), label=key, **style)
    plt.xlabel("step"), plt.ylabel("nats per token"), plt.legend(), plt.grid(alpha=0.3), plt.tight_layout()
    plt.savefig(picture, dpi=120)
    plt.close()


def main(argv: list[str]) -> None:
    cfg, model_args = parse(argv)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = sample.pick_device(cfg.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    main_process = rank == 0

    # Data, and everything that could be wrong with the flags, before any time is spent
    folder = Path(cfg.data_dir) / cfg.dataset
    if cfg.dataset == "python" and not folder.exists() and main_process:
        prepare.prepare(["python"], data_dir=cfg.data_dir)
    if world > 1:
        dist.barrier()
    (train_data, meta), (val_data, _) = (prepare.open_split(folder, split) for split in ("train", "val"))
    sets = [train_data]
    if cfg.anneal_dataset:
        second, second_meta = prepare.open_split(Path(cfg.data_dir) / cfg.anneal_dataset, "train")
        ranks = [Path(cfg.data_dir) / name / "tokenizer.tiktoken" for name in (cfg.dataset, cfg.anneal_dataset)]
        ranks = [f.read_bytes() if f.is_file() else b"" for f in ranks]
        if meta["tokenizer"] != second_meta["tokenizer"] or ranks[0] != ranks[1]:
            raise ValueError(f"{cfg.dataset} and {cfg.anneal_dataset} have different tokenizers: prepare both alike")
        sets.append(second)
    vocab = meta["vocab_size"]
    model_args.setdefault("vocab_size", -(-vocab // 64) * 64)  # rounded up: GPUs like multiples of 64
    if model_args["vocab_size"] < vocab:
        raise ValueError(
            f"vocab_size={model_args['vocab_size']} is too small for data set {cfg.dataset}: it has {vocab}"
        )
    config = HymbaConfig(**model_args)
    stages = parse_stages(cfg, config.block_size)
    config.block_size = stages[0][1]
    longest = max(length for _, length in stages)
    for name, data in [("train", train_data), ("val", val_data), ("anneal", sets[-1])]:
        if len(data) <= longest:
            raise ValueError(f"the {name} data has {len(data)} tokens: too few for sequences of {longest} + 1")
    out = Path(cfg.out_dir)
    last = out / "last"
    if (last.exists() or (out / "last.old").exists()) and not cfg.resume and not cfg.overwrite:
        raise ValueError(
            f"{out} holds a run: --resume continues it, --overwrite replaces it, or pass another --out_dir"
        )
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(cfg.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model = Hymba(config).to(device)
    need = 32 * model.num_params()  # last (weights and two moments) and best, each twice while it is replaced
    if (free := shutil.disk_usage(out).free) < need:
        raise ValueError(f"{out} has {free / 1e6:.0f} MB free, but checkpoints need {need / 1e6:.0f} MB")
    optimizer = optimizer_for(model, cfg)
    start, best, metrics = 0, math.inf, out / "metrics.jsonl"
    if cfg.resume:
        extra = load_checkpoint(last, model, optimizer, meta["tokenizer"], folder / "tokenizer.tiktoken")
        start, best = extra["step"], extra["best_val_loss"] or math.inf
        if start >= cfg.max_steps:
            raise ValueError(f"{last} is at step {start} of {cfg.max_steps}: raise --max_steps to go on")
        quiet = ("resume", "overwrite", "out_dir", "data_dir", "device", "prompt", "sample_tokens", "max_steps")
        changed = [k for k, v in asdict(cfg).items() if extra["train"].get(k) != v and k not in quiet]
        if changed and main_process:
            print(f"going on with other values of {', '.join(changed)} than {last} was trained with")
    if main_process:
        for name in ("last", "best") if cfg.overwrite and not cfg.resume else ():
            shutil.rmtree(out / name, ignore_errors=True)
        lines = metrics.read_text().splitlines(keepends=True) if cfg.resume and metrics.exists() else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start]  # whole lines
        metrics.with_suffix(".new").write_text("".join(kept))
        metrics.with_suffix(".new").replace(metrics)
        size = f"{model.num_params():,} parameters, {model.flops_per_token() / 1e6:,.0f} MFLOP a token"
        where = f"{device} x {world}" if world > 1 else f"{device}"
        print(f"{config.pattern}: {size}, {len(train_data):,} training tokens, on {where}", flush=True)

    step_model = torch.compile(model) if cfg.compile and device.type == "cuda" else model
    if world > 1:
        step_model = DistributedDataParallel(step_model, device_ids=[device.index] if device.type == "cuda" else None)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def loss_of(windows: np.ndarray) -> torch.Tensor:
        windows = torch.from_numpy(windows).to(device, non_blocking=True)
        with autocast:
            return step_model(windows[:, :-1], windows[:, 1:])[1]

    @torch.no_grad()
    def evaluate(T: int, micro: int) -> tuple[float, float]:
        """Validation loss in nats per token and in bits per byte, over evenly spaced windows of T, micro at a time."""
        starts = np.linspace(0, len(val_data) - T - 1, cfg.eval_windows).astype(int)[rank::world]
        total = torch.zeros(2, device=device)
        for i in range(0, len(starts), micro):
            windows = np.stack([val_data[s : s + T + 1] for s in starts[i : i + micro]]).astype(np.int64)
            total += torch.tensor([loss_of(windows).item() * len(windows), len(windows)], device=device)
        if world > 1:
            dist.all_reduce(total)
        loss = (total[0] / total[1]).item()
        return loss, loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]

    def save(name: str, done: int) -> None:
        extra = {"step": done, "best_val_loss": best if best < math.inf else None, "train": asdict(cfg)}
        extra |= {"tokenizer": meta["tokenizer"]}
        if main_process:
            optimizer_or_none = optimizer if name == "last" else None
            save_checkpoint(out / name, model, optimizer_or_none, extra, folder / "tokenizer.tiktoken")

    stop = []  # signals received; a second one acts at once
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: (stop.append(number), signal.signal(number, before[number])))

    terminal = sys.stderr.isatty()
    bar = tqdm(total=cfg.max_steps, initial=start, unit="step", disable=not (main_process and terminal))
    pending, since = [], time.perf_counter()  # (step, loss and gradient norm on the device) not logged yet
    for step in range(start, cfg.max_steps):
        config.block_size = T = next(length for first, length in reversed(stages) if step >= first)
        micro = max(1, cfg.batch_size * stages[0][1] // T)
        n_local = cfg.batch_size * cfg.grad_accum * stages[0][1] // T  # sequences a step in this process
        decaying = cfg.anneal_dataset and step >= cfg.max_steps - cfg.decay_steps
        windows = draw(sets, cfg.anneal_mix if decaying else 0.0, (cfg.seed, step), n_local * world, T)
        pieces = np.split(windows[rank * n_local : (rank + 1) * n_local], n_local // micro)
        loss = torch.zeros((), device=device)
        for i, piece in enumerate(pieces):
            sync = nullcontext() if world == 1 or i == len(pieces) - 1 else step_model.no_sync()
            with sync:
                piece_loss = loss_of(piece) / len(pieces)
                piece_loss.backward()
            loss += piece_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pending.append(torch.stack([loss, norm.to(device)]))
        done = step + 1
        bar.update()

        # Nothing above waits for the device; once in a while, look at what came out
        evaluating = done % cfg.eval_interval == 0 or done == cfg.max_steps
        if not (evaluating or done % cfg.log_interval == 0 or (stop and world == 1)):
            continue
        seen = torch.cat([torch.stack(pending).flatten(), torch.tensor([float(len(stop))], device=device)])
        if world > 1:
            dist.all_reduce(seen)
        *seen, stops = seen.tolist()
        losses, norms = [u / world for u in seen[::2]], [u / world for u in seen[1::2]]
        speed = len(pending) * n_local * world * T / (time.perf_counter() - since)
        for k, (u, v) in enumerate(zip(losses, norms, strict=True), done - len(pending) + 1):
            if not (math.isfinite(u) and math.isfinite(v)):
                where = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
                raise FloatingPointError(f"loss {u}, gradient norm {v} at step {k}: {where}; try a lower learning_rate")
        if main_process:
            lines = [
                {"step": k, "loss": u, "grad_norm": v, "lr": learning_rate(cfg, k - 1), "tokens_per_s": round(speed)}
                for k, (u, v) in enumerate(zip(losses, norms, strict=True), done - len(pending) + 1)
            ]
            with metrics.open("a") as f:
                f.writelines(json.dumps(line) + "\n" for line in lines)
            mfu = model.estimate_mfu(speed / world)
            text = f"loss {losses[-1]:.4f}, {speed:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")
            bar.set_postfix_str(text)
            if not terminal:
                print(f"step {done}/{cfg.max_steps}: {text}", flush=True)
        pending.clear()
        if evaluating:
            val_loss, bpb = evaluate(T, micro)
            if not math.isfinite(val_loss):
                raise FloatingPointError(f"validation loss {val_loss} at step {done}: try a lower learning_rate")
            if main_process:
                with metrics.open("a") as f:
                    f.write(json.dumps({"step": done, "val_loss": val_loss, "val_bpb": bpb}) + "\n")
                tqdm.write(f"step {done}: validation loss {val_loss:.4f}, {bpb:.4f} bits per byte")
        if evaluating or stops:
            improved = evaluating and val_loss < best
            best = val_loss if improved else best
            for name in ["last"] + ["best"] * improved:
                save(name, done)
        if stops and done < cfg.max_steps:
            bar.close()
            if main_process:
                print(f"stopped after step {done}: --resume continues from {last}")
            break
        since = time.perf_counter()
    else:
        bar.close()
        for s, handler in before.items():
            signal.signal(s, handler)
        if main_process:
            plot_loss(metrics, out / "loss.png")
            if cfg.prompt:
                sample.stream(model, prepare.load_tokenizer(meta["tokenizer"], folder), cfg.prompt, cfg.sample_tokens)
    if world > 1:
        dist.barrier()  # gloo may hang when one process leaves while another still talks
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character of the sample shows ?
    try:
        main(sys.argv[1:])
    except (ValueError, FloatingPointError, OSError) as e:
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
