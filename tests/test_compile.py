"""Every kernel compiles for GPUs that need not be here, fits into their shared memory, and spills no registers."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runs import ROOT

from conftest import TRITON

SHARED = {90: 227, 100: 227, 120: 99}  # KB that a program can have on the GPUs for which kernels.usable says yes
# Bytes that a thread may spill, the most of Triton 3.6 to 3.9; with 3.6 on Hopper none does
SPILLS = dict(scan_forward_kernel=96, scan_backward_kernel=160)
SPILLS |= dict(attention_forward=16, attention_backward_q=32, attention_backward_kv=96)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Capability -> what compile_kernels.py says of each kernel."""

    folder = tmp_path_factory.mktemp("compiled")

    def compile_all(capability: int) -> list[dict]:
        env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / str(capability))}
        command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), str(capability)]
        done = subprocess.run(command, capture_output=True, text=True, env=env | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kernel"')]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHARED, pool.map(compile_all, SHARED), strict=True))


@pytest.mark.skipif(not TRITON, reason="pip install triton: 3.6 or later")
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles(compiled, capability):
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("kernels", "engine_kernels"))
    launched = set(re.findall(r"^ +(\w+)\[.+\]\(", source, re.M))
    assert launched == {row["kernel"] for row in compiled[capability]} and len(launched) > 15
    spills = SPILLS | ({"attention_backward_kv": 704} if capability == 120 else {})  # it has no wgmma
    for row in compiled[capability]:
        assert "error" not in row, row
        assert row["shared"] <= SHARED[capability] * 1024 and row["spills"] <= spills.get(row["kernel"], 0), row
