"""
All tests: pytest test_model.py. Each compares with something independent of what it tests: a float64 loop, a dense
mask, transformers' own Llama and Mamba (pip install -r requirements-dev.txt), or the papers' figures.
"""

import base64
import collections
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

if not torch.cuda.is_available():  # without a GPU, Triton's interpreter runs the kernels on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"

import model as model_module
import prepare
import sample
import train
import weights
from model import Cache, Hymba, HymbaConfig, causal_conv, linear_cross_entropy, selective_scan, windowed_attention

try:
    import triton.runtime.interpreter

    import kernels
except ImportError:
    kernels = None

ROOT = Path(__file__).parent
torch.set_num_threads(1)  # the tensors here are too small to share
SMALL = dict(vocab_size=61, block_size=32, n_embd=32, n_head=4, n_kv_head=2, n_hidden=40, d_state=4, n_meta=5, window=7)
SMALL |= dict(kernels=False)
LETTERS = ["TTT", "ttt", "MMM", "HHH", "hhh"]
MIXED = ["HhhHhhhH", "MMTMtH"]


def small(pattern: str, seed: int = 0, **options) -> Hymba:
    """A small model whose weights are large enough that every part matters in its output."""
    torch.manual_seed(seed)
    model = Hymba(HymbaConfig(**(SMALL | {"pattern": pattern} | options)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("proj.weight", "embed.weight", "meta")):
                p.normal_(std=0.15)
            elif name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
    return model


def tokens(*shape: int, vocab: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error: norm of the difference over norm of the reference b."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


# ----------------------------------------------------------------------------------------------------------------------
# The reference operations


def scan_loop(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None):
    """The recurrence as it is written in the paper, token by token."""
    h = x.new_zeros(len(x), *A.shape) if state is None else state
    dt = torch.log1p(torch.exp(dt if dt_bias is None else dt + dt_bias))
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        y = (h * C[:, t, None, :]).sum(-1)
        y = y if D is None else y + D * x[:, t]
        ys.append(y if z is None else y * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(ys, 1), h


def scan_inputs(B, T, D, N, seed, given=None) -> dict:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"x": r(B, T, D), "dt": r(B, T, D) - 1, "A": -torch.exp(r(D, N)), "B": r(B, T, N), "C": r(B, T, N)}
    options = {"D": r(D), "z": r(B, T, D), "dt_bias": r(D), "state": r(B, D, N)}
    return inputs | {k: v for k, v in options.items() if (given or {}).get(k, True)}


def compare_with_grads(f, ref, inputs: dict, dtype=torch.float32, device="cpu") -> tuple[float, float]:
    """Largest relative errors of the outputs and of all gradients of f in dtype against ref in float64."""
    kept = ("A", "D", "dt_bias", "state", "weight", "bias")  # float32 in any case
    dtypes = {k: torch.float32 if k in kept else dtype for k in inputs}
    mine = {k: v.to(device, dtypes[k]).detach().requires_grad_() for k, v in inputs.items()}
    theirs = {k: v.to(dtypes[k]).double().to(device).detach().requires_grad_() for k, v in inputs.items()}
    out, expected = f(**mine), ref(**theirs)
    out, expected = [u if isinstance(u, tuple) else (u,) for u in (out, expected)]
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(u.shape, generator=g, dtype=torch.float64).to(o) for u, o in zip(expected, out, strict=True)]
    torch.autograd.backward(out, grads)
    torch.autograd.backward(expected, [u.double() for u in grads])
    forward = max(error(a, b) for a, b in zip(out, expected, strict=True))
    return forward, max(error(mine[k].grad, theirs[k].grad) for k in inputs)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    given=st.fixed_dictionaries({k: st.booleans() for k in ("D", "z", "dt_bias", "state")}),
    seed=st.integers(0, 1000),
)
def test_scan_against_float64_loop(shape, given, seed):
    forward, backward = compare_with_grads(selective_scan, scan_loop, scan_inputs(*shape, seed, given))
    assert forward < 1e-5 and backward < 1e-4


def test_scan_in_pieces_and_extremes():
    inputs = scan_inputs(2, 50, 6, 4, seed=0)
    y, h = selective_scan(**inputs)
    first = {k: v[:, :23] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    then = {k: v[:, 23:] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    y1, h1 = selective_scan(**first)
    y2, h2 = selective_scan(**(then | {"state": h1}))
    assert error(torch.cat([y1, y2], 1), y) < 1e-12 and error(h2, h) < 1e-12
    dt = torch.where(torch.rand(2, 50, 6) < 0.5, -14.0, 50.0).double()  # softplus: 1e-6 and 50
    A = -(10.0 ** torch.linspace(-4, 3, 24).view(6, 4)).double()
    extreme = inputs | {"dt": dt, "A": A, "dt_bias": torch.zeros(6).double(), "z": 80 * inputs["z"].sign()}
    forward, backward = compare_with_grads(selective_scan, scan_loop, extreme)
    assert forward < 1e-5 and backward < 1e-5


def test_scan_keeps_no_states_for_backward():
    B, T, D, N = 2, 512, 32, 16
    kept = []
    inputs = {k: v.float().requires_grad_() for k, v in scan_inputs(B, T, D, N, seed=0).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda u: kept.append(u.numel()) or u, lambda u: u):
        selective_scan(**inputs)
    assert max(kept) <= B * T * max(D, N) and sum(kept) < B * T * D * N


def test_scan_bfloat16_gives_float32_state():
    inputs = {k: v.bfloat16() if k != "state" else v for k, v in scan_inputs(2, 20, 6, 4, seed=0).items()}
    y, h = selective_scan(**inputs)
    expected, _ = scan_loop(**{k: v.double() for k, v in inputs.items()})
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32 and error(y, expected) < 1e-2


def dense_attention(q, k, v, window, n_meta):
    """The rule of the docstring, with the whole mask."""
    (T, H, E), (S, G) = q.shape[1:], k.shape[1:3]
    position, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
    seen = (j <= position) & ((position - j < (window or S)) | (j < n_meta))
    k, v = (u.repeat_interleave(H // G, dim=2) for u in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(E)
    return torch.einsum("bhts,bshf->bthf", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def test_attention_over_a_long_cache_takes_few_queries_at_a_time(monkeypatch):
    """The score matrix of 40 queries and 200,000 keys is never whole."""
    r, sizes, sdpa = torch.Generator().manual_seed(0), [], F.scaled_dot_product_attention
    q, k, v = (torch.randn(1, n, 1, 8, generator=r) for n in (40, 200_000, 200_000))
    expected = dense_attention(q.double(), k.double(), v.double(), None, 0)
    measured = lambda q, k, v, mask, **o: (sizes.append(mask.numel()), sdpa(q, k, v, mask, **o))[1]  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", measured)
    assert error(windowed_attention(q, k, v, None, 0), expected) < 1e-5 and max(sizes) <= 32 * 200_000


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 300),
    cached=st.integers(0, 50),
    window=st.one_of(st.none(), st.integers(1, 400)),
    n_meta=st.integers(0, 20),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (4, 4)]),
    seed=st.integers(0, 1000),
)
def test_attention_against_dense_mask(T, cached, window, n_meta, heads, seed):
    g, (H, G) = torch.Generator().manual_seed(seed), heads
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"q": r(1, T, H, 8), "k": r(1, T + cached, G, 8), "v": r(1, T + cached, G, 12)}
    rule = dict(window=window, n_meta=n_meta)
    forward, backward = compare_with_grads(
        lambda **k: windowed_attention(**k, **rule), lambda **k: dense_attention(**k, **rule), inputs
    )
    assert forward < 1e-5 and backward < 1e-4


def test_conv_against_conv1d():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    y, tail = causal_conv(x, weight, bias)
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=5)).mT
    assert error(y, expected) < 1e-6 and torch.equal(tail, x[:, -3:])
    y1, tail = causal_conv(x[:, :1], weight, bias)
    assert error(torch.cat([y1, causal_conv(x[:, 1:], weight, bias, tail)[0]], 1), expected) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: on a GPU, or in Triton's interpreter (pip install triton==3.6.0; slow, so shapes are small)

if kernels:
    patch_tensors = triton.runtime.interpreter._patch_lang_tensor

    def with_index(tensor, scope):
        """Triton 3.6 takes int() of one-element arrays for loop bounds, which NumPy 2.4 refuses."""
        patch_tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    triton.runtime.interpreter._patch_lang_tensor = with_index

GPU = torch.cuda.is_available()
# Later interpreters fail on kernels that 3.6 runs, and that both compile (3.9 converts tensors it does not know).
INTERPRETER = bool(kernels) and triton.__version__.startswith("3.6.")
on_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(GPU or not INTERPRETER, reason="pip install triton==3.6.0")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]),
    ],
)


@pytest.fixture
def poisoned(monkeypatch):
    """New tensors begin as NaN, so that what a kernel does not write shows; small tiles for the interpreter."""
    for where, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        f = getattr(where, name)
        nan = lambda u: (u.detach().fill_(math.nan), u)[1] if u.is_floating_point() else u  # noqa: E731
        monkeypatch.setattr(where, name, lambda *a, f=f, nan=nan, **k: nan(f(*a, **k)))
    if not GPU:
        small = dict(QUERIES=16, KEYS=16, FLOAT32=(16, 16, 4), CHUNK_QUERIES=16, RUN=16, STRIP=32, ROW_BLOCK=16)
        for name, value in (small | dict(DECODE_KEYS=16)).items():
            monkeypatch.setattr(kernels, name, value)


BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)}


def check(f, ref, inputs, dtype, device):
    """Outputs and gradients within bounds of the float64 reference."""
    forward, backward = compare_with_grads(f, ref, inputs, dtype, device)
    assert forward <= BOUNDS[dtype][0] and backward <= BOUNDS[dtype][1], (forward, backward)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(6))
def test_scan_kernel(case, dtype, device, poisoned, monkeypatch):
    rng = np.random.default_rng(case)
    T = [1, 2, 9, 19, 17, 24] if device == "cpu" else [1, 2, 127, 128, 129, 600]
    D = int(rng.integers(1, 40 if device == "cpu" else 700))
    N = [16, 5, 1, 16, 33, 16][case] if device == "cuda" else [16, 5, 1, 16, 3, 16][case]
    given = {k: bool(rng.integers(2)) or case == 0 for k in ("D", "z", "dt_bias", "state")}
    if case % 2:  # in segments, as few channels and many tokens are
        monkeypatch.setattr(kernels, "_segments", lambda n, t, room: (-(-t // 16), 16))
    B = int(rng.integers(1, 3))
    if case % 3 == 0:  # two channels to a thread, as where four leave too few programs
        monkeypatch.setattr(kernels, "FULL", B * -(-D // kernels._tiles(N, 2, 8, 8)["BD"]))
    inputs = scan_inputs(B, T[case], D, N, case, given)
    check(kernels.selective_scan, scan_loop, inputs, dtype, device)


@pytest.mark.skipif(not kernels, reason="pip install triton==3.6.0")
@pytest.mark.parametrize("room", [8, 14, 16])
def test_scan_segments(room):
    """They cover T, in whole chunks, and none of them is short; a chip that is full needs none."""
    for n_program, T in itertools.product([1, 100, 400, 799, 800, 5000], [1, 511, 1024, 8320, 2**20 + 1]):
        n_segment, length = kernels._segments(n_program, T, room)
        assert (n_segment - 1) * length < T <= n_segment * length and length % kernels.CHUNK == 0
        alone, at_once = n_program >= 800 or T < 256, n_program * n_segment <= 132 * room
        assert n_segment == 1 if alone else length >= (128 if at_once else 512) and n_segment <= 128


@on_device
def test_scan_kernel_extremes(device, poisoned):
    torch.manual_seed(0)
    inputs = scan_inputs(2, 33, 24, 4, seed=0)
    dt = torch.where(torch.rand(2, 33, 24) < 0.5, -14.0, 50.0).double()  # softplus: 1e-6 and 50
    A = -(10.0 ** torch.linspace(-4, 3, 96).view(24, 4)).double()
    extreme = inputs | {"dt": dt, "A": A, "dt_bias": torch.zeros(24).double(), "z": 80 * inputs["z"].sign()}
    check(kernels.selective_scan, scan_loop, extreme, torch.float32, device)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", range(8))
def test_attention_kernel(case, dtype, device, poisoned):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 products")
    rng = np.random.default_rng(case)
    T = [1, 2, 15, 16, 17, 40, 65, 50] if device == "cpu" else [1, 2, 127, 128, 129, 700, 1500, 300]
    cached = [0, 20, 0, 3, 0, 16, 0, 37][case]
    window = [None, 7, 1, None, 1000, 16, 20, 33][case]
    n_meta = [0, 5, 0, 3, 0, 16, 17, 200][case]
    E, F_ = [(16, 32), (64, 128), (32, 32), (48, 80), (16, 16), (64, 64), (16, 32), (16, 32)][case]
    G, R = [(1, 1), (2, 2), (1, 3), (2, 1)][case % 4]
    fused = torch.from_numpy(rng.standard_normal((2, T[case] + cached, G * R * E + G * (E + F_))))
    q, k, v = fused.split([G * R * E, G * E, G * F_], dim=-1)  # slices of a projection
    inputs = {"q": q[:, cached:].unflatten(2, (G * R, E)), "k": k.unflatten(2, (G, E)), "v": v.unflatten(2, (G, F_))}
    rule = dict(window=window, n_meta=n_meta)
    if window == 1 and n_meta == 0 or len(k[0]) == 1:  # one key: q and k get no gradient, and nothing to compare
        inputs = {"v": inputs["v"]}
        rule |= {
            "q": q.to(device, dtype)[:, cached:].unflatten(2, (G * R, E)),
            "k": k.to(device, dtype).unflatten(2, (G, E)),
        }
        as64 = {n: u.double() if isinstance(u, torch.Tensor) else u for n, u in rule.items()}
    else:
        as64 = rule
    mine, theirs = (lambda **u: kernels.windowed_attention(**u, **rule)), (lambda **u: dense_attention(**u, **as64))
    check(mine, theirs, inputs, dtype, device)


@on_device
@pytest.mark.parametrize(
    "T, K, with_tail", [(50, 4, False), (1, 4, False), (17, 3, True), (2, 4, True), (33, 2, False)]
)
def test_conv_kernel(T, K, with_tail, device, poisoned):
    g = torch.Generator().manual_seed(T)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"x": r(2, T, 45)[..., 3:], "weight": r(42, K), "bias": r(42)} | (
        {"tail": r(2, K - 1, 42)} if with_tail else {}
    )
    check(kernels.causal_conv, causal_conv, inputs, torch.float32, device)


def cross_entropy_inputs(n, V, seed) -> tuple[dict, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    inputs = {"x": torch.randn(n, 16, generator=g), "weight": torch.randn(V, 16, generator=g)}
    targets = torch.randint(0, V, (n,), generator=g)
    return inputs, targets.where(torch.rand(n, generator=g) < 0.7, -1).index_fill(0, torch.tensor([n // 2]), V - 1)


def plain_cross_entropy(x, weight, targets):
    logits, targets = F.linear(x, weight), targets.to(x.device)
    return F.cross_entropy(logits, targets, ignore_index=-1), F.cross_entropy(
        logits, targets, None, None, -1, None, "none"
    )


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(4))
def test_cross_entropy_kernel(case, dtype, device, poisoned):
    V = [1, 16, 50, 64] if device == "cpu" else [1, 8192, 50304, 32001]
    inputs, targets = cross_entropy_inputs([1, 3, 37, 20][case], V[case], case)
    mine = lambda **u: linear_cross_entropy(**u, targets=targets.to(device), fast=True)[0]  # noqa: E731
    check(mine, lambda **u: plain_cross_entropy(**u, targets=targets)[0], inputs, dtype, device)


@on_device
def test_cross_entropy_kernel_extremes(device, poisoned):
    """Logits of +-1e4, rows that begin with -inf, a target outside of the vocabulary."""
    logits = 1e4 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[:, :20], targets = float("-inf"), torch.tensor([49, 48, -1, 20, 30, 50])
    a, b = logits.clone().to(device), logits.clone()[:5]
    losses = kernels.cross_entropy(a, targets.to(device), True).cpu()
    assert losses[5].isnan() and error(losses[:5], model_module.cross_entropy(b, targets[:5], True)) < 1e-6
    assert error(a[:5].cpu(), b) < 1e-6


def decode_inputs(case: int, dtype, device):
    """Queries, caches and positions of one new token a row, in dtype: one row's cache is nearly empty, one's is full.

    Later keys count for more, so that a running softmax must shrink what it has.
    """
    g = torch.Generator().manual_seed(case)
    (B, S, G, R), (E, F_) = [(2, 70, 2, 5), (1, 300, 1, 3), (3, 33, 3, 1)][case], [(16, 32), (64, 128), (48, 80)][case]
    r = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)  # noqa: E731
    S = S if device == "cpu" else 40 * S
    pos = torch.randint(0, 2 * S, (B,), generator=g).to(device)
    pos[0], pos[-1] = 3, S + 1
    q = r(B, 1, G * R, E).abs()
    return q, r(B, S, G, E) + torch.arange(S).to(q)[:, None, None] / S, r(B, S, G, F_), pos


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 10**4])
@pytest.mark.parametrize("case", range(3))
def test_decode_attention_kernel(case, parts, dtype, device, poisoned, monkeypatch):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 products")
    monkeypatch.setattr(kernels, "DECODE_PROGRAMS", parts)
    q, k, v, pos = decode_inputs(case, dtype, device)
    expected = []
    for b, p in enumerate(pos.tolist()):  # the last of p + 1 queries sees slots 0 ... p
        n = min(p + 1, k.shape[1])
        expected.append(
            dense_attention(q[b : b + 1].double(), k[b : b + 1, :n].double(), v[b : b + 1, :n].double(), None, 0)
        )
    o = kernels.decode_attention(q, k, v, pos)
    assert o.dtype == dtype and error(o, torch.cat(expected)) < BOUNDS[dtype][0]
    assert torch.equal(o, kernels.decode_attention(q, k, v, pos))


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(3))
def test_kernels_between_products(case, dtype, device, poisoned):
    """RoPE of a slice of a projection, SwiGLU, and the normalised sum of two branches, against float64."""
    (B, T, H, E), D = [(1, 1, 1, 4), (2, 5, 3, 6), (3, 7, 5, 64)][case], [1, 33, 320][case]
    g = torch.Generator().manual_seed(case)
    r = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)  # noqa: E731
    x = r(B, T, 3 + H * E + 5)[..., 3 : 3 + H * E].unflatten(2, (H, E))
    pos = torch.randint(0, 10**4, (B if case else 1, T), generator=g).to(device)
    cos, sin = model_module.rope_angles(HymbaConfig(n_embd=2 * E, n_head=2, n_kv_head=1), pos)
    y = kernels.rope(x, (cos, sin))
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, model_module.apply_rope(x.double(), (cos.double(), sin.double()))) < BOUNDS[dtype][0]
    a, b, scales = r(B, T, D), r(B, T, 2 * D)[..., :D], [r(D).float(), r(D)]
    assert error(kernels.swiglu(a, b), F.silu(a.double()) * b.double()) < BOUNDS[dtype][0]
    normed = [F.rms_norm(u.double(), (D,), scale.double(), 1e-6) for u, scale in zip((a, b), scales, strict=True)]
    fused = kernels.fuse(a, b, *scales, 0.5, -2.0, 1e-6)
    assert fused.shape == a.shape and error(fused, 0.5 * normed[0] - 2 * normed[1]) < BOUNDS[dtype][0]


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("B, m, n", [(1, 1, 1), (4, 21, 100), (2, 7, 5504)])
def test_matvec_kernel(B, m, n, gated, dtype, device, poisoned):
    """Alone, and with all that it takes along; the vectors are a slice of something wider."""
    g = torch.Generator().manual_seed(n)
    r = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)  # noqa: E731
    x, weight, up, scale, add = r(B, 1, n + 3)[..., :n], r(m, n), r(m, n) if gated else None, r(n), r(B, 1, m)
    assert kernels.fits_matvec(x) and not kernels.fits_matvec(x.repeat(9, 1, 1))
    for w, norm, residual in ((weight, None, None), (weight.float(), scale, add)):
        v = x.double() if norm is None else F.rms_norm(x.double(), (n,), norm.double(), 1e-6)
        expected = v @ weight.double().t()
        expected = F.silu(expected) * (v @ up.double().t()) if gated else expected
        y = kernels.matvec(x, w, up, norm, 1e-6, residual)
        assert y.dtype == dtype and error(y, expected + (0 if residual is None else residual)) < BOUNDS[dtype][0]


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("owns_kv", [True, False])
@pytest.mark.parametrize("window", [0, 9])
def test_rope_append_kernel(window, owns_kv, dtype, device, poisoned):
    q, keys, values, _ = decode_inputs(0, dtype, device)
    (B, _, H, E), (G, F_), M = q.shape, values.shape[2:], 3
    pos = torch.tensor([2, 46], device=device)
    proj = torch.randn(B, 1, H * E + G * (E + F_) + 7, device=device).to(dtype)  # and what follows
    config = HymbaConfig(n_embd=H * E, n_head=H, n_kv_head=G)
    cos, sin = model_module.rope_angles(config, pos[:, None])
    rotate = lambda u: model_module.apply_rope(u.double(), (cos.double(), sin.double()))  # noqa: E731
    new_q, new_k, new_v, _ = proj.split([H * E, G * E, G * F_, 7], dim=-1)
    slots = [2, 46] if not window else [2, 10]
    expected = keys.double(), values.double()
    for b, slot in enumerate(slots if owns_kv else []):
        expected[0][b, slot] = rotate(new_k.unflatten(2, (G, E)))[b, 0]
        expected[1][b, slot] = new_v.unflatten(2, (G, F_))[b, 0].double()
    out = kernels.rope_append(proj, cos, sin, pos, keys, values, H, owns_kv, window, M)
    assert error(out, rotate(new_q.unflatten(2, (H, E)))) < BOUNDS[dtype][0]
    assert error(keys, expected[0]) < BOUNDS[dtype][0] and torch.equal(values.double(), expected[1])


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("N, K", [(16, 4), (5, 2)])
def test_step_kernels(N, K, norm, dtype, device, poisoned):
    """One token's convolution and scan against the loops, over several tokens, so that tail and state are checked."""
    B, T, D = 2, 5, 42
    g = torch.Generator().manual_seed(N)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    proj, dtBC, dt = (r(B, T, n).to(device, dtype) for n in (11 + 2 * D, 3 + 2 * N, D))
    weight, bias, A_log, skip, dt_bias = (u.to(device) for u in (r(D, K), r(D), r(D, N), r(D), r(D)))
    scales = [r(N).to(device) for _ in "BC"] if norm else [None, None]
    tail, state = r(B, K - 1, D).to(device, dtype), r(B, D, N).to(device)
    x, z = proj[..., -2 * D :].double().split(D, dim=-1)
    u, _ = causal_conv(x, weight.double(), bias.double(), tail.double())
    B_, C_ = dtBC[..., 3:].double().split(N, dim=-1)
    if norm:
        B_, C_ = (F.rms_norm(v, (N,), w.double(), 1e-6) for v, w in zip((B_, C_), scales, strict=True))
    last_inputs, ys = torch.cat([tail.double(), x], 1)[:, 1 - K :], []
    rest = skip.double(), z, dt_bias.double(), state.double()
    expected, last = scan_loop(u.to(dtype).double(), dt.double(), -A_log.double().exp(), B_, C_, *rest)
    for t in range(T):
        one = lambda v: v[:, t : t + 1]  # noqa: B023, E731
        y = kernels.conv_step(one(proj), weight, bias, tail)
        assert error(y, one(u)) < BOUNDS[dtype][0]
        ys.append(kernels.scan_step(y, one(dt), A_log, one(dtBC), skip, one(proj), dt_bias, state, *scales, 1e-6))
    assert error(torch.cat(ys, 1), expected) < 2 * BOUNDS[dtype][0] and error(state, last) < BOUNDS[dtype][0]
    assert torch.equal(tail.double(), last_inputs)


@on_device
def test_scan_step_of_a_model_that_is_float16_throughout(device, poisoned):
    """model.half() takes A_log, D and dt_bias along: their values are rounded, what follows is not."""
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    x, dt, BC, proj, (A_log, D, dt_bias) = r(2, 1, 42), r(2, 1, 42), r(2, 1, 10), r(2, 1, 84), (r(42, 5), r(42), r(42))
    outputs = []
    for dtype in (torch.float32, torch.float16):
        state = torch.ones(2, 42, 5, device=device)
        A, skip, bias = (u.half().to(dtype) for u in (A_log, D, dt_bias))
        outputs.append((kernels.scan_step(x, dt, A, BC, skip, proj, bias, state, None, None, 1e-6), state))
    assert all(error(a, b) < 1e-6 for a, b in zip(*outputs, strict=True))


@pytest.mark.skipif(not kernels, reason="pip install triton==3.6.0")
@pytest.mark.parametrize(
    "capability, hip, expected", [((9, 0), None, True), ((8, 9), None, False), ((9, 4), "6.4", False)]
)
def test_gpus_that_the_kernels_run_on(capability, hip, expected, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", kernels.tl.constexpr(False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert kernels.usable(types.SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.bfloat16)) == expected


@on_device
def test_float64_uses_the_reference(device):
    a, b = (small("hHMtT", n_head=2, n_kv_head=1, kernels=on).double().to(device) for on in (True, False))
    idx = tokens(1, 9).to(device)
    assert torch.equal(a(idx, idx)[1], b(idx, idx)[1])
    assert list(a.generate([[1, 2], [3]], 4, seed=1)) == list(b.generate([[1, 2], [3]], 4, seed=1))


@on_device
@pytest.mark.parametrize("pattern", ["hH", "Mt"])
def test_model_with_kernels_equals_model_without(pattern, device, poisoned):
    fast, slow = (small(pattern, n_head=2, n_kv_head=1, kernels=on).to(device) for on in (True, False))
    idx, targets = tokens(2, 24).to(device), tokens(2, 24, seed=2).to(device)
    losses = [m(idx, targets)[1] for m in (fast, slow)]
    grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (fast, slow), strict=True)]
    assert error(*losses) < 1e-5 and max(error(a, b) for a, b in zip(*grads, strict=True)) < 1e-3
    again = torch.autograd.grad(fast(idx, targets)[1], list(fast.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads[0], again, strict=True))
    with torch.no_grad():
        cache = fast.new_cache(2, 24)
        out = torch.cat([fast(piece, cache=cache)[0] for piece in idx.split([10, 1, 12, 1], dim=1)], 1)
        assert error(out, slow(idx)[0]) < 1e-5


@on_device
def test_sizes_without_a_kernel_use_the_reference(device):
    a, b = (small("hM", d_conv=7, kernels=on).to(device) for on in (True, False))  # and heads of 8 and 16 channels
    idx = tokens(1, 9).to(device)
    assert torch.equal(a(idx)[0], b(idx)[0])


@on_device
def test_kernels_compile_without_graph_breaks(device):
    model = small("hM", n_head=2, n_kv_head=1, kernels=True).to(device)
    idx = tokens(2, 8).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    a, b = (torch.autograd.grad(m(idx, idx)[1], list(model.parameters())) for m in (model, compiled))
    assert max(error(x, y) for x, y in zip(a, b, strict=True)) < 1e-4
    with torch.autocast(device, torch.bfloat16, enabled=GPU):
        compiled(idx, idx)[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_kernels_on_long_sequences():
    """65,537 tokens: the scan against the same in float64 pieces, attention against rows of the dense mask."""
    T, D, N = 65537, 48, 16
    inputs = scan_inputs(1, T, D, N, seed=0, given={"state": False})
    inputs = {k: v.cuda() for k, v in inputs.items()}
    with torch.no_grad():
        y, h = kernels.selective_scan(**{k: v.float() for k, v in inputs.items()})
        expected, last = selective_scan(**inputs)
        assert error(y, expected) < 1e-5 and error(h, last) < 1e-5
        q, k, v = (torch.randn(1, T, 2, n, device="cuda") for n in (64, 64, 128))
        o = kernels.windowed_attention(q, k, v, 1024, 128)
        for i in (0, 1000, 40000, T - 1):
            row = dense_attention(q[:, i : i + 1].double(), k[:, : i + 1].double(), v[:, : i + 1].double(), 1024, 128)
            assert error(o[:, i : i + 1], row) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_training_with_kernels_on_and_off():
    """200 steps in bfloat16: the same curve within its noise, and the same bits for the same seed."""

    def curve(on: bool) -> list[float]:
        torch.manual_seed(0)
        model = Hymba(HymbaConfig(**(SMALL | dict(pattern="HhhH", n_embd=64, kernels=on)))).cuda()
        optimizer = train.optimizer_for(model, train.TrainConfig())
        data, out = tokens(3000).cuda() // 8, []
        for step in range(200):
            at = (torch.arange(8)[:, None] * 331 + step * 13 + torch.arange(33)) % 3000
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(data[at[:, :-1]], data[at[:, 1:]])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return out

    a, again, b = curve(True), curve(True), curve(False)
    assert a == again
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.05 and a[-1] < a[0] - 0.2


# ----------------------------------------------------------------------------------------------------------------------
# The architecture


def test_check_figures():
    """Parameters and cache bytes of the family at 8,192 tokens, worked out by hand from the paper's table of sizes."""
    family = {"hymba_125m": (129_944_064, 57_753_600), "hymba_350m": (353_701_888, 66_551_808)}
    family |= {"hymba_1.5b": (1_522_797_824, 86_056_960)}
    for name, (params, cache) in family.items():
        _, args = train.parse([str(ROOT / f"config/{name}.py")])
        with torch.device("meta"):
            model = Hymba(HymbaConfig(**args, vocab_size=32001))
        assert (model.num_params(), model.cache_bytes(8192)) == (params, cache)
    assert model.config.pattern == "H" + "h" * 14 + "H" + "h" * 15 + "H"
    groups = (
        [1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13],
        [16, 16, 16, 19, 19, 21, 21, 23, 23, 25, 25, 27, 27, 29, 29],
    )
    assert model.config.kv_owner == [0, *groups[0], 15, *groups[1], 31]
    llama = HymbaConfig(
        vocab_size=128256, pattern="T" * 28, n_embd=3072, n_head=24, n_kv_head=8, n_hidden=8192, n_meta=0
    )
    with torch.device("meta"):
        assert Hymba(llama).cache_bytes(8192) == 939_524_096  # Llama-3.2-3B


def test_baseline_configs_match_in_parameters():
    counts = {}
    for name in ("hymba", "llama", "mamba", "swa", "inter"):
        _, args = train.parse([str(ROOT / f"config/{name}_125m.py")])
        with torch.device("meta"):
            counts[name] = Hymba(HymbaConfig(**args, vocab_size=32000)).num_params()
    assert all(abs(n / counts["hymba"] - 1) < 0.02 for n in counts.values()), counts
    assert all(train.parse([str(f)]) for f in (ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("fusion", ["mean", "diff", "concat"])
@pytest.mark.parametrize("letter", ["H", "h"])
def test_hybrid_heads_against_a_plain_forward(letter, fusion):
    """A block's mixer in float64, from the released format's words: row order, norms, RoPE, mask, gate, fusion."""
    model = small(letter, fusion=fusion).double()
    m, M, x = model.blocks[0].mixer, 5, torch.randn(2, 30, 32, dtype=torch.float64)
    with torch.no_grad():
        y, _ = m(x, model_module.rope_angles(model.config, torch.arange(30)[None]), None, None)
    w = {name: p.detach() for name, p in m.named_parameters()}
    rms = lambda u, scale: u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale  # noqa: E731
    u = x @ w["in_proj.weight"].T
    q, k, v, s, z = u[..., :32], u[..., 32:48], u[..., 48:80], u[..., 80:144], u[..., 144:]
    angle = torch.arange(30.0).double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]  # channel i and i + E / 2 as one complex number

    def rotate(u, heads):
        u = torch.complex(*u.reshape(2, 30, heads, 2, 4).unbind(3)) * turn
        return torch.cat([u.real, u.imag], -1)

    window = model.config.window if letter == "h" else None
    attn = dense_attention(rotate(q, 4), rotate(k, 2), v.reshape(2, 30, 2, 16), window, M).reshape(2, 30, 64)
    s = F.silu(F.conv1d(F.pad(s.mT, (3, 0)), w["conv_weight"][:, None], w["conv_bias"], groups=64)).mT
    p = s @ w["x_proj.weight"].T
    dt = rms(p[..., :2], w["dt_norm.weight"]) @ w["dt_proj.weight"].T
    B, C = rms(p[..., 2:6], w["B_norm.weight"]), rms(p[..., 6:], w["C_norm.weight"])
    ssm, _ = scan_loop(s, dt, -w["A_log"].exp(), B, C, w["D"], z, w["dt_bias"])
    a, b = rms(attn, w["attn_norm.weight"]), rms(ssm, w["ssm_norm.weight"])
    fused = {"mean": (a + b) / 2, "diff": a - b, "concat": torch.cat([a, b], -1)}[fusion]
    assert error(y, fused @ w["out_proj.weight"].T) < 1e-5  # RoPE, norms and A are float32


def test_kv_sharing():
    model = small("HhhHhhhH")
    owner = model.config.kv_owner
    assert owner == [0, 1, 1, 3, 4, 4, 4, 7]
    cache = model.new_cache(1, 10)
    E, heads, kv = 8, 4, 2
    for i, block in enumerate(model.blocks):
        rows = heads * E + 2 * 64 + (kv * (E + 16) if owner[i] == i else 0)
        assert block.mixer.in_proj.weight.shape == (rows, 32)
        assert (i in cache.kv) == (owner[i] == i)
    assert all(o is None or HymbaConfig(pattern="h" * n).kv_owner[o] == o
               for n in range(1, 12) for o in HymbaConfig(pattern="h" * n).kv_owner)  # fmt: skip
    assert small("HhhHhhhH", kv_share=False).config.kv_owner == list(range(8))
    assert HymbaConfig(pattern="MhhTtttM").kv_owner == [None, 1, 1, 3, 4, 4, 4, None]
    # A consumer's output depends on its producer's keys
    idx, before = tokens(1, 20), model(tokens(1, 20))[0]
    with torch.no_grad():
        model.blocks[1].mixer.in_proj.weight[32:48] += 1  # k of block 1, read by blocks 1 and 2
        model.blocks[1].mixer.out_proj.weight.zero_()
    assert error(model(idx)[0], before) > 1e-3


@pytest.mark.parametrize("fusion", ["mean", "diff", "concat"])
@pytest.mark.parametrize("pattern", LETTERS + MIXED)
def test_causality(pattern, fusion):
    if fusion != "mean" and not set(pattern) & set("Hh"):
        pytest.skip("fusion concerns hybrid blocks alone")
    model = small(pattern, fusion=fusion)
    idx = tokens(2, 30)
    changed = idx.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 61
    with torch.no_grad():
        a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :17], b[:, :17]) and (a[:, 17:] != b[:, 17:]).any(-1).all(0)[0]


@pytest.mark.parametrize("fusion", ["mean", "diff", "concat"])
@pytest.mark.parametrize("pattern", LETTERS + MIXED)
def test_cache_gives_the_full_forward(pattern, fusion):
    """One full forward = prefill + decode = prefill in pieces, far past the window, and bytes held = bytes promised."""
    model = small(pattern, fusion=fusion)
    idx = tokens(2, 60)
    with torch.no_grad():
        full = model(idx)[0]
        for sizes in ([20] + [1] * 40, [3, 1, 16, 9, 1, 1, 29], [60]):
            cache = model.new_cache(2, 60)
            assert cache.nbytes == 2 * model.cache_bytes(60, torch.float32)
            out = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(sizes, dim=1)], 1)
            assert error(out, full) < 1e-5
            assert cache.nbytes == 2 * model.cache_bytes(60, torch.float32)
        cache = model.new_cache(2, 4)  # too little room: grows
        out = torch.cat([model(piece, cache=cache)[0] for piece in idx.split([3, 1, 1, 30, 25], dim=1)], 1)
        assert error(out, full) < 1e-5
        assert cache.capacity >= 60 and cache.nbytes == 2 * model.cache_bytes(cache.capacity, torch.float32)


@pytest.mark.parametrize("n_meta", [0, 1, 40])
def test_cache_with_other_meta_counts(n_meta):
    model = small("HhhtMT", n_meta=n_meta, window=3)
    with torch.no_grad():
        cache, idx = model.new_cache(1, 20), tokens(1, 20)
        out = torch.cat([model(piece, cache=cache)[0] for piece in idx.split([1, 5, 1, 13], dim=1)], 1)
        assert error(out, model(idx)[0]) < 1e-5


def test_meta_tokens_run_once_and_follow_the_weights(monkeypatch):
    model, runs = small("HhH"), []
    monkeypatch.setattr(model_module.Block, "forward", count(model_module.Block.forward, runs))
    model.new_cache(1, 4), model.new_cache(3, 8)
    assert len(runs) == 3  # three blocks, once
    with torch.no_grad():
        model.blocks[0].mixer.D += 1  # as an optimizer would
    assert error(model(tokens(1, 6), cache=model.new_cache(1, 6))[0], model(tokens(1, 6))[0]) < 1e-5


def count(f, calls: list):
    def counted(*args, **kwargs):
        calls.append(1)
        return f(*args, **kwargs)

    return counted


def test_a_model_made_in_inference_mode_generates():
    with torch.inference_mode():
        model = small("hM")
        expected = list(model.generate([[1, 2], [3]], 5, temperature=0))
    assert list(model.generate([[1, 2], [3]], 5, temperature=0)) == expected
    assert list(small("hM").generate([[1, 2], [3]], 5, temperature=0)) == expected


def test_window_size_counts_the_query():
    """A window of 1 without meta tokens sees the token alone: permuting the past changes nothing."""
    model = small("t", n_meta=0, window=1)
    a, b = tokens(1, 9), tokens(1, 9).flip(1)
    b[:, -1] = a[:, -1]
    with torch.no_grad():
        assert error(model(a)[0][:, -1], model(b)[0][:, -1]) < 1e-6


def test_rope_stretch():
    """NTK as the released checkpoint has it: base 10000 * (2 * 8192 / 2048 - 1) ** (64 / 62)."""
    config = HymbaConfig(n_embd=1600, n_head=25, n_kv_head=5, block_size=8192, rope_orig=2048)
    cos, sin = model_module.rope_angles(config, torch.tensor([[777]]))
    base = 10000 * 7 ** (64 / 62)
    angle = 777 * torch.tensor([base ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    assert error(cos.flatten(), angle.cos()) < 1e-4 and error(sin.flatten(), angle.sin()) < 1e-4
    config.block_size = 2048
    assert error(model_module.rope_angles(config, torch.tensor([[3]]))[0].flatten()[1:2],
                 torch.tensor([math.cos(3 * 10000 ** (-2 / 64))])) < 1e-5  # fmt: skip


@pytest.mark.parametrize("n, V", [(1, 1), (50, 37), (4100, 61)])  # 4,100 tokens: two pieces
def test_linear_cross_entropy(n, V):
    inputs, targets = cross_entropy_inputs(n, V, seed=n)
    both = compare_with_grads(
        lambda **u: linear_cross_entropy(**u, targets=targets)[0],
        lambda **u: plain_cross_entropy(**u, targets=targets)[0],
        inputs,
    )
    assert max(both) < 1e-5
    with torch.no_grad():
        losses = linear_cross_entropy(**inputs, targets=targets)[1]
        assert error(losses, plain_cross_entropy(**inputs, targets=targets)[1]) < 1e-5
        assert linear_cross_entropy(**inputs, targets=torch.full((n,), -1))[0].isnan()  # as in F.cross_entropy


def test_loss():
    """Of the tied embedding, whose gradient comes from both ends, over two backward passes."""
    model = small("hM")
    idx, targets = tokens(2, 30), tokens(2, 30, seed=2)
    targets[:, :3] = -1
    logits, no_loss = model(idx)
    expected = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), ignore_index=-1)
    theirs = torch.autograd.grad(3 * expected, list(model.parameters()))
    none, loss = model(idx, targets)
    loss.backward()
    (2 * model(idx, targets)[1]).backward()
    assert none is None and no_loss is None and abs(loss.item() - expected.item()) < 1e-5
    assert max(error(p.grad, g) for p, g in zip(model.parameters(), theirs, strict=True)) < 1e-4


def test_autocast():
    """Everything between the norms' statistics is bfloat16 then, the residual stream included; the loss is not."""
    model, idx = small("hTM"), tokens(2, 30)
    expected = model(idx, idx)[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss, hidden = model(idx, idx)[1], model.hidden(idx)
    a, b = (torch.autograd.grad(u, list(model.parameters())) for u in (loss, expected))
    assert hidden.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert error(loss, expected) < 1e-2 and max(error(x, y) for x, y in zip(a, b, strict=True)) < 0.1


def test_compile_computes_sines_once():
    """torch.compile takes the model whole, and sees one table of sines that it cannot repeat in every block."""
    model, graphs = small("tTt"), []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph)[1])
    idx = tokens(2, 30)
    a, b = (torch.autograd.grad(m(idx, idx)[1], list(model.parameters())) for m in (model, compiled))
    assert max(error(x, y) for x, y in zip(a, b, strict=True)) < 1e-6
    calls = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("rope_table" in c for c in calls) == 1 and not any(c in ("sin", "cos") for c in calls)


@pytest.mark.parametrize("pattern", LETTERS + ["hH"])
def test_overfits_a_batch(pattern):
    torch.manual_seed(0)
    model = Hymba(HymbaConfig(**(SMALL | {"pattern": pattern})))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    idx = tokens(2, 17)
    for _ in range(120):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_initialisation():
    torch.manual_seed(0)
    model = Hymba(HymbaConfig(n_embd=256, n_head=4, pattern="hhhh", vocab_size=512, n_hidden=64, kernels=False))
    mixer = model.blocks[0].mixer
    dt = F.softplus(mixer.dt_bias.detach()).log()
    assert dt.min() > math.log(0.99e-3) and dt.max() < math.log(1.01e-1)
    assert abs(dt.mean() - math.log(1e-2)) < 0.2 and abs(dt.std() - math.log(100) / math.sqrt(12)) < 0.2
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(512, 16))
    assert abs(mixer.out_proj.weight.std() - 0.02 / math.sqrt(8)) < 1e-3 and abs(model.meta.std() - 0.02) < 1e-3
    assert abs(model(tokens(2, 64, vocab=512), tokens(2, 64, vocab=512, seed=3))[1].item() - math.log(512)) < 0.3


def test_flops():
    """The matrix part against torch's own counter, and attention's part against a count of the mask."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small("hMT", n_meta=3)
    c, T = model.config, 32
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens(1, T))
    ops = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in ops.items() if str(op) == "aten.mm")
    position, j = torch.arange(3 + T)[:, None], torch.arange(3 + T)
    causal = j <= position
    windowed = causal & ((position - j < c.window) | (j < 3))
    attention = 2 * 4 * ((8 + 16) * windowed.sum().item() + (8 + 8) * causal.sum().item())
    scan = 2 * (3 + T) * (7 * 64 * 4 + 2 * 4 * 64)
    assert abs(model.flops_per_token(T) - 3 * (matrices + attention + scan) / T) < 1e-6 * model.flops_per_token(T)
    step = model.flops_per_token(100, training=False)
    assert step - model.flops_per_token(99, training=False) == 2 * 4 * 16  # one more key in the one full block
    assert model.estimate_mfu(1e6) is None  # no peak is known for a CPU


def test_runs_alone_with_kernels_absent(tmp_path):
    for file in ("model.py", "weights.py"):
        shutil.copy(ROOT / file, tmp_path)
    code = "from model import *; m = Hymba(HymbaConfig(n_embd=32, n_head=2, n_kv_head=1, pattern='HhM')); "
    code += "m(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))[1].backward(); print('ok')"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "ok\n", run.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        ({"pattern": "HxH"}, "pattern 'HxH': unknown letter 'x'; use T, t, M, H or h"),
        ({"pattern": "HhH", "n_layer": 4}, "has 3 letters but n_layer=4"),
        ({"n_head": 8, "n_kv_head": 3}, "n_head=8 is not a multiple of n_kv_head=3"),
        ({"n_embd": 100, "n_head": 8}, "n_embd=100 is not a multiple of 2 * n_head=16"),
        ({"fusion": "sum"}, "use mean, diff, concat"),
        ({"window": 0}, "window=0: must be 1 or more"),
        ({"n_meta": -1}, "n_meta=-1: must be 0 or more"),
        ({"rope_factor": 8.0}, "rope_factor needs rope_orig, and rope_low less than rope_high"),
    ],
)
def test_config_errors(args, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        HymbaConfig(**args)


# ----------------------------------------------------------------------------------------------------------------------
# Released weights: each format from its description alone, and against transformers


# No kernel is for heads of 8 or convolutions of 5, so that Triton's interpreter stays out of these tests
HYMBA_JSON = dict(model_type="hymba", vocab_size=67, hidden_size=32, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=40, mamba_d_state=4, mamba_d_conv=3, mamba_expand=2, mamba_dt_rank=2,
    num_memory_tokens=5, sliding_window=6, global_attn_idx=[0, 3, 7], kv_reuse_group=[[1, 2], [4, 5, 6]],
    rope_theta=10000.0, rope_type="ntk", orig_max_position_embeddings=16, max_position_embeddings=64,
    rms_norm_eps=1e-6, tie_word_embeddings=True, hidden_act="silu")  # fmt: skip
LLAMA_JSON = dict(model_type="llama", vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=5e5,
    tie_word_embeddings=False, attention_bias=False)  # fmt: skip
MAMBA_JSON = dict(model_type="mamba", vocab_size=67, hidden_size=32, num_hidden_layers=2, state_size=4, expand=2,
    conv_kernel=5, time_step_rank=2, intermediate_size=64, use_bias=False, layer_norm_epsilon=1e-5)  # fmt: skip
RELEASED = {"hymba": HYMBA_JSON, "llama": LLAMA_JSON, "mamba": MAMBA_JSON}


def released_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a released checkpoint, worked out from config.json by hand."""
    V, C, n = c["vocab_size"], c["hidden_size"], c["num_hidden_layers"]
    layers = [f"model.layers.{i}." for i in range(n)]
    if c["model_type"] == "mamba":
        D, N, R, K = c["intermediate_size"], c["state_size"], c["time_step_rank"], c["conv_kernel"]
        shapes = {"backbone.embeddings.weight": (V, C), "backbone.norm_f.weight": (C,)}
        for p in (f"backbone.layers.{i}." for i in range(n)):
            shapes |= {p + "norm.weight": (C,), p + "mixer.in_proj.weight": (2 * D, C), p + "mixer.D": (D,)}
            shapes |= {p + "mixer.conv1d.weight": (D, 1, K), p + "mixer.conv1d.bias": (D,), p + "mixer.A_log": (D, N)}
            shapes |= {p + "mixer.x_proj.weight": (R + 2 * N, D), p + "mixer.dt_proj.weight": (D, R)}
            shapes |= {p + "mixer.dt_proj.bias": (D,), p + "mixer.out_proj.weight": (C, D)}
        return shapes
    H, G, I = c["num_attention_heads"], c["num_key_value_heads"], c["intermediate_size"]  # noqa: E741
    E, shapes = C // H, {"model.embed_tokens.weight": (V, C)}
    if c["model_type"] == "llama":
        shapes |= {"model.norm.weight": (C,)} | ({} if c["tie_word_embeddings"] else {"lm_head.weight": (V, C)})
        for p in layers:
            shapes |= {p + "input_layernorm.weight": (C,), p + "post_attention_layernorm.weight": (C,)}
            shapes |= {p + f"self_attn.{m}_proj.weight": (h * E, C) for m, h in [("q", H), ("k", G), ("v", G)]}
            shapes |= {p + "self_attn.o_proj.weight": (C, H * E), p + "mlp.down_proj.weight": (C, I)}
            shapes |= {p + f"mlp.{m}_proj.weight": (I, C) for m in ("gate", "up")}
        return shapes
    D, N, R, K = c["mamba_expand"] * C, c["mamba_d_state"], c["mamba_dt_rank"], c["mamba_d_conv"]
    shapes |= {"model.memory_tokens": (c["num_memory_tokens"], C), "model.final_layernorm.weight": (C,)}
    shared = {i for group in c["kv_reuse_group"] for i in group[1:]}
    for i, p in enumerate(layers):
        kv = 0 if i in shared else G * E + G * (D // H)
        shapes |= {p + "input_layernorm.weight": (C,), p + "pre_moe_layernorm.weight": (C,)}
        shapes |= {p + "mamba.in_proj.weight": (H * E + kv + 2 * D, C), p + "mamba.out_proj.weight": (C, D)}
        shapes |= {p + "mamba.conv1d.weight": (D, 1, K), p + "mamba.conv1d.bias": (D,), p + "mamba.D.0": (D,)}
        shapes |= {p + "mamba.x_proj.0.weight": (R + 2 * N, D), p + "mamba.dt_layernorm.weight": (R,)}
        shapes |= {p + "mamba.B_layernorm.weight": (N,), p + "mamba.C_layernorm.weight": (N,)}
        shapes |= {p + "mamba.dt_proj.0.weight": (D, R), p + "mamba.dt_proj.0.bias": (D,), p + "mamba.A_log.0": (D, N)}
        shapes |= {p + "mamba.pre_avg_layernorm1.weight": (D,), p + "mamba.pre_avg_layernorm2.weight": (D,)}
        shapes |= {p + f"moe.experts.0.{m}_proj.weight": (I, C) for m in ("gate", "up")}
        shapes |= {p + "moe.experts.0.down_proj.weight": (C, I)}
    return shapes


def write_released(folder: Path, c: dict, shards: int = 1, dtype=torch.float32, **changed) -> dict[str, torch.Tensor]:
    """A random checkpoint for config.json c; in changed, a tensor by its name, or None to leave it out."""
    g = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape, generator=g) * 0.2 + (len(shape) == 1 and "bias" not in name)).to(dtype)
               for name, shape in released_shapes(c).items()}  # fmt: skip
    tensors = {name: t for name, t in (tensors | changed).items() if t is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(tensors)}  # a block's tensors in several files
    for file in files:
        save_file({name: t for name, t in tensors.items() if where[name] == file}, folder / file, {"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def released_hymba(w: dict, c: dict, idx: torch.Tensor) -> torch.Tensor:
    """Logits of a released Hymba checkpoint in float64, from the format's description: names, row order, mask, RoPE."""
    w = {name: t.double() for name, t in w.items()}
    rms = lambda u, scale: u / (u.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * scale  # noqa: E731
    C, H, G, M = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["num_memory_tokens"]
    D, E, F_, R, N = 2 * C, C // H, 2 * C // H, c["mamba_dt_rank"], c["mamba_d_state"]
    x = torch.cat([w["model.memory_tokens"].expand(len(idx), -1, -1), w["model.embed_tokens.weight"][idx]], 1)
    base = c["rope_theta"] * (2 * c["max_position_embeddings"] / c["orig_max_position_embeddings"] - 1) ** (E / (E - 2))
    angle = torch.arange(x.shape[1]).double()[:, None, None] * base ** (-torch.arange(0, E, 2).double() / E)

    def rotate(u):
        a, b = u.unflatten(-1, (-1, E)).chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    producer, kv = {i: group[0] for group in c["kv_reuse_group"] for i in group}, {}
    for i in range(c["num_hidden_layers"]):
        m = {name.removeprefix(f"model.layers.{i}."): t for name, t in w.items()}
        owns = producer.get(i, i) == i
        u = rms(x, m["input_layernorm.weight"]) @ m["mamba.in_proj.weight"].T
        q, *new, s, z = u.split([H * E] + [G * E, G * F_] * owns + [D, D], -1)
        if owns:
            kv[i] = rotate(new[0]), new[1].unflatten(-1, (G, F_))
        window = None if i in c["global_attn_idx"] else c["sliding_window"] + 1  # q - k <= sliding_window
        attn = dense_attention(rotate(q), *kv[producer.get(i, i)], window, M).flatten(2)
        s = F.conv1d(
            F.pad(s.mT, (c["mamba_d_conv"] - 1, 0)), m["mamba.conv1d.weight"], m["mamba.conv1d.bias"], groups=D
        ).mT
        dt, B, C_ = (F.silu(s) @ m["mamba.x_proj.0.weight"].T).split([R, N, N], -1)
        dt = rms(dt, m["mamba.dt_layernorm.weight"]) @ m["mamba.dt_proj.0.weight"].T
        B, C_ = rms(B, m["mamba.B_layernorm.weight"]), rms(C_, m["mamba.C_layernorm.weight"])
        A, bias = -m["mamba.A_log.0"].exp(), m["mamba.dt_proj.0.bias"]
        ssm, _ = scan_loop(F.silu(s), dt, A, B, C_, m["mamba.D.0"], z, bias)
        a, b = rms(attn, m["mamba.pre_avg_layernorm1.weight"]), rms(ssm, m["mamba.pre_avg_layernorm2.weight"])
        x = x + (a + b) / 2 @ m["mamba.out_proj.weight"].T
        h = rms(x, m["pre_moe_layernorm.weight"])
        gate, up, down = (m[f"moe.experts.0.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate) * (h @ up)) @ down
    return (rms(x, w["model.final_layernorm.weight"]) @ w["model.embed_tokens.weight"].T)[:, M:]


@pytest.mark.parametrize("groups", [[[1, 2], [4, 5, 6]], []])
def test_released_hymba_against_a_plain_forward(groups, tmp_path):
    tensors = write_released(tmp_path, c := HYMBA_JSON | {"kv_reuse_group": groups})
    model, idx = Hymba.from_pretrained(tmp_path), tokens(2, 30, vocab=67)
    assert model.config.pattern == "HhhHhhhH" and model.config.window == 7
    with torch.no_grad():
        assert error(model(idx)[0], released_hymba(tensors, c, idx)) < 1e-5


def test_released_hymba_1_5b_has_exactly_the_published_tensors():
    groups = [[i, i + 1] for i in [*range(1, 14, 2), *range(19, 30, 2)]] + [[16, 17, 18]]
    c = dict(HYMBA_JSON, vocab_size=32001, hidden_size=1600, num_hidden_layers=32, num_attention_heads=25,
        num_key_value_heads=5, intermediate_size=5504, mamba_d_state=16, mamba_d_conv=4, mamba_dt_rank=100,
        num_memory_tokens=128, sliding_window=1024, global_attn_idx=[0, 15, 31], kv_reuse_group=sorted(groups),
        orig_max_position_embeddings=2048, max_position_embeddings=8192)  # fmt: skip
    config = HymbaConfig(**weights.released_config(c))
    _, args = train.parse([str(ROOT / "config/hymba_1.5b.py")])
    expected = asdict(HymbaConfig(**args, vocab_size=32001)) | dict(window=1025, block_size=8192, rope_orig=2048)
    assert asdict(config) == expected
    with torch.device("meta"):
        layout = weights.layout(Hymba(config), "hymba")
    assert {name: shape for theirs in layout.values() for name, shape in theirs.items()} == released_shapes(c)
    shapes = released_shapes(c)  # and the figures of the description themselves
    assert shapes["model.layers.1.mamba.in_proj.weight"] == (8960, 1600)
    assert shapes["model.layers.2.mamba.in_proj.weight"] == (8000, 1600)
    assert shapes["model.layers.0.mamba.x_proj.0.weight"] == (132, 3200)
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_522_797_824


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", RELEASED)
def test_released_round_trip(kind, shards, tmp_path):
    """bfloat16 files come back the same to the byte, although the model keeps A_log and a few others in float32."""
    c = RELEASED[kind] | {"architectures": ["what we know nothing of"]}
    tensors = write_released(tmp_path / "a", c, shards, torch.bfloat16)
    model, idx = Hymba.from_pretrained(tmp_path / "a"), tokens(1, 9)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name in model.state_dict()
                    if name.endswith(("A_log", "mixer.D", "dt_bias", "conv_weight", "conv_bias"))}  # fmt: skip
    assert {p.dtype for p in model.parameters()} <= {torch.float32, torch.bfloat16}
    logits, expected = model(idx)[0], Hymba.from_pretrained(tmp_path / "a", torch.float32)(idx)[0]
    assert logits.dtype == torch.bfloat16 and error(logits, expected) < 0.15
    model(idx, idx)[1].backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text()) == c
    again = load_file(tmp_path / "b/model.safetensors")
    assert again.keys() == tensors.keys() and all(again[n].dtype == t.dtype for n, t in tensors.items())
    assert all(torch.equal(again[n], t) for n, t in tensors.items())
    if shards == 1:
        raw = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
        assert raw[0] == raw[1]
    assert sorted(f.name for f in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of anonymous memory")
@pytest.mark.parametrize("kind", ["own", "llama"])
def test_weights_load_without_a_second_copy(kind, tmp_path):
    """41 MB of embedding (malloc keeps no such piece) stay in the mapped file, and nowhere else, when they are used."""
    c = LLAMA_JSON | dict(vocab_size=40_000, hidden_size=256, tie_word_embeddings=True)
    write_released(tmp_path, c)
    if kind == "own":
        config = HymbaConfig(**weights.released_config(c))
        Hymba(config).save_pretrained(tmp_path)

    def anonymous() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    before = anonymous()
    model = Hymba.from_pretrained(tmp_path)
    assert torch.stack([p.detach().sum() for p in model.parameters()]).isfinite().all()
    assert anonymous() - before < 20e6


def test_from_pretrained_dtype_and_device(tmp_path):
    write_released(tmp_path, HYMBA_JSON)
    wide = Hymba.from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    half = Hymba.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.embed.weight.dtype == torch.float16 and half.blocks[0].mixer.A_log.dtype == torch.float32
    assert Hymba.from_pretrained(tmp_path, device="meta").meta.is_meta


def test_released_tied_head_in_the_file(tmp_path):
    """Some files hold the embedding twice: then both copies must be equal, and both are written again."""
    tensors = write_released(tmp_path, HYMBA_JSON)
    embed = tensors["model.embed_tokens.weight"]
    write_released(tmp_path, HYMBA_JSON, **{"lm_head.weight": embed.clone()})
    model = Hymba.from_pretrained(tmp_path)
    assert model.lm_head is None
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")["lm_head.weight"], embed)
    write_released(tmp_path, HYMBA_JSON, **{"lm_head.weight": embed + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        Hymba.from_pretrained(tmp_path)


Q_PROJ, CONV = "model.layers.1.self_attn.q_proj.weight", "backbone.layers.0.mixer.conv1d.weight"


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "kind, tensors, message",
    [
        ("llama", {Q_PROJ: None}, f"missing {Q_PROJ}$"),
        ("llama", {Q_PROJ: torch.ones(31, 32)}, rf"{Q_PROJ} of shape \(31, 32\), not \(32, 32\)$"),
        ("llama", {"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, "unexpected model.layers.2.mlp.up_proj."),
        ("llama", {"lm_head.weight": None}, "missing lm_head.weight$"),
        ("mamba", {CONV: torch.ones(64, 5)}, rf"{CONV} of shape \(64, 5\), not \(64, 1, 5\)$"),
        ("hymba", {"model.memory_tokens": None, "more": torch.ones(1)}, "missing model.memory_tokens, .* more$"),
        ("llama", {Q_PROJ: torch.ones(32, 32).to(torch.int8)}, f"{Q_PROJ} of torch.int8: quantised weights are not"),
    ],
)
def test_released_tensors_that_do_not_fit(kind, tensors, message, shards, tmp_path):
    write_released(tmp_path, RELEASED[kind], shards, **tensors)
    with pytest.raises(ValueError, match=message):
        Hymba.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("hymba", {"model_type": "gpt2"}, "model_type='gpt2' is not supported, only hymba, llama, mamba"),
        ("hymba", {"model_type": None}, "model_type=None is not supported"),
        ("hymba", {"kv_reuse_group": [[1, 2], [4, 5]]}, r"kv_reuse_group=\[\[1, 2\], \[4, 5\]\] .* only .* \[4, 5, 6"),
        ("hymba", {"rope_type": "yarn"}, "rope_type='yarn' is not supported, only 'ntk'"),
        ("hymba", {"mlp_hidden_act": "relu2"}, "mlp_hidden_act='relu2' is not supported, only 'silu'"),
        ("hymba", {"sliding_window": None}, "config.json describes no model: TypeError"),
        ("hymba", {"mamba_d_state": 0}, "d_state=0: must be 1 or more"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported, only False"),
        ("llama", {"head_dim": 16}, "head_dim=16 is not supported, only 8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ("llama", {"num_attention_heads": 5}, "n_head=5 is not a multiple of n_kv_head=2"),
        ("mamba", {"use_bias": True}, "use_bias=True is not supported, only False"),
        ("mamba", {"intermediate_size": 48}, "intermediate_size=48 is not supported, only 64"),
    ],
)  # fmt: skip
def test_released_configs_that_cannot_be_computed(kind, changes, message, tmp_path):
    write_released(tmp_path, RELEASED[kind])
    (tmp_path / "config.json").write_text(json.dumps({"head_dim": None} | RELEASED[kind] | changes))
    with pytest.raises(ValueError, match=message):
        Hymba.from_pretrained(tmp_path)
    for key in ("hidden_size", "num_hidden_layers"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in RELEASED[kind].items() if k != key}))
        with pytest.raises(ValueError, match=f"config.json describes no model: KeyError: '{key}'"):
            Hymba.from_pretrained(tmp_path)


def test_released_files_missing_or_corrupt(tmp_path):
    write_released(tmp_path, LLAMA_JSON, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="00002.safetensors is corrupt"):
        Hymba.from_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model-00001-of-00002.safetensors"), second)
    with pytest.raises(ValueError, match="00002.safetensors is corrupt: another file of .* has .*weight, too"):
        Hymba.from_pretrained(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="not a whole checkpoint: it has no model-00002-of-00002.safetensors"):
        Hymba.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="it has no model.safetensors"):
        Hymba.from_pretrained(tmp_path)
    for text in (b"{", b"[]", b"null", b"3", b"\xff"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match="config.json describes no model"):
            Hymba.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        Hymba.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_corrupt_index_of_shards(text, tmp_path):
    small("M").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json is corrupt"):
        Hymba.from_pretrained(tmp_path)


def test_released_names_on_the_hub(tmp_path, monkeypatch):
    write_released(tmp_path, MAMBA_JSON)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, "model*.safetensors" in allow_patterns))
        if "down" in name:
            raise OSError("no\n network")
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert Hymba.from_pretrained("state-spaces/mamba-130m.hf").config.pattern == "MM"
    with pytest.raises(ConnectionError, match="no folder lab/down, nor a download from huggingface.co: no network"):
        Hymba.from_pretrained("lab/down")
    for name in ("mamba", "a/b/c", "/a/b", "../b", "a/", "./a", "a b/c", "https://huggingface.co/a/b"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor owner/model on huggingface.co"):
            Hymba.from_pretrained(name)
    name = "state-spaces/mamba-130m.hf"  # its config.json is read before the weights are downloaded
    assert asked == [(name, False), (name, True), ("lab/down", False)]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="to get it from huggingface.co: pip install huggingface_hub"):
        Hymba.from_pretrained("lab/model")


def test_a_crash_in_save_pretrained_leaves_the_old_files(tmp_path, monkeypatch):
    write_released(tmp_path, MAMBA_JSON)
    before, model = contents(tmp_path), Hymba.from_pretrained(tmp_path)

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(weights, "save_file", full)
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    with torch.no_grad():
        model.embed.weight.zero_()
    model.save_pretrained(tmp_path)  # over the file that is mapped
    assert not Hymba.from_pretrained(tmp_path).embed.weight.any() and error(model.norm.weight, torch.ones(32)) < 1


def transformers():
    return pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")


def compare_with_transformers(theirs, folder: Path, **options) -> Hymba:
    """Logits of theirs, with weights large enough to matter, and of what we load from its save_pretrained."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2, generator=g) if p.dim() > 1 else p.add_(torch.rand(p.shape, generator=g) - 0.5)
    theirs.eval().save_pretrained(folder, **options)
    model, idx = Hymba.from_pretrained(folder), tokens(2, 40, vocab=67)
    with torch.no_grad():
        assert error(model(idx)[0], theirs(idx).logits) < 1e-5
    model.save_pretrained(folder / "again")
    with torch.no_grad():  # theirs reads what we write
        assert torch.equal(type(theirs).from_pretrained(folder / "again")(idx).logits, theirs(idx).logits)
    return model


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3], ids=["plain", "llama3"])
@pytest.mark.parametrize("tied", [True, False])
def test_against_llama(tied, rope, tmp_path):
    tr = transformers()
    c = tr.LlamaConfig(vocab_size=67, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters=rope | {"rope_theta": 500.0})  # fmt: skip
    model = compare_with_transformers(tr.LlamaForCausalLM(c), tmp_path)
    assert model.config.tied == tied and (model.lm_head is None) == tied
    # transformers before 5 wrote it so
    c = json.loads((tmp_path / "config.json").read_text())
    c |= {"rope_theta": c.pop("rope_parameters")["rope_theta"], "rope_scaling": rope if rope == LLAMA3 else None}
    (tmp_path / "config.json").write_text(json.dumps(c))
    assert Hymba.from_pretrained(tmp_path).config == model.config


def test_against_mamba(tmp_path):
    """A pure M model against MambaForCausalLM, whose slow path also checks the mixer and the scan."""
    tr = transformers()
    mamba = tr.MambaForCausalLM(tr.MambaConfig(vocab_size=67, hidden_size=32, state_size=4, num_hidden_layers=3,
        conv_kernel=5, expand=2, time_step_rank=2, layer_norm_epsilon=1e-5, use_mambapy=False, use_cache=False,
    ))  # fmt: skip
    compare_with_transformers(mamba, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


def test_untied_output_layer():
    """Every use of the output layer: logits, the loss, generation, and the counts of parameters and operations."""
    tied, model = small("hM"), small("hM", tied=False)
    with torch.no_grad():
        model.lm_head.normal_(std=0.5)
    idx = tokens(1, 9)
    logits, loss = model(idx)[0], model(idx, idx)[1]
    hidden = model.hidden(idx)
    assert torch.equal(logits, hidden @ model.lm_head.T)
    assert abs(loss - F.cross_entropy(logits[0], idx[0])) < 1e-5
    assert next(model.generate([idx[0].tolist()], 1, temperature=0)) == [logits[0, -1].argmax().item()]
    assert model.num_params() == tied.num_params() + 61 * 32 and model.flops_per_token() == tied.flops_per_token()
    groups = train.optimizer_for(model, train.TrainConfig()).param_groups
    assert any(p is model.lm_head for p in groups[1]["params"])


# ----------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("pattern", MIXED + ["TTT", "MMM"])
def test_ragged_batch_gives_each_row_what_it_gets_alone(pattern):
    model = small(pattern)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 20, 1, 9, 3)]
    for options in ({"temperature": 0}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 5}):
        together = list(zip(*model.generate(prompts, 25, **options), strict=True))
        assert list(together[0]) == [row[0] for row in model.generate(prompts[:1], 25, **options)]
        if options["temperature"] == 0:
            for prompt, row in zip(prompts, together, strict=True):
                assert list(row) == [t for (t,) in model.generate([prompt], 25, **options)]
                full = torch.tensor([prompt + list(row)])
                with torch.no_grad():  # and what the full forward pass would choose
                    best = model(full)[0][0, len(prompt) - 1 : -1].argmax(-1)
                assert best.tolist() == list(row)


def test_ragged_batch_of_64_equals_64_single_runs():
    """Rows end at different times, and the batch is halved as they do."""
    model, g = small("HhM"), torch.Generator().manual_seed(0)
    prompts = [tokens(int(n), seed=i).tolist() for i, n in enumerate(torch.randint(1, 12, (64,), generator=g))]
    alone = [[t for (t,) in model.generate([p], 24, temperature=0)] for p in prompts]
    stop = max(range(61), key=lambda t: sum(t in row for row in alone))  # the token that ends most rows
    together = list(zip(*model.generate(prompts, 24, temperature=0, stop=stop), strict=True))
    for row, expected in zip(together, alone, strict=True):
        n = expected.index(stop) if stop in expected else 24
        assert list(row) == expected[:n] + [None] * (len(row) - n)
    assert 8 < sum(stop in row for row in alone) < 64


def test_sampling_does_not_depend_on_the_batch():
    model, prompts = small("Hh"), [tokens(n, seed=n).tolist() for n in (5, 2, 9, 3)]
    options = dict(max_new_tokens=15, temperature=1.5, top_k=40, top_p=0.95, seed=7)
    together = list(zip(*model.generate(prompts, **options), strict=True))
    for i in range(4):
        assert [t for (t,) in model.generate(prompts[i : i + 1], first_row=i, **options)] == list(together[i])
    pair = zip(*model.generate(prompts[1:3], first_row=1, **options), strict=True)
    assert list(pair) == together[1:3]
    same = list(zip(*model.generate([prompts[0]] * 3, **options), strict=True))
    assert len(set(same)) == 3  # equal prompts, different streams


def test_random_numbers():
    """Exponentially distributed, without correlation along any of the counter's parts, each following from its own."""
    seeds, rows, pos = (0, 1, 2**64 - 1), torch.arange(40), torch.arange(40) * 3
    draws = torch.stack(
        [model_module.exponential(s, rows, pos + p, 500) for s in seeds for p in (0, 1)]
    )  # (6, 40, 500)
    u = torch.exp(-draws.double()).flatten().sort().values  # uniform, then
    n = len(u)
    assert (u - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001
    z = torch.special.ndtri(torch.exp(-draws.double()).clamp(1e-12, 1 - 1e-12))
    for dim in range(3):
        a, b = z.narrow(dim, 0, z.shape[dim] - 1), z.narrow(dim, 1, z.shape[dim] - 1)
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
    assert draws.unique().numel() > 0.99 * n and (draws > 0).all()
    assert torch.equal(model_module.exponential(1, rows[7:9], pos[7:9], 99), draws[2, 7:9, :99])


def test_prompts_are_read_in_pieces(monkeypatch):
    model, sizes = small("HhhMt"), []
    prompts = [tokens(n, seed=n).tolist() for n in (50, 23, 23, 23, 4)]
    expected = list(model.generate(prompts, 12, temperature=0))
    monkeypatch.setattr(model_module, "PREFILL", 16)
    forward = Hymba.hidden
    monkeypatch.setattr(Hymba, "hidden", lambda m, idx, cache: sizes.append(idx.numel()) or forward(m, idx, cache))
    assert list(model.generate(prompts, 12, temperature=0)) == expected
    assert max(sizes) == 16 and sum(sizes[:-11]) == 50 + 3 * 23 + 4


def test_a_cache_that_generate_left_early():
    model, prompt = small("HhM"), tokens(9).tolist()
    cache = model.new_cache(1, 4)
    steps = model.generate([prompt], None, cache=cache)
    drawn = [next(steps)[0] for _ in range(4)]
    steps.close()
    with torch.no_grad():
        logits = model(torch.tensor([drawn[-1:]]), cache=cache)[0]
        full = model(torch.tensor([prompt + drawn]))[0]
    assert error(logits[0, -1], full[0, -1]) < 1e-5


def test_a_cache_after_a_stop_token_has_seen_all_that_was_yielded():
    model, prompt = small("HhM"), tokens(9).tolist()
    free = [t for (t,) in model.generate([prompt], 9, temperature=0)]
    for stop in set(free):
        cache = model.new_cache(1, 4)
        answer = [t for (t,) in model.generate([prompt], 20, temperature=0, stop=stop, cache=cache)]
        assert answer == free[: free.index(stop)] and cache.pos.tolist() == [5 + 9 + len(answer)]


def replaced(model: Hymba, how: str) -> Hymba:
    """With something in it that the kernels of one-token steps know nothing of."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    a, b = model.blocks
    if how == "layers":
        a.mixer.out_proj.__class__ = b.ffn.up_proj.__class__ = Doubled
        a.ffn.down_proj.bias = torch.nn.Parameter(torch.ones_like(b.ffn_norm.weight))
    elif how == "norms":
        a.mixer_norm = torch.nn.LayerNorm(len(a.mixer_norm.weight)).to(a.mixer_norm.weight.device)
        a.mixer.attn_norm, b.ffn_norm = torch.nn.Identity(), torch.nn.Identity()
    elif how == "parts":
        a.mixer.out_proj.register_forward_hook(lambda module, args, out: 2 * out)
        b.mixer.in_proj.weight = torch.nn.Parameter(b.mixer.in_proj.weight.t().contiguous().t())
        b.ffn = torch.nn.Sequential(b.ffn.gate_proj, torch.nn.Linear(40, 32, bias=False))
        b.ffn[1].weight.detach().fill_(0.1)
        b.ffn.to(b.ffn_norm.weight.device)
    return model


@on_device
@pytest.mark.parametrize(
    "pattern, fusion, rows, how",
    [("HM", "mean", 1, ""), ("ht", "diff", 5, ""), ("hT", "concat", 2, "layers"), ("hM", "mean", 2, "norms"),
     ("HM", "mean", 3, "parts")],
)  # fmt: skip
def test_inference_kernels_in_a_model(pattern, fusion, rows, how, device):
    """A prompt in two pieces, then single tokens, by kernels and without, also where parts are not ours."""
    sizes = dict(n_embd=32, n_head=2, n_kv_head=1, n_hidden=40, n_meta=3, window=4, vocab_size=50, fusion=fusion)
    idx, outputs = tokens(rows, 9, vocab=50).to(device), []
    for on in (True, False):
        model = replaced(small(pattern, **sizes, kernels=on).to(device), how)
        assert model.blocks[0].kernels == model.blocks[0].mixer.kernels == on
        cache = model.new_cache(rows, 12)
        with torch.no_grad():
            outputs.append(torch.cat([model(u, cache=cache)[0] for u in idx.split([4, 2, 1, 1, 1], dim=1)], 1))
    assert error(*outputs) < 1e-5


def test_steps_across_a_doubling_of_the_buffers():
    model = small("TH")
    cache = model.new_cache(2, 6)
    row = torch.arange(2)
    greedy = lambda x, cache, row: F.linear(x, model.embed.weight).argmax(-1)  # noqa: E731
    first = torch.tensor([3, 5])
    decoder = model_module.Decoder(model, cache, first.clone(), row, greedy)
    seen, capacities = [], []
    for _ in range(30):
        decoder.step()
        seen.append(decoder.tokens.tolist())
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [6, 12, 24, 48] and cache.nbytes == 2 * model.cache_bytes(48, torch.float32)
    assert seen == list(model.generate([[3], [5]], 30, temperature=0))


def test_a_cache_that_has_grown_frees_the_old_buffers(monkeypatch):
    model, caches, plain = small("T", n_meta=0), weakref.WeakSet(), Cache.map
    monkeypatch.setattr(Cache, "map", lambda cache, f: (caches.add(new := plain(cache, f)), new)[1])
    steps = model.generate([[1, 2], [3]], None)
    for _ in range(300):
        next(steps)
    held = {u.untyped_storage().data_ptr(): u.untyped_storage().nbytes() for c in caches for u in c.kv[0]}
    assert sum(held.values()) == 2 * model.cache_bytes(2 * (2 + 256), torch.float32)


def test_cast_keeps_what_must_be_float32():
    model = small("HhM").cast(torch.bfloat16)
    for name, p in model.named_parameters():
        kept = name.rpartition(".")[2] in ("conv_weight", "conv_bias", "dt_bias", "A_log", "D")
        assert p.dtype == (torch.float32 if kept else torch.bfloat16), name
    cache = model.new_cache(1, 9)
    assert {u.dtype for u in cache.kv[0]} == {torch.bfloat16} and cache.ssm[2][1].dtype == torch.float32
    with torch.no_grad():
        full, idx = model(tokens(1, 30))[0], tokens(1, 30)
        assert full.dtype == torch.bfloat16 and error(full, small("HhM")(idx)[0]) < 0.05
        out = torch.cat([model(piece, cache=cache)[0] for piece in idx.split([17] + [1] * 13, dim=1)], 1)
    assert error(out, full) < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("pattern", ["HhhhH", "MtT"])
def test_captured_steps_equal_the_reference(pattern):
    """CUDA graphs, across growing caches and halved batches: the tokens of the plain model."""
    sizes = dict(n_embd=256, n_head=4, n_kv_head=2, n_hidden=512, n_meta=16, window=64, vocab_size=512)
    # seed 30: the two likeliest tokens are never nearer than 2e-3, a thousand times float32's error; seed 0: once 1e-6
    fast, slow = (small(pattern, 30, **sizes, kernels=on).cuda() for on in (True, False))
    prompts = [tokens(n, vocab=512, seed=n).tolist() for n in (3, 200, 77, 30)]
    for n, options in ((200, dict(temperature=0)), (200, dict(temperature=0, stop=5)), (60, dict(seed=5, top_p=0.9))):
        expected = list(slow.generate(prompts, n, **options))
        assert list(fast.generate(prompts, n, **options)) == expected
        endless = fast.generate(prompts, None, **options)
        assert [next(endless) for _ in expected] == expected
    one = [[t for (t,) in fast.generate([p], 200, temperature=0)] for p in prompts]
    together = list(fast.generate(prompts, 200, temperature=0))
    assert one == [list(row) for row in zip(*together, strict=True)]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_long_prompts_need_bounded_memory():
    """Beside the weights and the cache, a prompt of 128k tokens needs no more than one of 32k does."""
    with torch.device("cuda"):
        model = Hymba(HymbaConfig(n_embd=256, n_head=4, n_kv_head=2, n_hidden=512, pattern="HhhhH")).cast(
            torch.bfloat16
        )
    peaks = []
    for n in (2**15, 2**17):
        prompt = tokens(n, vocab=32001).tolist()
        list(model.generate([prompt[:100]], 4))  # captures a step: cuBLAS keeps a workspace for that
        torch.cuda.reset_peak_memory_stats()
        list(model.generate([prompt], 4))
        peaks.append(torch.cuda.max_memory_allocated() - model.cache_bytes(n + 4))
    assert peaks[1] < 1.1 * peaks[0]


def test_generate_stops_and_samples():
    model = small("HhH")
    prompts = [tokens(4, seed=s).tolist() for s in range(6)]
    free = list(zip(*model.generate(prompts, 30, temperature=0), strict=True))
    stop = free[2][4]
    for row, expected in zip(
        zip(*model.generate(prompts, 30, temperature=0, stop=stop), strict=True), free, strict=True
    ):
        n = expected.index(stop) if stop in expected else 30
        assert row[:n] == expected[:n] and set(row[n:]) <= {None}
    one = list(model.generate([prompts[2]], 30, temperature=0, stop=stop))
    assert len(one) == list(free[2]).index(stop)  # ends when all rows have
    several = {stop, free[2][2]}
    ends = min(free[2].index(token) for token in several)
    assert len(list(model.generate([prompts[2]], 30, temperature=0, stop=several))) == ends < len(one)
    assert any(a != b for a, b in model.generate([[1], [1]], 20, temperature=5.0, seed=2**60))
    draws = [t for (t,) in model.generate([[1]], 200, temperature=5.0, seed=1)]
    assert draws == [t for (t,) in model.generate([[1]], 200, temperature=5.0, seed=1)]
    assert draws != [t for (t,) in model.generate([[1]], 200, temperature=5.0, seed=2)]
    greedy = [t for (t,) in model.generate([[1]], 50, temperature=0)]
    assert greedy == [t for (t,) in model.generate([[1]], 50, temperature=3.0, top_k=1)]
    assert greedy == [t for (t,) in model.generate([[1]], 50, temperature=3.0, top_p=1e-6)]
    endless = model.generate([[1]], None, temperature=0)
    assert [next(endless)[0] for _ in range(300)] == [t for (t,) in model.generate([[1]], 300, temperature=0)]
    for bad in ([], [[]]):
        with pytest.raises(ValueError, match="every prompt needs at least one token"):
            next(model.generate(bad))
    with pytest.raises(ValueError, match="token 61 is outside of the vocabulary of 61"):
        next(model.generate([[61]]))
    for bad in (-1, math.nan):
        with pytest.raises(ValueError, match=f"temperature={bad}"):
            next(model.generate([[1]], temperature=bad))
    with pytest.raises(ValueError, match="max_new_tokens=-1: must be 0 or more"):
        next(model.generate([[1]], -1))


@pytest.mark.parametrize("pattern", MIXED + ["TTT", "MMM"])
def test_generate_continues_a_cache(pattern):
    model = small(pattern)
    cache, text = model.new_cache(1, 4), []  # with too little room: it grows
    for n, prompt in enumerate(tokens(3, 9).tolist()):
        new = text[-1:] + prompt if n else prompt  # the last token was yielded, but not read
        text += prompt
        answer = [t for (t,) in model.generate([new], 7, temperature=0, cache=cache)]
        assert answer == [t for (t,) in model.generate([text], 7, temperature=0)]
        text += answer
        assert cache.pos.tolist() == [5 + len(text) - 1]
    for prompts, rows in [([[1], [2]], 1), ([[1]], 2), ([[1], [2]], 2)]:
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts, {rows} cache rows: only one prompt continues"):
            next(model.generate(prompts, cache=model.new_cache(rows, 9)))


def test_top_k_and_top_p_distribution():
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.15, 0.3]])).repeat(4000, 1)
    counter = 0, torch.arange(4000), torch.full((4000,), 9)

    def shares(temperature=1.0, top_k=None, top_p=None):
        return torch.bincount(model_module.sample_token(logits, temperature, top_k, top_p, counter), minlength=4) / 4000

    assert torch.allclose(shares(), torch.tensor([0.05, 0.5, 0.15, 0.3]), atol=0.03)
    assert torch.allclose(shares(top_k=2), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03)
    assert torch.allclose(shares(top_p=0.79), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03)
    assert torch.allclose(shares(top_p=0.81), torch.tensor([0, 0.5, 0.15, 0.3]) / 0.95, atol=0.03)
    assert torch.allclose(shares(temperature=0.5), torch.tensor([0.0025, 0.25, 0.0225, 0.09]) / 0.365, atol=0.03)
    assert shares(temperature=1e-40)[1] == 1


def test_pretrained_round_trip_and_errors(tmp_path):
    model = small("HhM")
    model.save_pretrained(tmp_path, step=3)
    again = Hymba.from_pretrained(tmp_path)
    assert asdict(again.config) == asdict(model.config)
    assert torch.equal(again(tokens(1, 9))[0], model(tokens(1, 9))[0])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["extra"] = tensors.pop("meta")
    tensors["norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing meta, unexpected extra, norm.weight of shape \(3,\), not \(32,\)$"):
        Hymba.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        Hymba.from_pretrained(tmp_path / "nowhere")


def test_cache_refuses_long_calls_for_ragged_rows():
    cache = Cache(HymbaConfig(**SMALL, pattern="TT"), 2, 9, torch.float32, torch.device("cpu"))
    cache.ragged = True
    with pytest.raises(ValueError, match="one token a call"):
        cache.block(0).extend(None, torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8))


# ----------------------------------------------------------------------------------------------------------------------
# Training


TINY = ["--pattern=HhhH", "--n_embd=32", "--n_head=2", "--n_kv_head=1", "--n_hidden=32", "--d_state=2", "--n_meta=4"]
TINY += ["--window=8", "--block_size=24", "--batch_size=2", "--warmup_steps=4", "--decay_steps=6", "--max_steps=24"]
TINY += ["--eval_interval=8", "--eval_windows=4", "--log_interval=4", "--prompt=", "--dataset=words", "--device=cpu"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with data/words and data/other: a few thousand bytes of text."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name in ("words", "other"):
        (root / name).mkdir()
        for i in range(25):
            words = rng.choice(["alpha", "beta", "gamma", "delta", "omega"], 120)
            (root / name / f"{i}.txt").write_text(name + " " + " ".join(words))
        prepare.prepare([str(root / name)], name=name, data_dir=root / "data")
    return root


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


def test_kill_and_resume_to_the_bit(corpus, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, out, err = run_train(corpus, f"--out_dir={whole}", "--prompt=alpha", "--sample_tokens=5")
    assert code == 0 and "alpha" in out.splitlines()[-1], err
    assert sorted(losses(whole)) == list(range(1, 25))
    # SIGKILL just after a checkpoint: what is on disk is whole, and the run continues from it
    process = run_train(corpus, f"--out_dir={cut}", wait=False)
    wait_for(lambda: (cut / "last/config.json").exists(), process)
    process.kill()
    process.communicate()
    # SIGTERM in the middle: saves, says so, exits with 0
    process = run_train(corpus, f"--out_dir={cut}", "--resume", "--max_steps=24", wait=False)
    wait_for(lambda: len(losses(cut)) >= 12, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume continues from" in out, err
    stopped = json.loads((cut / "last/config.json").read_text())["step"]
    if stopped < 24:
        code, out, err = run_train(corpus, f"--out_dir={cut}", "--resume")
        assert code == 0, err
    assert losses(cut) == losses(whole) and losses(cut, "val_loss") == losses(whole, "val_loss")
    meta = json.loads((corpus / "data/words/meta.json").read_text())["val"]
    for step, loss in losses(whole, "val_loss").items():
        bits = loss * meta["tokens"] / (meta["bytes"] * math.log(2))
        assert abs(losses(whole, "val_bpb")[step] - bits) < 1e-9
    best = min(losses(cut, "val_loss").items(), key=lambda item: item[1])
    saved = json.loads((cut / "best/config.json").read_text())
    assert (saved["step"], saved["best_val_loss"]) == best
    a, b = (Hymba.from_pretrained(folder / "last").state_dict() for folder in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
    code, _, err = run_train(corpus, f"--out_dir={cut}", "--resume")
    assert code == 1 and "raise --max_steps" in err
    code, _, err = run_train(corpus, f"--out_dir={cut}")
    assert code == 1 and "--resume continues it" in err
    shutil.copytree(corpus / "data", tmp_path / "data")
    meta_file = tmp_path / "data/words/meta.json"
    meta_file.write_text(meta_file.read_text().replace('"bytes",', '"cl100k_base",', 1))
    data = f"--data_dir={tmp_path / 'data'}"
    code, _, err = run_train(corpus, f"--out_dir={cut}", "--resume", "--max_steps=30", data)
    assert code == 1 and "was trained with another tokenizer (bytes)" in err
    with (cut / "metrics.jsonl").open("a") as f:
        f.write('{"step": 13, "lo')  # as a crash leaves it
    config = json.loads((cut / "last/config.json").read_text()) | {"best_val_loss": 1e-3}  # never to be reached again
    (cut / "last/config.json").write_text(json.dumps(config))
    code, out, err = run_train(corpus, f"--out_dir={cut}", "--resume", "--max_steps=25", "--grad_clip=0.1")
    assert json.loads((cut / "best/config.json").read_text()) == saved  # so the best one stays
    assert code == 0 and "other values of grad_clip" in out and sorted(losses(cut)) == list(range(1, 26)), err
    weights = (cut / "last/model.safetensors").read_bytes()
    (cut / "last/model.safetensors").write_bytes(weights[:1000])
    code, _, err = run_train(corpus, f"--out_dir={cut}", "--resume", "--max_steps=30")
    assert code == 1 and "model.safetensors is corrupt" in err and len(err.splitlines()) == 1
    code, _, err = run_train(corpus, f"--out_dir={cut}", "--resume", "--max_steps=30", "--n_hidden=48")
    assert code == 1 and "another architecture: n_hidden=32 there and 48 here" in err


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


def test_two_processes_equal_one_with_twice_the_batch(corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = run_train(corpus, f"--out_dir={one}", "--batch_size=4", "--max_steps=8", "--grad_accum=2")
    assert code == 0, err
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    flags = ("--batch_size=2", "--max_steps=8", "--grad_accum=2")
    code, _, err = run_train(corpus, f"--out_dir={two}", *flags, launcher=launcher)
    assert code == 0, err
    a, b = losses(one), losses(two)
    assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-4 for k in a)


def test_annealing_and_length_curriculum(corpus, tmp_path):
    flags = [
        "--anneal_dataset=other",
        "--anneal_mix=1.0",
        "--length_stages=24:16,48:8",
        "--rope_orig=24",
        "--compile=False",
    ]
    code, out, err = run_train(corpus, f"--out_dir={tmp_path}", *flags)
    assert code == 0, err
    assert Hymba.from_pretrained(tmp_path / "last").config.block_size == 48
    code, out, err = run_train(corpus, f"--out_dir={tmp_path / 'plain'}", flags[2], "--rope_orig=24")
    with_anneal, plain = losses(tmp_path), losses(tmp_path / "plain")
    assert all((with_anneal[k] == plain[k]) == (k <= 18) for k in range(1, 25))  # the last six steps decay
    shutil.copytree(corpus / "data", tmp_path / "data")
    (tmp_path / "data/other/tokenizer.tiktoken").write_text("IQ== 0")
    code, out, err = run_train(corpus, f"--out_dir={tmp_path / 'x'}", f"--data_dir={tmp_path / 'data'}", *flags[:2])
    assert code == 1 and "words and other have different tokenizers" in err
    cfg, _ = train.parse(["--length_stages=24:16,48:8", "--max_steps=24", "--batch_size=2"])
    assert train.parse_stages(cfg, 24) == [(0, 24), (16, 48)]
    for stages, message in [
        ("24:16,48:9", "is 25 steps, but max_steps=24"),
        ("24:16,36:8", "do not divide"),
        ("x", "write"),
    ]:
        cfg.length_stages = stages
        with pytest.raises(ValueError, match=message):
            train.parse_stages(cfg, 24)
    a, b = np.arange(1000), np.arange(1000, 3000)
    windows = train.draw([a, b], 0.25, (0, 3), 400, 8)
    assert windows.shape == (400, 9) and (np.diff(windows) == 1).all()
    assert 0.15 < (windows[:, 0] >= 1000).mean() < 0.35
    assert (windows == train.draw([a, b], 0.25, (0, 3), 400, 8)).all()
    assert (train.draw([a, b], 0.25, (0, 4), 400, 8) != windows).any()


def test_schedules():
    cfg = train.TrainConfig(max_steps=100, warmup_steps=10, decay_steps=20, learning_rate=1.0, min_lr=0.1)
    rates = [train.learning_rate(cfg, i) for i in range(101)]
    assert rates[0] == 0.1 and rates[9:81] == [1.0] * 72 and abs(rates[90] - 0.55) < 1e-9 and rates[100] == 0.1
    cfg.schedule = "cosine"
    rates = [train.learning_rate(cfg, i) for i in range(101)]
    assert rates[10] == 1.0 and abs(rates[55] - 0.55) < 1e-9 and abs(rates[100] - 0.1) < 1e-9
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_weight_decay_on_matrices_alone():
    model = small("hMT")
    optimizer = train.optimizer_for(model, train.TrainConfig())
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name.split(".")[-2] for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"in_proj", "x_proj", "dt_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_nan_stops_and_keeps_the_last_good_checkpoint(corpus, tmp_path):
    flags = (f"--out_dir={tmp_path}", "--learning_rate=1e30", "--min_lr=0", "--warmup_steps=14", "--grad_clip=0")
    code, _, err = run_train(corpus, *flags)
    assert code == 1 and " at step " in err and "try a lower learning_rate" in err
    assert len(err.splitlines()) == 1
    if (tmp_path / "last").exists():
        assert all(p.isfinite().all() for p in Hymba.from_pretrained(tmp_path / "last").parameters())


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = small("M")
    optimizer = train.optimizer_for(model, train.TrainConfig())
    model(tokens(1, 5), tokens(1, 5))[1].backward()
    optimizer.step()
    folder = tmp_path / "last"
    train.save_checkpoint(folder, model, optimizer, {"step": 1}, Path("none"))
    before = sorted((f.name, f.read_bytes()) for f in folder.iterdir())

    def full(*args):
        raise OSError(28, "No space left on device")

    def full_as_safetensors_says_it(*args):
        raise train.SafetensorError("I/O error: No space left on device")

    for error_ in (full, full_as_safetensors_says_it):
        monkeypatch.setattr(train, "save_file", error_)
        with pytest.raises(OSError, match="No space left"):
            train.save_checkpoint(folder, model, optimizer, {"step": 2}, Path("none"))
    assert [f.name for f in tmp_path.iterdir()] == ["last"]
    assert sorted((f.name, f.read_bytes()) for f in folder.iterdir()) == before
    folder.rename(tmp_path / "last.old")  # as if it stopped between the two renames
    folder = tmp_path / "last"
    config = json.loads((tmp_path / "last.old/config.json").read_text()) | {"tokenizer": "bytes"}
    del config["model"]["tied"]  # a flag younger than the checkpoint
    (tmp_path / "last.old/config.json").write_text(json.dumps(config))
    assert train.load_checkpoint(folder, model, optimizer, "bytes", Path("none"))["step"] == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--btach_size=3"], "unknown flag 'btach_size': did you mean batch_size?"),
        (["--batch_size=three"], "batch_size='three': must be int"),
        (["--learning_rate=fast"], "learning_rate='fast': must be float"),
        (["--resume=maybe"], "resume='maybe': must be bool"),
        (["config/nothing.py"], "no config file config/nothing.py"),
        (["--pattern=HxH"], "unknown letter 'x'"),
        (["--n_head=4", "--n_kv_head=3"], "n_head=4 is not a multiple of n_kv_head=3"),
        (["--schedule=linear"], "schedule='linear': use wsd or cosine"),
        (["--batch_size=0"], "batch_size=0: must be 1 or more"),
        (["--min_lr=1"], "min_lr=1.0 must lie between 0 and learning_rate"),
        (["--dataset=nothing"], "python prepare.py"),
        (["--vocab_size=100"], "vocab_size=100 is too small for data set words"),
        (["--block_size=100000"], "too few for sequences of 100000"),
        (["--resume"], "nothing to resume"),
        (["--device=cuda:99"], "device=cuda:99: there is none here"),
        (["--batch=3"], "unknown flag 'batch'"),
        (["--grad_clip=-1"], "grad_clip=-1.0: must be 0 or more"),
        (["--seed=-1"], "seed=-1: must be 0 or more"),
    ],
)
def test_training_errors(corpus, tmp_path, flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        train.main([*TINY, f"--data_dir={corpus / 'data'}", f"--out_dir={tmp_path / 'out'}", *flags])
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("out/*"))


def test_training_errors_of_data_and_disk(corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus / "data", tmp_path / "data")
    flags = [*TINY, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="0 MB free, but checkpoints need"):
        train.main(flags)
    file = tmp_path / "data/words/train.bin"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="train.bin"):
        train.main(flags)
    file.write_bytes(data[:-7])
    with pytest.raises(ValueError, match="train.bin"):
        train.main(flags)


def test_config_file_and_command_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('"""doc"""\nn_layer = 4\nlearning_rate = 1\nbatch_size = 3\n')
    cfg, args = train.parse([str(file), "--batch_size=5", "--pattern=HhhhHhhhH", "--resume"])
    assert (cfg.learning_rate, cfg.batch_size, cfg.out_dir, cfg.resume) == (1.0, 5, "out/mine", True)
    assert HymbaConfig(**args).pattern == "HhhhHhhhH"  # a pattern on the command line replaces the file's n_layer
    assert HymbaConfig(**train.parse([str(file)])[1]).pattern == "HHhH"
    file.write_text("n_layers = 4\n")
    with pytest.raises(ValueError, match="unknown flag 'n_layers': did you mean n_layer?"):
        train.parse([str(file)])
    file.write_text("n_layer = 4.5\n")
    with pytest.raises(ValueError, match="n_layer=4.5: must be int"):
        train.parse([str(file)])


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def test_sample_command(corpus, tmp_path):
    run = lambda *flags: subprocess.run(  # noqa: E731
        [sys.executable, str(ROOT / "sample.py"), "--device=cpu", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    done = run()
    assert done.returncode == 1 and done.stderr == (
        "sample.py: no checkpoint under out/: run python train.py first, or pass --init_from=FOLDER\n"
    )
    code, _, err = run_train(corpus, f"--out_dir={tmp_path / 'out/x'}", "--max_steps=2")
    assert code == 0, err
    flags = [
        "--prompt=alpha ",
        "--n_samples=3",
        "--temperature=0.8",
        "--top_k=50",
        "--top_p=0.95",
        "--max_new_tokens=20",
    ]
    a, b, c = run(*flags, "--seed=1"), run(*flags, "--seed=1"), run(*flags, "--seed=2")
    assert a.returncode == 0 and a.stdout == b.stdout != c.stdout, a.stderr
    assert a.stdout.count("alpha ") >= 3 and "out/x/best" in a.stderr
    assert run("--max_new_tokens=5").returncode == 0


def test_sample_file(tmp_path, capsys):
    """--file writes a line for each prompt in order, the same in batches of any size, and complains before it loads."""
    torch.manual_seed(0)
    model = Hymba(HymbaConfig(**(SMALL | dict(pattern="hM", vocab_size=320))))
    model.save_pretrained(tmp_path / "model", tokenizer="bytes")
    file = tmp_path / "prompts.txt"
    prompts = ["one", "a longer prompt", "two \u00e9", "form\x0cfeed", "\u2028five"]
    file.write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    flags = [f"--init_from={tmp_path / 'model'}", "--device=cpu", "--max_new_tokens=12", f"--file={file}"]
    outputs = []
    for size in (1, 2, 64):
        sample.main([*flags, f"--batch_size={size}", "--seed=3"])
        outputs.append(capsys.readouterr().out)
    rows = [json.loads(line) for line in outputs[0].splitlines()]
    assert [row["prompt"] for row in rows] == prompts and outputs[0] == outputs[1] == outputs[2]
    assert len({row["text"] for row in rows}) > 1 and set(rows[0]) == {"prompt", "text"}
    file.write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    for bad, kind, message in [
        ([], ValueError, "prompts.txt is empty: write one prompt a line"),
        ([f"--file={tmp_path / 'nowhere.txt'}"], FileNotFoundError, "nowhere.txt"),
        ([f"--file={tmp_path / 'latin.txt'}"], ValueError, "latin.txt is not UTF-8 text"),
        (["--temperature=-1"], ValueError, "temperature=-1.0, .* use >= 0"),
        (["--max_new_tokens=-1"], ValueError, "max_new_tokens=-1: must be 0 or more"),
        (["--n_samples=0"], ValueError, "n_samples=0: must be 1 or more"),
    ]:
        with pytest.raises(kind, match=message):  # before the model: there is none
            sample.main([*flags, f"--init_from={tmp_path / 'no model'}", *bad])
    file.write_text("x")
    with pytest.raises(ValueError, match="--batch_size of 1 or more"):
        sample.main([*flags, "--batch_size=0"])


def test_a_gpu_called_by_its_number_becomes_the_current_one(monkeypatch):
    """Triton launches on the current one, wherever the tensors are, and torch.cuda.graph captures its streams."""
    current = []
    monkeypatch.setattr(torch, "zeros", lambda n, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cpu", "cuda", "cuda:1"):
        assert sample.pick_device(name) == torch.device(name)
    assert current == [torch.device("cuda:1")]


def test_generate_refuses_a_gpu_that_is_not_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    weight = types.SimpleNamespace(device=torch.device("cuda:1"))
    model = types.SimpleNamespace(config=HymbaConfig(**SMALL, pattern="T"), embed=types.SimpleNamespace(weight=weight))
    with pytest.raises(ValueError, match=r"on cuda:1: call torch.cuda.set_device\(1\) before generate"):
        next(Hymba.generate(model, [[1]]))


def test_jsonl_lines_come_as_soon_as_they_can():
    """Rows end in the order 1, 2, 0, 3: nothing is written before row 0 has ended, then three lines at once."""
    tokenizer, printed = prepare.load_tokenizer("bytes", "."), []

    class Fixed:
        def generate(self, prompts, max_new_tokens, stop, first_row):
            a = ord("a")
            for step in ([a, a, a, a], [a, None, a, a], [a, None, None, a], *[[None, None, None, a]] * 2):
                printed.append(None)
                yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda line, **_: printed.append(json.loads(line)["text"]))
        sample.write_jsonl(Fixed(), tokenizer, list("wxyz"), 8, 9)
    assert printed == [None] * 4 + ["aaa", "a", "aa", None, "aaaaa"]


def test_jsonl_text_continues_the_prompt(capsys):
    """A word's first token, decoded alone, would lose the blank before it."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r requirements-dev.txt")
    decoders = tokenizers.decoders
    words = tokenizers.Tokenizer(tokenizers.models.BPE({"▁the": 0, "▁fox": 1, "es": 2}, []))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = types.SimpleNamespace(n_vocab=3, eot_token=9, decode=words.decode, encode_ordinary=lambda text: [0])

    class Fixed:
        def generate(self, prompts, max_new_tokens, stop, first_row):
            yield from ([1, 0], [2, None], [7, None])  # 7: beyond the tokenizer's vocabulary

    sample.write_jsonl(Fixed(), tokenizer, ["the", "the"], 8, 9)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] + row["text"] for row in rows] == ["the foxes", "the the"]


def test_bench_counts_a_step_s_bytes():
    import bench

    sizes = dict(n_embd=32, n_head=2, n_kv_head=1, n_hidden=16, d_state=4, n_meta=5, window=7, vocab_size=64)
    spec = dict(config=sizes | dict(pattern="HhhMT"), batch=2, contexts=[16], prefill=False, steps=1)
    (row,) = bench.decode_worker(spec, torch.device("cpu"))
    E, F_, D, steps = 16, 32, 64, 3 + 0  # three steps before the bytes are counted
    full, ring = 5 + 16 + steps + 1, 5 + 7
    kv = 2 * (full * (E + F_) + 2 * ring * (E + F_) + full * 2 * E)  # H; two blocks that read one ring; T
    ssm = 4 * (2 * 3 * D + 4 * D * 4)  # H, h, h, M: conv tail in bfloat16, state in float32
    with torch.device("meta"):
        model = Hymba(HymbaConfig(**sizes, pattern="HhhMT"))
    kept = 4 * (D * 4 + 3 * D + D * 4)  # float32 in H, h, h, M: conv_weight, conv_bias, dt_bias, D and A_log
    weights = 2 * model.num_params() + 2 * kept
    assert abs(row["read_gb"] * 1e9 - weights - 2 * (kv + ssm)) < 1
    assert row["cache_mb"] == row["formula_mb"] == model.cache_bytes(16 + 256) / 1e6
    assert {"ms_per_step", "tokens_per_s"} < set(row)


def test_bench_halves_a_batch_until_it_fits(monkeypatch):
    import bench

    def row(model, B, context, *rest):
        tried.append((context, B))
        if B * context > 100:
            raise torch.cuda.OutOfMemoryError("no room")
        return dict(context=context, batch=B)

    tried = []
    monkeypatch.setattr(bench, "decode_row", row)
    spec = dict(config=SMALL | dict(pattern="t"), batch=8, contexts=[10, 20, 100], prefill=False)
    assert [r["batch"] for r in bench.decode_worker(spec, torch.device("cpu"))] == [8, 4, 1]
    assert tried == [(10, 8), (20, 8), (20, 4), (100, 4), (100, 2), (100, 1)]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        bench.decode_worker(spec | {"contexts": [101]}, torch.device("cpu"))


def test_bench_plot_says_what_it_cannot_show(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-dev.txt")
    import bench

    for what, message in [("decode", "no picture of decode"), ("sweep", "has no results")]:
        (tmp_path / "x.json").write_text(json.dumps({"what": what, "device": "", "rows": []}))
        with pytest.raises(ValueError, match=message):
            bench.plot([str(tmp_path / "x.json")])


def test_streaming_holds_back_half_characters(capsys):
    tokenizer = prepare.load_tokenizer("bytes", ".")

    class Fixed:
        """A model that says what it is told."""

        def generate(self, prompts, max_new_tokens, stop):
            yield from ([b] for b in "né€🙂".encode())

    assert sample.stream(Fixed(), tokenizer, "<", 99) == "<né€🙂"
    assert capsys.readouterr().out == "<né€🙂\n"


TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}{% endif %}
<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}"""  # what trim_blocks and lstrip_blocks leave of it is one line
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]


def write_chat_model(folder: Path, merges: int = 0, **settings) -> Path:
    """A random released Hymba with a tokenizer of ASCII characters and so many merges, and a chat template."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r requirements-dev.txt")
    pytest.importorskip("jinja2", reason="pip install -r requirements-dev.txt")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.decoder = tokenizers.decoders.Fuse()
    size = len(SPECIAL) + 27 + merges
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    letters = "abcdefghijklmnopqrstuvwxyz "
    tokenizer.train_from_iterator([a + b for a in letters for b in letters], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    write_released(folder, HYMBA_JSON | {"vocab_size": size})
    tokenizer.enable_truncation(4)  # of some batch in its training, not of ours
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "config.json").write_text(json.dumps(HYMBA_JSON | {"vocab_size": size, "eos_token_id": 3}))
    return folder


def talk(folder: Path, lines: list[str], monkeypatch, capsys, *flags: str) -> tuple[list[str], str]:
    """What python sample.py --chat answers to the lines, and what it writes to stderr."""
    lines = iter([*lines, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    capsys.readouterr()
    sample.main([f"--init_from={folder}", "--chat", "--device=cpu", "--max_new_tokens=12", *flags])
    out, err = capsys.readouterr()
    return out.split("\n")[:-1], err


def test_chat_keeps_the_cache(tmp_path, monkeypatch, capsys):
    """Greedy answers are those to the whole conversation without a cache, but each turn reads only what is new."""
    folder, read, run = write_chat_model(tmp_path), [], Hymba.hidden
    said = ["hello", "the fox", "why"]
    with monkeypatch.context() as patch:
        patch.setattr(Hymba, "hidden", lambda self, idx, cache: read.append(idx.shape[1]) or run(self, idx, cache))
        patch.setattr(Cache, "nbytes", 12_345_678)
        answers, err = talk(folder, said, patch, capsys, "--temperature=0")
    model, tokenizer = Hymba.from_pretrained(folder), sample.ReleasedTokenizer(folder)
    text, held = "<s>", []
    for line, answer in zip(said, answers, strict=True):
        text += f"<|user|>{line}<|assistant|>"
        prompt, expected = tokenizer.encode(text), []
        for (token,) in model.generate([prompt], 12, temperature=0):
            if token in (1, 2, 3):
                break
            expected.append(token)
        assert tokenizer.encode(answer) == [token for token in expected if token]  # <s> is no text
        held.append(len(prompt) + min(len(expected), 11))  # the last of 12 tokens has not been read
        text += answer + "</s>"
    assert len(set(answers)) == 3 and "reading the whole" not in err
    assert re.findall(r"\[cache: 12.3 MB, (\d+) tokens\]", err) == [str(n) for n in held]
    assert sum(read) == held[-1] and sum(n > 1 for n in read) == 3


@pytest.mark.parametrize("reason", ["tokens", "template"])
def test_chat_reads_again_what_the_cache_does_not_hold(reason, tmp_path, monkeypatch, capsys):
    """Tokens that their text is not cut into again, or a template that forgets: the answers stay right."""
    forgets = {"chat_template": TEMPLATE.replace("in messages %}", "in messages[-1:] %}")}
    folder = write_chat_model(tmp_path, **({"merges": 300} if reason == "tokens" else forgets))
    said = ["the dog", "over the fox", "the lazy dog"]
    answers, err = talk(folder, said, monkeypatch, capsys, "--temperature=0")
    assert "[reading the whole conversation again: nothing is lost but time]" in err
    render, tokenizer = sample.chat_template(folder), sample.ReleasedTokenizer(folder)
    messages = []
    for line, answer in zip(said, answers, strict=True):
        messages.append({"role": "user", "content": line})
        add, text = sample.decoder(tokenizer, prompt := tokenizer.encode(render(messages))), ""
        for (token,) in Hymba.from_pretrained(folder).generate([prompt], 12, temperature=0):
            if token in (1, 2, 3):
                break
            text += add(token)
        assert text == answer
        messages.append({"role": "assistant", "content": answer})


def test_chat_survives_ctrl_c(tmp_path, monkeypatch, capsys):
    folder = write_chat_model(tmp_path)
    plain, _ = talk(folder, ["hello"], monkeypatch, capsys, "--temperature=0")
    run, calls = Hymba.hidden, []

    def interrupted(self, idx, cache):
        calls.append(1)
        if len(calls) == 4:  # between two blocks, say
            rope = model_module.rope_angles(self.config, torch.zeros(1, 1))
            self.blocks[0](torch.zeros(1, 1, 32), rope, None, cache.block(0))
            raise KeyboardInterrupt
        return run(self, idx, cache)

    monkeypatch.setattr(Hymba, "hidden", interrupted)
    answers, err = talk(folder, ["hello", "go on"], monkeypatch, capsys, "--temperature=0")
    assert answers[0] == plain[0][:3] and "[stopped: the next turn reads the whole conversation again]" in err
    messages = [{"role": r, "content": t} for r, t in [("user", "hello"), ("assistant", answers[0]), ("user", "go on")]]
    tokenizer = sample.ReleasedTokenizer(folder)
    prompt = tokenizer.encode(sample.chat_template(folder)(messages))
    expected = [t for (t,) in Hymba.from_pretrained(folder).generate([prompt], len(answers[1]), temperature=0)]
    assert tokenizer.decode(expected) == answers[1] and "[cache:" in err


def test_chat_template_against_transformers(tmp_path):
    tr, folder = transformers(), write_chat_model(tmp_path)
    said = [("user", "hello"), ("assistant", " a\n"), ("user", "the {{ fox }}")]
    messages = [{"role": role, "content": text} for role, text in said]
    text = sample.chat_template(folder)(messages)
    assert text == "<s><|user|>hello<|assistant|> a\n</s><|user|>the {{ fox }}<|assistant|>"
    file, other = str(folder / "tokenizer.json"), "{% for m in messages %}{{ loop.index0 }}{% break %}{% endfor %}"
    theirs = tr.PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>")
    for source in (TEMPLATE, other + "{{ strftime_now('%Y') }}\n  {% if 1 %}\nx\n  {% endif %}\n"):
        expected = theirs.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        (folder / "chat_template.jinja").write_text(source)  # goes before the one in tokenizer_config.json
        assert sample.chat_template(folder)(messages) == expected


def test_chat_and_tokenizer_errors(tmp_path, monkeypatch):
    folder = write_chat_model(tmp_path)
    args = [f"--init_from={folder}", "--chat", "--device=cpu"]
    with pytest.raises(ValueError, match="--chat goes without --prompt and --n_samples"):
        sample.main([*args, "--prompt=Hello"])
    monkeypatch.setattr(Hymba, "from_pretrained", lambda *args, **options: pytest.fail("it began to load the weights"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for template, message in [
        (None, "has no chat template, so it was not trained to chat: use --prompt"),
        ([{"name": "tool_use", "template": "x"}], "has no chat template"),
        ("{% for %}", "the chat template of .*: Expected"),
        ("{{ raise_exception('only French') }}", "the chat template of .*: only French"),
        ("{{ messages.append(1) }}", "the chat template of .*: "),  # the sandbox
        ("{{ ''.__class__.__mro__ }}", "the chat template of .*: "),
    ]:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        with pytest.raises(ValueError, match=message):
            sample.main(args)
    settings["chat_template"] = [{"name": "default", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="missing: pip install jinja2"):
        patch.setitem(sys.modules, "jinja2", None)
        sample.main(args)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="missing: pip install tokenizers"):
        patch.setitem(sys.modules, "tokenizers", None)
        sample.main(args)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    assert sample.ReleasedTokenizer(folder).stops == {3}  # config.json's
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="says nowhere which token ends a text"):
        sample.main(args)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is corrupt"):
        sample.main(args)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        sample.main(args)


def test_sample_released_weights_without_chat(tmp_path, capsys):
    """The tokenizer's own beginning of a text, and each of several tokens that may end it."""
    folder = write_chat_model(tmp_path)
    model, tokenizer = Hymba.from_pretrained(folder), sample.ReleasedTokenizer(folder)
    for letter in "abcdefghijklmnopqrstuvwxyz":  # one whose continuation does not end at once
        prompt, ends = [0, *tokenizer.encode(letter)], []
        answer = [t for (t,) in model.generate([prompt], 9, temperature=0)]
        if not {1, 3} & set(answer[:3]):
            break
    for stops in ([1], [1, answer[2]]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        sample.main(
            [f"--init_from={folder}", f"--prompt={letter}", "--device=cpu", "--temperature=0", "--max_new_tokens=9"]
        )
        ends.append(next(i for i, t in enumerate([*answer, 3]) if t in {*stops, 3}))
        assert capsys.readouterr().out == tokenizer.decode(prompt + answer[: ends[-1]]) + "\n"
    assert ends[0] > 2 >= ends[1]


def test_decoder_gives_what_the_whole_text_gives():
    """Tokens whose text depends on their neighbours: word boundaries, and characters cut into bytes."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r requirements-dev.txt")
    decoders = tokenizers.decoders
    vocab = {name: i for i, name in enumerate(["▁the", "▁fox", "es", "▁", *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(  # as Llama 2's
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = types.SimpleNamespace(n_vocab=260, decode=tokenizer.decode)
    ids = [0, 1, 2, 1, *(4 + b for b in "é🙂".encode()), 3, 1]
    for cut in range(len(ids) + 1):
        add = sample.decoder(wrapped, ids[:cut])
        pieces = [add(t) for t in ids[cut:]]
        if not 4 < cut < 10:  # not inside of a character
            assert tokenizer.decode(ids[:cut]) + "".join(pieces) == "the foxes foxé🙂  fox"
    add = sample.decoder(wrapped, [0])
    assert [add(4 + 0xFF) for _ in range(5)] + [add(1)] == ["", "", "", "\ufffd" * 4, "", "\ufffd fox"]
    assert add(10**6) == ""


# ----------------------------------------------------------------------------------------------------------------------
# Data


UNICODE = "naïve café — 東京 🤗👩‍👩‍👧 \u202eabc\r\n\ttabs  and   spaces \n\n\n<|endoftext|> ١٢٣ 1234567 I'LL\n"


def write_documents(folder, texts):
    """One file a document, in the order of the list."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:05d}.txt").write_bytes(text.encode())
    return str(folder)


def read_back(folder, split):
    """The documents of a split as bytes, cut at the end-of-text tokens."""
    tokens, meta = prepare.open_split(folder, split)
    encoding = prepare.load_tokenizer(meta["tokenizer"], folder)
    assert tokens[-1] == meta["eot"]
    ends = np.flatnonzero(tokens == meta["eot"])
    starts = np.concatenate([[0], ends[:-1] + 1])
    return [encoding.decode_bytes(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def command(*args, **kwargs):
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )


def test_prepare_meta_and_files(tmp_path):
    texts = [f"document {i}: " + "é" * i + "\n" for i in range(45)]
    source = write_documents(tmp_path / "in", texts)
    folder = prepare.prepare([source], "mine", data_dir=tmp_path / "data")
    assert folder == tmp_path / "data" / "mine"
    assert [p.name for p in sorted(folder.parent.iterdir())] == ["mine"]
    assert sorted(contents(folder)) == ["meta.json", "train.bin", "val.bin"]
    meta = json.loads((folder / "meta.json").read_text())
    assert list(meta) == ["tokenizer", "vocab_size", "eot", "dtype", "source", "train", "val", "duplicates"]
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["dtype"]) == ("bytes", 257, 256, "uint16")
    assert (meta["source"], meta["duplicates"]) == ([source], 0)
    for split, n_documents in (("train", 43), ("val", 2)):
        tokens, meta_read = prepare.open_split(folder, split)
        raw = (folder / f"{split}.bin").read_bytes()
        assert meta_read == meta and tokens.dtype == np.dtype("<u2") and not tokens.flags.writeable
        np.testing.assert_array_equal(tokens, np.frombuffer(raw, "<u2"))
        documents = read_back(folder, split)
        assert len(documents) == n_documents == meta[split]["documents"]
        assert meta[split]["tokens"] == len(tokens) == meta[split]["bytes"] + n_documents
        assert meta[split]["bytes"] == sum(map(len, documents))
        assert meta[split]["sha256"] == hashlib.sha256(raw).hexdigest()
    # A uniform model over the 256 bytes has 8 bits per byte by the formula that meta.json is for.
    meta["val"]["tokens"] -= meta["val"]["documents"]
    assert math.isclose(math.log(256) * meta["val"]["tokens"] / meta["val"]["bytes"] / math.log(2), 8)


def test_prepare_split_takes_the_smallest_hash_of_each_twenty(tmp_path):
    texts = [f"{i} squared is {i * i}\n" for i in range(59)]
    folder = prepare.prepare([write_documents(tmp_path / "in", texts)], "mine", data_dir=tmp_path)
    by_hash = lambda text: hashlib.sha256(text.encode()).digest()  # noqa: E731
    val = [min(texts[i : i + 20], key=by_hash) for i in (0, 20)]  # the last 19 are all for training
    assert [d.decode() for d in read_back(folder, "val")] == val
    assert [d.decode() for d in read_back(folder, "train")] == [text for text in texts if text not in val]


def test_prepare_split_of_few_documents_cuts_each_at_a_line_break(tmp_path):
    texts = ["".join(f"line {j} of {i}\n" for j in range(100)) for i in range(18)] + ["one line without an end"]
    folder = prepare.prepare([write_documents(tmp_path / "in", texts)], "mine", data_dir=tmp_path)
    train, val = read_back(folder, "train"), read_back(folder, "val")
    assert len(train) == 19 and len(val) == 18
    assert train.pop().decode() == texts.pop()
    for text, head, tail in zip(texts, train, val, strict=True):
        assert (head + tail).decode() == text and head.endswith(b"\n")
        assert 0.05 * len(text) <= len(tail) <= 0.05 * len(text) + len("line 99 of 17\n")
    late = write_documents(tmp_path / "late", ["one long line " * 9 + "\nend"])
    assert read_back(prepare.prepare([late], "late", data_dir=tmp_path / "data"), "val") == [b"end"]
    with pytest.raises(
        ValueError, match="no text for validation: give 20 documents or more, or one with several lines"
    ):
        prepare.prepare([write_documents(tmp_path / "short", ["no line break"])], "short", data_dir=tmp_path / "data")


def test_prepare_drops_duplicates_and_empty_documents_before_the_split(tmp_path):
    texts = [f"text {i}\n" for i in range(20)]
    data = tmp_path / "data"
    noisy = [t for text in texts for t in (text, "", text, texts[0])]
    a = prepare.prepare([write_documents(tmp_path / "a", texts)], "clean", data_dir=data)
    b = prepare.prepare([write_documents(tmp_path / "b", noisy)], "noisy", data_dir=data)
    assert contents(a)["train.bin"] == contents(b)["train.bin"] and contents(a)["val.bin"] == contents(b)["val.bin"]
    assert json.loads(contents(b)["meta.json"])["duplicates"] == 40
    # A long dropped document must leave nothing behind when a shorter one follows it.
    c = write_documents(tmp_path / "c", ["long " * 999 + "\nend\n", "long " * 999 + "\nend\n", "short\nlast\n"])
    assert read_back(prepare.prepare([c], "c", data_dir=data), "train")[1] == b"short\n"


def test_prepare_is_deterministic_on_any_number_of_cores(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "in", [UNICODE * (1 + i % 7) * 50 + str(i) for i in range(60)])
    monkeypatch.setattr(prepare, "PIECE", 5000)  # many jobs, and documents cut into several
    folders = []
    for n_cores in (1, 2, 7):
        monkeypatch.setattr(os, "cpu_count", lambda n=n_cores: n)
        folders.append(prepare.prepare([source], f"on{n_cores}", data_dir=tmp_path))
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    documents = read_back(folders[0], "train") + read_back(folders[0], "val")
    assert sorted(documents) == sorted((tmp_path / "in" / f"{i:05d}.txt").read_bytes() for i in range(60))


@pytest.mark.parametrize(
    "text", [UNICODE * 3000, "é" * 200_000 + "\n" + "🤗" * 100_000, " " * 2_000_000 + "x\n" * 200_000]
)
@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_prepare_long_documents_in_pieces(tmp_path, monkeypatch, text, tokenizer):
    if tokenizer == "gpt2":  # a stand-in that splits as GPT-4 does and merges nothing: the real one is a download
        ranks = {bytes([b]): b for b in range(256)}
        fake = tiktoken.Encoding("x", pat_str=prepare.SPLIT, mergeable_ranks=ranks, special_tokens={prepare.EOT: 256})
        monkeypatch.setattr(prepare, "load_tokenizer", lambda spec, folder: fake)
    (tmp_path / "long.txt").write_bytes(text.encode())
    folder = prepare.prepare([str(tmp_path / "long.txt")], "long", tokenizer, data_dir=tmp_path)
    train, val = read_back(folder, "train"), read_back(folder, "val")
    assert len(train) == len(val) == 1
    assert (train[0] + val[0]).decode() == text


def test_prepare_cut_pieces_covers_the_spans(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 64)
    text = (UNICODE * 20).encode() + "東".encode() * 100
    spans = [(0, 12), (12, 13), (13, len(text))]
    jobs = list(prepare.cut_pieces(text, spans))
    pieces = [piece for job in jobs for piece in job]
    assert pieces[0][0] == 0 and pieces[-1][1] == len(text)
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
    assert [stop for _, stop, is_end in pieces if is_end] == [12, 13, len(text)]
    assert all(0 < stop - start <= 64 for start, stop, _ in pieces)
    for start, stop, is_end in pieces[2:]:
        text[start:stop].decode()  # never cut inside a character
        assert is_end or text[stop - 1 : stop] == b"\n" or b"\n" not in text[start:stop]


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_prepare_bytes_tokenizer_round_trip(text):
    encoding = prepare.load_tokenizer("bytes", "unused")
    tokens = encoding.encode_ordinary(text)
    assert tokens == list(text.encode()) and encoding.decode(tokens) == text
    assert (encoding.n_vocab, encoding.eot_token, encoding.decode([256])) == (257, 256, "<|endoftext|>")


def test_prepare_bpe(tmp_path):
    pytest.importorskip("tokenizers", reason="bpe:N needs: pip install tokenizers")
    lines = "".join(f"def function_{i}(self, x):\n    return x + {i}  # {UNICODE}" for i in range(400))
    texts = [lines[i : i + 2000] for i in range(0, len(lines), 2000)]
    source = write_documents(tmp_path / "in", texts)
    folder = prepare.prepare([source], "mine", "bpe:400", data_dir=tmp_path)
    assert contents(folder) == contents(prepare.prepare([source], "again", "bpe:400", data_dir=tmp_path))
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["dtype"]) == ("bpe:400", 400, 399, "uint16")
    documents = read_back(folder, "train") + read_back(folder, "val")
    assert sorted(d.decode() for d in documents) == sorted(texts)
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(lines.encode())
    assert meta["train"]["tokens"] < meta["train"]["bytes"] / 2
    # A plain tiktoken rank file: the 256 bytes first, in order, then the merges, each of two tokens before it.
    rows = [row.split(" ") for row in (folder / "tokenizer.tiktoken").read_text().splitlines()]
    tokens = [base64.b64decode(token) for token, _ in rows]
    assert [int(rank) for _, rank in rows] == list(range(399))
    assert tokens[:256] == [bytes([b]) for b in range(256)] and len(set(tokens)) == 399
    for rank, token in enumerate(tokens[256:], 256):
        assert any({token[:i], token[i:]} <= set(tokens[:rank]) for i in range(1, len(token)))
    # The first merge is the most frequent pair inside the pieces that the split pattern makes of the training text.
    pieces = tiktoken.Encoding(
        "x", pat_str=prepare.SPLIT, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    pattern = pieces._pat_str
    import regex  # a dependency of tiktoken

    pairs = collections.Counter()
    for document in read_back(folder, "train"):
        for piece in regex.findall(pattern, document.decode()):
            raw = piece.encode()
            pairs.update(zip(raw, raw[1:], strict=False))
    assert pairs[tuple(tokens[256])] == max(pairs.values())
    encoding = prepare.load_tokenizer("bpe:400", folder)
    for text in ("", "a", UNICODE, "\0\x7f\ufeff\U0010ffff", " " * 50_000, "word" * 20_000, "<|endoftext|>"):
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    with pytest.raises(ValueError, match=r"bpe:9000 needs more training text.* use --tokenizer=bpe:\d+ or bytes"):
        prepare.prepare([source], "toolarge", "bpe:9000", data_dir=tmp_path)
    # The rank file is checked when it is read.
    path = folder / "tokenizer.tiktoken"
    whole = path.read_bytes()
    for broken in (b"", whole[:-3], whole[: len(whole) // 2], whole.replace(b" 300\n", b" 301\n"), b"\xff" + whole):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="tokenizer.tiktoken is corrupt, it should rank 399 tokens"):
            prepare.load_tokenizer("bpe:400", folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no .*tokenizer.tiktoken, which the tokenizer 'bpe:400' needs"):
        prepare.load_tokenizer("bpe:400", folder)


def test_prepare_large_vocabulary_is_uint32(tmp_path, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    for n_vocab, dtype in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        special = {"<|endoftext|>": n_vocab - 1}
        encoding = tiktoken.Encoding("x", pat_str=prepare.SPLIT, mergeable_ranks=ranks, special_tokens=special)
        monkeypatch.setattr(prepare, "load_tokenizer", lambda spec, folder, encoding=encoding: encoding)
        source = write_documents(tmp_path / "in", [f"{UNICODE}{i}" for i in range(20)])
        folder = prepare.prepare([source], dtype, "cl100k_base", data_dir=tmp_path)
        tokens, meta = prepare.open_split(folder, "val")
        assert (meta["dtype"], meta["vocab_size"], meta["eot"]) == (dtype, n_vocab, n_vocab - 1)
        assert tokens.dtype == dtype and tokens[-1] == n_vocab - 1
        assert read_back(folder, "val")[0].decode().startswith(UNICODE)


def test_prepare_jsonl(tmp_path):
    texts = [UNICODE + str(i) for i in range(19)] + ["lone surrogate \ud800 half\n"]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    folder = prepare.prepare([str(tmp_path / "a.jsonl")], "mine", data_dir=tmp_path)
    documents = {d.decode() for d in read_back(folder, "train") + read_back(folder, "val")}
    assert documents == {text.replace("\ud800", "?") for text in texts}
    for i, bad in enumerate(['{"id": 1}', '{"text": 3}', '{"text": null}', '["text"]', '"text"', "{", "text", "\xff"]):
        path = tmp_path / f"bad{i}.jsonl"
        path.write_bytes(f"{lines[0]}\n\n{bad}\n".encode("latin-1", "replace"))
        with pytest.raises(ValueError, match=rf"bad{i}.jsonl, line 3: expected a JSON object such as"):
            prepare.prepare([str(path)], "bad", data_dir=tmp_path)
    assert not (tmp_path / "bad").exists()


def test_prepare_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet needs: pip install pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [UNICODE + str(i) for i in range(3000)]
    columns = {"id": list(range(3001)), "text": [*texts, None]}
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"id": columns["id"], "text": pa.array(columns["text"], pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        folder = prepare.prepare([str(tmp_path / "a.parquet")], "mine", data_dir=tmp_path, overwrite=True)
        documents = [d.decode() for d in read_back(folder, "train") + read_back(folder, "val")]
        assert sorted(documents) == sorted(texts)
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_text("not parquet")
    pq.write_table(pa.table({"text": [b"\xff"]}), tmp_path / "e.parquet")
    for letter in "bcde":
        with pytest.raises(
            ValueError, match=rf"{letter}.parquet is not a parquet file with a column `text` of strings"
        ):
            prepare.prepare([str(tmp_path / f"{letter}.parquet")], "bad", data_dir=tmp_path)


def test_prepare_folders(tmp_path, capsys):
    root = tmp_path / "in"
    for name in (
        "b/2.md",
        "b/1.py",
        "a.txt",
        "c",
        ".hidden/x.txt",
        ".profile",
        "data/old/meta.json",
        "b/__pycache__/x.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\nlast\n")
    (root / "picture.png").write_bytes(b"\x89PNG\r\n")
    (root / "latin1.txt").write_bytes(b"a line\ncaf\xe9\n")
    (root / "cut.txt").write_bytes("é".encode()[:1])
    (root / "dangling").symlink_to(root / "nothing")
    folder = prepare.prepare([str(root), str(root / "a.txt")], "mine", data_dir=root / "data")
    assert read_back(folder, "train") == [b"a.txt\n", b"c\n", b"b/1.py\n", b"b/2.md\n", b"b/__pycache__/x.txt\n"]
    out = capsys.readouterr().out
    assert "left out: 1 duplicates, 3 files that are not UTF-8, 2 hidden ones" in out
    for name in ("latin1.txt", "cut.txt", "picture.png"):
        with pytest.raises(ValueError, match=f"{name} is not UTF-8 text; leave it out or convert it"):
            prepare.prepare([str(root / name)], "bad", data_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no text in .*empty; give UTF-8 text, .jsonl or .parquet files"):
        prepare.prepare([str(tmp_path / "empty")], "bad", data_dir=tmp_path)
    assert not list(tmp_path.glob("bad*"))


def test_prepare_python(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    for name in ("os.py", "json/decoder.py", "site-packages/x/y.py", "dist-packages/z.py", "data.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\npass\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.py").write_text("# w\npass\n")
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda key: str(library))
    monkeypatch.setattr(prepare.site, "getsitepackages", lambda: [str(library / "site-packages")])
    monkeypatch.setattr(prepare.site, "getusersitepackages", lambda: str(tmp_path / "nothing"))
    here = str(ROOT), os.getcwd(), str(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [*here, str(library / "site-packages"), str(library / "python.zip")])
    folder = prepare.prepare(["python"], data_dir=tmp_path)
    assert folder.name == "python" and read_back(folder, "train") == [b"# os.py\n", b"# json/decoder.py\n"]
    assert prepare.open_split(folder, "val")[1]["source"] == [f"Python {sys.version.split()[0]} standard library"]
    folder = prepare.prepare(["python"], data_dir=tmp_path, site_packages=True)
    names = ["w", "os.py", "dist-packages/z.py", "json/decoder.py", "site-packages/x/y.py"]
    assert folder.name == "site-packages" and read_back(folder, "train") == [f"# {name}\n".encode() for name in names]
    assert prepare.open_split(folder, "val")[1]["duplicates"] == 0


def test_prepare_shakespeare(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        assert url == prepare.SHAKESPEARE and 0 < timeout <= 60
        return open(tmp_path / "reply", "rb")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    (tmp_path / "reply").write_bytes(text)
    message = "cannot download https://.* run: python prepare.py path/to/input.txt --name=shakespeare"
    with pytest.raises(ConnectionError, match=message):  # a login page instead of the text
        prepare.prepare(["shakespeare"], data_dir=tmp_path / "data")
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    folder = prepare.prepare(["shakespeare"], data_dir=tmp_path / "data")
    assert (folder.name, sorted(contents(folder))) == ("shakespeare", ["meta.json", "train.bin", "val.bin"])
    assert read_back(folder, "train") + read_back(folder, "val") == text.splitlines(keepends=True)
    (tmp_path / "data" / f"again.tmp-{os.getpid()}").mkdir()  # what a crash left, of a process with the same id
    assert contents(prepare.prepare(["shakespeare"], "again", data_dir=tmp_path / "data")) == contents(folder)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError, match=message):

        def cut_off(url, timeout):
            raise http.client.IncompleteRead(b"")

        patch.setattr(prepare.urllib.request, "urlopen", cut_off)
        prepare.prepare(["shakespeare"], data_dir=tmp_path / "offline")
    (tmp_path / "reply").unlink()  # as urllib's errors, FileNotFoundError is an OSError
    with pytest.raises(ConnectionError, match=message):
        prepare.prepare(["shakespeare"], data_dir=tmp_path / "offline")
    assert not (tmp_path / "offline").exists()


def test_prepare_tiktoken_offline(tmp_path, monkeypatch):
    def get_encoding(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(
        ConnectionError, match="cannot download the tokenizer 'gpt2'.*--tokenizer=bytes or --tokenizer=bpe"
    ):
        prepare.prepare(["python"], tokenizer="gpt2", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_prepare_refuses_before_reading_anything(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "a.parquet").write_text("")
    a, data = str(tmp_path / "a.txt"), tmp_path / "data"
    monkeypatch.setattr(prepare, "read_documents", lambda path: pytest.fail("it began to read"))
    for sources, options, error, message in [
        ([a], {}, ValueError, "give the data set a name, such as --name=mine"),
        (["python", a], {}, ValueError, "give the data set a name"),
        ([a], {"name": "../up"}, ValueError, "--name=../up is not a plain folder name"),
        ([a], {"name": ""}, ValueError, "is not a plain folder name"),
        ([a], {"name": ".."}, ValueError, "is not a plain folder name"),
        ([a], {"name": "a/b"}, ValueError, "is not a plain folder name"),
        ([a], {"name": "a\n"}, ValueError, "is not a plain folder name"),
        ([a], {"name": "x", "site_packages": True}, ValueError, "--site-packages goes with the source python"),
        ([a, "nowhere.txt"], {"name": "x"}, FileNotFoundError, "no file or folder 'nowhere.txt'"),
        ([a], {"name": "x", "tokenizer": "bpe:"}, ValueError, "'bpe:': N is the size of the vocabulary, at least 257"),
        ([a], {"name": "x", "tokenizer": "bpe:256"}, ValueError, "at least 257; write bpe:16384"),
        ([a], {"name": "x", "tokenizer": "bpe:16k"}, ValueError, "at least 257; write bpe:16384"),
        (
            [a],
            {"name": "x", "tokenizer": "gpt9"},
            ValueError,
            "unknown tokenizer 'gpt9'; use bytes, bpe:N .* gpt2, .*cl100k",
        ),
    ]:
        with pytest.raises(error, match=message):
            prepare.prepare(sources, data_dir=data, **options)
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match="needs a package that is missing: pip install tokenizers"):
        prepare.prepare([a], "x", "bpe:300", data_dir=data)
    with pytest.raises(ValueError, match="needs a package that is missing: pip install pyarrow"):
        prepare.prepare([str(tmp_path / "a.parquet")], "x", data_dir=data)
    assert not data.exists()
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 89, 11))
    with pytest.raises(OSError, match="data has 0 MB free and this needs about 0 MB; make room or choose another"):
        prepare.prepare([a], "x", data_dir=data)
    assert not list(data.iterdir())


def test_prepare_overwrite_and_failure_leave_whole_data_sets(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "in", ["a\nb\n"])
    folder = prepare.prepare([source], "mine", data_dir=tmp_path / "data")
    before = contents(folder)
    write_documents(tmp_path / "in", ["c\nd\n"])
    with pytest.raises(FileExistsError, match="mine exists; pass --overwrite to replace it, or another --name"):
        prepare.prepare([source], "mine", data_dir=tmp_path / "data")

    def fail(*args, **options):
        assert contents(folder) == before  # the old data set is there until the new one is complete
        raise error

    for stage in ("read_documents", "cut_pieces", "load_tokenizer"):
        for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
            with monkeypatch.context() as patch, pytest.raises(type(error)):
                if stage == "load_tokenizer":  # inside the threads
                    encoding = tiktoken.Encoding(
                        "x", pat_str="x", mergeable_ranks={b"x": 0}, special_tokens={"<|endoftext|>": 1}
                    )
                    patch.setattr(tiktoken.Encoding, "encode_to_numpy", fail)
                    patch.setattr(prepare, stage, lambda spec, folder, encoding=encoding: encoding)
                else:
                    patch.setattr(prepare, stage, fail)
                prepare.prepare(
                    [source],
                    "mine",
                    "gpt2" if stage == "load_tokenizer" else "bytes",
                    tmp_path / "data",
                    overwrite=True,
                )
            assert contents(folder) == before and list(folder.parent.iterdir()) == [folder]
    (folder / "notes.txt").write_text("mine")  # --overwrite removes nothing that prepare.py did not write
    with pytest.raises(FileExistsError, match="mine holds other files than a data set's; pass another --name"):
        prepare.prepare([source], "mine", data_dir=tmp_path / "data", overwrite=True)
    (folder / "notes.txt").unlink()
    # Even if the last renaming is what fails, the old one comes back.
    rename = Path.rename
    with monkeypatch.context() as patch, pytest.raises(OSError, match="denied"):

        def deny(path, target):
            if ".tmp-" in path.name:
                raise OSError("denied")
            return rename(path, target)

        patch.setattr(Path, "rename", deny)
        prepare.prepare([source], "mine", data_dir=tmp_path / "data", overwrite=True)
    assert contents(folder) == before and list(folder.parent.iterdir()) == [folder]
    assert prepare.prepare([source], "mine", data_dir=tmp_path / "data", overwrite=True) == folder
    assert read_back(folder, "train") == [b"c\n"] and list(folder.parent.iterdir()) == [folder]


def test_prepare_open_split_checks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, expected in [
        ("data/python", "no data set at data/python; prepare it with: python prepare.py python"),
        (
            "data/site-packages",
            "no data set at data/site-packages; prepare it with: python prepare.py python --site-packages",
        ),
        ("data/shakespeare", "no data set at data/shakespeare; prepare it with: python prepare.py shakespeare"),
        ("data/x", "no data set at data/x; prepare it with: python prepare.py FILES... --name=x"),
        ("/d/python", "no data set at /d/python; prepare it with: python prepare.py python --data_dir=/d"),
    ]:
        with pytest.raises(FileNotFoundError) as info:
            prepare.open_split(name, "train")
        assert str(info.value) == expected
    folder = prepare.prepare([write_documents(tmp_path / "in", ["some\ntext\n"])], "mine")
    assert str(folder) == "data/mine" or folder == Path("data/mine")
    with pytest.raises(ValueError, match="unknown split 'test'; use train or val"):
        prepare.open_split(folder, "test")
    again = "; rebuild it with: python prepare.py FILES... --name=mine --overwrite"
    whole = (folder / "train.bin").read_bytes()
    for broken, expected in [
        (whole[:-2], f"train.bin is truncated: {len(whole) - 2} bytes where meta.json says {len(whole)}{again}"),
        (whole[:-1], f"train.bin is truncated: {len(whole) - 1} bytes where"),
        (b"", f"train.bin is truncated: 0 bytes where meta.json says {len(whole)}"),
        (bytes([whole[0] ^ 1]) + whole[1:], f"train.bin is corrupt: its checksum is not the one in meta.json{again}"),
    ]:
        (folder / "train.bin").write_bytes(broken)
        with pytest.raises(ValueError) as info:
            prepare.open_split(folder, "train")
        assert expected in str(info.value)
    (folder / "train.bin").unlink()
    with pytest.raises(ValueError, match="train.bin is truncated: 0 bytes"):
        prepare.open_split(folder, "train")
    assert len(prepare.open_split(folder, "val")[0])  # the other split is untouched
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer": "bpe:300"}))
    with pytest.raises(ValueError, match="--name=mine --overwrite --tokenizer=bpe:300"):
        prepare.open_split(folder, "train")
    for broken in ("", "{", "[]", "null", "{}", json.dumps(meta | {"dtype": "int8"}), json.dumps(meta | {"train": {}})):
        (folder / "meta.json").write_text(broken)
        with pytest.raises(ValueError, match="meta.json is corrupt; rebuild it with: python prepare.py FILES"):
            prepare.open_split(folder, "train")
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="mine has no meta.json; rebuild it with: python prepare.py"):
        prepare.open_split(folder, "train")


def test_prepare_reads_in_blocks(tmp_path):
    """A document of 64 MB costs a few MB: the memory is that of the pieces being tokenized, not of the corpus."""
    import tracemalloc

    with open(tmp_path / "big.txt", "wb") as f:
        for i in range(64):
            f.write(f"{i:063d}\n".encode() * 2**14)
    tracemalloc.start()
    try:
        folder = prepare.prepare([str(tmp_path / "big.txt")], "big", data_dir=tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6 + 8 * (os.cpu_count() or 1) * prepare.PIECE * 5
    assert prepare.open_split(folder, "train")[1]["train"]["bytes"] > 60e6


def test_prepare_command_line(tmp_path):
    (tmp_path / "in.txt").write_text("some text\nand more\n" * 9)
    result = command("in.txt", "--name=mine", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data/mine/train.bin: 1 documents, 162 bytes, 163 tokens" in result.stdout.replace("\\", "/")
    assert read_back(tmp_path / "data/mine", "val") == [b"some text\nand more\n"[-9:]]
    for args, code, message in [
        (["in.txt", "--name=mine"], 1, "exists; pass --overwrite to replace it, or another --name\n"),
        (["in.txt", "--nam=mine"], 2, "unrecognized arguments: --nam=mine; see python prepare.py --help\n"),
    ]:
        result = command(*args, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (code, "")
        assert result.stderr.startswith("prepare.py: ") and result.stderr.endswith(message)
        assert result.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes without a signal they could handle")
def test_prepare_killed_leaves_nothing(tmp_path):
    write_documents(tmp_path / "in", [f"{i} {UNICODE}" * 20_000 for i in range(20)])
    args = [sys.executable, str(ROOT / "prepare.py"), "in", "--name=mine"]
    process = subprocess.Popen(args, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 30
    while not list(tmp_path.glob("data/mine.tmp-*/text")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and stderr.endswith("prepare.py: interrupted, nothing was written\n")
    assert "Traceback" not in stderr and not list((tmp_path / "data").iterdir())
