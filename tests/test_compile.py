"""Every kernel compiles for GPUs that need not be here, fits into their shared memory, and spills little."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from runs import ROOT

import bench
from conftest import TRITON, needs_gpu

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a program can have
# Bytes that a thread may spill, the most of Triton 3.6 and 3.8; with 3.6 on Hopper, none of these does
SPILLS = dict(scan_forward_kernel=96, scan_backward_kernel=160)
SPILLS |= dict(attention_forward=16, attention_backward_q=32, attention_backward_kv=96)
# Mamba-2's, the most of Triton 3.6 and 3.8, on Hopper, too. Of the backward pass, most are addresses, kept from
# before the loop over heads
SPILLS |= dict(ssd_backward_states_kernel=136, ssd_backward_kernel=768)
# What other versions spill more, on sm_120 and, the scan, on sm_80
MORE = {"3.7": dict(ssd_backward_kernel=800), "3.9": dict(scan_backward_kernel=176, ssd_backward_kernel=856)}
# Where attention's tiles come without the memory accelerator
BY_POINTERS = SPILLS | dict(attention_forward=160, attention_backward_q=80, attention_backward_kv=240)


@pytest.mark.skipif(not TRITON, reason="pip install triton: 3.6 or later")
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles(capability, tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), str(capability)]
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kernel"')]
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("kernels", "engine_kernels", "ssd_kernels"))
    launched = set(re.findall(r"^ +(\w+)\[.+\]\(", source, re.M))
    assert launched == {row["kernel"] for row in rows} and len(launched) > 20
    room, spills = SHARED[capability] * 1024, SPILLS if 90 <= capability < 120 else BY_POINTERS
    if capability in (80, 120):
        spills = spills | MORE.get(".".join(version("triton").split(".")[:2]), {})
    fits = lambda row: "error" not in row and row["shared"] <= room and row["spills"] <= spills.get(row["kernel"], 0)  # noqa: E731
    assert not [row for row in rows if not fits(row)]


@pytest.mark.gpu
@needs_gpu
def test_kernels_as_older_gpus_run_them():
    """The GPU tests of all kernels once more, on the path of compute capability 8.0 (on a Hopper GPU)."""
    if torch.cuda.get_device_capability()[0] != 9 or "TRITON_OVERRIDE_ARCH" in os.environ:
        pytest.skip("needs a Hopper GPU, with its own path chosen before")
    files = [str(ROOT / f"tests/test_{name}.py") for name in ("kernels", "engine_kernels", "ssd_kernels")]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "4", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | bench.as_ampere())
    assert done.returncode == 0, done.stdout[-3000:]
