"""
The command lines of all scripts: the flags of train.py, which are its own (TrainConfig) and the architecture's
(model.HymbaConfig), from a config file and the command line; the parser of the other scripts; and `run`, which makes
one line of whatever goes wrong.
"""

import argparse
import atexit
import difflib
import inspect
import os
import re
import runpy
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from files import brief, of_type
from hybrids import hybrid_pattern
from model import HymbaConfig, check_fields


@dataclass
class TrainConfig:
    """All flags that are not the architecture's."""

    # Files
    out_dir: str = ""  # checkpoints and metrics; empty: out/ and the config file's name
    resume: str = ""  # go on from out_dir/last, to the bit; --resume=anyway: although the result will be another
    overwrite: bool = False  # start anew although out_dir holds a run, which is kept until the first checkpoint
    data_dir: str = "data"  # where data sets live
    dataset: str = "python"  # its folder there
    data_command: str = ""  # what makes the data set, for the error if it is not there
    hybrid: str = ""  # makes --pattern: inter:1:5:spread, intra:1:5:scattered and the like (hybrids.py)
    # Data and schedule
    anneal_dataset: str = ""  # data annealing: this data set is mixed in while the rate decays (Hymba, Sec. 2.5)
    anneal_mix: float = 0.5  # its share of the sequences then
    length_stages: str = ""  # length curriculum, "2048:9000,8192:1000": block_size:steps, tokens per step constant
    batch_size: int = 8  # sequences of block_size in one forward pass of one process
    grad_accum: int = 1  # such passes before each optimizer step
    max_steps: int = 1000  # of the optimizer
    schedule: str = "wsd"  # warmup-stable-decay, or cosine
    warmup_steps: int = 100  # linearly up to learning_rate
    decay_steps: int = 200  # of wsd: the last ones, linearly down to min_lr
    seed: int = 1337  # of the first weights and of every batch
    # Optimizer
    learning_rate: float = 1e-3  # its largest value
    min_lr: float = 1e-5  # at the end
    weight_decay: float = 0.1  # of the matrices of linear layers
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    # Evaluation
    eval_interval: int = 250  # steps between evaluations, each followed by a checkpoint
    eval_windows: int = 64  # validation sequences, the same each time
    log_interval: int = 10  # steps
    prompt: str = ""  # of the sample at the end; empty: a new text
    sample_tokens: int = 300  # 0: no sample
    # Machine
    device: str = ""  # empty: cuda, else mps, else cpu
    compile: bool = True  # torch.compile, on CUDA only
    kernels: bool = True  # Triton kernels where there are a GPU and Triton
    threads: int = 0  # on a CPU; 0: one or all, whichever takes the shorter step when training starts

    def __post_init__(self):
        whole = {name: (0, 2**31) for name in ("warmup_steps", "decay_steps", "sample_tokens")}
        whole |= {"seed": (0, 2**63 - 1), "threads": (0, 1024), "max_steps": (1, 2**31)}
        rates = {name: (0, 1e6) for name in ("learning_rate", "min_lr", "weight_decay", "grad_clip")}
        check_fields(self, whole | rates | {name: (0, 1) for name in ("beta1", "beta2", "anneal_mix")})
        if self.schedule not in ("wsd", "cosine"):
            raise ValueError(f"schedule={brief(self.schedule)}: use wsd or cosine")
        if self.resume not in ("", "True", "anyway"):
            raise ValueError(f"resume={brief(self.resume)}: write --resume or --resume=anyway")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on with a run and --overwrite replaces it: give one of them")
        for name in ("data_dir", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"--{name}= is empty: give a folder, or leave it out")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} must lie between 0 and learning_rate={self.learning_rate}")
        if max(self.beta1, self.beta2) == 1:
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}: must be less than 1")


class UsageError(ValueError):
    """Arguments that are not understood."""


FLAGS = {f.name: f for f in [*fields(TrainConfig), *fields(HymbaConfig)]}
SWITCHES = {f.name for f in FLAGS.values() if f.type is bool} | {"resume"}  # --name alone means True


def parse(argv: list[str], description: str = "") -> tuple[TrainConfig, dict]:
    """Flags from a config file and the command line: the training configuration and the HymbaConfig arguments.

    Raises UsageError for arguments that are not understood, ValueError for a config file or values that are wrong.
    """
    file, given = Path(__file__).parent / "config" / "tiny.py", {}
    rest, argv = [], list(argv)
    asked_help = "--help" in argv or "-h" in argv
    while argv:
        name, equals, value = (arg := argv.pop(0)).partition("=")
        name = name.removeprefix("--")
        if arg in ("--help", "-h"):
            continue
        if not arg.startswith("--"):
            rest.append(arg)
            continue
        if name not in FLAGS:
            raise UsageError(f"unknown flag '{name}'{similar(name)}")
        if not equals and name in SWITCHES:
            value = argv.pop(0) if argv[:1] in (["True"], ["False"]) else "True"
        elif not equals:
            if not argv or argv[0].startswith("--"):
                raise UsageError(f"--{name} needs a value: --{name}=...")
            value = argv.pop(0)
        given[name] = value
    for arg in rest:
        name = arg.lstrip("-").partition("=")[0]
        if name != arg and not Path(arg).is_file():
            meant = f": did you mean --{arg.lstrip('-')}?" if name in FLAGS else similar(name)
            raise UsageError(f"argument '{arg}' is not understood{meant}")
    if len(rest) > 1:
        raise UsageError(f"two config files, {' and '.join(rest[:2])}: give one")
    file = Path(rest[0]) if rest else file
    values = read_config_file(file)
    if asked_help:
        print(help_text(description, file, values))
        sys.exit(0)
    if "pattern" in given or "n_layer" in given:  # whichever is given replaces both of the file's
        values.pop("pattern", None), values.pop("n_layer", None)
    if "dataset" in given:  # these were for the file's own
        values.pop("data_command", None), values.pop("prompt", None)
    if "pattern" in given:
        values.pop("hybrid", None)
    for name, value in given.items():
        values[name] = from_text(name, value)
    if values.get("hybrid"):
        if "pattern" in given:
            raise UsageError("--hybrid makes the pattern: leave --pattern out, or --hybrid")
        n_layer = values.get("n_layer") or len(values.get("pattern", "")) or HymbaConfig().n_layer
        values["pattern"] = hybrid_pattern(values["hybrid"], n_layer)
    if values.get("resume") in (True, False, "False"):
        values["resume"] = "True" if values["resume"] is True else ""
    values["out_dir"] = values.get("out_dir") or f"out/{file.stem}"
    names = {f.name for f in fields(TrainConfig)}
    train = TrainConfig(**{k: v for k, v in values.items() if k in names})
    model_args = {k: v for k, v in values.items() if k not in names}
    HymbaConfig(**model_args)  # whatever the data's vocabulary is, this must be possible
    return train, model_args


def from_text(name: str, text: str) -> int | float | str | bool:
    """The value of a flag from the command line. Raises ValueError if it is of another type."""
    kind = FLAGS[name].type
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name}={brief(text)}: must be {kind.__name__}") from None


def similar(name: str) -> str:
    """What an unknown flag may have meant, as the end of an error."""
    close = difflib.get_close_matches(name.replace("-", "_"), FLAGS, 1)
    return f": did you mean {close[0]}?" if close else "; see python train.py --help"


def read_config_file(file: Path) -> dict:
    """The flags that a config file assigns. Raises FileNotFoundError, and ValueError with the line that is wrong."""
    if not file.is_file():
        choices = ", ".join(sorted(str(p) for p in Path("config").glob("**/*.py")))
        raise FileNotFoundError(f"no config file {file}; there are {choices or 'none in config/'}")
    try:
        values = runpy.run_path(str(file))
    except SyntaxError as e:
        raise ValueError(f"{file}, line {e.lineno or 1}: {e.msg}") from None
    except (Exception, SystemExit) as e:
        line = next((f.lineno for f in reversed(traceback.extract_tb(e.__traceback__)) if f.filename == str(file)), 1)
        raise ValueError(f"{file}, line {line}: {type(e).__name__}: {e}") from None
    values = {k: v for k, v in values.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    for name, value in values.items():
        if name not in FLAGS:
            simple = isinstance(value, int | float | str)
            hint = similar(name) if simple else "; begin the name of what is no flag with _"
            raise ValueError(f"{file}: unknown flag '{name}'{hint}")
        kind = FLAGS[name].type
        if not of_type(value, kind) and not (name == "resume" and type(value) is bool):
            raise ValueError(f"{file}: {name}={brief(value)}: must be {kind.__name__}")
    return values


def help_text(description: str, file: Path, values: dict) -> str:
    """All flags in groups, each with the comment beside it in the source and its value in a config file."""
    lines = [description.strip()]
    for heading, config in (("", TrainConfig), ("Architecture", HymbaConfig)):
        lines += ["", f"{heading}:"] if heading else []
        for line in inspect.getsource(config).splitlines():
            if group := re.fullmatch(r"    # (.*)", line):
                lines += ["", f"{group[1]}:"]
            elif field := re.fullmatch(r"    (\w+): (\w+) = [^#]*?(?:  # (.*))?", line):
                name, kind, comment = field.groups()
                value = values.get(name, FLAGS[name].default)
                lines.append(f"  --{f'{name} ({kind})':24} {comment or ''} [{value}]".replace("  [", " ["))
    return "\n".join([*lines, "", f"[in brackets: the value in {file}, or the default]"])


# ----------------------------------------------------------------------------------------------------------------------
# All scripts


class Parser(argparse.ArgumentParser):
    """The parser of sample.py, prepare.py and bench.py: whole names only, and errors in one line."""

    def __init__(self, script: str, description: str):
        style = argparse.RawTextHelpFormatter
        super().__init__(script, description=description, formatter_class=style, allow_abbrev=False)

    def error(self, message: str):
        raise UsageError(f"{message}; see python {self.prog} --help")


def out_of_memory(e: BaseException) -> bool:
    words = ("out of memory", "not enough memory", "can't allocate memory", "Unable to allocate")
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or any(word in str(e) for word in words)


def run(script: str, main: Callable[[list[str]], None], lower: str = "") -> None:
    """Run a script's main(argv). What goes wrong becomes one line on stderr and the exit status: 2 for arguments that
    are not understood, 130 for Ctrl-C, and 1 for all else. `lower` says which flags take memory. Other exceptions are
    mistakes in this code, and keep their traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed, as services have them
            setattr(sys, name, open(os.devnull, "w" if number else "r"))
        getattr(sys, name).reconfigure(errors="replace")  # a character that a terminal cannot show is a ?
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        return
    except BrokenPipeError:  # the reader has gone: head, for one
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KeyboardInterrupt as e:
        status, message = 130, f"interrupted{', ' * bool(str(e))}{e}"
    except (ValueError, OSError, FloatingPointError) as e:
        status, message = 2 if isinstance(e, UsageError) else 1, str(e)
    except (MemoryError, RuntimeError) as e:
        if out_of_memory(e):
            reason = str(e).splitlines()[0] if str(e) else "no more to be had"
            status, message = 1, f"out of memory: lower {lower} ({reason})"
        elif any(words in str(e) for words in ("Connection closed by peer", "Connection reset by peer")):
            status, message = 1, "another process of this run has ended, and says why"
        else:
            raise
    finally:
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python ends ends it, silently
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # process 0 says the same, and then torchrun ends this one
    message = " ".join(message.split())
    print(f"{script}: {message if len(message) < 1000 else f'{message[:800]} ... {message[-190:]}'}", file=sys.stderr)
    sys.exit(status)
