"""Small training runs, in this process or in one of their own."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import prepare
import train

ROOT = Path(__file__).parents[1]
TINY = [
    "--pattern=HhhH", "--n_embd=32", "--n_head=2", "--n_kv_head=1", "--n_hidden=32", "--d_state=2", "--n_meta=4",
    "--window=8", "--block_size=24", "--batch_size=2", "--warmup_steps=4", "--decay_steps=6", "--max_steps=24",
    "--eval_interval=8", "--eval_windows=4", "--log_interval=4", "--sample_tokens=0", "--dataset=words", "--device=cpu",
]  # fmt: skip


def train_here(root: Path, *flags: str) -> None:
    """What python train.py does, in this process."""
    train.main([*TINY, f"--data_dir={root / 'data'}", *flags])


def run_train(root: Path, *flags: str, launcher=(), wait: bool = True, **env):
    """python train.py in a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *TINY, f"--data_dir={root / 'data'}", *flags]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"} | env
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, cwd=root, start_new_session=True)
    if not wait:
        return process
    try:
        stdout, stderr = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's children, too
        raise
    return process.returncode, stdout, stderr


def prepare_bpe(source: Path, name: str, data_dir: Path) -> Path:
    """A data set with the tokenizer bpe:300, whose merges are not learned: that would need a package."""

    def pairs(texts, spec, folder):
        tokens = [bytes([i]) for i in range(256)] + [b"a" + bytes([i]) for i in range(97, 97 + 43)]
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
        (folder / "tokenizer.tiktoken").write_text("".join(lines))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "train_bpe", pairs)
        patch.setattr(prepare.importlib.util, "find_spec", lambda name: True)
        return prepare.prepare([str(source)], name, "bpe:300", data_dir=data_dir, overwrite=True)


def losses(out: Path, key: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def wait_for(condition, process) -> None:
    deadline = time.time() + 60
    while True:
        try:
            if condition():
                return
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        if process.poll() is not None or time.time() > deadline:
            raise AssertionError(process.communicate())
        time.sleep(0.005)
