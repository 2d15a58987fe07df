"""
One new token a row as Triton kernels: matvec, a linear layer of few rows with what is around it, and over caches that
are updated in place, rope_append, decode_attention, conv_step and scan_step. Optional: engine.py uses them where ops.py
says so. The rules and letters are the ones of kernels.py.

Bound by memory: weights and caches are read once. Each kernel does all it can of what lies between two matrix products.
Positions are read on the device, so a CUDA graph of these kernels stays right as the cache fills.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import LOG2E, launches_early, rms, sigmoid, softplus, wait

# ----------------------------------------------------------------------------------------------------------------------
# Linear layers

MATVEC_ROWS, MATVEC_SIZE = 4, 8192  # of x: at most so many rows, of at most so many numbers
MATVEC_TILE = 8192  # numbers of a weight that a program reads


@triton.jit
def matvec_kernel(weight, up, x, scale, add, y, eps, B, m, n, x_b,
                  BM: tl.constexpr, BN: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
                  ADD: tl.constexpr):  # fmt: skip
    """y = W x, with RMS-normalised x where NORM, silu(W x) * (U x) where GATED, and y + add where ADD.

    A program reads BM whole rows of W (m, n), and keeps them in registers for all B vectors x. The floor is W at the
    memory's bandwidth, and all the rest is latency: it asks for its rows before it waits for x.
    """
    i, j = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    here = (i < m)[:, None] & (j < n)[None, :]
    at = i.to(tl.int64)[:, None] * n + j[None, :]
    w = tl.load(weight + at, mask=here, other=0.0)
    if GATED:
        u = tl.load(up + at, mask=here, other=0.0)
    if NORM:
        s = tl.load(scale + j, mask=j < n, other=0.0)
    wait()
    for b in tl.range(B):
        v = tl.load(x + b * x_b + j, mask=j < n, other=0.0).to(tl.float32)
        norm = 1.0
        if NORM:
            norm = rms(v, n, eps)
            v *= s.to(tl.float32)
        out = tl.sum(w.to(tl.float32) * v[None, :], 1) * norm
        if GATED:
            out = out * sigmoid(out) * (tl.sum(u.to(tl.float32) * v[None, :], 1) * norm)
        if ADD:
            out += tl.load(add + b * m + i, mask=i < m, other=0.0).to(tl.float32)
        tl.store(y + b * m + i, out.to(y.dtype.element_ty), mask=i < m)


def fits_matvec(x: Tensor) -> bool:
    """Whether x (B, 1, n) is for matvec: more rows are faster in a matrix product, longer ones do not fit a program."""
    return len(x) <= MATVEC_ROWS and x.shape[-1] <= MATVEC_SIZE


def matvec(
    x: Tensor, weight: Tensor, up: Tensor | None = None, scale: Tensor | None = None, eps: float = 0.0,
    add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A linear layer of few tokens, x (B, 1, n) with weight (m, n) -> (B, 1, m) in x's dtype, and what is around it.

    scale (n,): x is RMS-normalised first; up (m, n): returns silu(weight x) * (up x); add (B, 1, m) is added at last.
    All contiguous but x's rows; weight, up and scale must not be written by the kernel that was launched just before.
    """
    (m, n), B = weight.shape, len(x)
    y, BN = x.new_empty(B, 1, m), triton.next_power_of_2(n)
    BM = max(1, min(8, MATVEC_TILE // BN // (1 if up is None else 2)))
    matvec_kernel[(triton.cdiv(m, BM),)](
        weight, up, x, scale, add, y, eps, B, m, n, x.stride(0),
        BM, BN, up is not None, scale is not None, add is not None, launch_pdl=launches_early(),
    )  # fmt: skip
    return y


# ----------------------------------------------------------------------------------------------------------------------
# Attention heads

DECODE_KEYS, DECODE_PROGRAMS = 64, 1024  # of decode_attention: slots a tile, and how many programs fill the chip


@triton.jit
def rope_append_kernel(proj, cos, sin, pos, out, keys, values, proj_b, keys_b, keys_s, values_b, values_s,
                       H, G, window, n_meta, E: tl.constexpr, F: tl.constexpr, BE: tl.constexpr,
                       BF: tl.constexpr):  # fmt: skip
    """out = R(pos) q for heads 0 ... H; programs H ... H + G store R(pos) k and v in the token's slot of the cache,
    R the rotation of channels i and i + E / 2 by the angle whose cos and sin are given. Grid (H [+ G], B)."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BE)
    half = i < E // 2
    wait()
    c = tl.load(cos + b * (E // 2) + i, mask=half)
    s = tl.load(sin + b * (E // 2) + i, mask=half)
    proj += b * proj_b
    x0 = tl.load(proj + h * E + i, mask=half).to(tl.float32)
    x1 = tl.load(proj + h * E + E // 2 + i, mask=half).to(tl.float32)
    into = out + (b * H + h) * E
    if h >= H:
        p = tl.load(pos + b)
        slot = tl.where((window == 0) | (p < n_meta), p, n_meta + (p - n_meta) % tl.maximum(window, 1))
        into = keys + b * keys_b + slot * keys_s + (h - H) * E
        f = tl.arange(0, BF)
        value = tl.load(proj + (H + G) * E + (h - H) * F + f, mask=f < F)
        tl.store(values + b * values_b + slot * values_s + (h - H) * F + f, value, mask=f < F)
    tl.store(into + i, (x0 * c - x1 * s).to(out.dtype.element_ty), mask=half)
    tl.store(into + E // 2 + i, (x1 * c + x0 * s).to(out.dtype.element_ty), mask=half)


def rope_append(
    proj: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, keys: Tensor, values: Tensor,
    n_head: int, owns_kv: bool, window: int, n_meta: int,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys to their positions pos (B,), cos and sin (B, 1, 1, E / 2); returns q (B, 1, H, E).

    proj (B, 1, ...) begins with q (H E) and, where the block owns them, k (G E) and v (G F), which go into their slot
    of keys (B, S, G, E) and values (B, S, G, F): pos itself where window is 0, else one of n_meta pinned slots or of
    the ring behind them.
    """
    B, (G, E), F = len(proj), keys.shape[2:], values.shape[-1]
    out = proj.new_empty(B, 1, n_head, E)
    rope_append_kernel[(n_head + G * owns_kv, B)](
        proj, cos, sin, pos, out, keys, values, proj.stride(0), *keys.stride()[:2], *values.stride()[:2],
        n_head, G, window, n_meta, E, F, triton.next_power_of_2(E // 2), triton.next_power_of_2(F),
        num_warps=1, launch_pdl=launches_early(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["S", "length"])
def decode_split(q, k, v, pos, o, lse, S, length, scale, k_b, k_s, v_b, v_s, H,
                 R: tl.constexpr, BR: tl.constexpr, E: tl.constexpr, F: tl.constexpr, BE: tl.constexpr,
                 BF: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """o = sum_j p_j v_j / sum_j p_j over slots j of one part of the cache, p_j = exp(q . k_j / sqrt(E)), and its lse.

    One program a row, key/value head and part of `length` slots: its keys and values are read once for all R query
    heads of the group, padded to the 16 rows of a matrix product that costs nothing beside the loads. The floor is
    2 (E + F) bytes a slot and head at the memory's bandwidth; parts are there to put enough programs on the chip.
    Grid (parts, G, B); o (B, H, parts, F), lse (B, H, parts) in units of log2.
    """
    part, g = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    wait()
    end = tl.minimum(tl.load(pos + b) + 1, S).to(tl.int32)  # the slots that are filled
    first = part * length
    r, j, e, f = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BE), tl.arange(0, BF)
    head = b * H + g * R + r
    at = head * tl.num_programs(0) + part
    if first >= end:
        tl.store(lse + at, tl.full((BR,), float("-inf"), tl.float32), mask=r < R)
        return
    end = tl.minimum(end, first + length)
    query = tl.load(q + head[:, None] * E + e[None, :], mask=(r < R)[:, None] & (e < E)[None, :], other=0.0)
    k += b * k_b + g * E + e[None, :]
    v += b * v_b + g * F + f[None, :]
    acc = tl.zeros((BR, BF), tl.float32)
    m = tl.full((BR,), -1e30, tl.float32)
    total = tl.zeros((BR,), tl.float32)
    for j0 in tl.range(first, end, BK):
        slot = (j0 + j).to(tl.int64)[:, None]
        seen = j0 + j < end
        key = tl.load(k + slot * k_s, mask=seen[:, None] & (e < E)[None, :], other=0.0)
        value = tl.load(v + slot * v_s, mask=seen[:, None] & (f < F)[None, :], other=0.0)
        score = tl.dot(query, key.T, input_precision="ieee") * scale  # (BR, BK)
        score = tl.where(seen[None, :], score, float("-inf"))
        m_new = tl.maximum(m, tl.max(score, 1))
        p = tl.exp2(score - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        m = m_new
    tl.store(lse + at, m + tl.log2(total), mask=r < R)
    here = (r < R)[:, None] & (f < F)[None, :]
    tl.store(o + at[:, None] * F + f[None, :], (acc / total[:, None]).to(o.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["parts"])
def decode_combine(o, lse, out, parts, F: tl.constexpr, BF: tl.constexpr, BP: tl.constexpr):
    """out = sum_i w_i o_i / sum_i w_i over the parts, w_i = exp(lse_i), always in the same order; nothing was written
    to o where lse is -inf. Grid (H, B)."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    i, f = tl.arange(0, BP), tl.arange(0, BF)
    wait()
    acc = tl.zeros((BP, BF), tl.float32)
    total = tl.zeros((BP,), tl.float32)
    m = tl.max(tl.full((BP,), -1e30, tl.float32), 0)
    for i0 in tl.range(0, parts, BP):
        here = i0 + i < parts
        part = tl.load(lse + row * parts + i0 + i, mask=here, other=float("-inf"))
        x = o + (row * parts + i0 + i)[:, None] * F + f[None, :]
        x = tl.load(x, mask=here[:, None] & (f < F)[None, :], other=0.0)
        m_new = tl.maximum(m, tl.max(part, 0))
        w = tl.exp2(part - m_new)
        shrink = tl.exp2(m - m_new)
        acc = acc * shrink + tl.where((w > 0)[:, None], w[:, None] * x, 0.0)
        total = total * shrink + w
        m = m_new
    tl.store(out + row * F + f, (tl.sum(acc, 0) / tl.sum(total, 0)).to(out.dtype.element_ty), mask=f < F)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    """One new token's attention over the cache: q (B, 1, H, E), k (B, S, G, E), v (B, S, G, F) -> (B, 1, H, F).

    pos (B,) int64: the token's position; a row sees slots 0 ... pos, all S once the ring is full. The parts that the
    cache is cut into follow from the shapes alone, and are added up in one order: same bits from run to run.
    """
    (B, _, H, E), (_, S, G, F) = q.shape, v.shape
    R, q, out, f32 = H // G, q.contiguous(), q.new_empty(B, 1, H, F), dict(dtype=torch.float32)
    BK, BF = DECODE_KEYS * 2 // q.element_size(), triton.next_power_of_2(F)
    parts = max(1, min(triton.cdiv(S, BK), DECODE_PROGRAMS // (B * G)))
    length = triton.cdiv(triton.cdiv(S, parts), BK) * BK
    parts = triton.cdiv(S, length)
    o, lse = out if parts == 1 else q.new_empty(B, H, parts, F, **f32), q.new_empty(B, H, parts, **f32)
    decode_split[(parts, G, B)](
        q, k, v, pos, o, lse, S, length, math.log2(math.e) / math.sqrt(E), *k.stride()[:2], *v.stride()[:2], H,
        R, max(16, triton.next_power_of_2(R)), E, F, triton.next_power_of_2(E), BF, BK, num_warps=4, num_stages=2,
        launch_pdl=launches_early(),
    )  # fmt: skip
    if parts > 1:
        decode_combine[(H, B)](o, lse, out, parts, F, BF, 32, launch_pdl=launches_early())
    return out


# ----------------------------------------------------------------------------------------------------------------------
# SSM heads


@triton.jit
def conv_step_kernel(x, weight, bias, tail, y, x_b, tail_b, D, K: tl.constexpr, BD: tl.constexpr):
    """y = silu(bias + sum_k w_k x_{t - K + 1 + k}), with the last K - 1 inputs in tail (B, K - 1, D), which moves on by
    one. Grid (D / BD, B)."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    here = d < D
    tail += b * tail_b + d
    total = tl.load(bias + d, mask=here).to(tl.float32)
    wait()
    for k in tl.static_range(K - 1):
        u = tl.load(tail + k * D, mask=here)
        total += tl.load(weight + d * K + k, mask=here).to(tl.float32) * u.to(tl.float32)
        if k > 0:
            tl.store(tail + (k - 1) * D, u, mask=here)
    u = tl.load(x + b * x_b + d, mask=here)
    total += tl.load(weight + d * K + K - 1, mask=here).to(tl.float32) * u.to(tl.float32)
    tl.store(tail + (K - 2) * D, u.to(tail.dtype.element_ty), mask=here)
    tl.store(y + b * D + d, (total * sigmoid(total)).to(y.dtype.element_ty), mask=here)


def conv_step(proj: Tensor, weight: Tensor, bias: Tensor, tail: Tensor) -> Tensor:
    """causal_conv of one token -> y (B, 1, D); proj (B, 1, ...) ends with its x and z; the tail moves on in place."""
    B, D = len(proj), len(weight)
    y = proj.new_empty(B, 1, D)
    conv_step_kernel[(triton.cdiv(D, 128), B)](
        proj[..., -2 * D :], weight, bias, tail, y, proj.stride(0), tail.stride(0), D, weight.shape[1], 128,
        launch_pdl=launches_early(),
    )  # fmt: skip
    return y


@triton.jit
def scan_step_kernel(x, dt, A_log, BC, D_skip, z, bias, state, B_scale, C_scale, y, eps, D,
                     x_b, dt_b, BC_b, z_b, state_b,
                     N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """h <- exp(dt A) h + dt x B, y = (C . h + D x) silu(z), with dt = softplus(dt + bias), A = -exp(A_log), and B, C
    RMS-normalised first where NORM. Grid (D / BD, B). Floor: the float32 state, read and written once."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_d = d < D
    here = in_d[:, None] & (n < N)[None, :]
    state += b * state_b + d[:, None] * N + n[None, :]
    h = tl.load(state, mask=here, other=0.0)
    A = -tl.exp2(tl.load(A_log + d[:, None] * N + n[None, :], mask=here, other=0.0).to(tl.float32) * LOG2E)
    wait()
    u = tl.load(x + b * x_b + d, mask=in_d, other=0.0).to(tl.float32)
    gate = tl.load(z + b * z_b + d, mask=in_d, other=0.0).to(tl.float32)
    step = tl.load(dt + b * dt_b + d, mask=in_d, other=0.0).to(tl.float32)
    step = softplus(step + tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32))
    Bt = tl.load(BC + b * BC_b + n, mask=n < N, other=0.0).to(tl.float32)
    Ct = tl.load(BC + b * BC_b + N + n, mask=n < N, other=0.0).to(tl.float32)
    if NORM:
        Bt *= rms(Bt, N, eps) * tl.load(B_scale + n, mask=n < N, other=0.0).to(tl.float32)
        Ct *= rms(Ct, N, eps) * tl.load(C_scale + n, mask=n < N, other=0.0).to(tl.float32)
    h = tl.exp2(step[:, None] * LOG2E * A) * h + (step * u)[:, None] * Bt[None, :]
    tl.store(state, h, mask=here)
    out = tl.sum(h * Ct[None, :], 1) + tl.load(D_skip + d, mask=in_d, other=0.0) * u
    tl.store(y + b * D + d, (out * gate * sigmoid(gate)).to(y.dtype.element_ty), mask=in_d)


def scan_step(
    x: Tensor, dt: Tensor, A_log: Tensor, parameters: Tensor, D: Tensor, proj: Tensor, dt_bias: Tensor, state: Tensor,
    B_scale: Tensor | None, C_scale: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """selective_scan of one token x, dt (B, 1, D) -> y (B, 1, D), with A = -exp(A_log); the state moves on in place.

    parameters (B, 1, ...) end with B and C (N each), which are RMS-normalised first where scales (N,) are given; proj
    (B, 1, ...) ends with z. The state (B, D, N) is float32, as A_log, D and dt_bias should be.
    """
    (b, _, d), n = x.shape, A_log.shape[1]
    y = x.new_empty(b, 1, d)
    scan_step_kernel[(triton.cdiv(d, 32), b)](
        x, dt, A_log, parameters[..., -2 * n :], D, proj[..., -d:], dt_bias, state, B_scale, C_scale, y, eps, d,
        x.stride(0), dt.stride(0), parameters.stride(0), proj.stride(0), state.stride(0),
        n, triton.next_power_of_2(n), 32, B_scale is not None, num_warps=1, launch_pdl=launches_early(),
    )  # fmt: skip
    return y
