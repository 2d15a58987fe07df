"""
The flags of train.py: its own (TrainConfig) and the architecture's (model.HymbaConfig), from a config file, which is
Python that assigns flags, and from the command line, which overrides it.
"""

import argparse
import difflib
import runpy
from dataclasses import dataclass, fields
from pathlib import Path

from model import HymbaConfig


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
    kernels: bool = True  # Triton kernels where there are a GPU and Triton
    threads: int = 0  # on a CPU; 0: one or all, whichever takes the shorter step when training starts
    seed: int = 1337
    prompt: str = "def "  # of the sample at the end; empty: none
    sample_tokens: int = 300

    def __post_init__(self):
        if self.schedule not in ("wsd", "cosine"):
            raise ValueError(f"schedule='{self.schedule}': use wsd or cosine")
        for name in ("batch_size", "grad_accum", "max_steps", "eval_interval", "eval_windows", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("grad_clip", "warmup_steps", "decay_steps", "weight_decay", "threads", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.min_lr <= self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} must lie between 0 and learning_rate={self.learning_rate}")
        if not 0 <= self.anneal_mix <= 1:
            raise ValueError(f"anneal_mix={self.anneal_mix}: must lie between 0 and 1")


def parse(argv: list[str], description: str = "") -> tuple[TrainConfig, dict]:
    """Flags from a config file and the command line: the training configuration and the HymbaConfig arguments.

    Raises ValueError for an unknown flag or a value of the wrong type, naming what was meant.
    """
    flags = {f.name: f for f in [*fields(TrainConfig), *fields(HymbaConfig)]}
    types = {"int": int, "float": float, "str": str, "bool": bool} | {t: t for t in (int, float, str, bool)}
    parser = argparse.ArgumentParser(
        "train.py", description=description, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
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
