"""
Speed and memory, ours beside the peers that are installed: python bench.py WHAT [--json=FILE]

    scan        the selective scan, forward and backward. On a GPU: ours, mamba-ssm, and the floor. On a CPU: ours and
                mambapy, each in a process of its own for its peak memory; --loop adds the loop over tokens that small
                reimplementations leave to autograd; --accuracy: errors of outputs and gradients on a GPU, against
                float64 and beside mamba-ssm's
    ssd         Mamba-2's scan on a GPU, forward and backward: ours, mamba-ssm's and fla's Triton kernels, and the
                floor; --accuracy: errors against float64
    attention   attention in a window of 1,024 tokens plus 128 meta tokens: ours, FlexAttention, and as the released
                code has it (two FlexAttention calls on halves of the values, keys and values repeated); and full
                causal attention beside PyTorch's own (SDPA)
    train       training steps of config/*_125m.py (bfloat16, torch.compile, fused AdamW, vocabulary 50,304): Hymba, the
                same with mamba-ssm's scan and FlexAttention in place of our kernels, Llama and the other baselines
    decode      inference in bfloat16 with random weights after 8,192 tokens of context: Hymba-1.5B and Llama-3.2-3B
                (here and in transformers), at each of --batches, halved until it fits. Prefill, at batches 1 and 16,
                reads prompts of that length; a decode step starts from a cache with random contents
    roadmap     the paper's Table 10 as flags of one model (Hymba-350M's sizes): cache and decode speed beside the
                paper's, as ratios to attention heads only
    sweep       decode speed against cache bytes of patterns T, t, M and Hymba's, from 1k to 128k tokens of context, at
                the largest batch that fits
    plot FILE...  pictures of what --json wrote of scan, attention, train and sweep: bench_scan.png, and so on

Floors are what the hardware cannot beat: for the scan one exponential for each token, channel and state on the special
function units, and reading and writing each input and output once at copy bandwidth, whichever is slower; for
attention 2 (E + F) operations for each pair that the mask lets through (5/2 of that backward), at 990 TFLOP/s; for a
decode step reading all weights and what each block sees of the caches once, at the copy bandwidth of the same run.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import cost
import ops
import pictures
import training
from engine import Cache, Engine, TokenLoop
from files import read_json
from flags import Parser, TrainConfig, parse, run
from model import Hymba, HymbaConfig

SCAN_CPU = (8, 512, 512, 16)  # B, T, D, N
SCAN_GPU = [(8, 2176, 3200, 16), (32, 2176, 1024, 16), (2, 8320, 3200, 16), (1, 65536, 3200, 16)]
SSD = [(8, 2176, 50, 128), (32, 2176, 16, 128)]  # B, T, heads, N with P = 64
ATTENTION = [(8, 2176, 25, 5), (2, 8320, 25, 5), (32, 2176, 8, 4)]  # B, T, H, G with E = 64, F = 128
COPY, PEAK = 3.0e12, 990e12  # B/s and bf16 FLOP/s of an H100
LLAMA_3B = dict(pattern="T" * 28, n_embd=3072, n_head=24, n_kv_head=8, n_hidden=8192, n_meta=0, vocab_size=128256)
SIZE_350M = dict(n_layer=32, n_embd=768, n_head=12, n_kv_head=4, n_hidden=2432, n_meta=0)
ROADMAP = {  # the paper's row: what it is, its flags, and the paper's tokens/s and cache in MB (A100, 8k, batch 128)
    1: ("Mamba heads only", dict(pattern="M" * 32), 4720.8, 1.87),
    5: ("hybrid heads, GQA", dict(pattern="H" * 32), 876.7, 148.24),
    6: ("attention heads only", dict(pattern="T" * 32, n_kv_head=12), 721.1, 414.72),
    7: ("5 + sliding window", dict(pattern="h" * 32, kv_share=False), 4485.1, 5.51),
    8: ("7 + 3 full", dict(kv_share=False), 2399.7, 41.19),
    9: ("8 + shared KV", {}, 2756.5, 39.42),
    12: ("1 + meta tokens", dict(pattern="M" * 32, n_meta=128), 4712.8, 1.87),
    13: ("9 + meta tokens", dict(n_meta=128), 2695.8, 40.01),
}


def timed(f, repeats: int) -> tuple[float, float]:
    """Median and spread (90th minus 10th percentile) of the milliseconds that f takes on the GPU."""
    for _ in range(3):
        f()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    cold = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    for start, end in events:
        cold.zero_()  # what the last run left in the L2 cache is gone, as in a model, and the host gets ahead
        start.record()
        f()
        end.record()
    torch.cuda.synchronize()
    ms = sorted(start.elapsed_time(end) for start, end in events)
    return statistics.median(ms), ms[int(0.9 * repeats)] - ms[int(0.1 * repeats)]


def forward_and_backward(f, inputs: list[torch.Tensor], repeats: int) -> dict:
    """Times of f(*inputs) alone and of its backward pass, in ms, and the peak memory of both, in MB. A backward pass
    that fails takes NaN ms."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = f(*inputs)
    grad = torch.randn_like(out)
    try:
        torch.autograd.grad(out, inputs, grad)
    except RuntimeError as e:  # fla's does on Hopper with Triton before 3.7.1, whose results are wrong
        print(f"no backward pass: {str(e).splitlines()[0]}", file=sys.stderr)
        grad = None
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.no_grad():
        fwd, fwd_spread = timed(lambda: f(*inputs), repeats)
    bwd = bwd_spread = math.nan
    if grad is not None:
        out = f(*inputs)
        bwd, bwd_spread = timed(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), repeats)
    return dict(fwd=fwd, fwd_spread=fwd_spread, bwd=bwd, bwd_spread=bwd_spread, peak_mb=peak)


def table(rows: list[dict]) -> None:
    """Print rows, one list of columns for all."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    text = [[f"{v:.3g}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in text)) + 2 for i, c in enumerate(columns)]
    for line in [columns, *text]:
        print("".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)))


def attempt(name: str, f, *args) -> dict | None:
    """f(*args), or None with a line that says why not: a peer that fails must not take the others' results with it."""
    try:
        r = f(*args)
        print(f"{name}: {r['fwd']:.3g} ms forward, {r['bwd']:.3g} ms backward", file=sys.stderr)
        return r
    except Exception as e:  # whatever a peer raises
        print(f"{name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", file=sys.stderr)
        return None


def mamba_ssm_scan(x, dt, A, B, C, D, z, dt_bias):
    """mamba-ssm's scan on our layout: it wants channels before tokens."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    t = (u.transpose(1, 2) for u in (x, dt))
    y = selective_scan_fn(*t, A, B.mT.contiguous(), C.mT.contiguous(), D, z.transpose(1, 2), dt_bias, True)
    return y.transpose(1, 2)


def scan_gpu(repeats: int, tokens: list[int]) -> list[dict]:
    import kernels

    rows = []
    for B, T, D, N in [(1, T, 3200, 16) for T in tokens] or SCAN_GPU:
        torch.manual_seed(0)
        new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        A = -torch.arange(1.0, N + 1, device="cuda").repeat(D, 1)
        bias = torch.empty(D, device="cuda").uniform_(-6.9, -2.25)  # steps of 1e-3 to 1e-1
        rest = [A, new(B, T, N), new(B, T, N), torch.ones(D, device="cuda")]
        ours = [new(B, T, D), 0.3 * new(B, T, D), *rest, new(B, T, D), bias]
        swap = lambda u: u.mT.contiguous().mT if u.dim() == 3 and u.shape[2] == D else u  # noqa: B023, E731
        theirs = [swap(u) for u in ours]  # in memory as mamba-ssm wants them, so that no copy is counted
        exp, hbm = B * T * D * N / (132 * 16 * 1.755e9) * 1e3, 4 * B * T * D * 2 / COPY * 1e3
        peers = {"ours": (lambda *u: kernels.selective_scan(*u)[0], ours)}
        if importlib.util.find_spec("mamba_ssm"):
            peers["mamba-ssm"] = (mamba_ssm_scan, theirs)
        for name, (f, inputs) in peers.items():
            inputs = [u.detach().requires_grad_() for u in inputs]
            if r := attempt(name, forward_and_backward, f, inputs, repeats):
                gbs = 8 * B * T * D / r["fwd"] / 1e6
                rows.append(dict(shape=str((B, T, D, N)), name=name, **r, exp_floor=exp, hbm_floor=hbm, fwd_GBps=gbs))
    ratios(rows)
    return rows


def scan_accuracy(tokens: list[int]) -> list[dict]:
    """Norm of the error over norm of the exact values, for y and each gradient, at (B, D, N) = (2, 256, 16)."""
    import kernels

    rows = []
    for T, dtype in [(T, dtype) for T in tokens or [2048, 65536] for dtype in (torch.bfloat16, torch.float32)]:
        torch.manual_seed(0)
        new = lambda *shape: torch.randn(*shape, device="cuda").to(dtype)  # noqa: B023, E731
        A = -torch.arange(1.0, 17, device="cuda").repeat(256, 1)
        bias = torch.empty(256, device="cuda").uniform_(-6.9, -2.25)  # steps of 1e-3 to 1e-1
        inputs = dict(x=new(2, T, 256), dt=0.3 * new(2, T, 256), A=A, B=new(2, T, 16), C=new(2, T, 16))
        inputs |= dict(D=torch.ones(256, device="cuda"), z=new(2, T, 256), dt_bias=bias)
        grad, exact = new(2, T, 256), None
        peers = {"float64": lambda **u: ops.selective_scan(**u)[0], "ours": lambda **u: kernels.selective_scan(**u)[0]}
        if importlib.util.find_spec("mamba_ssm"):
            peers["mamba-ssm"] = mamba_ssm_scan
        for name, f in peers.items():
            kind = torch.float64 if exact is None else None
            mine = {k: u.to(kind or u.dtype).clone().requires_grad_() for k, u in inputs.items()}
            y = f(**mine)
            found = dict(y=y, **dict(zip(mine, torch.autograd.grad(y, list(mine.values()), grad.to(y)), strict=True)))
            exact = exact or found
            if exact is not found:
                errors = {k: ((u.double() - exact[k]).norm() / exact[k].norm()).item() for k, u in found.items()}
                rows.append(dict(tokens=T, dtype=str(dtype).removeprefix("torch."), name=name) | errors)
    return rows


def ssd_peers() -> dict:
    """By name, Mamba-2's scan of the packages that are here, with our signature."""
    import ssd_kernels

    def mamba_ssm(x, dt, A, B, C, D, dt_bias):
        sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))  # of no use here
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        B, C = B.unsqueeze(2), C.unsqueeze(2)  # one group
        return mamba_chunk_scan_combined(x, dt, A, B, C, 128, D, dt_bias=dt_bias, dt_softplus=True)

    def fla(x, dt, A, B, C, D, dt_bias):
        from fla.ops.simple_gla import chunk_simple_gla

        step, heads = F.softplus(dt.float() + dt_bias), x.shape[2]
        q, k = (u.unsqueeze(2).expand(-1, -1, heads, -1).contiguous() for u in (C, B))  # it has no groups
        y, _ = chunk_simple_gla(q, k, (x * step[..., None]).to(x.dtype), g=step * A, scale=1.0)
        return y + (D[:, None] * x).to(x.dtype)

    peers = {"ours": lambda *u: ssd_kernels.ssd(*u)[0]}
    here = {name: f for name, f in [("mamba_ssm", mamba_ssm), ("fla", fla)] if importlib.util.find_spec(name)}
    return peers | here


def ssd_inputs(B: int, T: int, heads: int, N: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As a Mamba-2 block makes them at first: A in [-16, -1], steps of 1e-3 to 1e-1."""
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device="cuda").to(dtype)  # noqa: E731
    vector = lambda low, high: torch.empty(heads, device="cuda").uniform_(low, high)  # noqa: E731
    inputs = dict(x=new(B, T, heads, 64), dt=0.3 * new(B, T, heads), A=-vector(1, 16), B=new(B, T, N), C=new(B, T, N))
    return inputs | dict(D=torch.ones(heads, device="cuda"), dt_bias=vector(-6.9, -2.25))


def ssd_gpu(repeats: int, accuracy: bool) -> list[dict]:
    """Times at SSD's shapes; or relative errors of y and each gradient at (B, T, heads, N) = (2, 2048, 8, 128)."""
    rows = []
    for shape in [] if accuracy else SSD:
        hbm = 4 * 64 * math.prod(shape[:3]) / COPY * 1e3
        for name, f in ssd_peers().items():
            inputs = [u.requires_grad_() for u in ssd_inputs(*shape, torch.bfloat16).values()]
            if r := attempt(name, forward_and_backward, f, inputs, repeats):
                rows.append(dict(shape=str(shape), name=name, **r, hbm_floor=hbm))
    ratios(rows)
    for dtype in (torch.bfloat16, torch.float32) if accuracy else ():
        inputs = ssd_inputs(2, 2048, 8, 128, dtype)
        grad, exact = torch.randn_like(inputs["x"]), None
        # In float32, too, theirs did not end in 90 s
        peers = ssd_peers() if dtype == torch.bfloat16 else {"ours": ssd_peers()["ours"]}
        for name, f in ({"float64": lambda *u: ops.ssd(*u)[0]} | peers).items():
            mine = {k: (u if exact else u.double()).clone().requires_grad_() for k, u in inputs.items()}
            y = f(*mine.values())
            found = dict(y=y, **dict(zip(mine, torch.autograd.grad(y, list(mine.values()), grad.to(y)), strict=True)))
            if exact:
                errors = {k: ((u.double() - exact[k]).norm() / exact[k].norm()).item() for k, u in found.items()}
                rows.append(dict(dtype=str(dtype).removeprefix("torch."), name=name) | errors)
            exact = exact or found
    return rows


def ratios(rows: list[dict]) -> None:
    """Add to each row how much longer it takes than ours of the same shape, and print geometric means."""
    ours = {(r["shape"], r.get("mask")): r for r in rows if r["name"] == "ours"}
    means: dict[str, list] = {}
    for r in rows:
        mine = ours.get((r["shape"], r.get("mask")))
        if mine and r is not mine:
            r["fwd_ratio"], r["bwd_ratio"] = r["fwd"] / mine["fwd"], r["bwd"] / mine["bwd"]
            r["both_ratio"] = (r["fwd"] + r["bwd"]) / (mine["fwd"] + mine["bwd"])
            means.setdefault(r["name"], []).append((r["fwd_ratio"], r["bwd_ratio"], r["both_ratio"]))
    for name, values in means.items():
        fwd, bwd, both = (statistics.geometric_mean(column) for column in zip(*values, strict=True))
        times = f"{fwd:.2f}x forward, {bwd:.2f}x backward, {both:.2f}x together"
        print(f"{name}: slower than ours {times} (geometric mean)")


def flex(window: int, n_meta: int, T: int, halves: bool = False, inside: bool = False):
    """FlexAttention with Hymba's mask over T tokens. halves: as the released code does; inside: under torch.compile."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, i, j):
        return (j <= i) & ((i - j < window) | (j < n_meta))

    torch.compiler.reset()  # else the eighth shape is no longer compiled
    torch._functorch.config.donated_buffer = False  # else its backward pass runs once only, and cannot be timed alone
    attend = flex_attention if inside else torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(seen, None, None, T, T, device="cuda")

    def f(q, k, v):
        repeat = q.shape[2] // k.shape[2]
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        if not halves:
            return attend(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
        k, v = (u.repeat_interleave(repeat, dim=1) for u in (k, v))
        return torch.cat([attend(q, k, half, block_mask=mask) for half in v.chunk(2, dim=-1)], dim=-1).transpose(1, 2)

    return f


def attention_gpu(repeats: int, tokens: list[int]) -> list[dict]:
    import kernels

    def sdpa(q, k, v):
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def sdpa_repeated(q, k, v):  # grouped queries rule some of its backends out
        k, v = (u.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for u in (k, v))
        return sdpa(q, k, v)

    rows = []
    for window, n_meta, value_size in [(1024, 128, 128), (None, 0, 128), (None, 0, 64)]:
        mask = f"window {window} + {n_meta}" if window else f"causal, F = {value_size}"
        peers = {"ours": lambda q, k, v: kernels.windowed_attention(q, k, v, window, n_meta)}  # noqa: B023
        peers |= {"flex": None, "flex halves": None} if window else {"sdpa": sdpa, "sdpa repeated": sdpa_repeated}
        for B, T, H, G in [(1, T, 25, 5) for T in tokens] or ATTENTION:
            torch.manual_seed(0)
            sizes = [(H, 64), (G, 64), (G, value_size)]
            inputs = [torch.randn(B, T, *s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in sizes]
            p = torch.arange(1, T + 1, dtype=torch.float64)
            pairs = p if not window else p.clamp(max=window) + (p - window).clamp(0, n_meta)
            gflop = 2e-9 * B * H * (64 + value_size) * pairs.sum().item()
            for name, f in peers.items():
                f = f or flex(window, n_meta, T, halves=name.endswith("halves"))
                if r := attempt(name, forward_and_backward, f, inputs, repeats):
                    r |= dict(floor=gflop / PEAK * 1e12, fwd_tflops=gflop / r["fwd"], bwd_tflops=2.5 * gflop / r["bwd"])
                    rows.append(dict(shape=str((B, T, H, G)), mask=mask, name=name, **r))
    ratios(rows)
    return rows


def train_worker(config: str, peer: bool, B: int, T: int, steps: int = 12) -> dict:
    """Compile, say ready, wait for a line on stdin, then time forward, backward and step as train.py does them: the
    host runs ahead of the device. Tokens/s, peak memory, and the ten kernels that take the longest."""
    file = next((Path(__file__).parent / "config").rglob(f"{config}.py"), f"config/{config}.py")
    _, args = parse([str(file)])
    if peer:
        scan = torch.compiler.disable(mamba_ssm_scan)
        windowed, full = (flex(w, 128, T + 128, inside=True) for w in (1024, 10**9))
        attend = lambda q, k, v, window, n_meta: (windowed if window else full)(q, k, v)  # noqa: E731
        ops.KERNELS["selective_scan"] = (lambda *u: (scan(*u[:8]), None)), lambda *u: True
        ops.KERNELS["windowed_attention"] = attend, ops.KERNELS["windowed_attention"][1]
        del ops.KERNELS["causal_conv"]  # fused by torch.compile
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Hymba(HymbaConfig(**(args | {"vocab_size": 50304, "block_size": T}))).cuda()
    optimizer = training.optimizer_for(model, TrainConfig())
    windows = torch.randint(0, 50304, (B, T + 1)).numpy()
    start = time.perf_counter()
    training.compile_blocks(model)
    for attempt in range(40):  # others compile on this GPU at the same time, and may hold its memory for a moment
        try:
            training.StepGraphs(model, B, T, 1)
            break
        except RuntimeError as e:  # not always an OutOfMemoryError: cuBLAS and Triton have their own
            if attempt == 39 or not re.search("out of memory|ALLOC_FAILED", str(e)):
                raise
        finally:  # leaves the memory to the others until it is this one's turn
            optimizer.zero_grad(set_to_none=True), torch.cuda.empty_cache()
        time.sleep(3)
    torch.cuda.synchronize()
    compile_s = time.perf_counter() - start
    print("ready", flush=True)
    sys.stdin.readline()
    graphs = training.StepGraphs(model, B, T, 1)

    def step():
        loss = graphs.loss(windows, backward=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    for _ in range(3):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        loss = step()
        event.record()
    torch.cuda.synchronize()
    ms = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))
    speed = B * T / statistics.median(ms) * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(), torch.cuda.synchronize()
    top = sorted(profile.key_averages(), key=lambda k: -k.self_device_time_total)
    busy = sum(k.self_device_time_total for k in top) / 1e3 / statistics.median(ms)
    return dict(
        shape=f"{B} x {T}", name=config + (" with peers" if peer else ""), tokens_per_s=round(speed),
        mfu=cost.estimate_mfu(model, speed), peak_gib=torch.cuda.max_memory_allocated() / 2**30, loss=loss.item(),
        spread=ms[-1] / ms[0] - 1, compile_s=compile_s, idle=1 - busy,
        kernels=[dict(kernel=k.key[:80], ms=k.self_device_time_total / 1e3, calls=k.count) for k in top[:10]],
    )  # fmt: skip


def train_gpu(configs: list[str], shapes: list[str]) -> list[dict]:
    """A process for each model and shape: they compile side by side and are timed one after the other."""
    rows, workers, pipe = [], {}, subprocess.PIPE
    threads = max(1, len(os.sched_getaffinity(0)) // (len(configs) * len(shapes)))
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    for shape in shapes:
        for name in configs:
            command = [sys.executable, __file__, "train", f"--worker={name}", f"--shapes={shape}"]
            workers[name, shape] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
    ready = [key for key, worker in workers.items() if "ready\n" in iter(worker.stdout.readline, "")]
    for (name, shape), worker in workers.items():
        out = worker.communicate("go\n" if (name, shape) in ready else None)[0]
        if worker.returncode:
            print(f"{name}, {shape}: failed, see above", file=sys.stderr)
            continue
        rows.append(json.loads(out.splitlines()[-1]))
        print(f"{name}, {shape}: where {sum(k['ms'] for k in rows[-1]['kernels']):.1f} ms of a step go")
        table(rows[-1]["kernels"])
    return rows


def step_bytes(model: Hymba, cache: Cache) -> int:
    """Bytes that a one-token step must read: each weight once, and of each block's caches what its token sees."""
    total = sum(p.nbytes for p in model.parameters())
    for block in (cache.block(i) for i in range(model.config.n_layer)):
        if block.kv:
            slots = (block.pos + 1).clamp(max=block.kv[0].shape[1]).sum().item()
            total += slots * sum(u[0, 0].nbytes for u in block.kv)
        total += sum(u.nbytes for u in block.ssm or ())
    return total


def seconds(f, repeats: int, device: torch.device) -> float:
    """Median of three means over `repeats` calls, one after the other as generation makes them."""
    sync, times = torch.cuda.synchronize if device.type == "cuda" else (lambda: None), []
    for _ in range(3):
        sync()
        start = time.perf_counter()
        for _ in range(repeats):
            f()
        sync()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def decode_worker(spec: dict, device: torch.device) -> list[dict]:
    """Decode, and prefill where the specification says so, of one model: one row for each context, in ascending order.

    The batch is halved until it fits.
    """
    torch.manual_seed(0)
    B, copy, rows = spec["batch"], None, []
    if device.type == "cuda":
        a, b = torch.empty(2, 2**29, dtype=torch.uint8, device=device)
        b.copy_(a)
        copy = 2 * a.nbytes / seconds(lambda: b.copy_(a), 20, device)
        del a, b
        torch.cuda.empty_cache()
    config = dict(block_size=8192, vocab_size=32001) | spec["config"]
    if not spec.get("peer"):
        with device:
            engine = Engine(checkpoint.cast(Hymba(HymbaConfig(**config)), torch.bfloat16).eval())
    while len(rows) < len(spec["contexts"]):
        context = spec["contexts"][len(rows)]
        try:
            if spec.get("peer"):
                rows.append(transformers_row(config, B, context, spec["prefill"], device))
            else:
                rows.append(decode_row(engine, B, context, spec, copy, device))
        except torch.cuda.OutOfMemoryError:
            if B == 1:
                raise
            B //= 2
        if copy:
            torch.cuda.empty_cache()
    return rows


def decode_row(engine: Engine, B: int, context: int, spec: dict, copy: float | None, device) -> dict:
    model = engine.model
    engine.new_cache(1, 1)  # runs the meta tokens, once
    before = torch.cuda.memory_allocated() if copy else 0
    cache = engine.new_cache(B, context + 256)
    held = torch.cuda.memory_allocated() - before if copy else cache.nbytes
    for u in (u for pair in [*cache.kv.values(), *cache.ssm.values()] for u in pair):
        u.normal_()
    cache.pos += context
    cache.longest += context
    greedy = lambda x, cache, row: F.linear(x, model.embed.weight).float().argmax(-1)  # noqa: E731
    loop = TokenLoop(engine, cache, cache.pos.clone().zero_(), cache.pos.clone(), greedy)
    start = time.perf_counter()
    for _ in range(3):
        loop.advance()
    first = time.perf_counter() - start
    n, read = step_bytes(model, cache), seconds(loop.advance, spec.get("steps", 40), device)
    row = dict(context=context, batch=B, ms_per_step=read * 1e3, tokens_per_s=B / read, read_gb=n / 1e9)
    row |= dict(roofline=n / read / copy, copy_TBps=copy / 1e12) if copy else {}
    row |= dict(cache_mb=held / B / 1e6, formula_mb=cost.cache_bytes(model.config, context + 256) / 1e6)
    row |= dict(params=model.num_params(), first_steps_s=first)
    if spec.get("profile"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(4):
                loop.advance()
            torch.cuda.synchronize()
        top = profile.key_averages()
        print(top.table(sort_by="self_device_time_total", row_limit=35, max_name_column_width=90), file=sys.stderr)
    del cache, loop
    return row | prefill(engine, min(B, 16), context) if spec["prefill"] else row


def prefill(engine: Engine, B: int, T: int) -> dict:
    """Speed of reading B prompts of T tokens, and for one also the times to the first and between later tokens."""
    model = engine.model
    prompts = torch.randint(0, model.config.vocab_size, (B, T)).tolist()
    for _ in range(2):  # the second time counts
        arrivals = [time.perf_counter()]
        for _ in engine.generate(prompts, 30 if B == 1 else 1, temperature=0):
            arrivals.append(time.perf_counter())
    took = arrivals[1] - arrivals[0]
    flops = T * (cost.flops_per_token(model, T) / 3 - 2 * model.output.numel())  # the output layer reads one token
    row = dict(prefill_batch=B, prefill_tokens_per_s=B * T / took, prefill_mfu=B * flops / took / PEAK)
    if B == 1:
        gaps = [b - a for a, b in zip(arrivals[5:], arrivals[6:], strict=False)]
        row |= dict(first_token_ms=took * 1e3, next_token_ms=statistics.median(gaps) * 1e3)
    return row


def transformers_row(config: dict, B: int, context: int, with_prefill: bool, device: torch.device) -> dict:
    """The same measurements of transformers' Llama with SDPA and a static cache."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    c = HymbaConfig(**config)
    config = LlamaConfig(
        hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer, vocab_size=c.vocab_size,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=2 * context,
        tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config).bfloat16().eval()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    cache, token = StaticCache(config, max_cache_len=context + 256), torch.zeros(B, 1, dtype=torch.long, device=device)
    pos = torch.tensor([context], device=device)

    @torch.no_grad()
    def step():
        return model(token, past_key_values=cache, cache_position=pos, position_ids=pos[None]).logits[:, -1].argmax(-1)

    step()
    held = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
    for layer in cache.layers:
        layer.keys.normal_(), layer.values.normal_()
        if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
            layer.cumulative_length.fill_(context)
    took = seconds(step, 5, device)
    row = dict(context=context, batch=B, ms_per_step=took * 1e3, tokens_per_s=B / took, cache_mb=held / B / 1e6)
    if with_prefill:
        idx = torch.randint(0, c.vocab_size, (min(B, 16), context), device=device)

        def read():
            for part in idx.split(4):  # all at once would need more memory than the cache
                cache = StaticCache(config, max_cache_len=context + 256)
                with torch.no_grad():
                    model(part, past_key_values=cache, logits_to_keep=1)

        read()
        row |= dict(prefill_batch=len(idx), prefill_tokens_per_s=idx.numel() / seconds(read, 1, device))
    return row


def run_worker(name: str, spec: dict) -> list[dict]:
    """decode_worker in a process of its own, so that memory is clean."""
    worker = [sys.executable, __file__, "decode", f"--worker={json.dumps(spec)}"]
    done = subprocess.run(worker, capture_output=True, text=True)
    if spec.get("profile"):
        print(f"--- {name}, batch {spec['batch']}\n{done.stderr}", file=sys.stderr)
    if done.returncode:
        print(f"{name}: failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return []
    return [dict(name=name) | row for row in json.loads(done.stdout.splitlines()[-1])]


def decode_gpu(batches: list[int], names: list[str], profile: bool) -> list[dict]:
    _, hymba = parse([str(Path(__file__).parent / "config/hymba_1.5b.py")])
    specs = {"Hymba-1.5B": dict(config=hymba | {"block_size": 8192})} | {"Llama-3.2-3B": dict(config=LLAMA_3B)}
    if importlib.util.find_spec("transformers"):
        specs["Llama-3.2-3B, transformers"] = dict(config=LLAMA_3B, peer=True)
    rows = []
    for name, spec in specs.items():
        if names and name not in names:
            continue
        for batch in batches:
            spec |= dict(batch=batch, contexts=[8192], prefill=batch in (1, 16), profile=profile)
            rows += run_worker(name, spec)
            table(rows[-1:])
    return rows


def roadmap_gpu(batch: int, profile: bool) -> list[dict]:
    rows = []
    for number, (name, flags, speed, cache) in ROADMAP.items():
        spec = dict(config=SIZE_350M | flags, batch=batch, contexts=[8192], prefill=False, profile=profile)
        rows += [row | dict(row=number, paper_speed=speed, paper_cache=cache) for row in run_worker(name, spec)]
    base = next((r for r in rows if r["row"] == 6), None)
    for r in rows if base else []:
        r["speed_ratio"], r["paper_speed_ratio"] = r["tokens_per_s"] / base["tokens_per_s"], r["paper_speed"] / 721.1
        r["cache_ratio"], r["paper_cache_ratio"] = r["cache_mb"] / base["cache_mb"], r["paper_cache"] / 414.72
    return rows


def sweep_gpu(batch: int, profile: bool) -> list[dict]:
    contexts = [2**k for k in range(10, 18)]
    patterns = {"T": "T" * 32, "t": "t" * 32, "M": "M" * 32, "Hymba": ""}
    rows = []
    for name, pattern in patterns.items():
        meta = dict(n_meta=0 if name in "TM" else 128)
        spec = dict(config=SIZE_350M | dict(pattern=pattern, block_size=2**17) | meta, batch=batch, contexts=contexts)
        rows += run_worker(name, spec | dict(prefill=False, profile=profile))
    return rows


def scan_cpu_worker(which: str, repeats: int) -> dict:
    """Time `repeats` forward and backward passes in float32; peak memory is what this process grew by, in MB."""
    import resource

    B, T, D, N = SCAN_CPU
    torch.manual_seed(0)
    x, dt = torch.randn(B, T, D), torch.rand(B, T, D) * 0.1
    A, Bs, Cs = -torch.arange(1.0, N + 1).repeat(D, 1), torch.randn(B, T, N), torch.randn(B, T, N)
    inputs = [u.requires_grad_() for u in (x, dt, A, Bs, Cs)]

    def terms(x, dt, A, B):  # decay and input of every state, as both peers hold them
        dt = F.softplus(dt)
        return torch.exp(dt.unsqueeze(-1) * A), (dt * x).unsqueeze(-1) * B.unsqueeze(2)

    def mambapy(x, dt, A, B, C):
        from mambapy.pscan import pscan

        return (pscan(*terms(x, dt, A, B)) @ C.unsqueeze(-1)).squeeze(-1)

    def loop(x, dt, A, B, C):
        (decay, u), h, ys = terms(x, dt, A, B), x.new_zeros(len(x), *A.shape), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + u[:, t]
            ys.append((h @ C[:, t].unsqueeze(-1)).squeeze(-1))
        return torch.stack(ys, 1)

    f = {"ours": lambda *u: ops.selective_scan(*u)[0], "mambapy": mambapy, "loop": loop}[which]
    f(*(u[:, :2] if u.dim() == 3 else u for u in inputs))  # imports and thread pools
    scale = 1024 if sys.platform != "darwin" else 1024**2  # ru_maxrss is in KiB, on a Mac in bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        y = f(*inputs)
        middle = time.perf_counter()
        y.sum().backward()
        times.append(((middle - start) * 1e3, (time.perf_counter() - middle) * 1e3))
        for u in inputs:
            u.grad = None
    row = dict(shape=str(SCAN_CPU), name=which)
    for key, column in zip(("fwd", "bwd"), zip(*times, strict=True), strict=True):
        row |= {key: statistics.median(column), f"{key}_spread": max(column) - min(column)}
    return row | dict(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale - before)


def scan_cpu(repeats: int, loop: bool) -> list[dict]:
    names = ["ours"] + ["mambapy"] * bool(importlib.util.find_spec("mambapy")) + ["loop"] * loop
    rows = []
    for name in names:
        worker = [sys.executable, __file__, "scan", f"--worker={name}", f"--repeats={1 if name == 'loop' else repeats}"]
        rows.append(json.loads(subprocess.run(worker, check=True, capture_output=True, text=True).stdout))
    ratios(rows)
    if "mambapy" not in names:
        print("pip install mambapy to see it beside ours")
    return rows


def plot(files: list[str]) -> None:
    """Time against size, log-log: ours and peers as lines, floors dashed. Of training: tokens/s and memory as bars. Of
    sweeps: speed against cache."""
    plt = pictures.pyplot("plot", needed=True)
    draw = {"scan": plot_times, "attention": plot_times, "train": plot_bars, "sweep": plot_sweep}
    for file in files:
        result = read_json(Path(file), {"what": str, "device": str, "rows": list})
        what, rows = result["what"], result["rows"]
        if what not in draw:
            raise ValueError(f"{file}: no picture of {what}, only of {', '.join(draw)}")
        if not rows:
            raise ValueError(f"{file} has no results to plot")
        try:
            fig = draw[what](plt, rows)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"{file} is not what bench.py {what} --json writes: {type(e).__name__}: {e}") from None
        fig.suptitle(f"{what}, {result['device']}")
        fig.tight_layout()
        fig.savefig(f"bench_{what}.png", dpi=120)
        print(f"wrote bench_{what}.png")


def plot_times(plt, rows: list[dict]):
    masks, names = (list(dict.fromkeys(r.get(key, "") for r in rows)) for key in ("mask", "name"))
    fig, axes = plt.subplots(len(masks), 2, figsize=(10, 1 + 3 * len(masks)), squeeze=False)
    sizes = sorted({tokens_of(r["shape"]) for r in rows})
    ticks = [n for i, n in enumerate(sizes) if i == 0 or n > 1.5 * sizes[i - 1]]
    for mask, pair in zip(masks, axes, strict=True):
        for ax, key, label in zip(pair, ("fwd", "bwd"), ("forward", "backward"), strict=True):
            for name in names:
                here = {tokens_of(r["shape"]): r for r in rows if (r["name"], r.get("mask", "")) == (name, mask)}
                here = dict(sorted(here.items()))
                if here:
                    median, spread = ([r[k] for r in here.values()] for k in (key, f"{key}_spread"))
                    ax.errorbar(here.keys(), median, [u / 2 for u in spread], fmt="o-", label=name)
                floors = [r.get("exp_floor", r.get("floor")) for r in here.values()]
                if key == "fwd" and name == "ours" and None not in floors:
                    ax.plot(here.keys(), floors, "k--", label="floor")
            ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{label}, ms", title=mask)
            ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
            ax.set_xticks([], minor=True)
            ax.legend(fontsize="small")
    return fig


def plot_bars(plt, rows: list[dict]):
    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    names, shapes = (list(dict.fromkeys(r[key] for r in rows)) for key in ("name", "shape"))
    for ax, key, label in zip(axes, ("tokens_per_s", "peak_gib"), ("tokens/s", "peak memory, GiB"), strict=True):
        for i, name in enumerate(names):
            here = [r for r in rows if r["name"] == name]
            left = 0.8 * (i + 0.5) / len(names) - 0.4
            at = [shapes.index(r["shape"]) + left for r in here]
            ax.bar(at, [r[key] for r in here], 0.8 / len(names), label=name)
        ax.set(xticks=range(len(shapes)), xticklabels=shapes, xlabel="batch x tokens", ylabel=label)
    axes[0].legend(fontsize="small")
    return fig


def plot_sweep(plt, rows: list[dict]):
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(r["name"] for r in rows):
        here = [r for r in rows if r["name"] == name]
        (line,) = ax.plot([r["cache_mb"] for r in here], [r["tokens_per_s"] for r in here], "o-", label=name)
        for r in here[:: len(here) - 1] if here[-1]["cache_mb"] > 2 * here[0]["cache_mb"] else []:
            text, end = f"{r['context'] // 1024}k", (r["cache_mb"], r["tokens_per_s"])
            ax.annotate(text, end, (-4, -14), textcoords="offset points", ha="right", color=line.get_color())
    contexts = sorted(r["context"] // 1024 for r in rows)
    title = f"{contexts[0]}k to {contexts[-1]}k tokens of context, the largest batch up to {rows[0]['batch']} that fits"
    ax.set(xscale="log", yscale="log", xlabel="cache of one sequence, MB", ylabel="decode, tokens/s", title=title)
    ax.margins(y=0.1)
    ax.legend()
    return fig


def tokens_of(shape: str) -> int:
    """B x T of "(B, T, D, N)"."""
    return math.prod(int(n) for n in shape.strip("()").split(",")[:2])


def as_ampere() -> dict[str, str]:
    """Environment variables with which a Hopper GPU runs what GPUs of compute capability 8.0 do: Triton writes its
    assembler's input for those, and the assembler makes of it what this GPU runs. Compiled kernels lie by themselves.
    """
    import triton

    folder = Path.home() / ".triton" / "as_sm80"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ptxas").write_text(f"""#!/bin/sh
for a; do shift; [ "$a" != --gpu-name=sm_80 ] || a=--gpu-name=sm_90; set -- "$@" "$a"; done
exec "{Path(triton.__file__).parent}/backends/nvidia/bin/ptxas" "$@"
""")
    (folder / "ptxas").chmod(0o755)
    path = {"TRITON_PTXAS_PATH": str(folder / "ptxas"), "TRITON_CACHE_DIR": str(folder / "cache")}
    return path | {"TRITON_OVERRIDE_ARCH": "sm80"}


def numbers(flag: str, text: str) -> list[int]:
    """The numbers in "1,16,128"."""
    if not re.fullmatch(r"([1-9][0-9]{0,8}(,|$))*", text):
        raise ValueError(f"--{flag}={text[:60]}: write numbers with commas between them, such as 1,16,128")
    return [int(n) for n in text.split(",") if n]


def main(argv: list[str]) -> None:
    parser = Parser("bench.py", __doc__)
    parser.add_argument("what", choices=["scan", "ssd", "attention", "train", "decode", "roadmap", "sweep", "plot"])
    parser.add_argument("files", nargs="*", help="plot: what --json wrote")
    parser.add_argument("--repeats", type=int, help="timed runs [CPU: 7, GPU: 30]")
    parser.add_argument("--tokens", default="", help="GPU scan, attention: one sequence each of 1024,4096,... tokens")
    parser.add_argument("--loop", action="store_true", help="scan on a CPU: time the loop, too (minutes)")
    parser.add_argument("--configs", default="hymba_125m,hymba_125m:peers,llama_125m", help="train: which models")
    parser.add_argument("--shapes", default="16x2048,4x8192", help="train: batch x tokens")
    parser.add_argument("--batches", default="1,16,128", help="decode: which; roadmap, sweep: the last [1,16,128]")
    parser.add_argument("--models", default="", help="decode: which models, separated by semicolons [all]")
    parser.add_argument("--profile", action="store_true", help="decode: where a step's time goes, to stderr")
    parser.add_argument("--accuracy", action="store_true", help="scan, ssd on a GPU: errors against float64")
    parser.add_argument("--ampere", action="store_true", help="the code path of GPUs before Hopper, on a Hopper GPU")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if args.repeats is not None and args.repeats < 1:
        raise ValueError(f"--repeats={args.repeats}: must be 1 or more")
    if args.what == "plot":
        return plot(args.files)
    if args.worker and args.what == "scan":
        print(json.dumps(scan_cpu_worker(args.worker, args.repeats)))
        return
    if args.worker and args.what == "decode":
        print(json.dumps(decode_worker(json.loads(args.worker), torch.device("cuda" if gpu else "cpu"))))
        return
    if args.worker:
        config, _, peers = args.worker.partition(":")
        print(json.dumps(train_worker(config, bool(peers), *map(int, args.shapes.split("x")))))
        return
    if not gpu and args.what != "scan":
        message = "measures GPU kernels, and there is no GPU here; bench.py scan runs on a CPU"
        raise ValueError(f"bench.py {args.what} {message}")
    if args.ampere and not os.environ.get("TRITON_OVERRIDE_ARCH"):
        if not gpu or torch.cuda.get_device_capability()[0] != 9:
            raise ValueError("--ampere needs a Hopper GPU; an older one takes that path by itself")
        os.execve(sys.executable, [sys.executable, __file__, *argv], os.environ | as_ampere())
    if args.accuracy and not gpu:
        raise ValueError("--accuracy compares kernels, and there is no GPU here; pytest tests/test_kernels.py does")
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    device += " as if of compute capability 8.0" if args.ampere else ""
    print(f"{args.what} on {device}, torch {torch.__version__}; times in ms")
    tokens, batches = numbers("tokens", args.tokens), numbers("batches", args.batches)
    if args.what == "scan" and args.accuracy:
        rows = scan_accuracy(tokens)
    elif args.what == "scan":
        rows = scan_gpu(args.repeats or 30, tokens) if gpu else scan_cpu(args.repeats or 7, args.loop)
    elif args.what == "ssd":
        rows = ssd_gpu(args.repeats or 30, args.accuracy)
    elif args.what == "attention":
        rows = attention_gpu(args.repeats or 30, tokens)
    elif args.what == "train":
        rows = train_gpu(args.configs.split(","), args.shapes.split(","))
    elif args.what == "decode":
        rows = decode_gpu(batches, [n for n in args.models.split(";") if n], args.profile)
    else:
        rows = {"roadmap": roadmap_gpu, "sweep": sweep_gpu}[args.what](batches[-1], args.profile)
    table([{k: v for k, v in row.items() if k != "kernels"} for row in rows])
    if args.json:
        result = {"what": args.what, "device": device, "torch": torch.__version__, "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run("bench.py", main, "--batches, --shapes or --tokens")
