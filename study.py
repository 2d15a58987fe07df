"""
The papers' comparison at a size that one GPU can do: every system with the same data, batches, tokens and code, and as
many parameters.

    python study.py --list             # what is done, what is missing, and how long that would take
    python study.py --minutes=9        # run what is missing, the most important first, for so long
    python study.py --figures          # tables and pictures of what is done

Here is what is compared: systems, sizes, and the runs. Each adds a line to results/runs.jsonl: what was trained, with
which flags, code, data and device, and what came out. Learning rates are tried first, for each system by itself. The
two best have an epoch each, and the better one counts; variants take the two of the system they vary. Then come more
seeds, recall, more epochs, and a larger scale, at half the rates. driver.py runs them, as many at a time as the GPUs
hold; what the end of the time cuts off goes on the next time. figures.py has the tables and pictures.

Data: python prepare.py python --site-packages --tokenizer=bpe:16384 --name=study
      python recall.py
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

import math
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cost
from files import check_folders, parse_json
from flags import Parser, read_config_file, run
from hybrids import hybrid_pattern
from model import Hymba, HymbaConfig

ROOT = Path(__file__).parent

# Systems, in order of importance: flags beside those of their scale. A pattern of one letter is repeated, "" is Hymba's
HYMBA, MAMBA2 = {"pattern": "", "n_meta": 32}, {"ssm": "mamba2", "d_state": 64}
SYSTEMS = {
    "transformer": {"pattern": "T"},
    "mamba": {"pattern": "M"},
    "inter": {"pattern": "inter:1:5:spread"},
    "hymba": HYMBA,
    "sliding": {"pattern": "t"},
    "intra": {"pattern": "H"},
    "mamba2": {"pattern": "M"} | MAMBA2,
    "hymba-mamba2": HYMBA | MAMBA2,
}
MAIN = list(SYSTEMS)
SYSTEMS |= {
    "hymba-mamba-first": HYMBA | {"pattern": "M..."},  # the first block has no attention
    "hymba-full-second": HYMBA | {"pattern": "MH..."},  # nor here, but the second has that of the first
    "hymba-no-meta": HYMBA | {"n_meta": 0},
    "hymba-no-sharing": HYMBA | {"kv_share": False},
    "hymba-no-ssm": HYMBA | {"pattern": "Ttt"},  # T and t where Hymba has H and h
    "hymba-windows": HYMBA | {"pattern": "h"},
    "hymba-diff": HYMBA | {"fusion": "diff"},
    "hymba-concat": HYMBA | {"fusion": "concat"},
    "hymba-group": HYMBA | {"branch_norm": "group"},
    # Attention heads beside those of the scale: a quarter, and three quarters of the width
    "hymba-1to3": HYMBA | {"fusion": "concat", "heads": 0.5},
    "hymba-3to1": HYMBA | {"fusion": "concat", "heads": 1.5},
    "inter-front": {"pattern": "inter:1:5:front"},
    "inter-middle": {"pattern": "inter:1:5:middle"},
    "intra-scattered": {"pattern": "intra:1:5:scattered"},
    "intra-clustered": {"pattern": "intra:1:5:clustered"},
    "intra-sandwich": {"pattern": "intra:1:5:sandwich"},
    "transformer-experts": {"pattern": "T", "n_expert": 8},
    "hymba-experts": HYMBA | {"n_expert": 8},
}
# Systems that are the same model as another one in the four blocks of recall, which runs instead
ALIKE = {"hymba-mamba-first": "hymba-full-second", "hymba-no-sharing": "hymba", "inter-middle": "inter"}
ALIKE |= {"intra-clustered": "intra-scattered"}
THIRD = ("hymba", "hymba-no-meta", "hymba-mamba-first")  # a third seed: the variants' two were 0.065 and 0.045 apart


@dataclass(frozen=True)
class Scale:
    """What all systems of one size share: flags, how many parameters work on a token, embeddings not counted, and the
    share of the small scale's learning rates (half of them when twice as wide)."""

    parameters: int
    flags: dict
    rate: float = 1.0

    def steps(self, tokens: float) -> int:
        return round(tokens / (self.flags["batch_size"] * self.flags["block_size"]))


SHARED = read_config_file(ROOT / "config" / "study.py")
SIZES = ("n_layer", "n_embd", "n_head", "n_kv_head", "block_size", "window", "batch_size")
RECORDS = {"dataset": "recall", "data_command": "python recall.py", "vocab_size": 2048, "eval_windows": 448}
SCALES = {
    "small": Scale(14_000_000, SHARED | dict(zip(SIZES, (12, 256, 4, 2, 1024, 256, 32), strict=True))),
    "large": Scale(56_000_000, SHARED | dict(zip(SIZES, (12, 512, 8, 4, 2048, 512, 16), strict=True)), 0.5),
    "recall": Scale(1_100_000, SHARED | dict(zip(SIZES, (4, 128, 4, 2, 1024, 64, 16), strict=True)) | RECORDS),
}
EPOCH, TRIAL, RECALL = 97e6, 25e6, 262e6  # tokens of the corpus, of a trial of a learning rate, and of a run of recall
RATES, RECALL_RATES = (2e-3, 4e-3, 8e-3), (3e-3, 6e-3)


def settings(system: str, scale: Scale, match: str = "parameters") -> dict:
    """Flags of a system, with n_hidden (a multiple of 8) such that it has as many (active) parameters as its scale says
    or, with match="flops", that training it takes as many operations as Hymba."""
    given = scale.flags | SYSTEMS[system]
    n, pattern = given["n_layer"], given["pattern"]
    if share := given.pop("heads", None):
        given["head_size"] = given["n_embd"] // given["n_head"]
        given |= {name: round(share * given[name]) for name in ("n_head", "n_kv_head")}
    if ":" in pattern:
        given["pattern"] = hybrid_pattern(pattern, n)
    elif pattern == "Ttt":
        given["pattern"] = HymbaConfig(n_layer=n).pattern.replace("H", "T").replace("h", "t")
    elif pattern.endswith("..."):
        given["pattern"] = (start := pattern[:-3]) + HymbaConfig(n_layer=n).pattern[len(start) :]
    else:
        given["pattern"] = pattern * n if pattern else HymbaConfig(n_layer=n).pattern
    fields = {k: v for k, v in given.items() if k in HymbaConfig.__dataclass_fields__} | {"n_hidden": 8}
    if match == "flops":
        like = cost.meta_model(config_fields(settings("hymba", scale)))
        return given | {"n_hidden": cost.solve(fields, cost.flops_per_token, cost.flops_per_token(like), 8)["n_hidden"]}
    return given | {"n_hidden": cost.solve(fields, parameters, scale.parameters, 8)["n_hidden"]}


def parameters(model: Hymba) -> int:
    """How many work on a token, the embedding not counted."""
    return cost.active_params(model) - model.embed.weight.numel()


def config_fields(flags: dict) -> dict:
    return {k: v for k, v in flags.items() if k in HymbaConfig.__dataclass_fields__}


# ----------------------------------------------------------------------------------------------------------------------
# What is to be run


@dataclass(frozen=True)
class Plan:
    """One run. The stage says what it is for: rate, epoch, flops (as an epoch, matched in them), long, recall."""

    system: str
    scale: str
    stage: str
    tokens: float
    learning_rate: float  # 0: not known yet
    seed: int = 1

    @property
    def key(self) -> tuple:
        return self.scale, self.system, self.stage, self.learning_rate, self.seed

    @property
    def shares(self) -> bool:
        return shares(self.stage, self.seed)

    @property
    def name(self) -> str:
        return "-".join([self.scale, self.system, self.stage, f"{self.learning_rate:g}", str(self.seed)])

    def flags(self) -> dict:
        scale, rate = SCALES[self.scale], self.learning_rate
        steps = scale.steps(self.tokens)
        match = "flops" if self.stage == "flops" else "parameters"
        schedule = {"max_steps": steps, "warmup_steps": min(100, steps // 4), "decay_steps": steps // 4}
        rates = {"learning_rate": rate, "min_lr": rate / 100, "seed": self.seed, "eval_interval": steps}
        return settings(self.system, scale, match) | schedule | rates


def shares(stage: str, seed: int) -> bool:
    """Whether another run may use the GPU at the same time: the speed of this one is not asked for, or is known from
    the epoch of the same system."""
    return stage in ("rate", "recall", "long") or seed > 1


def trials(done: dict, system: str) -> tuple[list[float], list[float]]:
    """The rates to be tried for a system, and the two best of them, none while one is missing. A best rate at the edge
    asks for its neighbour, half or twice as large, up to three times."""
    rates = list(RATES)
    while True:
        rows = {rate: done.get(("small", system, "rate", rate, 1)) for rate in rates}
        if None in rows.values():
            return rates, []
        best, second, *_ = sorted(rates, key=lambda rate: rows[rate]["val_loss"] or math.inf)
        if best not in (rates[0], rates[-1]) or len(rates) == len(RATES) + 3:
            return rates, [best, second]
        rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]


def epoch_rates(done: dict, system: str, scale: str = "small") -> list[float]:
    """The two rates of a system's epochs: the best of its trials, or of those of the system that it is a variant of;
    zeros while they are not known."""
    found = trials(done, system if system in MAIN else system.split("-")[0])[1] or [0.0, 0.0]
    return [rate * SCALES[scale].rate for rate in found]


def better_rate(done: dict, system: str, scale: str = "small") -> float:
    """The rate at which the first seed of a system's epochs ended lower; 0 while one is missing."""
    known = all((scale, system, "epoch", rate, 1) in done for rate in epoch_rates(done, system, scale))
    return next((row["learning_rate"] for row in epochs(done, system, scale) if known), 0.0)


def plans(done: dict) -> Iterator[Plan]:
    """All runs of the study, the most important first."""
    rates = {system: epoch_rates(done, system) for system in SYSTEMS}
    known = all(("small", s, "epoch", rate, 1) in done for s in SYSTEMS for rate in rates[s])
    best = {s: better_rate(done, s) for s in SYSTEMS}
    other = {s: max(rates[s], key=lambda rate: rate != best[s]) if best[s] else 0.0 for s in SYSTEMS}
    firsts = {s: rows[0]["val_loss"] for s in SYSTEMS if (rows := epochs(done, s))}
    five = sorted(firsts, key=firsts.get)[:5] if known else []  # the best, by first seeds
    winner = five[0] if five else "hymba"
    variants = [system for system in SYSTEMS if system not in MAIN]
    large = list(dict.fromkeys([winner, "hymba", "transformer", "inter", "mamba"]))
    late = [system for system in ["hymba-full-second"] if system not in large]  # better than Hymba if small
    for system in MAIN:
        for rate in trials(done, system)[0]:
            yield Plan(system, "small", "rate", TRIAL, rate)
        for rate in rates[system]:
            yield Plan(system, "small", "epoch", EPOCH, rate)
    for system in MAIN:
        yield Plan(system, "small", "epoch", EPOCH, best[system], seed=2)
    for system in MAIN:
        yield Plan(system, "recall", "recall", RECALL, RECALL_RATES[0])
    for system in variants:
        for rate in rates[system]:
            yield Plan(system, "small", "epoch", EPOCH, rate)
    for system in ("transformer", "mamba", "inter"):  # Hymba's own operations are the measure
        yield Plan(system, "small", "flops", EPOCH, best[system])
    long = list(dict.fromkeys([winner, "hymba", "transformer", "inter", "intra"]))
    for system in long:
        yield Plan(system, "small", "long", 4 * EPOCH, best[system])
    for pick in (best, other):
        for system in large:
            yield Plan(system, "large", "epoch", 2 * EPOCH, pick[system] * SCALES["large"].rate)
    for rate, seed in zip(RECALL_RATES, (2, 1), strict=True):
        for system in MAIN:
            yield Plan(system, "recall", "recall", RECALL, rate, seed)
    few, others = ([s for s in variants if (s in THIRD) == third] for third in (True, False))
    for systems, seed in ((few, 2), (THIRD, 3), (others, 2)):
        for system in systems:
            yield Plan(system, "small", "epoch", EPOCH, best[system], seed)
    for seed in (2, 3):  # the first seed without meta tokens had not learned to use long context at this rate
        yield Plan("hymba-no-meta", "small", "epoch", EPOCH, other["hymba-no-meta"], seed)
    for pick in (best, other):
        for system in late:
            yield Plan(system, "large", "epoch", 2 * EPOCH, pick[system] * SCALES["large"].rate)
    for system in [*large, *late]:
        yield Plan(system, "large", "epoch", 2 * EPOCH, better_rate(done, system, "large"), seed=2)
    # The Transformer with experts is 1.02% too large in recall: n_hidden is a multiple of 8, as its kernels want it
    recalling = [system for system in variants if system not in (*ALIKE, "transformer-experts")]
    for system in recalling:
        yield Plan(system, "recall", "recall", RECALL, RECALL_RATES[0])
    for systems, seed in ((late, 1), ([*long, *late], 2)):
        for system in systems:
            yield Plan(system, "small", "long", 4 * EPOCH, best[system], seed)
    again = [system for system in long if system in (*MAIN, *recalling)]  # a third time
    for systems, seed in ((recalling, 2), (again, 3)):
        for system in systems:
            yield Plan(system, "recall", "recall", RECALL, RECALL_RATES[0], seed)
    for system in five:
        if system not in (*long, *late):
            yield Plan(system, "small", "long", 4 * EPOCH, best[system])


def epochs(done: dict, system: str, scale: str = "small", stage: str = "epoch") -> list[dict]:
    """First seeds of a system's runs of a stage that did not diverge, the one that ended lower first."""
    found = [done.get((scale, system, stage, rate, 1)) for rate in epoch_rates(done, system, scale)]
    return sorted((r for r in found if r and r["val_loss"]), key=lambda r: r["val_loss"])


def ranking(done: dict, scale: str = "small", stage: str = "epoch") -> dict[str, list[dict]]:
    """Runs of a stage of each system that has one, a row for each seed, at the rate at which the first seed ended
    lower; the lowest mean loss first."""
    rows = {}
    for system in SYSTEMS:
        for first in epochs(done, system, scale, stage)[:1]:
            others = [done.get((scale, system, stage, first["learning_rate"], seed)) for seed in (2, 3)]
            rows[system] = [first, *(row for row in others if row and row["val_loss"])]
    return dict(sorted(rows.items(), key=lambda pair: mean_loss(pair[1])))


def mean_loss(rows: list[dict]) -> float:
    return statistics.mean(r["val_loss"] for r in rows)


def read(results: Path, data: dict | None = None) -> dict:
    """Results by the key of their plan, the last of each, on the data sets whose hashes `data` has, or else on those of
    the last line. Trials count on any data: a rate that was the best on other data is good enough."""
    names = {"scale": str, "system": str, "stage": str, "learning_rate": float, "seed": int, "flags": dict}
    names |= {"tokens_per_s": float, "val_loss": float | None}
    lines = results.read_text().splitlines() if results.exists() else []
    rows = [parse_json(line, f"{results}, line {number}", names) for number, line in enumerate(lines, 1)]
    data = data or (rows[-1] if rows else {})
    done = {}
    for row in rows:
        name = f"{row['flags'].get('dataset')}_data"
        if row["stage"] == "rate" or row.get(name) == data.get(name):
            done[row["scale"], row["system"], row["stage"], row["learning_rate"], row["seed"]] = row
    return done


def main(argv: list[str]) -> None:
    import driver  # both import this file
    import figures

    parser = Parser("study.py", __doc__)
    parser.add_argument("--minutes", type=float, help="run what is missing for so long")
    parser.add_argument("--list", action="store_true", help="what is done, and what is missing")
    parser.add_argument("--figures", action="store_true", help="print the tables and draw the pictures")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="the folder of runs.jsonl [results]")
    text = "a file to measure the loss on, too; can be repeated"
    parser.add_argument("--text", action="append", type=Path, default=[], help=text)
    parser.add_argument("--commit", help="of the code that runs [what git says]")
    args = parser.parse_args(argv)
    if not (args.list or args.figures) and args.minutes is None:
        raise ValueError("nothing to do: give --list, --minutes=9 or --figures")
    if args.minutes is not None and not 0 < args.minutes <= 1e4:
        raise ValueError(f"--minutes={args.minutes:g}: must be more than 0, and 10,000 or less")
    if missing := [path for path in args.text if not path.exists()]:
        raise FileNotFoundError(f"no file or folder {missing[0]}")
    if len({path.name for path in args.text}) < len(args.text):
        raise ValueError("--text: results have a text's name without its folder, and two have the same")
    check_folders(args.results)
    results = args.results / "runs.jsonl"
    if args.figures and not args.minutes and not (results.exists() and results.stat().st_size):
        raise FileNotFoundError(f"no results in {results}: --minutes=9 makes some")
    if args.minutes:
        args.results.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + 60 * args.minutes
        asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        if not (commit := args.commit or asked.stdout.strip()):
            raise ValueError("git does not know this folder: say which code runs, --commit=NAME")
        driver.run_missing(results, deadline, commit, [path.absolute() for path in args.text])
    if args.list:
        driver.listing(read(results))
    if args.figures:
        figures.main(read(results), args.results)


if __name__ == "__main__":
    run("study.py", main, "--text")
