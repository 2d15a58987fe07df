"""
The tables and pictures of study.py, from the rows of results/runs.jsonl.
"""

import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

import cost
import pictures
from model import HymbaConfig
from study import (
    ALIKE,
    MAIN,
    RECALL_RATES,
    SCALES,
    SYSTEMS,
    TRIAL,
    config_fields,
    epochs,
    mean_loss,
    parameters,
    ranking,
    trials,
)

# Hymba, Table 10 (of arXiv's first version): accuracy of general and of recall tasks, in percent, of models of about
# 300M parameters. Rows 7 (windows, without sharing either), 8 (no sharing), 10 (attention alone with Hymba's savings of
# cache) and 11 (concatenation) have no meta tokens; the variants here have. The sequential model is row A of Table 1.
PAPER = {
    "mamba": (42.98, 19.23), "transformer": (44.08, 39.98), "intra": (45.19, 49.90), "hymba-windows": (44.42, 29.78),
    "hymba-no-meta": (45.16, 48.04), "hymba": (45.53, 51.79), "hymba-no-ssm": (43.60, 28.18), "inter": (44.07, 45.16),
    "hymba-concat": (44.56, 48.94), "hymba-no-sharing": (44.56, 48.79),
}  # fmt: skip

# What came after the small epochs: its scale and stage
LATER = {"same operations": ("small", "flops"), "four epochs": ("small", "long"), "large": ("large", "epoch")}
DRAWN = [*MAIN, "intra-scattered"]  # in pictures that all systems would crowd
COLORS = {system: "C9" if system.startswith("hymba-") else "C8" for system in SYSTEMS}  # in all pictures, of variants
COLORS |= {system: "k" for system in SYSTEMS if "n_expert" in SYSTEMS[system]}
COLORS |= {system: f"C{i}" for i, system in enumerate(MAIN)}
NAMES = {
    "transformer": "Transformer", "mamba": "Mamba", "mamba2": "Mamba-2", "sliding": "sliding windows",
    "inter": "inter-layer", "intra-scattered": "intra-layer", "intra": "hybrid heads throughout", "hymba": "Hymba",
    "hymba-mamba2": "Hymba with Mamba-2", "hymba-experts": "Hymba with experts",
    "transformer-experts": "Transformer with experts", "intra-clustered": "intra-layer, clustered",
    "intra-sandwich": "intra-layer, sandwich", "inter-middle": "inter-layer, middle",
    "inter-front": "inter-layer, front",
}  # fmt: skip


def name(system: str) -> str:
    """In pictures and on pages, where Hymba's variants have no prefix."""
    return NAMES.get(system, system.removeprefix("hymba-"))


def cache_mb(row: dict) -> float:
    """Cache of one sequence of 8,192 tokens."""
    return cost.cache_bytes(HymbaConfig(**config_fields(row["flags"])), 8192) / 1e6


def recalled(done: dict, system: str, rate: float = RECALL_RATES[0]) -> list[dict]:
    """Runs of recall at a rate (that which all have, if not told) of a system and of those that are the same model."""
    same = ALIKE.get(system, system)
    runs = [row for key, row in done.items() if (key[0], ALIKE.get(key[1], key[1]), key[3]) == ("recall", same, rate)]
    return [row for row in runs if "accuracy" in row]  # what diverged has none


def mean_recall(rows: list[dict]) -> float:
    return statistics.mean(r["accuracy"] for r in rows)


def device(row: dict) -> str:
    """H100 of "NVIDIA H100 80GB HBM3": speeds of different devices are not to be compared."""
    return re.sub(r"NVIDIA | \d+GB.*", "", row.get("device", "?"))


def timed(done: dict, scale: str = "small") -> dict[str, dict]:
    """Of each system, an epoch that was timed on the device on which most systems were, at whichever rate."""
    found = {}
    for system in ranking(done, scale):
        for row in reversed(epochs(done, system, scale)):  # the better one, if both were
            found.setdefault(device(row), {})[system] = row
    return found[max(found, key=lambda card: (len(found[card]), card))] if found else {}


def device_of(rows: dict[str, dict]) -> str:
    return next(iter(map(device, rows.values())), "?")


def half_intervals(done: dict, scale: str = "small", stage: str = "epoch") -> dict[str, float]:
    """Of each system's mean loss, half the 95% confidence interval, as if seeds differed as much in all systems and at
    all rates: the variance is pooled. Empty while it has fewer than five degrees of freedom."""
    seeds = {}
    for (where, system, what, rate, _), row in done.items():
        if (where, what) == (scale, stage) and row["val_loss"]:
            seeds.setdefault((system, rate), []).append(row["val_loss"])
    squares = [(loss - statistics.mean(losses)) ** 2 for losses in seeds.values() for loss in losses]
    if (free := len(squares) - len(seeds)) < 5:  # degrees of freedom
        return {}
    z = statistics.NormalDist().inv_cdf(0.975)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)  # Student's, within 1%
    return {
        system: t * math.sqrt(sum(squares) / free / len(rows)) for system, rows in ranking(done, scale, stage).items()
    }


def later(done: dict) -> dict[str, dict[str, list[dict]]]:
    """What came after the small epochs, by what is different and by system, a row for each seed, the lowest mean loss
    first: as many operations as Hymba, four epochs, and the large scale."""
    return {what: ranking(done, *where) for what, where in LATER.items()}


def operations(row: dict) -> float:
    """Floating-point operations of training for a token."""
    return cost.flops_per_token(cost.meta_model(config_fields(row["flags"])))


def needles(row: dict) -> dict[int, float]:
    """By length, the share of codes that are told from nine others, a mean over depths."""
    lengths, choice = row["needle"]["lengths"], row["needle"]["choice"]  # choice by depth, then length
    return dict(zip(lengths, map(statistics.mean, zip(*choice, strict=True)), strict=True))


def needle(row: dict) -> float:
    """The same at the training length."""
    return needles(row)[row["flags"]["block_size"]]


def reach(row: dict) -> tuple[float, float]:
    """The loss at positions within the window and beyond it, up to the training length, in bins that lie on one side:
    1 to 213 and 268 to 1,024."""
    (result,) = row["position"].values()
    bins = list(zip(result["by_position"], result["edges"][:-1], result["edges"][1:], strict=True))
    window, end = row["flags"]["window"], row["flags"]["block_size"]
    within = [(loss, high - low) for loss, low, high in bins if high <= window + 1]
    beyond = [(loss, high - low) for loss, low, high in bins if window < low and high <= end + 1]
    return tuple(sum(loss * n for loss, n in part) / sum(n for _, n in part) for part in (within, beyond))


def known(done: dict) -> set[str]:
    """Systems that have names in the pictures throughput and later, where others are grey, and whose insides are shown:
    those of other pictures, at the large scale, or with more parameters."""
    return {*DRAWN, *ranking(done, "large"), *(system for system in SYSTEMS if "n_expert" in SYSTEMS[system])}


def shown(done: dict) -> dict[str, list[dict]]:
    """Of the runs of four epochs, those whose insides are in pictures."""
    return {system: rows for system, rows in later(done)["four epochs"].items() if system in known(done)}


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is the head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table(done: dict) -> str:
    """A line for each system with an epoch: the means of loss (and half its confidence interval) and bits per byte over
    seeds, and of recall over all runs of the same model at one rate, the needle of each seed, speeds on one device, the
    loss at the other rate, and what else is known of the first seed."""
    halves, speeds = half_intervals(done), timed(done)
    heads = ["system", "pattern", "seeds", "loss", "+/-", "bits per byte", "rate", "other rate", "within", "beyond"]
    heads += ["recall", "needle", f"training, tokens/s ({device_of(speeds)})", "decoding, tokens/s", "cache, MB"]
    lines = [heads]
    for system, rows in ranking(done).items():
        first, *others = epochs(done, system)
        recall, half, speed = recalled(done, system), halves.get(system), speeds.get(system, {})
        cells = [system, f"`{first['flags']['pattern']}`", f"{len(rows)}", f"{mean_loss(rows):.3f}"]
        cells += [f"{half:.3f}" if half else "", f"{statistics.mean(r['val_bpb'] for r in rows):.3f}"]
        cells += [f"{first['learning_rate']:g}"]
        cells += [", ".join(f"{r['val_loss']:.3f} at {r['learning_rate']:g}" for r in others)]
        cells += [*(f"{loss:.3f}" for loss in reach(first)), f"{mean_recall(recall):.2f}" if recall else ""]
        cells += [", ".join(f"{needle(row):.2f}" for row in rows if "needle" in row)]
        cells += [f"{v:,.0f}" if (v := speed.get(f"{key}tokens_per_s")) else "" for key in ("", "decode_")]
        lines.append([*cells, f"{cache_mb(first):.1f}"])
    return markdown(lines)


def recall_table(done: dict) -> str:
    """A line for each model of recall, the most accurate first, if it has a run at the first rate: accuracy by number
    of pairs and over all, means of its runs; that of each run at both rates; and the cache of a record."""
    runs = {system: found for system in SYSTEMS if system not in ALIKE and (found := recalled(done, system))}
    pairs = [*runs.values()][0][0]["pairs"] if runs else []
    heads = ["system", "pattern", *(f"{n} pairs" for n in pairs), "mean", *(f"at {rate:g}" for rate in RECALL_RATES)]
    lines = [[*heads, "cache, KB"]]
    for system, found in sorted(runs.items(), key=lambda item: -mean_recall(item[1])):
        cells = [system, f"`{found[0]['flags']['pattern']}`"]
        cells += [f"{statistics.mean(row['pairs'][n]['accuracy'] for row in found):.2f}" for n in pairs]
        rates = [recalled(done, system, rate) for rate in RECALL_RATES]
        cells += [f"{mean_recall(found):.2f}", *(", ".join(f"{r['accuracy']:.2f}" for r in rows) for rows in rates)]
        lines.append([*cells, f"{found[0]['cache_bytes'] / 1e3:,.0f}"])
    return markdown(lines)


def later_table(done: dict) -> str:
    """A line for each system of what came after the small epochs, beside the mean of those: the means over seeds of
    loss (and half its confidence interval) and bits per byte, and what else is known of the first seed. Speeds of those
    that had a GPU to themselves, at the large scale on one device."""
    heads = ["what", "system", "rate", "seeds", "loss", "+/-", "small epoch", "bits per byte", "within", "beyond"]
    heads += ["needle", "active parameters, M", "training, GFLOPs a token", "device", "training, tokens/s"]
    ranked, speeds = ranking(done), timed(done, "large")
    lines = [[*heads, "decoding, tokens/s"]]
    for what, systems in later(done).items():
        halves = half_intervals(done, *LATER[what])
        for system, rows in systems.items():
            first, half = rows[0], halves.get(system)
            cells = [what, system, f"{first['learning_rate']:g}", f"{len(rows)}", f"{mean_loss(rows):.3f}"]
            cells += [f"{half:.3f}" if half else "", f"{mean_loss(ranked[system]):.3f}" if system in ranked else ""]
            cells += [f"{value:.3f}" for value in (statistics.mean(r["val_bpb"] for r in rows), *reach(first))]
            cells += [f"{needle(first):.2f}", f"{parameters(cost.meta_model(config_fields(first['flags']))) / 1e6:.2f}"]
            speed = speeds.get(system, {}) if what == "large" else first
            alone = "decode_tokens_per_s" in speed
            cells += [f"{operations(first) / 1e9:.3f}", device(speed) if alone else ""]
            lines.append(cells + [f"{speed[f'{key}tokens_per_s']:,.0f}" if alone else "" for key in ("", "decode_")])
    return markdown(lines)


def draw_losses(ax, done: dict) -> None:
    rows, halves = ranking(done), half_intervals(done)
    for y, (system, runs) in enumerate(rows.items()):
        ax.errorbar(mean_loss(runs), y, xerr=halves.get(system), fmt="C0|", ms=12, capsize=3)
        ax.plot([r["val_loss"] for r in runs], [y] * len(runs), "C0o", ms=4)
    ax.set(
        yticks=range(len(rows)), yticklabels=map(name, rows), xlabel="validation loss after an epoch, nats per token"
    )
    ax.set_title("seeds, mean, and 95% interval (pooled variance)", fontsize="small")
    ax.invert_yaxis()


def draw_rates(ax, done: dict) -> None:
    for system in MAIN:
        rows = [done.get(("small", system, "rate", rate, 1)) for rate in trials(done, system)[0]]
        points = [(r["learning_rate"], r["val_loss"]) for r in rows if r and r["val_loss"]]
        if points:
            ax.plot(*zip(*points, strict=True), "o-", color=COLORS[system], label=name(system))
    number_axis(ax, sorted({rate for system in MAIN for rate in trials(done, system)[0]}))
    ax.set(xlabel="learning rate", ylabel=f"validation loss after {TRIAL / 1e6:.0f} M tokens")


def draw_curves(ax, done: dict, seconds: bool) -> None:
    """Training loss, a mean over neighbours, against operations or seconds of training."""
    speeds, ranked = timed(done), ranking(done)
    rows = {s: runs[0] for s, runs in ranked.items() if s in DRAWN and (s in speeds or not seconds)}
    for system, row in rows.items():
        tokens = row["flags"]["batch_size"] * row["flags"]["block_size"]
        unit = tokens / speeds[system]["tokens_per_s"] if seconds else tokens * operations(row)
        steps, losses = zip(*row["curve"], strict=True)
        smooth = [statistics.mean(losses[max(0, i - 4) : i + 5]) for i in range(len(losses))]
        ax.plot([step * unit for step in steps[5:]], smooth[5:], COLORS[system], lw=1, label=name(system))
    low = min((row["val_loss"] for row in rows.values()), default=1.0)
    what = f"seconds on one {device_of(speeds)}" if seconds else "floating-point operations"
    ax.set(
        xscale="log", ylim=(low - 0.1, low + 1.5), xlabel=f"training, {what}", ylabel="training loss, nats per token"
    )


def draw_names(ax, points: Iterable[tuple[str, tuple[float, float]]], size: str = "small", colors: bool = True) -> None:
    """Names of points, in the colors of their systems or black, each at that side of its own where the fewest names are
    in the way, of such sides where the fewest points are, and of those close to its own where the fewest lines are.
    Called last: limits and scales of the axes decide on that."""
    from matplotlib.transforms import Bbox

    def place(text, side: tuple[int, int]) -> Bbox:
        text.set(position=side, ha={6: "left", -6: "right", 0: "center"}[side[0]])
        return text.get_window_extent()

    def in_the_way(text, side: tuple[int, int]) -> tuple[int, ...]:
        box, far = place(text, side), abs(side[1]) == 16
        crossed = sum(path.intersects_bbox(box, filled=False) for path in paths)
        return box.count_overlaps(names), box.count_overlaps(dots), far, crossed

    ax.margins(x=0.2, y=0.1)  # for the names at the edges
    ax.autoscale_view()  # at once: places of points in pixels depend on it
    marks = [line.get_xydata() for line in ax.lines] + [some.get_offsets() for some in ax.collections]
    pixels = [xy for some in marks if len(some) for xy in ax.transData.transform(some)]
    drawn = [line for line in ax.lines if line.get_linestyle() != "None"]
    paths = [line.get_path().transformed(line.get_transform()) for line in drawn]
    dots, left, right = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in pixels], ax.bbox.x0, ax.bbox.x1
    names = [Bbox.from_extents(-1e4, -1e4, left, 1e4), Bbox.from_extents(right, -1e4, 1e4, 1e4)]  # outside of the axes
    sides = [(x, y) for x in (6, -6) for y in (0, 8, -8)] + [(0, 10), (0, -10)]  # in points
    sides += [(x, y) for y in (16, -16) for x in (6, -6)]  # far
    for system, point in points:
        text = ax.annotate(name(system), point, (0, 0), textcoords="offset points", va="center", fontsize=size)
        text.set_color(COLORS[system] if colors else "k")
        names.append(place(text, min(sides, key=lambda side, text=text: in_the_way(text, side))))


def draw_against(ax, points: dict[str, tuple[float, float]], x: str, y: str) -> None:
    for system, point in points.items():
        ax.plot(*point, "o", color=COLORS[system])
    ax.set(xscale="log", xlabel=x, ylabel=y)
    draw_names(ax, points.items())


def draw_throughput(ax, done: dict) -> None:
    """All systems; the variants, which are many, have no names, but for those that are known."""
    rows, speeds, named = ranking(done), timed(done), known(done)
    points = {s: (v, mean_loss(rows[s])) for s, row in speeds.items() if (v := row.get("decode_tokens_per_s"))}
    variants = [points.pop(s) for s in [*points] if s not in named]
    if variants:
        ax.plot(*zip(*variants, strict=True), "o", color="0.7", ms=4, label="other variants")
    x = f"decoding 64 sequences of 8,192 tokens on one {device_of(speeds)}, tokens/s"
    draw_against(ax, points, x, "validation loss, nats per token")


def draw_recall(ax, done: dict) -> None:
    rows = {system: runs for system in DRAWN if (runs := recalled(done, system))}
    points = {system: (runs[0]["cache_bytes"] / 1e3, mean_recall(runs)) for system, runs in rows.items()}
    for system, (x, _) in points.items():  # each run, around the mean
        ax.plot([x] * len(rows[system]), [row["accuracy"] for row in rows[system]], ".-", color=COLORS[system], lw=0.5)
    draw_against(ax, points, "cache of one record, KB", "accuracy of recall, mean over 4 to 256 pairs")


def number_axis(ax, ticks: list[float]) -> None:
    """A logarithmic axis with these numbers."""
    ax.set_xscale("log")
    ax.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    ax.set_xticks([], minor=True)


def draw_pairs(ax, done: dict) -> None:
    ticks = []
    for i, system in enumerate(DRAWN):
        if runs := recalled(done, system):
            shares = {int(n): statistics.mean(r["pairs"][n]["accuracy"] for r in runs) for n in runs[0]["pairs"]}
            size = 10 - 0.8 * i  # points that coincide are seen
            ax.plot(shares.keys(), shares.values(), "o-", color=COLORS[system], label=name(system), ms=size)
            ticks = list(shares)
    number_axis(ax, ticks)
    ax.set(xlabel="pairs", ylabel="accuracy of recall")


def draw_positions(ax, done: dict) -> None:
    """Loss by position, to 8 times the training length, from a tenth of it on."""
    length, low = SCALES["small"].flags["block_size"], math.inf
    for system, runs in ranking(done).items():
        if system in DRAWN:
            (result,) = runs[0]["position"].values()
            middles = pictures.middles(result["edges"], len(result["by_position"]))
            ax.plot(middles, result["by_position"], COLORS[system], label=name(system))
            low = min(low, *result["by_position"])
    ax.axvline(length, color="0.5", ls=":")
    number_axis(ax, [length * 2**i // 8 for i in range(7)])
    ax.set(xlim=(length / 10, 8 * length), xlabel="position (dotted: the training length)")
    ax.set(ylim=(low - 0.1, low + 1) if low < math.inf else None, ylabel="loss, nats per token")


def draw_reach(ax, done: dict) -> None:
    """Beyond the window, systems that find needles are ahead of what their loss within it lets expect. A line joins a
    system's two rates, and the better one has a ring and the name, but for variants that find needles: they lie close
    together."""
    named = []
    for i, system in enumerate(ranking(done)):
        rows = epochs(done, system)
        points = [reach(row) for row in rows]
        ax.plot(*zip(*points, strict=True), "0.8", zorder=0)
        colors = dict(c=[needle(row) for row in rows], vmin=0, vmax=1, cmap="viridis")
        if ringed := i == 0 or system in MAIN or needle(rows[0]) < 0.8:
            named.append((system, points[0]))
        rings = ["k" if ringed else "none", "none"][: len(rows)]
        ax.scatter(*zip(*points, strict=True), s=[36, 12][: len(rows)], edgecolors=rings, zorder=2 + ringed, **colors)
    if ax.collections:
        ax.figure.colorbar(ax.collections[0], label="needle found in 1,024 tokens")
    ax.set(xlabel="loss within the window of 256, nats per token", ylabel="loss beyond it, nats per token")
    draw_names(ax, named, "x-small", colors=False)


def draw_needle(ax, done: dict) -> None:
    length, ticks = SCALES["small"].flags["block_size"], []
    for system, runs in ranking(done).items():
        if system in DRAWN:
            found = needles(runs[0])
            ax.plot(found.keys(), found.values(), "o-", color=COLORS[system], label=name(system))
            ticks = list(found)
    ax.axvline(length, color="0.5", ls=":")
    ax.axhline(0.1, color="0.5", ls="--")
    number_axis(ax, ticks)
    ax.set(xlabel="tokens of text (dotted: the training length)", ylabel="needle found (dashed: by chance)")


def draw_ladder(ax, done: dict) -> None:
    """The paper's accuracies against our loss, for the systems that it has, whose names are at recall."""
    losses = {system: mean_loss(rows) for system, rows in ranking(done).items() if system in PAPER}
    for i, tasks in enumerate(("general tasks", "recall tasks")):
        accuracies = [PAPER[system][i] for system in losses]
        ax.scatter(list(losses.values()), accuracies, marker="so"[i], color=f"C{i}", label=f"{tasks}, the paper's")
    ax.set(xlabel="validation loss here, nats per token", ylabel="accuracy in the paper, %")
    points = [(system, (loss, PAPER[system][1])) for system, loss in losses.items()]
    draw_names(ax, sorted(points, key=lambda named: -named[1][1]), colors=False)


def draw_later(ax, done: dict) -> None:
    """From an epoch at the small scale to four (solid) and to as many operations as Hymba (dotted). Losses at the large
    scale are of longer context, so its points are by themselves."""
    ranked, names = ranking(done), known(done)
    point = lambda runs: (runs[0]["tokens"] * operations(runs[0]), mean_loss(runs))  # noqa: E731
    named = []
    for (what, rows), style in zip(later(done).items(), ("x:", "o-", "s"), strict=True):
        for system, runs in rows.items():
            if system in ranked:
                begin, end = point(ranked[system]), point(runs)
                color = COLORS[system] if system in names else "0.7"
                ax.plot(*zip(begin, end, strict=True), style, color=color, ms=5, lw=1, markevery=[1])
                if system in names:
                    named.append((system, end))
        ax.plot([], style, color="0.4", ms=5, lw=1, label="large (longer context)" if what == "large" else what)
    ax.set(xscale="log", xlabel="floating-point operations of training", ylabel="validation loss, nats per token")
    draw_names(ax, named, "x-small")


def draw_heads(ax, done: dict, kind: str) -> None:
    """After four epochs, what removing the heads of one kind from one block costs."""
    for i, (system, (row, *_)) in enumerate(shown(done).items()):
        changes = pictures.numbers(row["heads"][kind])
        if not all(map(math.isnan, changes)):
            ax.plot(
                range(1, len(changes) + 1), changes, "o-", color=COLORS[system], label=name(system), ms=max(2, 10 - i)
            )
    what = {"attn": "attention", "ssm": "SSM heads"}[kind]
    ax.set_title("after four epochs, first seeds", fontsize="small")
    ax.set_yscale("symlog", linthresh=1e-3)  # removing some may help
    ax.set(xlabel="block, from 1", ylabel=f"change of the loss without its {what}, nats per token")


PICTURES = {
    "losses": draw_losses, "rates": draw_rates, "ladder": draw_ladder, "throughput": draw_throughput,
    "flops": lambda ax, done: draw_curves(ax, done, False), "time": lambda ax, done: draw_curves(ax, done, True),
    "recall": draw_recall, "pairs": draw_pairs, "positions": draw_positions, "reach": draw_reach,
    "needle": draw_needle, "later": draw_later, "heads_attn": lambda ax, done: draw_heads(ax, done, "attn"),
    "heads_ssm": lambda ax, done: draw_heads(ax, done, "ssm"),
}  # fmt: skip


def main(done: dict, folder: Path) -> None:
    """Print the tables, and draw every picture into folder."""
    print(table(done), recall_table(done), later_table(done), sep="\n\n")
    plt = pictures.pyplot("--figures", needed=True)
    for picture, draw in PICTURES.items():
        fig, ax = plt.subplots(figsize=(7.5, max(4.5, 0.25 * len(SYSTEMS))))
        draw(ax, done)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="small")
        ax.grid(alpha=0.3)
        fig.tight_layout()
        pictures.save(plt, folder / f"{picture}.png")
    names = [f"{picture}.png" for picture in PICTURES]
    if models := {
        name(system): {"pattern": row["flags"]["pattern"], "texts": {"": {"blocks": row["attention"]}}}
        for system, (row, *_) in shown(done).items()
    }:
        pictures.draw_attention(plt, models)
        plt.tight_layout()
        pictures.save(plt, folder / "attention.png")
        names.append("attention.png")
    print(f"wrote {', '.join(names)} in {folder}")
