"""Small training runs, in this process or in one of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import train

ROOT = Path(__file__).parents[1]
TINY = ["--pattern=HhhH", "--n_embd=32", "--n_head=2", "--n_kv_head=1", "--n_hidden=32", "--d_state=2", "--n_meta=4"]
TINY += ["--window=8", "--block_size=24", "--batch_size=2", "--warmup_steps=4", "--decay_steps=6", "--max_steps=24"]
TINY += [
    "--eval_interval=8",
    "--eval_windows=4",
    "--log_interval=4",
    "--sample_tokens=0",
    "--dataset=words",
    "--device=cpu",
]


def train_here(root: Path, *flags: str) -> None:
    """What python train.py does, in this process."""
    train.main([*TINY, f"--data_dir={root / 'data'}", *flags])


def run_train(root: Path, *flags: str, launcher=(), wait: bool = True, **env):
    """python train.py in a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *TINY, f"--data_dir={root / 'data'}", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"} | env
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
