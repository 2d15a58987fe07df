"""The kernels of one-token steps against float64."""

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from conftest import BOUNDS, TRITON, dense_attention, error, on_device, scan_loop
from model import HymbaConfig, causal_conv

if TRITON:
    import engine_kernels


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
    monkeypatch.setattr(engine_kernels, "DECODE_PROGRAMS", parts)
    q, k, v, pos = decode_inputs(case, dtype, device)
    expected = []
    for b, p in enumerate(pos.tolist()):  # the last of p + 1 queries sees slots 0 ... p
        n = min(p + 1, k.shape[1])
        expected.append(
            dense_attention(q[b : b + 1].double(), k[b : b + 1, :n].double(), v[b : b + 1, :n].double(), None, 0)
        )
    o = engine_kernels.decode_attention(q, k, v, pos)
    assert o.dtype == dtype and error(o, torch.cat(expected)) < BOUNDS[dtype][0]
    assert torch.equal(o, engine_kernels.decode_attention(q, k, v, pos))


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("B, m, n", [(1, 1, 1), (4, 21, 100), (2, 7, 5504)])
def test_matvec_kernel(B, m, n, gated, dtype, device, poisoned):
    """Alone, and with all that it takes along; the vectors are a slice of something wider."""
    g = torch.Generator().manual_seed(n)
    r = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)  # noqa: E731
    x, weight, up, scale, add = r(B, 1, n + 3)[..., :n], r(m, n), r(m, n) if gated else None, r(n), r(B, 1, m)
    assert engine_kernels.fits_matvec(x) and not engine_kernels.fits_matvec(x.repeat(9, 1, 1))
    for w, norm, residual in ((weight, None, None), (weight.float(), scale, add)):
        v = x.double() if norm is None else F.rms_norm(x.double(), (n,), norm.double(), 1e-6)
        expected = v @ weight.double().t()
        expected = F.silu(expected) * (v @ up.double().t()) if gated else expected
        y = engine_kernels.matvec(x, w, up, norm, 1e-6, residual)
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
    out = engine_kernels.rope_append(proj, cos, sin, pos, keys, values, H, owns_kv, window, M)
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
        y = engine_kernels.conv_step(one(proj), weight, bias, tail)
        assert error(y, one(u)) < BOUNDS[dtype][0]
        ys.append(
            engine_kernels.scan_step(y, one(dt), A_log, one(dtBC), skip, one(proj), dt_bias, state, *scales, 1e-6)
        )
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
        outputs.append((engine_kernels.scan_step(x, dt, A, BC, skip, proj, bias, state, None, None, 1e-6), state))
    assert all(error(a, b) < 1e-6 for a, b in zip(*outputs, strict=True))
