"""
The picture of a training run, and what evaluate.py shows of its results: of each task, the rows of a table, and a
picture in which models stand side by side. `models` is what stands under that key in the JSON file.
"""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from files import writing_file


def pyplot(pictures: str, needed: bool = False):
    """matplotlib.pyplot, which needs no display. Where it is missing, says what to install for which pictures: prints
    it and returns None, or if they are needed, raises ValueError."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        if needed:
            raise ValueError(f"{pictures} needs matplotlib: pip install matplotlib") from None
        print(f"no {pictures}: pip install matplotlib to get one")
        return None
    return plt


def plot_loss(metrics: Path, picture: Path) -> None:
    """Training and validation loss against the step, from the JSON lines, if matplotlib is there."""
    if not (plt := pyplot(picture.name)):
        return
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    plt.figure(figsize=(7, 4))
    for key, style in [("loss", {"lw": 0.7}), ("val_loss", {"marker": "o"})]:
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        plt.plot(*zip(*points, strict=True), label=key, **style)
    plt.xlabel("step"), plt.ylabel("nats per token"), plt.legend(), plt.grid(alpha=0.3), plt.tight_layout()
    save(plt, picture)


def save(plt, picture: Path) -> None:
    """The figure that was drawn last, as a file that is whole."""
    with writing_file(picture) as new:
        plt.savefig(new, dpi=120)
    plt.close()


def show(task: str, models: dict[str, dict], picture: Path) -> None:
    """Print the table, and draw the picture if matplotlib is there."""
    rows_of, draw = SHOWN[task]
    print_table([{"model": name} | row for name, r in models.items() for row in rows_of(r)])
    if plt := pyplot(picture.name):
        draw(plt, models)
        plt.tight_layout()
        save(plt, picture)


def print_table(rows: list[dict]) -> None:
    """Rows as aligned columns, in Markdown. A row may lack what others have."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:.4f}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else value

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")


def numbers(values: list[float | None]) -> list[float]:
    """NaN, which is not drawn, for what there is not."""
    return [math.nan if value is None else value for value in values]


def loss_rows(r: dict) -> Iterator[dict]:
    for text, u in r["texts"].items():
        numbers = {key: u[key] for key in ("loss", "error", "perplexity", "bits_per_byte")}
        bins = [f"{a:,} to {b - 1:,}" for a, b in pairwise(u["edges"])]
        some = list(zip(bins, u["by_position"], strict=True))[::-6]  # the last one, and every sixth before it
        yield {"text": text} | numbers | dict(reversed(some))


def middles(edges: list[int], n: int) -> np.ndarray:
    """Of the first n bins, which end before the next one's edge, the positions in the middle, on a logarithmic axis."""
    edges = np.array(edges[: n + 1], dtype=float)
    return np.sqrt(edges[:-1] * np.maximum(edges[:-1], edges[1:] - 1))


def draw_loss(plt, models: dict[str, dict]) -> None:
    """In nats against tokens, or where tokens stand for different numbers of bytes, in bits against bytes."""
    _, ax = plt.subplots(figsize=(7, 4))
    shown = [(name, text, u) for name, r in models.items() for text, u in r["texts"].items()]
    sizes = [u["bits_per_byte"] and round(u["loss"] / math.log(2) / u["bits_per_byte"], 6) for *_, u in shown]
    bits, one = all(sizes) and len(set(sizes)) > 1, len({text for _, text, _ in shown}) == 1
    for (name, text, u), size in zip(shown, sizes, strict=True):  # bytes of a token
        label = name if one else f"{name}, {text}"
        x, y = (size, 1 / math.log(2) / size) if bits else (1.0, 1.0)
        if u["by_position"]:
            errors = np.array(numbers(u["by_position_error"]))
            where = x * middles(u["edges"], len(errors))
            ax.errorbar(where, y * np.array(u["by_position"]), y * errors, label=label, capsize=2)
            ax.axvline(x * u["length"], color="0.8")
        else:  # of records
            ax.plot(u["length"], u["loss"], "o", label=label)
    what, unit = ("bytes", "bits per byte") if bits else ("tokens", "nats per token")
    ax.set(xscale="log", xlabel=f"{what} read", ylabel=unit)
    ax.legend()


def recall_rows(r: dict) -> Iterator[dict]:
    yield {"cache bytes": r["cache_bytes"]} | {f"{n} pairs": u["accuracy"] for n, u in r["pairs"].items()}


def draw_recall(plt, models: dict[str, dict]) -> None:
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name, r in models.items():
        accuracies, errors = (numbers([u[key] for u in r["pairs"].values()]) for key in ("accuracy", "error"))
        left.errorbar(list(map(int, r["pairs"])), accuracies, errors, marker="o", capsize=2, label=name)
        right.plot(r["cache_bytes"], r["accuracy"], "o", label=name)
    left.set_xscale("log", base=2), left.xaxis.set_major_formatter("{x:.0f}")
    left.set(xlabel="pairs", ylabel="accuracy", ylim=(-0.03, 1.03))
    right.set(xscale="log", xlabel="bytes of cache", ylabel="mean accuracy")
    left.legend()


def needle_rows(r: dict) -> Iterator[dict]:
    for what in ("greedy", "choice"):
        means = np.mean(r[what], axis=0).tolist()
        yield {"share": what} | {f"{length:,}": mean for length, mean in zip(r["lengths"], means, strict=True)}


def draw_needle(plt, models: dict[str, dict]) -> None:
    _, axes = plt.subplots(2, len(models), figsize=(4 * len(models), 5), squeeze=False)
    for column, (name, r) in zip(axes.T, models.items(), strict=True):
        for ax, what in zip(column, ("greedy", "choice"), strict=True):
            ax.imshow(r[what], vmin=0, vmax=1, aspect="auto", cmap="viridis")
            for (i, j), share in np.ndenumerate(r[what]):
                ax.text(j, i, f"{share:.2f}", ha="center", va="center", color="black" if share > 0.6 else "white")
            ax.set(xticks=range(len(r["lengths"])), xticklabels=r["lengths"], xlabel="tokens")
            ax.set(yticks=range(len(r["depths"])), yticklabels=r["depths"], ylabel="depth", title=f"{name}: {what}")


def heads_rows(r: dict) -> Iterator[dict]:
    whats = [what for what in ("loss", "recall") if what in r]
    for i, letter in enumerate(r["pattern"]):
        changes = {f"{what} without {kind}": r[what][kind][i] for what in whats for kind in ("attn", "ssm")}
        yield {"block": f"{i} {letter}"} | changes


def draw_heads(plt, models: dict[str, dict]) -> None:
    whats = [what for what in ("loss", "recall") if any(what in r for r in models.values())]
    size = 5 * len(models), 3 * len(whats)
    _, axes = plt.subplots(len(whats), len(models), figsize=size, squeeze=False, sharey="row")
    for column, (name, r) in zip(axes.T, models.items(), strict=True):
        for ax, what in zip(column, whats, strict=True):
            for shift, kind in ((-0.2, "attn"), (0.2, "ssm")):
                u = r.get(what, {kind: [], f"{kind}_error": []})
                changes, errors = (numbers(u[key]) for key in (kind, f"{kind}_error"))
                ax.bar(np.arange(len(changes)) + shift, changes, 0.4, yerr=errors, capsize=2, label=f"without {kind}")
            ax.set(xticks=range(len(r["pattern"])), xticklabels=r["pattern"], title=name, ylabel=f"change of {what}")
            ax.set(xlim=(-0.6, len(r["pattern"]) - 0.4))  # also where the first or last has no such heads
    axes[0, 0].legend()


def attention_rows(r: dict) -> Iterator[dict]:
    for text, u in r["texts"].items():
        for i, (letter, b) in enumerate(zip(r["pattern"], u["blocks"], strict=True)):
            shares = b["share"] or dict.fromkeys(("meta", "first", "self", "others"))
            row = {"text": text, "block": f"{i} {letter}"} | shares | {"|attn|": b["attn"], "|ssm|": b["ssm"]}
            yield row | {"memory": b["memory"] and b["memory"]["50%"]}


def draw_attention(plt, models: dict[str, dict]) -> None:
    """Of the first text: shares, magnitudes, memory lengths; of all texts, the share of each meta token, a mean over
    blocks."""
    _, axes = plt.subplots(len(models), 4, figsize=(15, 3 * len(models)), squeeze=False)
    for (shares, sizes, memory, meta), (name, r) in zip(axes, models.items(), strict=True):
        text, x = next(iter(r["texts"])), np.arange(len(r["pattern"]))
        blocks, where = r["texts"][text]["blocks"], f", {Path(text).name}" if len(r["texts"]) > 1 else ""
        bottom = np.zeros(len(blocks))
        for kind in ("meta", "first", "self", "others"):
            values = np.array([b["share"][kind] if b["share"] else 0 for b in blocks])
            shares.bar(x, values, bottom=bottom, label=kind)
            bottom += values
        for kind, colour in (("attn", "C0"), ("ssm", "C1")):
            for key, label, style in ((kind, kind, "o-"), (f"{kind}_branch_norm", f"{kind}, normed", ".:")):
                if any(b[key] is not None for b in blocks):
                    sizes.plot(x, numbers([b[key] for b in blocks]), style, color=colour, label=label)
        there = [i for i, b in enumerate(blocks) if b["memory"]]
        low, median, high = ([blocks[i]["memory"][p] for i in there] for p in ("10%", "50%", "90%"))
        memory.plot(there, median, "o", label="median of the states")
        memory.vlines(there, low, high, label="10 to 90%")
        for ax, title in (
            (shares, "attention goes to"),
            (sizes, "output, root mean square"),
            (memory, "memory, tokens"),
        ):
            ax.set(xticks=x, xticklabels=r["pattern"], title=title + where)
            ax.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08))
        (shares if bottom.any() else sizes).set(ylabel=name)
        sizes.set(yscale="log"), memory.set(yscale="log" if there else "linear")
        lines = {t: [b["meta"] for b in u["blocks"] if b["meta"]] for t, u in r["texts"].items()}
        means = [np.mean(line, axis=0) for line in lines.values() if line]
        meta.set(title="share of each meta token", xlabel="meta token")
        if len(means) == 1:
            meta.bar(range(len(means[0])), means[0])
        elif means:
            plt.colorbar(meta.imshow(means, aspect="auto", vmin=0), ax=meta)
            names = [Path(text).name for text, line in lines.items() if line]
            meta.set(yticks=range(len(means)), yticklabels=names)
        for ax, drawn in ((shares, bottom.any()), (memory, there), (meta, means)):
            ax.set_visible(bool(drawn))


def harness_rows(r: dict) -> Iterator[dict]:
    for task, values in r["tasks"].items():
        yield {"task": task} | values


def draw_harness(plt, models: dict[str, dict]) -> None:
    """Accuracies of the tasks that have one, of whatever kind."""
    _, ax = plt.subplots(figsize=(7, 4))
    known, shown = ("acc_norm", "acc", "exact_match"), {}
    for name, r in models.items():
        shown[name] = {}
        for task, u in r["tasks"].items():
            if key := next((key for kind in known for key in u if key.split(",")[0] == kind), None):
                kind, *of = key.split(",")  # of: a filter of the answer
                shown[name][f"{task}\n{key}"] = u[key], u.get(",".join([f"{kind}_stderr", *of]))
    tasks = list(dict.fromkeys(task for u in shown.values() for task in u))
    for i, (name, u) in enumerate(shown.items()):
        values, errors = (numbers([u.get(task, (None, None))[k] for task in tasks]) for k in (0, 1))
        at = np.arange(len(tasks)) + 0.8 * (i - (len(models) - 1) / 2) / len(models)
        ax.bar(at, values, 0.8 / len(models), yerr=errors, capsize=2, label=name)
    ax.set(xticks=range(len(tasks)), xticklabels=tasks, ylabel="accuracy")
    ax.legend()


SHOWN = {
    "loss": (loss_rows, draw_loss),
    "recall": (recall_rows, draw_recall),
    "needle": (needle_rows, draw_needle),
    "heads": (heads_rows, draw_heads),
    "attention": (attention_rows, draw_attention),
    "harness": (harness_rows, draw_harness),
}
