"""
The folder of a training run, out/NAME: who may write there, how a new run takes the place of an old one, what a
checkpoint records of its run, and how a run goes on from it, to the bit or not at all.

    last/  the newest checkpoint, with the optimizer's state          metrics.jsonl  a line for each step
    best/  the weights with the lowest validation loss                lock           held by the process that trains
    new/   a run that will replace this one with its first checkpoint
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

import checkpoint
from files import brief, check_folders, locked, parse_json, recover
from flags import TrainConfig

if TYPE_CHECKING:
    from train import Run


def check_folder(cfg: TrainConfig) -> None:
    """Raise ValueError if out_dir holds a run that is neither continued nor replaced, or has none to continue."""
    out = Path(cfg.out_dir)
    check_folders(out)
    there = any((out / name).exists() for name in ("last", "last.old", "new/last"))
    if there and not cfg.resume and not cfg.overwrite:
        raise ValueError(
            f"{out} holds a run: --resume continues it, --overwrite replaces it, or pass another --out_dir"
        )
    if cfg.resume and not there:
        raise ValueError(f"nothing to resume: {out / 'last'} holds no checkpoint; leave --resume out to start one")


@contextmanager
def run_folder(cfg: TrainConfig, rank: int, world: int) -> Iterator[None]:
    """Hold out_dir for the with block, and clean up what a crash left there. ValueError if another process has it."""
    out = Path(cfg.out_dir)
    busy = f"another train.py is training in {out}: wait for it, or pass another --out_dir"
    with locked(out / "lock", busy) if rank == 0 else nullcontext():
        if rank == 0:
            take_over(out)
            recover(out / "last")
            shutil.rmtree(out / "new", ignore_errors=True)  # left by a run that replaced another, and got nowhere
        if world > 1:
            dist.barrier()
        yield


def take_over(out: Path) -> None:
    """Put the run in out/new into the place of the one in out, if it has a checkpoint. Wherever a crash stops this, the
    next call goes on: out/last goes last of the old run, and new/last comes last of the new one."""
    new = out / "new"
    if not (new / "last").exists():
        return
    names = ("best", "metrics.jsonl", "last")
    if (out / "last").exists():
        (out / "metrics.jsonl").unlink(missing_ok=True)
        (out / "loss.png").unlink(missing_ok=True)
        for name in ("best", "last.old", "last"):
            shutil.rmtree(out / name, ignore_errors=True)
    for name in names:
        if (new / name).exists():
            (new / name).rename(out / name)
    shutil.rmtree(new)


def metrics_so_far(run: "Run") -> list[str]:
    """The lines of metrics.jsonl up to the step from which a run goes on; none of a new run."""
    lines = run.metrics.read_text(errors="replace").splitlines(keepends=True) if run.metrics.exists() else []
    kept = []
    for number, line in enumerate(lines if run.cfg.resume else [], 1):
        if not line.endswith("\n"):  # the last one, as a crash left it
            break
        where = f"{run.metrics}, line {number} (remove it, or the file)"
        values = parse_json(line, where, {"step": int}, {"loss": float, "val_loss": float})
        step, losses = values["step"], [values.get(key) or 0 for key in ("loss", "val_loss")]
        if step < 1 or max(map(abs, losses)) > 1e30:
            raise ValueError(f"{where}: {brief(values)} cannot be")
        kept += [line] * (step <= run.step)
    return kept


# Flags that may differ from the checkpoint's: they do not change what is computed
QUIET = {"resume", "overwrite", "out_dir", "data_dir", "dataset", "data_command", "device", "kernels", "threads"}
QUIET |= {"prompt", "sample_tokens", "log_interval", "hybrid"}
LATER = {"max_steps", "eval_interval"}  # change the steps to come


def resume(run: "Run") -> int:
    """Load out_dir/last into a run. Returns the threads it ran on, 0 if unknown: others would round differently.

    Raises ValueError if there is nothing to resume, or if the run would not go on exactly as it would have without a
    stop, and resume is not "anyway".
    """
    cfg, last = run.cfg, run.out / "last"
    there, here = checkpoint.read_training(last), recorded(run)
    file = last / "tokenizer.tiktoken"
    ranks = file.read_bytes() if file.is_file() else None
    if there["tokenizer"] != here["tokenizer"] or ranks != run.data.tokenizer_file:
        name = brief(there["tokenizer"])
        raise ValueError(f"{last} was trained with another tokenizer ({name}) than this data set's")
    checkpoint.load_training(last, run.model, run.optimizer, there["step"])
    run.step, run.best = there["step"], math.inf if there.get("best_val_loss") is None else there["best_val_loss"]
    if run.step >= cfg.max_steps:
        raise ValueError(f"{last} is at step {run.step} of {cfg.max_steps}: raise --max_steps to go on")

    theirs = asdict(TrainConfig()) | there["train"]
    if unknown := sorted(theirs.keys() - {f.name for f in fields(TrainConfig)}):
        raise ValueError(f"{last / 'config.json'}: another version wrote it: unknown keys {brief(unknown)}")
    pairs = [(k, theirs[k], v) for k, v in here["train"].items() if k not in QUIET]
    # Older checkpoints do not say
    pairs += [(k, there[k], here[k]) for k in ("processes", "device") if there.get(k) is not None]
    data = here["data"] if there.get("data") is None else there["data"]
    pairs += [(f"the {k} data", str(data.get(k))[:12], v[:12]) for k, v in here["data"].items()]
    if not cfg.length_stages:
        pairs.append(("block_size", checkpoint.read_config(last)[2].block_size, run.model.config.block_size))
    differ = [(k, a, b) for k, a, b in pairs if a != b]
    changes = ", ".join(f"{k} is {brief(b)} and was {brief(a)}" for k, a, b in differ)
    if [k for k, _, _ in differ if k not in LATER] and cfg.resume != "anyway":
        raise ValueError(f"{last} would not go on exactly: {changes}; put it back, or --resume=anyway")
    if changes and run.rank == 0:
        print(f"going on from {last} with other values: {changes}")
    return there.get("threads") or 0


def recorded(run: "Run") -> dict:
    """What config.json of a checkpoint says of its run, as far as the result depends on it."""
    train = {k: v for k, v in asdict(run.cfg).items() if k not in ("kernels", "threads", "resume", "overwrite")}
    extra = {"train": train, "tokenizer": run.data.meta["tokenizer"], "data": run.data.checksums}
    return extra | {"processes": run.world, "device": run.device.type}
