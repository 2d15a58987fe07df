"""
What evaluate.py shows of its results: a table, and a picture in which the models stand side by side.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def rows_of(task: str, name: str, r: dict) -> Iterator[dict]:
    """Lines of the table for the result of one model."""
    blocks = range(len(r["pattern"]))
    if task == "loss":
        for text, u in r["texts"].items():
            ends = {f"to {p:,}": u["by_position"][i] for i, p in enumerate(u.get("edges", [])[1:]) if i % 4 == 3}
            yield (
                {"model": name, "text": text}
                | {k: u[k] for k in ("loss", "error", "perplexity", "bits_per_byte")}
                | ends
            )
    elif task == "recall":
        yield {"model": name, "cache bytes": r["cache_bytes"]} | {
            f"{n} pairs": p["accuracy"] for n, p in r["pairs"].items()
        }
    elif task == "needle":
        for what in ("greedy", "choice"):
            means = np.mean(r[what], axis=0)
            yield {"model": name, "share": what} | {
                f"{n:,}": float(m) for n, m in zip(r["lengths"], means, strict=True)
            }
    elif task == "heads":
        for i in blocks:
            row = {"model": name, "block": f"{i} {r['pattern'][i]}"}
            yield row | {
                f"{what} without {k}": r[what][k][i]
                for what in ("loss", "recall")
                if what in r
                for k in ("attn", "ssm")
            }
    elif task == "attention":
        for text, u in r["texts"].items():
            for i, b in enumerate(u["blocks"]):
                row = {"model": name, "text": text, "block": f"{i} {r['pattern'][i]}"}
                row |= b["share"] or dict.fromkeys(("meta", "first", "self", "others"))
                yield row | {"|attn|": b["attn"], "|ssm|": b["ssm"], "memory": b["memory"] and b["memory"]["50%"]}
    else:
        for task_name, values in r["tasks"].items():
            yield {"model": name, "task": task_name} | values


def print_table(rows: list[dict]) -> None:
    """Rows as aligned columns, in Markdown."""

    def shown(value) -> str:
        return (
            ""
            if value is None
            else f"{value:.4f}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else value
        )

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([shown(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * w for w in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |")


def draw(task: str, models: dict[str, dict], file: Path) -> None:
    """The results of all models side by side."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no {file.name}: pip install matplotlib to get one")
        return
    n = len(models)
    if task == "loss":
        _, ax = plt.subplots(figsize=(7, 4))
        for name, r in models.items():
            for text, u in r["texts"].items():
                if "edges" in u:
                    label = f"{name}, {text}" if len(r["texts"]) > 1 else name
                    ax.errorbar(u["edges"][:-1], u["by_position"], u["by_position_error"], label=label, capsize=2)
                    ax.axvline(u["length"], color="0.8")
        ax.set(xscale="log", xlabel="tokens read", ylabel="nats per token")
        ax.legend()
    elif task == "recall":
        _, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
        for name, r in models.items():
            values = [p["accuracy"] for p in r["pairs"].values()]
            left.errorbar(
                list(map(int, r["pairs"])), values, [p["error"] for p in r["pairs"].values()], marker="o", label=name
            )
            right.plot(r["cache_bytes"], r["accuracy"], "o", label=name)
        left.set(xscale="log", xlabel="pairs", ylabel="accuracy")
        right.set(xscale="log", xlabel="bytes of cache", ylabel="mean accuracy")
        left.legend()
    elif task == "needle":
        _, axes = plt.subplots(2, n, figsize=(4 * n, 5), squeeze=False, sharey=True)
        for column, (name, r) in zip(axes.T, models.items(), strict=True):
            for ax, what in zip(column, ("greedy", "choice"), strict=True):
                ax.imshow(r[what], vmin=0, vmax=1, aspect="auto", cmap="viridis")
                ax.set(
                    xticks=range(len(r["lengths"])), xticklabels=r["lengths"], title=f"{name}: {what}", xlabel="tokens"
                )
                ax.set(yticks=range(len(r["depths"])), yticklabels=r["depths"], ylabel="depth")
    elif task == "heads":
        whats = [what for what in ("loss", "recall") if any(what in r for r in models.values())]
        _, axes = plt.subplots(len(whats), n, figsize=(5 * n, 3 * len(whats)), squeeze=False, sharey="row")
        for column, (name, r) in zip(axes.T, models.items(), strict=True):
            for ax, what in zip(column, whats, strict=True):
                for shift, kind in ((-0.2, "attn"), (0.2, "ssm")):
                    values = [v or 0 for v in r[what][kind]] if what in r else []
                    ax.bar(np.arange(len(values)) + shift, values, 0.4, label=f"without {kind}")
                ax.set(
                    xticks=range(len(r["pattern"])), xticklabels=r["pattern"], title=name, ylabel=f"change of {what}"
                )
        axes[0, 0].legend()
    elif task == "attention":
        _, axes = plt.subplots(n, 4, figsize=(18, 3 * n), squeeze=False)
        for line, (name, r) in zip(axes, models.items(), strict=True):
            blocks, x, letters = next(iter(r["texts"].values()))["blocks"], range(len(r["pattern"])), r["pattern"]
            bottom = np.zeros(len(blocks))
            for kind in ("meta", "first", "self", "others"):
                values = np.array([b["share"][kind] if b["share"] else 0 for b in blocks])
                line[0].bar(x, values, bottom=bottom, label=kind)
                bottom += values
            for kind in ("attn", "ssm"):
                line[1].plot(x, [b[kind] for b in blocks], "o-", label=kind)
            line[2].plot(x, [b["memory"] and b["memory"]["50%"] for b in blocks], "o", label="median")
            lows, highs = ([b["memory"][p] if b["memory"] else math.nan for b in blocks] for p in ("10%", "90%"))
            line[2].vlines(x, lows, highs, label="10 to 90%")
            line[2].set(yscale="log")
            for ax, title in zip(line, ("attention goes to", "output magnitude", "memory, tokens"), strict=False):
                ax.set(xticks=x, xticklabels=letters, title=f"{name}: {title}")
                ax.legend(fontsize=7)
            meta = [
                np.mean([b["meta"] for b in u["blocks"] if b["meta"]], axis=0)
                for u in r["texts"].values()
                if any(b["meta"] for b in u["blocks"])
            ]
            if meta:
                line[3].imshow(meta, aspect="auto")
            line[3].set(
                yticks=range(len(meta)),
                yticklabels=list(r["texts"])[: len(meta)],
                title=f"{name}: share of each meta token",
            )
    else:
        _, ax = plt.subplots(figsize=(7, 4))
        for i, (name, r) in enumerate(models.items()):
            values = {
                t: next((v[k] for k in ("acc_norm", "acc", "exact_match") if k in v), 0) for t, v in r["tasks"].items()
            }
            ax.bar(np.arange(len(values)) + 0.8 * i / n, values.values(), 0.8 / n, label=name)
            ax.set(xticks=range(len(values)), xticklabels=values, ylabel="accuracy")
        ax.legend()
    plt.tight_layout()
    plt.savefig(file, dpi=120)
    plt.close()
