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
validation split of the data set that a model was trained on, unless --dataset or --text says otherwise. Each
task prints a table, and writes FOLDER_TASK.json and a picture FOLDER_TASK.png that compares the models, beside the
first folder (FOLDER_TASK_2 if these are there).

Every task is a function of a model, which returns what stands in the JSON file. Letters are the ones of model.py.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

import itertools
import json
import math
import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from engine import PREFILL, Engine, final_states
from files import check_folders, naming, read_json, writing_file
from flags import Parser, run
from hooks import removed, watching
from model import Hymba, linear_cross_entropy
from sample import pick_device
from tokenizer import Tokenizer, encode_piece, tokenizer_of
from training import even_starts, to_device

NO_RECORDS = "no data set of recall.py, whose --help says how to train on one"
TASKS = ("loss", "recall", "needle", "heads", "attention", "harness")
READ_BY = {"length": ("loss", "heads", "attention", "harness"), "tokens": ("loss", "recall", "heads", "attention")}
READ_BY |= {"longest": ("loss",)} | dict.fromkeys(("needle", "lengths", "trials"), ("needle",))
READ_BY |= dict.fromkeys(("tasks", "limit", "shots", "include"), ("harness",))
READ_BY |= dict.fromkeys(("text", "dataset", "data_dir"), TASKS[:-1])  # the harness has texts of its own


@dataclass
class Text:
    """What a model is measured on."""

    tokens: np.ndarray  # (n,); a token t that is not to be predicted is ~t
    bytes_per_token: float | None = None
    record: int = 1  # windows begin at its multiples, and are as long if it is more than 1
    begin: tuple[int, ...] = ()  # tokens of some released models that begin every window


def open_text(folder: Path | str, split: str = "val", command: str = "") -> tuple[Text, dict]:
    """A split of a data set, and its meta.json. Raises what prepare.open_split raises."""
    tokens, meta = prepare.open_split(folder, split, command)
    bytes_per_token = meta[split]["bytes"] / meta[split]["tokens"] if meta["tokenizer"] != "none" else None
    return Text(tokens, bytes_per_token, meta.get("record", 1)), meta


def read_text(path: Path, tokenizer: Tokenizer) -> Text:
    """A text file, or all text files of a folder but hidden ones. Raises OSError, or ValueError if the file is not
    UTF-8."""
    parts = []
    shown = lambda file: not any(part.startswith(".") for part in file.relative_to(path).parts)  # noqa: E731
    for file in sorted(f for f in path.rglob("*") if f.is_file() and shown(f)) if path.is_dir() else [path]:
        try:
            parts.append(file.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as e:
            if not path.is_dir():  # a folder may have other files, too
                raise ValueError(f"{path} is not UTF-8 text: {e}") from None
    text = "\n".join(parts)
    tokens = np.array(encode_piece(tokenizer, text), dtype=np.int64)
    return Text(tokens, len(text.encode()) / max(1, len(tokens)), begin=tuple(tokenizer.encode_ordinary("")))


def window(model: Hymba, text: Text, length: int = 0) -> int:
    """Tokens of a window: the length that was asked for, or else block_size; of records, what they have."""
    return text.record - 1 if text.record > 1 else length or model.config.block_size


def batches(model: Hymba, text: Text, length: int, n_tokens: int, title: str) -> Iterator[np.ndarray]:
    """About n_tokens in windows of T + 1 tokens, evenly spaced and disjoint -> (b, T + 1) at a time, and a bar.
    Raises ValueError if the text is too short."""
    T = window(model, text, length)
    if len(text.tokens) <= T:
        raise ValueError(f"{len(text.tokens):,} tokens of text are too few for a window of {T:,} + 1: use shorter ones")
    n, new = max(1, min(n_tokens // T, len(text.tokens) // (T + 1))), T + 1 - len(text.begin)
    starts, size = even_starts(len(text.tokens), T, n, text.record), max(1, PREFILL // T)
    begin = np.array(text.begin, np.int64)
    for i in tqdm(range(0, n, size), desc=title, unit="batch", leave=False, disable=None):
        yield np.stack([np.concatenate([begin, text.tokens[s : s + new]]) for s in starts[i : i + size]])


def mean_and_error(x: np.ndarray) -> tuple[float | list, float | list | None]:
    """Mean over the first axis of x, and its standard error (None of a single value)."""
    return x.mean(0).tolist(), (x.std(0, ddof=1) / len(x) ** 0.5).tolist() if len(x) > 1 else None


# ----------------------------------------------------------------------------------------------------------------------
# Loss


@torch.no_grad()
def token_losses(model: Hymba, windows: np.ndarray) -> np.ndarray:
    """Loss in nats of each token but the first of windows (b, T + 1) -> (b, T), NaN where it is not to be predicted."""
    idx, targets = to_device(windows, model.embed.weight.device)
    losses = linear_cross_entropy(final_states(model, idx), model.output, targets, reduction="none").float()
    return losses.masked_fill(targets < 0, math.nan).cpu().numpy()


def losses(model: Hymba, text: Text, length: int = 0, n_tokens: int = 2**18, title: str = "loss") -> np.ndarray:
    """Loss in nats of each token in windows of the text -> (windows, T), NaN where it is not to be predicted."""
    return np.concatenate([token_losses(model, w) for w in batches(model, text, length, n_tokens, title)])


def loss(model: Hymba, text: Text, length: int = 0, longest: int = 0, n_tokens: int = 2**18) -> dict:
    """Loss in nats per token, perplexity and bits per byte over windows of `length` (0: block_size), and the loss by
    position: up to length in these windows, and beyond in windows of `longest` (0: 8 times as long, or as the text).

    A position is the number of tokens read, meta tokens not counted. Entry i is the mean over edges[i] <= position <
    edges[i + 1], which grow by a constant factor. Errors are standard errors over windows. Raises ValueError if the
    text is too short for length or longest.
    """
    near, T = losses(model, text, length, n_tokens), window(model, text, length)
    mean, error = mean_and_error(np.nanmean(near, axis=1))
    bits = text.bytes_per_token and mean / math.log(2) / text.bytes_per_token
    result = {"length": T, "windows": len(near), "loss": mean, "error": error, "bits_per_byte": bits}
    result |= {"perplexity": math.exp(mean), "edges": [1], "by_position": [], "by_position_error": []}
    longest = longest or min(8 * T, len(text.tokens) - 1)
    parts = [(near, 1, T + 1)] if text.record == 1 else []
    if parts and longest > T:
        far = losses(model, text, longest, n_tokens, "by position")
        parts.append((far, T + 1, longest + 1))
    for rows, first, last in parts:
        edges = np.unique(np.geomspace(first, last, math.ceil(3 * math.log2(last / first)) + 1).round().astype(int))
        means, errors = mean_and_error(np.add.reduceat(rows, edges[:-1] - 1, axis=1) / np.diff(edges))
        result["edges"] += edges[1:].tolist()
        result["by_position"] += means
        result["by_position_error"] += errors or [None] * len(means)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Recall


@torch.no_grad()
def recall(model: Hymba, text: Text, n_tokens: int = 2**30) -> dict:
    """Accuracy of the answers in records of a data set of recall.py, by the number of pairs that a record gives, and
    the bytes of the cache that holds them. An answer is right if no other token of the vocabulary is likelier. Raises
    ValueError for other texts."""
    if text.record == 1:
        raise ValueError(f"the text is {NO_RECORDS}")
    shares = {}  # of right answers in each record, by its number of pairs
    for windows in batches(model, text, 0, n_tokens, "recall"):
        idx, targets = to_device(windows, model.embed.weight.device)
        asked = targets >= 0  # (b, T)
        x = final_states(model, idx)[asked].float()  # in bfloat16, many logits would be equal
        right = F.linear(x, model.output.float()).argmax(-1) == targets[asked]
        n_pairs = asked.int().argmax(1) // 2  # the first answer comes behind the pairs
        for n, answers in zip(n_pairs.tolist(), right.split(asked.sum(1).tolist()), strict=True):
            shares.setdefault(n, []).append(answers.float().mean().item())
    pairs = {
        str(n): dict(zip(("accuracy", "error"), mean_and_error(np.array(u)), strict=True))
        for n, u in sorted(shares.items())
    }
    mean = float(np.mean([u["accuracy"] for u in pairs.values()]))
    return {"pairs": pairs, "accuracy": mean, "cache_bytes": cost.cache_bytes(model.config, text.record - 1)}


# ----------------------------------------------------------------------------------------------------------------------
# Needle in a haystack


def codes(tokenizer: Tokenizer, rng: np.random.Generator, n: int, lead: str) -> np.ndarray:
    """n different codes of five digits behind `lead`, all of as many tokens -> (n, L). Raises ValueError if there are
    not as many."""
    by_length = {}
    for _ in range(100 * n):
        code = tuple(encode_piece(tokenizer, f"{lead}{rng.integers(10_000, 100_000)}"))
        alike = by_length.setdefault(len(code), {})
        alike[code] = None
        if len(alike) == n:
            return np.array(list(alike))
    raise ValueError("--needle: this tokenizer has the same tokens for many numbers, so codes cannot be told apart")


@torch.no_grad()
def likelihoods(engine: Engine, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihoods (B, n) of n answers (B, n, L) to each of the prompts (B, T), and whether a greedy continuation
    would be that answer (B, n). The prompts are read once."""
    (B, T), L, output = prompts.shape, answers.shape[2], engine.model.output.float()
    cache, step, scores, greedy = engine.new_cache(B, T + L), max(1, PREFILL // B), [], []
    for piece in prompts.split(step, dim=1):
        x = engine.hidden(piece, cache)[:, -1:]  # (B, 1, C)
    for answer in answers.unbind(1):
        rest = engine.hidden(answer[:, :-1], cache.map(Tensor.clone)) if L > 1 else x[:, :0]
        logits = F.linear(torch.cat([x, rest], dim=1).float(), output)  # (B, L, V); in bfloat16, many would be equal
        scores.append(logits.log_softmax(-1).gather(2, answer[..., None]).sum((1, 2)))
        greedy.append((logits.argmax(-1) == answer).all(1))
    return torch.stack(scores, 1), torch.stack(greedy, 1)


def needle_tokens(
    tokenizer: Tokenizer, fact: str, rng: np.random.Generator
) -> tuple[list[int], list[int], np.ndarray, int]:
    """Tokens of the question, of what ends the fact behind its code, and of a thousand codes (1000, L); and how many a
    prompt has beside the text, its answer included."""
    before, _, after = fact.partition("{}")
    lead = before[len(before.rstrip()) :]  # goes with the code: a space belongs to the token behind it
    question, end = (encode_piece(tokenizer, u) for u in ("\n" + before.rstrip(), after + "\n"))
    pool = codes(tokenizer, rng, 1000, lead)
    return question, end, pool, len(tokenizer.encode_ordinary("")) + 2 * (len(question) + pool.shape[1]) + len(end)


def needle_lengths(text: Text, lengths: list[int] | None, need: int, block_size: int) -> list[int]:
    """The lengths that can be had of the text, where `need` tokens are fact, question and answer: those asked for, or
    up to 4 times block_size. Raises ValueError if one is too short for these, or the text is for it."""
    most = need + len(text.tokens) - 1
    usual = [int(block_size * share) for share in (0.25, 0.5, 1, 1.5, 2, 3, 4)]
    lengths = list(dict.fromkeys(lengths)) if lengths else [length for length in usual if need <= length <= most]
    if not lengths or not need <= min(lengths) <= max(lengths) <= most:
        raise ValueError(f"--lengths: fact and question need {need} tokens at least, and there is text for {most:,}")
    return lengths


def needle(
    model: Hymba, tokenizer: Tokenizer, text: Text, lengths: list[int] | None = None,
    depths: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1), n: int = 16, fact: str = "The pass key is {}.",
    choices: int = 10,
) -> dict:  # fmt: skip
    """A code that is told once in real text and asked for at its end, n times for each length and depth (pass keys:
    Mohtashami and Jaggi, https://arxiv.org/abs/2305.16300; retrieval: Bae et al., https://arxiv.org/abs/2510.04800).

    {} in the fact is the code, and the question is what stands before {}, again. lengths are tokens of text, fact,
    question and answer together (None: up to 4 times block_size). Depth 0 puts the fact first, and 1 puts it last.
    Results are matrices, depths by lengths: `greedy`, the share of codes that greedy decoding gives; `choice`, the
    share that is likelier than choices - 1 other codes, 1 / choices by chance; `loss`, nats of the right code. Raises
    ValueError if a length or the text is too short, or the tokenizer cannot tell codes apart.
    """
    engine, device, rng = Engine(model), model.embed.weight.device, np.random.default_rng(0)
    question, end, pool, need = needle_tokens(tokenizer, fact, rng)
    lengths = needle_lengths(text, lengths, need, model.config.block_size)
    begin = tokenizer.encode_ordinary("")  # what begins every text, if anything
    result = {name: np.zeros((len(depths), len(lengths))) for name in ("greedy", "choice", "loss")}
    cells = [(i, j) for j in range(len(lengths)) for i in range(len(depths))]
    for i, j in tqdm(cells, desc="needle", unit="cell", leave=False, disable=None):
        prompts, room, size = [], lengths[j] - need, max(1, PREFILL // lengths[j])
        answers = np.stack([rng.choice(pool, choices, replace=False) for _ in range(n)])  # (n, choices, L): right first
        for answer in answers[:, 0].tolist():
            at, cut = rng.integers(len(text.tokens) - room), round(depths[i] * room)
            hay = text.tokens[at : at + room].tolist()
            prompts.append([*begin, *hay[:cut], *question, *answer, *end, *hay[cut:], *question])
        pieces = (torch.tensor(np.array(u), device=device).split(size) for u in (prompts, answers))
        parts = [likelihoods(engine, *piece) for piece in zip(*pieces, strict=True)]
        scores, greedy = (torch.cat(u) for u in zip(*parts, strict=True))  # (n, choices)
        result["greedy"][i, j] = greedy[:, 0].float().mean()
        result["choice"][i, j] = (scores[:, 0] > scores[:, 1:].amax(1)).float().mean()
        result["loss"][i, j] = -scores[:, 0].mean()
    return {"lengths": lengths, "depths": list(depths), "n": n} | {k: v.tolist() for k, v in result.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Heads removed


def heads(model: Hymba, measure: Callable[[Hymba], np.ndarray | float]) -> dict:
    """What the heads of one kind in one block are for: the change of measure(model), losses of windows or an accuracy,
    when they are removed (Hymba, Fig. 3). {"whole": measure of the whole model, "attn": a change for each block, "ssm":
    the same, "attn_error" and "ssm_error": standard errors over windows}, with None where a block has no such heads."""
    whole = np.atleast_1d(measure(model))
    result = {"whole": float(whole.mean())}
    for kind in ("attn", "ssm"):
        there = [getattr(block.mixer, kind) is not None for block in model.blocks]
        result |= {kind: [None] * len(there), f"{kind}_error": [None] * len(there)}
        for i in tqdm(np.flatnonzero(there), desc=f"heads: {kind}", leave=False, disable=None):
            with removed(model.blocks[i], kind):
                change = mean_and_error(np.atleast_1d(measure(model)) - whole)
            result[kind][i], result[f"{kind}_error"][i] = change
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Attention and memory


@torch.no_grad()
def attention(model: Hymba, text: Text, length: int = 0, n_tokens: int = 2**15) -> dict:
    """Over windows of `length` tokens (0: block_size), for each block, None where it has no such heads:

    - share: of attention on meta tokens, on the first token of the text, on the query's own and on all others, a mean
      over heads and queries, which are those of the text (Hymba, Fig. 7).
    - meta: the share on each meta token (Fig. 5).
    - attn, ssm: root mean square of the outputs of the heads (Fig. 12); attn_branch_norm, ssm_branch_norm: once normed.
    - memory: effective length of a state, the number of tokens m for which exp(-m dt A) = 1 / e, where dt is the mean
      of its channel's steps over the text. The mean of the block, and what 10, 50 and 90% of its states stay below.

    Raises ValueError if the text is too short.
    """
    with watching(model) as watches:
        for windows in batches(model, text, length, n_tokens, "attention"):
            final_states(model, to_device(windows, model.embed.weight.device)[0])
    rows, M = [], model.config.n_meta
    for watch, block in zip(watches, model.blocks, strict=True):
        row = dict.fromkeys(["share", "meta", "attn", "ssm", "attn_branch_norm", "ssm_branch_norm", "memory"])
        row |= {name: (total / n) ** 0.5 for name, (total, n) in watch.squares.items()}
        if watch.queries:
            seen = (watch.seen / watch.queries).tolist()
            row["share"] = dict(zip(("meta", "first", "self", "others"), [sum(seen[:M], 0.0), *seen[M:]], strict=True))
            row["meta"] = seen[:M]
        if watch.steps:
            states = watch.lengths(block.mixer.ssm.A_log)
            row["memory"] = {"mean": states.mean().item()}
            row["memory"] |= {f"{p}%": states.quantile(p / 100).item() for p in (10, 50, 90)}
        rows.append(row)
    return {"length": window(model, text, length), "blocks": rows}


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def texts_of(args: Namespace, folder: Path, tokenizer: Tokenizer | None) -> dict[str, Text]:
    """By name, what a model is measured on: --text, or else the validation split of --dataset, or else of the data set
    that the model was trained on."""
    if args.text:
        return {str(path): read_text(path, tokenizer) for path in args.text}
    _, config, settings = checkpoint.read_config(folder)
    trained = config.get("train") or {}
    name = args.dataset or trained.get("dataset")
    if not name:
        raise ValueError(f"{folder} does not say what it was trained on: pass --text=FILE or --dataset=NAME")
    data = Path(args.data_dir or trained.get("data_dir") or "data") / name
    text, meta = open_text(data, "val", "" if args.dataset else trained.get("data_command", ""))
    alike = all(meta.get(key) == config.get(key) for key in ("tokenizer", "tokenizer_sha256"))
    if not alike or meta["vocab_size"] > settings.vocab_size:
        raise ValueError(f"{data} has other tokens than {folder}: prepare it with that tokenizer, or pass --text=FILE")
    return {name: text}


def open_inputs(args: Namespace, name: str) -> tuple[Path, Tokenizer | None, dict[str, Text]]:
    """A model's folder, its tokenizer if its tokens stand for text, and its texts. Raises ValueError if the task cannot
    be done with them, before any model is loaded."""
    folder = checkpoint.pretrained_folder(name, weights=False)
    trained = {"dataset": str, "data_dir": str, "data_command": str}
    config = read_json(folder / "config.json", may={"train": trained, "tokenizer": str, "tokenizer_sha256": str})
    tokenizer = None if config.get("tokenizer") == "none" else tokenizer_of(folder)
    if tokenizer is None and (args.text or args.task in ("needle", "harness")):
        raise ValueError(f"{folder}: its tokens stand for no text; use the tasks recall, loss, heads and attention")
    texts = {} if args.task == "harness" else texts_of(args, folder, tokenizer)
    if args.task == "recall" and any(text.record == 1 for text in texts.values()):
        raise ValueError(f"{', '.join(texts)}: {NO_RECORDS}")
    block_size = checkpoint.read_config(folder)[2].block_size
    least = args.length or block_size
    for path, text in texts.items():
        if not len(text.tokens):
            raise ValueError(f"{path} has no text")
        if text.record > 1 and (args.length or args.longest):
            raise ValueError(f"--length, --longest: {path} has records, which are read whole: leave them out")
        if 0 < args.longest <= least:
            raise ValueError(f"--longest={args.longest}: must be more than a window of {folder}, {least:,}")
        if args.task == "needle":
            try:
                *_, need = needle_tokens(tokenizer, args.needle, np.random.default_rng(0))
                needle_lengths(text, parse_lengths(args.lengths), need, block_size)
            except ValueError as e:
                raise ValueError(f"{folder}, {path}: {e}") from None
        elif len(text.tokens) <= (most := max(least, args.longest)):
            lower = "--longest" if most > least else "--length"
            raise ValueError(f"{path} has {len(text.tokens):,} tokens, too few for windows of {most:,}: lower {lower}")
    return folder, tokenizer, texts


def measure(args: Namespace, model: Hymba, tokenizer: Tokenizer | None, texts: dict[str, Text]) -> dict:
    """What a task of the command line says of a model."""
    text, length = next(iter(texts.values()), None), args.length
    n = args.tokens or {"recall": 2**30, "heads": 2**16, "attention": 2**15}.get(args.task, 2**18)
    if args.task == "loss":
        return {"texts": {name: loss(model, text, length, args.longest, n) for name, text in texts.items()}}
    if args.task == "recall":
        return recall(model, text, n)
    if args.task == "needle":
        return needle(model, tokenizer, text, parse_lengths(args.lengths), n=args.trials, fact=args.needle)
    if args.task == "heads":
        result = {"loss": heads(model, lambda m: np.nanmean(losses(m, text, length, n), axis=1))}
        return result | ({"recall": heads(model, lambda m: recall(m, text, n)["accuracy"])} if text.record > 1 else {})
    if args.task == "attention":
        return {"texts": {name: attention(model, text, length, n) for name, text in texts.items()}}
    options = dict(length=length, limit=args.limit, shots=args.shots, include=args.include)
    return {"tasks": harness.results(model, tokenizer, task_names(args.tasks), **options)}


def parse_lengths(text: str | None) -> list[int] | None:
    return [int(u) for u in text.split(",")] if text else None


def task_names(text: str) -> list[str]:
    return [name for name in text.replace(" ", "").split(",") if name]


def check_arguments(args: Namespace, names: list[str], defaults: Namespace) -> None:
    """Raise ValueError for what can be seen to be wrong before any file is opened."""
    if not names:
        raise ValueError("give one model or more: --init_from=FOLDER [FOLDER ...]")
    for name, tasks in READ_BY.items():
        if args.task not in tasks and getattr(args, name) != getattr(defaults, name):
            raise ValueError(f"--{name} is not for the task {args.task} but for {' and '.join(tasks)}")
    if len(set(names)) < len(names):
        raise ValueError(f"--init_from names {next(n for n in names if names.count(n) > 1)} twice")
    for name, least in (("tokens", 0), ("length", 0), ("longest", 0), ("limit", 1), ("shots", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name}={value}: must be {least} or more")
    if len(args.text) > 1 and args.task in ("needle", "heads"):
        raise ValueError(f"--text: the task {args.task} takes one text")
    if args.text and args.dataset:
        raise ValueError("give --text or --dataset, not both")
    for path in args.text:
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
    if args.task == "needle":
        if not 1 <= args.trials <= 10_000:
            raise ValueError(f"--trials={args.trials}: must be between 1 and 10,000")
        if args.needle.count("{}") != 1 or not args.needle.partition("{}")[0].strip():
            raise ValueError("--needle: write {} where the code goes, once and behind some text")
        if args.lengths and not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", args.lengths):
            raise ValueError(f"--lengths={args.lengths}: write numbers with commas between them")
    if args.task == "harness":
        harness.check_installed()
        if not task_names(args.tasks or ""):
            raise ValueError("the task harness needs names: --tasks=piqa,lambada_openai")
        if args.include and not Path(args.include).is_dir():
            raise FileNotFoundError(f"no folder {args.include}")
    if args.out and args.out.suffix != ".json":
        raise ValueError(f"--out={args.out}: give the name of a .json file")


def is_result(file: Path) -> bool:
    """Whether a file is one that evaluate.py wrote."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"task", "flags", "models"} <= found.keys()


def claim(file: Path, nothing: dict) -> bool:
    """Make a new file with `nothing` in it, since another call may be looking for a name. False if there is one, or its
    picture."""
    if file.with_suffix(".png").exists():
        return False
    try:
        with naming(file), file.open("x") as f:
            json.dump(nothing, f)
    except FileExistsError:
        return False
    return True


def output(args: Namespace, first: str, nothing: dict) -> Path:
    """The JSON file to write, in a folder where that can be done: --out, which may replace results and their picture
    but no other file, or a new one, which is made. Raises ValueError or OSError."""
    if not (out := args.out):
        folder = Path(first) if Path(first).name not in ("", "..") else Path(first).resolve()  # "." has a name, too
        usual = (folder.parent if folder.exists() else Path()) / f"{folder.name}_{args.task}"
        names = (usual.with_name(f"{usual.name}{f'_{n}' if n > 1 else ''}.json") for n in itertools.count(1))
        return next(name for name in names if claim(name, nothing))
    check_folders(out.parent)
    if there := next((file for file in (out, out.with_suffix(".png")) if file.is_dir()), None):
        raise ValueError(f"{there} is a folder: give the name of another .json file, --out=FILE")
    if other := next((file for file in (out, out.with_suffix(".png")) if file.exists() and not is_result(out)), None):
        raise ValueError(f"{other} is not of evaluate.py: give the name of another file, --out=FILE")
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming(out), tempfile.TemporaryFile(dir=out.parent):
        return out


def main(argv: list[str]) -> None:
    parser = Parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("task", choices=TASKS, help="what to measure")
    add("more", nargs="*", metavar="FOLDER", help="more models")
    add("--init_from", action="append", default=[], help="folder, or name on huggingface.co; can be repeated")
    add("--out", type=Path, help="the JSON file; the picture has its name [beside the first folder]")
    add("--dataset", help="measure on its validation split [the data set that the model was trained on]")
    add("--data_dir", help="where data sets live [where it was, or data]")
    add("--text", type=Path, action="append", default=[], help="measure on a file or folder; loss, attention: several")
    add(
        "--tokens", type=int, default=0, help="how many to read [loss 262144, heads 65536, attention 32768, recall all]"
    )
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
    args, defaults = parser.parse_intermixed_args(argv), parser.parse_intermixed_args([TASKS[0]])
    names = [*args.init_from, *args.more]
    check_arguments(args, names, defaults)
    inputs = {name: open_inputs(args, name) for name in names}
    if args.task == "harness":
        harness.known_tasks(task_names(args.tasks), args.include)
    if args.kernels == "False":
        ops.use_kernels(False)
    device, models = pick_device(args.device), {}
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else None)
    result = {"task": args.task, "flags": argv, "device": str(device), "torch": torch.__version__, "models": models}
    out = output(args, names[0], result)
    try:
        for name, (folder, tokenizer, texts) in inputs.items():
            model = checkpoint.load(name, dtype and getattr(torch, dtype), device).eval()
            about = {"folder": str(folder), "pattern": model.config.pattern, "parameters": model.num_params()}
            models[name] = about | measure(args, model, tokenizer, texts)
            with writing_file(out) as new:  # after each model: a later one may fail
                new.write_text(json.dumps(result, indent=1) + "\n")
            out.with_suffix(".png").unlink(missing_ok=True)  # of an earlier run
            del model  # before the next one is loaded
    finally:
        if models:
            pictures.show(args.task, models, out.with_suffix(".png"))
            print(f"the results: {out}")
        elif not args.out:
            out.unlink()


if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # tasks of the harness that import a package called evaluate do not want this file
    run("evaluate.py", main, "--length, --longest or --lengths")
