"""
Measure models: python evaluate.py TASK --init_from=FOLDER [FOLDER ...] [--flag=value ...]

    python evaluate.py loss --init_from=out/tiny out/tiny_T        # by position, to 8 times the training length
    python evaluate.py loss --init_from=out/tiny --text=book.txt   # of any text
    python evaluate.py recall --init_from=out/recall_hymba out/recall_mamba    # accuracy against pairs and cache
    python evaluate.py needle --init_from=out/tiny                 # a fact in real text: depth against length
    python evaluate.py heads --init_from=out/tiny                  # what each block's attention and SSM heads are for
    python evaluate.py attention --init_from=out/tiny --text=a.py --text=b.md  # where attention goes; memory lengths
    python evaluate.py harness --init_from=out/tiny --tasks=piqa,lambada_openai   # needs: pip install lm_eval

FOLDER is what sample.py takes: a run's folder, a checkpoint, or the name of a model on huggingface.co. Text is the
validation split of the data set that the first model was trained on, unless --dataset or --text says otherwise. Each
task prints a table, and writes FOLDER_TASK.json and a picture FOLDER_TASK.png that compares the models, beside the
first folder.

Every task is a function of a model, which returns what stands in the JSON file. Letters are the ones of model.py.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

import json
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import cost
import harness
import ops
import pictures
import prepare
from engine import PREFILL, Engine
from files import check_folders, read_json
from flags import Parser, run
from model import Block, Hymba, linear_cross_entropy, windowed_attention
from sample import pick_device
from tokenizer import Tokenizer, encode_piece, tokenizer_of
from train import even_starts, to_device

TASKS = ("loss", "recall", "needle", "heads", "attention", "harness")
AT_ONCE = 16384  # tokens in one forward pass


def hidden(model: Hymba, idx: Tensor) -> Tensor:
    """Final states (B, T, C) of tokens idx (B, T). Matrix products are in bfloat16 on a GPU, as in training."""
    with torch.autocast(idx.device.type, torch.bfloat16, enabled=idx.is_cuda):
        return model.hidden(idx)


def batches(tokens: np.ndarray, T: int, n: int, title: str, record: int = 1) -> Iterator[np.ndarray]:
    """Up to n windows of T + 1 tokens, evenly spaced and disjoint, (b, T + 1) at a time. A bar shows how far it is."""
    if len(tokens) <= T:
        raise ValueError(
            f"the text has {len(tokens):,} tokens: too few for a window of {T:,} + 1, so give more or longer"
        )
    starts, size = even_starts(len(tokens), T, min(n, max(1, len(tokens) // (T + 1))), record), max(1, AT_ONCE // T)
    for i in tqdm(range(0, len(starts), size), desc=title, unit="batch", leave=False, disable=None):
        yield np.stack([tokens[s : s + T + 1] for s in starts[i : i + size]]).astype(np.int64)


def mean_and_error(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis, and its standard error (NaN of a single value)."""
    return x.mean(0), x.std(0, ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.full(x.shape[1:], math.nan)


# ----------------------------------------------------------------------------------------------------------------------
# Loss


@torch.no_grad()
def token_losses(model: Hymba, windows: np.ndarray) -> np.ndarray:
    """Loss in nats of each token but the first of windows (b, T + 1) -> (b, T), NaN where it is not to be predicted."""
    idx, targets = to_device(windows, model.embed.weight.device)
    losses = linear_cross_entropy(hidden(model, idx), model.output, targets, reduction="none").float()
    return losses.masked_fill(targets < 0, math.nan).cpu().numpy()


def mean_loss(model: Hymba, tokens: np.ndarray, length: int = 0, n_tokens: int = 2**18, record: int = 1) -> np.ndarray:
    """Mean loss in nats of each of n_tokens / length windows of tokens -> (windows,). length 0: block_size."""
    length = length or model.config.block_size
    n = max(1, n_tokens // length)
    return np.concatenate(
        [np.nanmean(token_losses(model, w), axis=1) for w in batches(tokens, length, n, "loss", record)]
    )


def loss(
    model: Hymba, tokens: np.ndarray, bytes_per_token: float = math.nan, length: int = 0, longest: int = 0,
    n_tokens: int = 2**18, record: int = 1,
) -> dict:  # fmt: skip
    """Loss in nats per token, perplexity and bits per byte over windows of `length` (0: block_size), and the loss by
    position in windows of `longest` (0: 8 times as long, or what the text has).

    positions are the numbers of tokens read (meta tokens not counted), in steps of a constant factor: entry i is the
    mean over edges[i] <= position < edges[i + 1]. Errors are standard errors over windows.
    """
    length = length or model.config.block_size
    windows = mean_loss(model, tokens, length, n_tokens, record)
    mean, error = (float(u) for u in mean_and_error(windows))
    result = {"length": length, "windows": len(windows), "loss": mean, "error": error, "perplexity": math.exp(mean)}
    result["bits_per_byte"] = mean / math.log(2) / bytes_per_token
    if record > 1:
        return result
    longest = min(longest or 8 * length, len(tokens) - 1)
    edges = np.unique(np.geomspace(1, longest + 1, 25).round().astype(int))
    sums = [
        np.add.reduceat(token_losses(model, w), edges[:-1] - 1, axis=1)
        for w in batches(tokens, longest, max(16, n_tokens // longest), "by position")
    ]
    mean, error = mean_and_error(np.concatenate(sums) / np.diff(edges))
    return result | {"edges": edges.tolist(), "by_position": mean.tolist(), "by_position_error": error.tolist()}


# ----------------------------------------------------------------------------------------------------------------------
# Recall


@torch.no_grad()
def recall(model: Hymba, tokens: np.ndarray, record: int, n: int = 2**30) -> dict:
    """Accuracy of the answers in n records of a data set of recall.py, by the number of pairs that a record gives, and
    the bytes of the cache that holds them. An answer is right if no other token of the vocabulary is likelier."""
    shares = {}  # of right answers in each record, by its number of pairs
    for windows in batches(tokens, record - 1, n, "recall", record):
        idx, targets = to_device(windows, model.embed.weight.device)
        asked = targets >= 0  # (b, T)
        x = hidden(model, idx)[asked].to(model.output.dtype)
        right = F.linear(x, model.output).argmax(-1) == targets[asked]
        for answers in right.split(asked.sum(1).tolist()):
            shares.setdefault(len(answers), []).append(answers.float().mean().item())
    pairs = {}
    for number in sorted(shares):
        accuracy, error = mean_and_error(np.array(shares[number]))
        pairs[str(number)] = {"accuracy": float(accuracy), "error": float(error)}
    mean = float(np.mean([u["accuracy"] for u in pairs.values()]))
    return {"pairs": pairs, "accuracy": mean, "cache_bytes": cost.cache_bytes(model.config, record - 1)}


# ----------------------------------------------------------------------------------------------------------------------
# Needle in a haystack


def codes(tokenizer: Tokenizer, rng: np.random.Generator, n: int, lead: str) -> np.ndarray:
    """n different codes of five digits behind `lead`, all of as many tokens -> (n, L)."""
    by_length = {}
    while True:
        code = tuple(encode_piece(tokenizer, f"{lead}{rng.integers(10_000, 100_000)}"))
        alike = by_length.setdefault(len(code), {})
        alike[code] = None
        if len(alike) == n:
            return np.array(list(alike))


@torch.no_grad()
def likelihoods(engine: Engine, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihoods (B, n) of n answers (B, n, L) to each of the prompts (B, T), and whether a greedy continuation
    would be that answer (B, n). The prompts are read once."""
    (B, T), L = prompts.shape, answers.shape[2]
    cache, step = engine.new_cache(B, T + L), max(1, PREFILL // B)
    for piece in prompts.split(step, dim=1):
        x = engine.hidden(piece, cache)[:, -1:]
    first, scores, greedy = F.linear(x, engine.model.output).float(), [], []  # (B, 1, V)
    for answer in answers.unbind(1):
        rest = engine.logits(answer[:, :-1], cache.map(Tensor.clone)).float() if L > 1 else first[:, :0]
        logits = torch.cat([first, rest], dim=1)  # (B, L, V)
        scores.append(logits.log_softmax(-1).gather(2, answer[..., None]).sum((1, 2)))
        greedy.append((logits.argmax(-1) == answer).all(1))
    return torch.stack(scores, 1), torch.stack(greedy, 1)


def needle(
    model: Hymba, tokenizer: Tokenizer, tokens: np.ndarray, lengths: list[int] | None = None,
    depths: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1), n: int = 16, fact: str = "The pass key is {}.",
    choices: int = 10,
) -> dict:  # fmt: skip
    """A code that is told once in real text and asked for at its end, n times for each length and depth.

    {} in the fact is the code, and the question is what stands before {}, again. lengths are tokens of text, fact,
    question and answer together (None: up to 4 times block_size). Depth 0 puts the fact first, and 1 puts it last.
    Results are matrices, depths by lengths: `greedy`, the share of codes that greedy decoding gives; `choice`, the
    share that is likelier than choices - 1 other codes, 1 / choices by chance; `loss`, nats of the right code.
    """
    engine, device, rng = Engine(model), model.embed.weight.device, np.random.default_rng(0)
    before, _, after = fact.partition("{}")
    lead = before[len(before.rstrip()) :]  # goes with the code: a space belongs to the token behind it
    question, end = (encode_piece(tokenizer, u) for u in ("\n" + before.rstrip(), after + "\n"))
    begin = tokenizer.encode_ordinary("")  # what begins every text, if anything
    answers = codes(tokenizer, rng, n * choices, lead).reshape(n, choices, -1)  # the first of each is the right one
    need = len(begin) + 2 * (len(question) + answers.shape[2]) + len(end)
    most = need + len(tokens) - 1
    usual = [int(model.config.block_size * share) for share in (0.25, 0.5, 1, 1.5, 2, 3, 4)]
    lengths = lengths or [length for length in usual if need <= length <= most]
    if not lengths or not need <= min(lengths) <= max(lengths) <= most:
        raise ValueError(f"--lengths: fact and question need {need} tokens at least, and there is text for {most:,}")
    result = {name: np.zeros((len(depths), len(lengths))) for name in ("greedy", "choice", "loss")}
    cells = [(i, j) for j in range(len(lengths)) for i in range(len(depths))]
    for i, j in tqdm(cells, desc="needle", unit="cell", leave=False, disable=None):
        prompts, room, size = [], lengths[j] - need, max(1, AT_ONCE // lengths[j])
        for answer in answers[:, 0].tolist():
            at, cut = rng.integers(len(tokens) - room), round(depths[i] * room)
            text = tokens[at : at + room].tolist()
            prompts.append([*begin, *text[:cut], *question, *answer, *end, *text[cut:], *question])
        pieces = (torch.tensor(np.array(u), device=device).split(size) for u in (prompts, answers))
        parts = [likelihoods(engine, *piece) for piece in zip(*pieces, strict=True)]
        scores, greedy = (torch.cat(u) for u in zip(*parts, strict=True))  # (n, choices)
        result["greedy"][i, j] = greedy[:, 0].float().mean()
        result["choice"][i, j] = (scores[:, 0] > scores[:, 1:].amax(1)).float().mean()
        result["loss"][i, j] = -scores[:, 0].mean()
    return {"lengths": lengths, "depths": list(depths), "n": n} | {k: v.tolist() for k, v in result.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Heads removed


@contextmanager
def removed(block: Block, kind: str) -> Iterator[None]:
    """In the with block, the attention ("attn") or SSM heads ("ssm") of a block give zeros. In a hybrid block, that is
    their normalised branch, before the two are fused; in another, the whole mixer."""
    mixer = block.mixer
    if mixer.attn is not None and mixer.ssm is not None:
        module, zeros = getattr(mixer, f"{kind}_branch_norm"), lambda _, args, y: torch.zeros_like(y)
    else:
        module, zeros = mixer, lambda _, args, out: (torch.zeros_like(out[0]), out[1])  # keys and values are handed on
    hook = module.register_forward_hook(zeros)
    try:
        yield
    finally:
        hook.remove()


def heads(model: Hymba, measure: Callable[[Hymba], float]) -> dict:
    """What the heads of one kind in one block are for: the change of measure(model), a loss or an accuracy, when they
    are removed (Hymba, Fig. 3). {"whole": measure of the whole model, "attn": a change for each block, "ssm": the
    same}, with None where a block has no such heads."""
    kinds, whole = ("attn", "ssm"), measure(model)
    result = {"whole": whole} | {kind: [None] * len(model.blocks) for kind in kinds}
    there = [(i, kind) for i, b in enumerate(model.blocks) for kind in kinds if getattr(b.mixer, kind) is not None]
    for i, kind in tqdm(there, desc="heads", leave=False, disable=None):
        with removed(model.blocks[i], kind):
            result[kind][i] = measure(model) - whole
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Attention and memory


class Watch:
    """A block's cache that keeps nothing. It sums up what it sees of the tokens of the text: where attention goes, the
    squares of the heads' outputs, and the steps dt of the SSM."""

    ssm = None, None

    def __init__(self, n_meta: int):
        self.M, self.seen, self.queries = n_meta, 0.0, 0
        self.squares, self.dt = {}, []

    def keep(self, tail: Tensor, state: Tensor) -> None:
        pass

    def attend(self, q: Tensor, kv: tuple[Tensor, Tensor], attn) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention as it is. Its probabilities are summed over heads and queries, for some queries at a time: those on
        each meta token, on the first token of the text, on the query's own, and on all others: seen (M + 3,)."""
        (B, T, H, E), M, k = q.shape, self.M, kv[0].float().repeat_interleave(q.shape[2] // kv[0].shape[2], dim=2)
        step, j = max(1, 2**24 // (B * H * T)), torch.arange(T, device=q.device)
        for first in range(M, T, step):
            i = j[first : first + step, None]
            scores = torch.einsum("bthe,bshe->bhts", q[:, first : first + step].float(), k) / math.sqrt(E)
            mask = (j <= i) & ((i - j < (attn.window or T)) | (j < M))
            p = scores.masked_fill(~mask, -math.inf).softmax(-1).sum((0, 1))  # (t, T)
            own = p.gather(1, i).sum()
            start = p[:, M].masked_fill(i[:, 0] == M, 0).sum()  # what the first token gives itself is its own
            meta = p[:, :M].sum(0)
            self.seen += torch.cat([meta, torch.stack([start, own, p.sum() - meta.sum() - start - own])])
        self.queries += B * H * (T - M)
        return windowed_attention(q, *kv, attn.window, attn.n_meta), kv

    def note_output(self, name: str, out: Tensor | tuple) -> None:
        y = (out[0] if isinstance(out, tuple) else out)[:, self.M :].float()
        total, n = self.squares.get(name, (0.0, 0))
        self.squares[name] = total + y.square().sum().item(), n + y.numel()

    def note_steps(self, dt: Tensor, bias: Tensor) -> None:
        """dt, the last channels of (B, T, ...), are still without their bias."""
        self.dt.append(F.softplus(dt[:, self.M :, -len(bias) :].float() + bias.float()).flatten(0, 1).mean(0))

    def lengths(self, A_log: Tensor) -> Tensor:
        """1 / (dt A) for each of the states of a block, in order: tokens in which exp(-m dt A) falls to 1 / e."""
        dt = torch.stack(self.dt).mean(0)  # (D,), or (heads,) where all channels of a head have one dt and one A
        return (1 / (dt[:, None] * torch.exp(A_log.float()).view(len(dt), -1))).flatten().sort().values


@contextmanager
def watching(model: Hymba) -> Iterator[list[Watch]]:
    """A Watch for each block, which sees all forward passes of the with block."""
    watches, hooks = [Watch(model.config.n_meta) for _ in model.blocks], []
    for watch, block in zip(watches, model.blocks, strict=True):
        give = partial(lambda watch, _, args, options: (args, options | {"cache": watch}), watch)
        hooks.append(block.register_forward_pre_hook(give, with_kwargs=True))
        for name in ("attn", "ssm", "attn_branch_norm", "ssm_branch_norm"):
            if (module := getattr(block.mixer, name, None)) is not None:
                note = partial(lambda watch, name, _, args, out: watch.note_output(name, out), watch, name)
                hooks.append(module.register_forward_hook(note))
        if ssm := block.mixer.ssm:
            note = partial(lambda watch, bias, _, args, out: watch.note_steps(out, bias), watch, ssm.dt_bias)
            source = getattr(ssm, "dt_proj", block.mixer.in_proj)  # Mamba-2 has dt last in the block's projection
            hooks.append(source.register_forward_hook(note))
    try:
        yield watches
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention(model: Hymba, tokens: np.ndarray, length: int = 0, n_tokens: int = 2**15) -> dict:
    """Over windows of `length` tokens (0: block_size), for each block, None where it has no such heads:

    - share: of attention on meta tokens, on the first token of the text, on the query's own and on all others, a mean
      over heads and queries, which are those of the text (Hymba, Fig. 7).
    - meta: the share on each meta token (Fig. 5).
    - attn, ssm: root mean square of the outputs of the heads (Fig. 12); attn_branch_norm, ssm_branch_norm: once normed.
    - memory: effective length of a state, the number of tokens m for which exp(-m dt A) = 1 / e, where dt is the mean
      of its channel's steps over the text. The mean of the block, and what 10, 50 and 90% of its states stay below.
    """
    length = length or model.config.block_size
    with watching(model) as watches:
        for windows in batches(tokens, length, max(1, n_tokens // length), "attention"):
            hidden(model, to_device(windows, model.embed.weight.device)[0])
    rows, M = [], model.config.n_meta
    for watch, block in zip(watches, model.blocks, strict=True):
        row = dict.fromkeys(["share", "meta", "attn", "ssm", "attn_branch_norm", "ssm_branch_norm", "memory"])
        row |= {name: (total / n) ** 0.5 for name, (total, n) in watch.squares.items()}
        if watch.queries:
            seen = (watch.seen / watch.queries).tolist()
            row["share"] = dict(zip(("meta", "first", "self", "others"), [sum(seen[:M]), *seen[M:]], strict=True))
            row["meta"] = seen[:M]
        if watch.dt:
            states = watch.lengths(block.mixer.ssm.A_log)
            row["memory"] = {"mean": states.mean().item()}
            row["memory"] |= {f"{p}%": states[int(len(states) * p / 100)].item() for p in (10, 50, 90)}
        rows.append(row)
    return {"length": length, "blocks": rows}


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def texts_of(args: Namespace, folder: Path, config: dict, tokenizer: Tokenizer | None) -> dict:
    """By name, what a model is measured on: tokens, bytes per token, and the length of a record (1: none). Those are
    --text, or else the validation split of --dataset, or else of the data set that the model was trained on."""
    texts = {}
    for path in args.text:
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        try:
            text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text: {e}") from None
        tokens = np.array(tokenizer.encode_ordinary(text), dtype=np.int64)
        texts[str(path)] = tokens, len(text.encode()) / max(1, len(tokens)), 1
    if texts:
        return texts
    trained = config.get("train") or {}
    name = args.dataset or trained.get("dataset")
    if not name:
        raise ValueError(f"{folder} does not say what it was trained on: pass --text=FILE or --dataset=NAME")
    command = trained.get("data_command", "") if name == trained.get("dataset") else ""
    data = Path(args.data_dir or trained.get("data_dir") or "data") / name
    tokens, meta = prepare.open_split(data, "val", command)
    if any(meta.get(key) != config.get(key) for key in ("tokenizer", "tokenizer_sha256")):
        raise ValueError(f"{data} has other tokens than {folder}: prepare it with that tokenizer, or pass --text=FILE")
    return {name: (tokens, meta["val"]["bytes"] / meta["val"]["tokens"], meta.get("record", 1))}


def open_inputs(args: Namespace, name: str) -> tuple[Path, Tokenizer | None, dict]:
    """A model's folder, its tokenizer if its tokens stand for text, and its texts. ValueError if the task cannot be
    done with them: the model is loaded afterwards."""
    folder = checkpoint.pretrained_folder(name, weights=False)
    config = read_json(folder / "config.json", may={"train": dict, "tokenizer": str, "tokenizer_sha256": str})
    tokenizer = None if config.get("tokenizer") == "none" else tokenizer_of(folder)
    if tokenizer is None and (args.text or args.task in ("needle", "harness")):
        raise ValueError(f"{folder}: its tokens stand for no text; use the tasks recall, loss, heads and attention")
    texts = {} if args.task == "harness" else texts_of(args, folder, config, tokenizer)
    need = args.length or checkpoint.read_config(folder)[2].block_size
    for text, (tokens, _, record) in texts.items():
        if args.task == "recall" and record == 1:
            raise ValueError(f"{text} is no data set of recall.py, whose --help says how to make one and train on it")
        if len(tokens) <= need and args.task != "needle":
            raise ValueError(f"{text} has {len(tokens):,} tokens, too few for windows of {need:,} + 1: lower --length")
    return folder, tokenizer, texts


def measure(args: Namespace, model: Hymba, tokenizer: Tokenizer | None, texts: dict) -> dict:
    """What a task of the command line says of a model."""
    tokens, _, record = next(iter(texts.values()), (None, 0, 1))
    n, length = args.tokens or {"recall": 2**30, "heads": 2**16, "attention": 2**15}.get(args.task, 2**18), args.length
    if args.task == "loss":
        return {"texts": {k: loss(model, u[0], u[1], length, args.longest, n, u[2]) for k, u in texts.items()}}
    if args.task == "recall":
        return recall(model, tokens, record, n // record + 1)
    if args.task == "needle":
        lengths = [int(u) for u in args.lengths.split(",")] if args.lengths else None
        return needle(model, tokenizer, tokens, lengths, n=args.trials, fact=args.needle)
    if args.task == "heads":
        result = {"loss": heads(model, lambda m: float(mean_loss(m, tokens, length, n, record).mean()))}
        if record > 1:
            result["recall"] = heads(model, lambda m: recall(m, tokens, record, n // record + 1)["accuracy"])
        return result
    if args.task == "attention":
        return {"texts": {k: attention(model, u[0], length, n) for k, u in texts.items()}}
    return {
        "tasks": harness.results(model, tokenizer, args.tasks.split(","), length, args.limit, args.shots, args.include)
    }


def check_arguments(args: Namespace, names: list[str]) -> None:
    """Raise ValueError for what can be seen to be wrong before any file is opened."""
    if not names:
        raise ValueError("give one model or more: --init_from=FOLDER [FOLDER ...]")
    if len(set(names)) < len(names):
        raise ValueError(f"--init_from names {next(n for n in names if names.count(n) > 1)} twice")
    for name, least in (("tokens", 0), ("length", 0), ("longest", 0), ("trials", 1), ("limit", 1), ("shots", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name}={value}: must be {least} or more")
    for path in args.text:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
    if args.task == "needle":
        if args.needle.count("{}") != 1 or not args.needle.partition("{}")[0].strip():
            raise ValueError("--needle: write {} where the code goes, once and behind some text")
        if args.lengths and not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", args.lengths):
            raise ValueError(f"--lengths={args.lengths}: write numbers with commas between them")
    if args.task == "harness":
        harness.check_installed()
        if not args.tasks:
            raise ValueError("the task harness needs names: --tasks=piqa,lambada_openai")
    if args.out:
        check_folders(args.out.parent)
        if args.out.is_dir() or args.out.suffix != ".json":
            raise ValueError(f"--out={args.out}: give the name of a .json file")


def main(argv: list[str]) -> None:
    parser = Parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("task", choices=TASKS, help="what to measure")
    add("more", nargs="*", metavar="FOLDER", help="more models")
    add("--init_from", help="folder, or name on huggingface.co")
    add("--out", type=Path, help="the JSON file; the picture has its name [beside the first folder]")
    add("--dataset", help="measure on its validation split [the data set that the model was trained on]")
    add("--data_dir", help="where data sets live [where it was, or data]")
    add(
        "--text", type=Path, action="append", default=[], help="measure on a text file or folder instead; several times"
    )
    add("--tokens", type=int, default=0, help="how many to read [as many as take about a minute]")
    add("--length", type=int, default=0, help="tokens of a window, or context of harness [the model's block_size]")
    add("--longest", type=int, default=0, help="loss: largest position [8 times --length]")
    add("--needle", default="The pass key is {}.", help="needle: the fact; {} is the code [The pass key is {}.]")
    add("--lengths", help="needle: numbers of tokens, with commas [up to 4 times block_size]")
    add("--trials", type=int, default=16, help="needle: for each length and depth [16]")
    add("--tasks", help="harness: names, with commas")
    add("--limit", type=int, help="harness: documents of each task [all]")
    add("--shots", type=int, help="harness: examples before each document [the task's own]")
    add("--include", help="harness: a folder with tasks of your own")
    add("--device", help="cuda, mps or cpu [the best there is]")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights [bfloat16 on cuda, else the checkpoint's]")
    add("--kernels", choices=["True", "False"], default="True", help="Triton kernels on a GPU [True]")
    args = parser.parse_intermixed_args(argv)
    names = [args.init_from, *args.more] if args.init_from else args.more
    check_arguments(args, names)
    inputs = {name: open_inputs(args, name) for name in names}
    if args.kernels == "False":
        ops.use_kernels(False)
    device, first = pick_device(args.device), Path(names[0])
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else None)
    beside = first.parent if first.exists() else Path()
    out, models = args.out or beside / f"{first.name}_{args.task}.json", {}
    for name, (folder, tokenizer, texts) in inputs.items():
        model = checkpoint.load(name, dtype and getattr(torch, dtype), device).eval()
        about = {"folder": str(folder), "pattern": model.config.pattern, "parameters": model.num_params()}
        models[name] = about | measure(args, model, tokenizer, texts)
        del model  # before the next one is loaded
    settings = {"task": args.task, "flags": argv, "device": str(device), "torch": torch.__version__}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(settings | {"models": models}, indent=1) + "\n")
    pictures.print_table([row for name, r in models.items() for row in pictures.rows_of(args.task, name, r)])
    pictures.draw(args.task, models, out.with_suffix(".png"))
    print(f"the results: {out}")


if __name__ == "__main__":
    run("evaluate.py", main, "--length, --longest or --lengths")
