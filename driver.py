"""
What runs the study: each plan of study.py that has no result yet, on the GPUs there are, until the time is over.

Each run is a train.py of its own, and what is measured of it are calls of evaluate.py and bench.py. A GPU with enough
memory trains two at a time, but one alone where the speed is asked for. The next begins while that one is measured, so
speed is taken over the last quarter of the steps. When the time is over, what runs is stopped: it goes on from its
checkpoint in out/study/, or starts anew where there is none.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import prepare
import study
from evaluate import read_text
from files import naming, recover
from study import Plan
from tokenizer import load_tokenizer

START, MEASURING, SAVING = 40, 50, 15  # seconds before the first step; of decode_speed and measure; of a checkpoint
SPEED = 700_000  # tokens/s at the small scale, of a system that was not timed yet
FASTEST = 3_000_000  # at most, of a system that has not run at a scale: the host has to keep up
BESIDE = 0.6  # of its speed, what a run keeps beside another on the same GPU


def folder(plan: Plan) -> Path:
    """Where train.py keeps a run, and what is measured of it is written."""
    return study.ROOT / "out" / "study" / plan.name


def checkpoint(plan: Plan) -> dict:
    """What config.json says of the checkpoint that a run has left, {} where there is none or it is of other data."""
    config = folder(plan) / "last" / "config.json"
    meta = study.ROOT / "data" / study.SCALES[plan.scale].flags["dataset"] / "meta.json"
    if not (config.exists() and meta.exists()):
        return {}
    saved = json.loads(config.read_text())
    return saved if saved["data"]["train"] == json.loads(meta.read_text())["train"]["sha256"] else {}


def measuring(plan: Plan) -> float:
    """How long it will take to measure what was trained."""
    if plan.stage == "rate":
        return 0
    return 2 * MEASURING if plan.stage == "long" else MEASURING


def seconds(plan: Plan, done: dict) -> float:
    """How long what its checkpoint lacks of a run will take: at the speed of the slowest of the same system and scale,
    if there is one. Those that had a GPU to themselves say it best; what others had beside them is not known. From one
    scale to another, speed goes with one over the parameters."""

    def speeds(here: bool, alone: bool) -> list[float]:
        found = []
        for (scale, system, stage, _, seed), row in done.items():
            same = system == plan.system and (scale == plan.scale) == here and study.shares(stage, seed) != alone
            if same and row["tokens_per_s"]:
                found.append(row["tokens_per_s"] * study.SCALES[scale].parameters / study.SCALES[plan.scale].parameters)
        return found

    alone, beside = speeds(here=True, alone=True), speeds(here=True, alone=False)
    guess = SPEED * study.SCALES["small"].parameters / study.SCALES[plan.scale].parameters
    elsewhere = min(*(speeds(here=False, alone=True) or [guess]), FASTEST)
    speed = min(beside) if beside and not alone else min(alone or [elsewhere]) * (BESIDE if plan.shares else 1)
    left = 1 - checkpoint(plan).get("step", 0) / study.SCALES[plan.scale].steps(plan.tokens)
    return (START if left else 0) + left * plan.tokens / speed + measuring(plan)


def train(plan: Plan, env: dict, deadline: float) -> dict | None:
    """Train a plan's model; None if the time ran out first. Of a run that diverged, val_loss is None. Raises
    RuntimeError with what train.py printed if it fails otherwise."""
    out, diverged = folder(plan), False
    recover(out / "last")  # where it was killed while it saved
    options = [f"--{name}={value}" for name, value in plan.flags().items()]
    if not (saved := checkpoint(plan)):
        shutil.rmtree(out, ignore_errors=True)  # nothing of another run is to be taken for this one's
    command = [sys.executable, "train.py", "config/study.py", *options, f"--out_dir={out}"]
    command += ["--resume=anyway"] if saved else []
    if saved.get("step") != plan.flags()["max_steps"]:  # else it is trained, and what followed was cut off
        output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        process = subprocess.Popen(command, cwd=study.ROOT, env=env, **output)
        left = deadline - time.monotonic()
        timers = threading.Timer(left - SAVING, process.terminate), threading.Timer(left, process.kill)
        for timer in timers:
            timer.start()
        said = process.communicate()[0]
        for timer in timers:
            timer.cancel()
        over = time.monotonic() > deadline - SAVING
        if over and process.returncode in (-signal.SIGTERM, -signal.SIGKILL):  # before a step, or while it saved
            return None
        diverged = process.returncode and "try a lower learning_rate" in said
        if process.returncode and not diverged:
            raise RuntimeError(f"{plan.name}: {said[-2000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps, last = [r for r in rows if "loss" in r], rows[-1] if rows and not diverged else {}
    if not diverged and "val_loss" not in last:
        return None
    speed = statistics.median([r["tokens_per_s"] for r in steps[3 * len(steps) // 4 :]] or [0])
    curve = [(r["step"], round(r["loss"], 4)) for r in steps[:: max(1, len(steps) // 200)]]
    return {"val_loss": last.get("val_loss"), "val_bpb": last.get("val_bpb"), "tokens_per_s": speed, "curve": curve}


def ask(command: list[str], env: dict, deadline: float) -> str:
    """What a script prints. Raises subprocess.TimeoutExpired at the deadline, and CalledProcessError if it fails."""
    left = deadline - time.monotonic()
    options = dict(cwd=study.ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True, timeout=left)
    return subprocess.run([sys.executable, *command], **options).stdout


def decode_speed(plan: Plan, env: dict, deadline: float) -> float:
    """Tokens/s in 64 sequences, after 8,192 tokens of each."""
    fields = study.config_fields(plan.flags()) | {"block_size": 8192}
    spec = {"batch": 64, "contexts": [8192], "config": fields, "prefill": False}
    said = ask(["bench.py", "decode", f"--worker={json.dumps(spec)}"], env, deadline)
    return json.loads(said.splitlines()[-1])[0]["tokens_per_s"]


def measure(plan: Plan, env: dict, deadline: float, texts: list[Path]) -> dict:
    """What else is known of a trained model: of recall, accuracies, and what removing heads costs; of text, losses by
    position and the needle, and after the longest training heads and attention, too."""

    def evaluate(task: str, *options: str) -> dict:
        out = folder(plan) / f"evaluate_{task}.json"
        ask(["evaluate.py", task, f"--init_from={folder(plan)}", f"--out={out}", *options], env, deadline)
        return next(iter(json.loads(out.read_text())["models"].values()))

    if plan.stage == "recall":
        found = evaluate("recall")
        result = {name: found[name] for name in ("accuracy", "pairs", "cache_bytes")}
        return result | {"heads": evaluate("heads")["recall"]}
    if plan.stage == "rate":
        return {}
    result = {
        "position": evaluate("loss")["texts"],
        "needle": evaluate("needle", "--needle=pass_key = {}", "--trials=32"),
    }
    if plan.stage == "long":
        result["heads"] = evaluate("heads")["loss"]
        result["attention"] = evaluate("attention")["texts"][plan.flags()["dataset"]]["blocks"]
    if texts:
        losses = evaluate("loss", *(f"--text={text}" for text in texts))["texts"]
        result["texts"] = {Path(text).name: loss for text, loss in losses.items()}
    return result


class Driver:
    """Runs what is missing until the deadline, and appends what came out to results."""

    def __init__(self, results: Path, deadline: float, commit: str, texts: list[Path]):
        """Raises FileNotFoundError where there is no data, and ValueError if a text cannot be measured with it."""
        self.results, self.deadline, self.texts = results, deadline, texts
        self.whole = deadline - time.monotonic()
        self.begun: dict[Plan, tuple[int | None, str]] = {}  # its GPU, and "training", "measuring" or "over"
        self.failed: list[str] = []
        self.turn = threading.Condition()  # holds what was begun and the file of results
        self.origin = {"commit": commit, "torch": torch.__version__}
        contexts = {}  # the longest with each data set
        for flags in (scale.flags for scale in study.SCALES.values()):
            data = flags["dataset"], flags["data_command"]
            contexts[data] = max(flags["block_size"], contexts.get(data, 0))
        for (name, command), need in contexts.items():
            folder = study.ROOT / "data" / name
            meta = prepare.open_split(folder, "train", command)[1]
            self.origin[f"{name}_data"] = meta["train"]["sha256"][:12]
            if meta["tokenizer"] == "none":  # of recall, whose models read no text
                continue
            tokenizer = load_tokenizer(meta["tokenizer"], folder, meta.get("tokenizer_sha256"))
            for text in texts:
                if (n := len(read_text(text, tokenizer).tokens)) <= need:
                    raise ValueError(f"--text={text} has {n:,} tokens, too few for windows of {need:,}: leave it out")

    def on(self, gpu: int | None, stage: str) -> list[Plan]:
        return [plan for plan, where in self.begun.items() if where == (gpu, stage)]

    def enter(self, plan: Plan, gpu: int | None, stage: str) -> None:
        with self.turn:
            self.begun[plan] = gpu, stage
            self.turn.notify_all()

    def pick(self, new: list[Plan], done: dict) -> Plan | None:
        """The first plan that has a rate and will end in time, or for which no call of as many minutes has the time, or
        else the first. What does not end in time goes on in the next call if out/ is still there."""
        left = self.deadline - time.monotonic()
        took = {plan: seconds(plan, done) for plan in new if plan.learning_rate}
        enough = left > 3 * START  # to get anywhere
        first = next(iter(took), None) if enough else None
        return next((p for p in took if took[p] < left - SAVING or (enough and took[p] > self.whole - START)), first)

    def next(self, gpu: int | None) -> Plan | None:
        """What is to be run next, once the GPU has room: it trains two runs that are not timed, or one. None if there
        is nothing, and no run that may tell the rate of another."""
        with self.turn:
            while True:
                done = study.read(self.results, self.origin)
                new = [p for p in study.plans(done) if p.key not in done and p not in self.begun]
                plan = self.pick(new, done)
                beside = self.on(gpu, "training")
                if plan and (not beside or all(p.shares for p in [plan, *beside])):
                    self.enter(plan, gpu, "training")
                    return plan
                busy = any(stage != "over" for _, stage in self.begun.values())
                if not plan and not (busy and any(not p.learning_rate for p in new)):
                    return None
                self.turn.wait()

    def alone(self, gpu: int | None) -> None:
        """Wait until nothing is measured on the GPU."""
        with self.turn:
            self.turn.wait_for(lambda: not self.on(gpu, "measuring"))

    def end(self, plan: Plan, gpu: int | None, row: dict | None) -> None:
        with self.turn:
            if row:
                with naming(self.results), self.results.open("a") as f:
                    f.write(json.dumps(row) + "\n")
            self.enter(plan, gpu, "over")  # and if it failed, nobody takes it up again

    def work(self, gpu: int | None) -> None:
        """Take up one run after another for a GPU, until there is none, or the time is over."""
        names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": names[gpu] if names else str(gpu)})
        device = "cpu" if gpu is None else torch.cuda.get_device_name(gpu)
        while plan := self.next(gpu):
            row = None
            try:
                print(f"{time.strftime('%H:%M:%S')} {plan.name} on {device}", flush=True)
                if (outcome := train(plan, env, self.deadline)) is None:
                    return
                if outcome["val_loss"] is not None:
                    if not plan.shares and gpu is not None:
                        self.alone(gpu)
                        outcome["decode_tokens_per_s"] = decode_speed(plan, env, self.deadline)
                    self.enter(plan, gpu, "measuring")
                    outcome |= measure(plan, env, self.deadline, self.texts)
                row = {"scale": plan.scale, "system": plan.system, "stage": plan.stage, "tokens": plan.tokens}
                row |= {"learning_rate": plan.learning_rate, "seed": plan.seed, "flags": plan.flags()}
                row |= outcome | self.origin | {"device": device}
                print(f"{time.strftime('%H:%M:%S')} {plan.name}: loss {outcome['val_loss']}", flush=True)
            except subprocess.TimeoutExpired:  # measured the next time
                return
            except (RuntimeError, subprocess.CalledProcessError) as e:  # the next one may not
                print(f"{time.strftime('%H:%M:%S')} {plan.name} failed: {e}", flush=True)
                self.failed.append(plan.name)
            finally:
                self.end(plan, gpu, row)


def listing(done: dict) -> None:
    """Print every run, with its loss or how long it will take, and how long all that is missing will."""
    total = 0.0
    for plan in study.plans(done):
        row, took = done.get(plan.key), seconds(plan, done)
        total += 0 if row else took / (2 if plan.shares else 1)
        loss = f"loss {row['val_loss']:.4f}" if row and row["val_loss"] else "diverged"
        what = loss if row else f"missing, {took / 60:.1f} min"
        print(f"{plan.name:42} {what}")
    print(f"missing: {total / 3600:.1f} hours on one GPU")


def run_missing(results: Path, deadline: float, commit: str, texts: list[Path]) -> None:
    """Run what is missing until the deadline, on all GPUs. Raises ValueError with the names of what failed."""
    driver = Driver(results, deadline, commit, texts)
    memory = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    gpus = [i for i, size in enumerate(memory) for _ in range(2 if size > 40e9 else 1)] or [None]
    with ThreadPoolExecutor(len(gpus)) as pool:
        list(pool.map(driver.work, gpus))
    if driver.failed:
        raise ValueError(f"failed, see above: {', '.join(driver.failed)}")
