"""
Compile every Triton kernel for a GPU that need not be there: python tests/compile_kernels.py CAPABILITY (80, 90, ...).

The wrappers of kernels.py and engine_kernels.py are called as a model calls them, at the sizes of Hymba-125M and
Hymba-1.5B in bfloat16, with launching replaced by compiling. Prints a JSON line for each kernel and its constants:
shared memory, registers, and bytes spilled by a thread. test_compile.py runs it.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))
import engine_kernels
import kernels
import ssd_kernels

capability, compiled = int(sys.argv[1]), {}


class Driver:
    """As much of a driver as compiling asks for."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


def compile_only(self, *args, grid, warmup, **kwargs):
    try:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    except Exception as e:
        compiled[self.__name__, type(e).__name__] = " ".join(str(e).split())[-500:]
        return
    compiled[self.__name__, kernel.hash] = kernel


def resources(kernel) -> dict[str, int]:
    """Of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"shared": kernel.metadata.shared, "registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def call_all(C: int, H: int, G: int, n_hidden: int, V: int) -> None:
    """Each operation with kernels, of a model C wide with H query and G key/value heads."""
    D, N, E, F, M, W = 2 * C, 16, C // H, 2 * C // H, 128, 1024
    new = lambda *shape, dtype=torch.bfloat16: torch.zeros(*shape, dtype=dtype)  # noqa: E731
    new32 = lambda *shape: new(*shape, dtype=torch.float32)  # noqa: E731
    for B, T in ((1, 2176), (16, 136), (128, 8)):  # in segments; two channels to a thread; four
        proj, BC = new(B, T, 2 * D), new(B, T, 2 * N)
        x, dt, z = proj[..., :D], new(B, T, D), proj[..., D:]
        scan = x, dt, new32(D, N), BC[..., :N], BC[..., N:], new32(D), z, new32(D)
        _, _, chunks = kernels._scan_forward(*scan, None, True)
        kernels._scan_forward(*scan, new32(B, D, N), False)
        kernels._scan_backward(*scan, chunks, new(B, T, D), None)
    B, T, P, S = 1, 2176, 64, 128  # Mamba-2: channels of a head, states
    xBC, dt, state, head = new(B, T, D + 2 * S), new(B, T, D // P), new32(B, D // P, P, S), new32(D // P)
    x, BC = xBC[..., :D].unflatten(2, (-1, P)), (xBC[..., D : D + S], xBC[..., D + S :])
    ssd_kernels._ssd_forward(x, dt, head, *BC, head, head, None)
    ssd_kernels._ssd_backward(x, dt, head, *BC, head, head, state, new(B, T, D // P, P), state)
    kernels.conv(x := new(B, T, 2 * D)[..., :D], weight := new32(D, 4), bias := new32(D), 0)
    kernels.conv_backward_op(new(B, T, D), x, weight, bias, 0)
    q, k, v = new(B, T, H, E), new(B, T, G, E), new(B, T, G, F)
    for window in (W, T):
        o, lse = kernels.attention(q, k, v, window, M)
        kernels.attention_backward(new(B, T, H, F), q, k, v, o, lse, window, M)
    for grad in (True, False):
        kernels.cross_entropy(new(16, V), torch.zeros(16, dtype=torch.int64), grad)
    angles = new32(1, T, 1, E // 2), new32(1, T, 1, E // 2)
    kernels.apply_rope(q, angles), kernels.swiglu(new(B, T, n_hidden), new(B, T, n_hidden))
    kernels.normed_sum(o := new(B, T, D), o, new(D), new(D), 0.5, 0.5, 1e-6)

    x, residual, pos = new(B, 1, C), new(B, 1, C), torch.zeros(B, dtype=torch.int64)
    engine_kernels.matvec(x, new(H * E + G * (E + F) + 2 * D, C), None, new(C), 1e-6)
    engine_kernels.matvec(x, new(n_hidden, C), new(n_hidden, C), new(C), 1e-6)
    engine_kernels.matvec(new(B, 1, D), new(C, D), add=residual)
    proj, cache = new(B, 1, H * E + G * (E + F) + 2 * D), (new(B, 8192, G, E), new(B, 8192, G, F))
    angles = new32(B, 1, 1, E // 2), new32(B, 1, 1, E // 2)
    engine_kernels.rope_append(proj, *angles, pos, *cache, H, True, W, M)
    engine_kernels.decode_attention(new(B, 1, H, E), *cache, pos)
    engine_kernels.conv_step(proj, weight, bias, new(B, 3, D))
    parameters, dt = new(B, 1, C // 16 + 2 * N), new(B, 1, D)
    for scale in (new(N), None):
        step = dt, dt, new32(D, N), parameters, new32(D), proj, new32(D), new32(B, D, N), scale, scale, 1e-6
        engine_kernels.scan_step(*step)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    kernels.OVERRIDE = capability
    run, JITFunction.run = JITFunction.run, compile_only
    call_all(512, 8, 4, 1664, 32064)
    call_all(1600, 25, 5, 5504, 32064)
    for (name, _), kernel in compiled.items():
        print(json.dumps({"kernel": name} | ({"error": kernel} if isinstance(kernel, str) else resources(kernel))))
