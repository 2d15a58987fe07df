"""
Mamba-2's scan (state space duality, https://arxiv.org/abs/2405.21060) as Triton kernels: ssd, with the name and the
signature of its definition in model.py. Rules and letters are the ones of kernels.py; besides, P channels of a head,
Q tokens of a chunk.

Within a chunk, let s_i be the sum of dt A over its tokens up to i, h the state before it, and u = dt x. Then

    y_i = sum_{j <= i} exp(s_i - s_j) (C_i . B_j) u_j + exp(s_i) h C_i + D x_i
    h'  = exp(s_last) h + sum_j exp(s_last - s_j) u_j B_j^T

So only the states are taken one after the other, one for each chunk (ssd_states_kernel). The rest is matrix products,
for all chunks at once. No exponent is positive, so nothing overflows. dt, s, sums, states that are handed on, and all
that is multiplied element by element are float32. Products take operands as they are in memory: bfloat16, or else
float32, without tensor cores.

For the backward pass, the inputs alone are kept. It takes the states anew: they are twice as large as x (N = 128).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import LOG2E, capability, direct, sigmoid, softplus, usable

GROUP = 10  # heads, at most, that one program of the chunks' products takes in turn: C B^T is the same for all


@triton.jit
def load_rows(x, first, T, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DOT: tl.constexpr):
    """Tokens first ... first + ROWS of x, each SIZE numbers, as (ROWS, COLS) in the products' dtype, zeros outside."""
    t, i = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    here = (first + t < T) & (i < SIZE)
    return tl.load(x + tl.cast(first, tl.int64) * stride + (t * stride + i), mask=here, other=0.0).to(DOT)


@triton.jit
def load_state(states, P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """A state (BP, BN)."""
    p, n = tl.arange(0, BP)[:, None], tl.arange(0, BN)[None, :]
    return tl.load(states + p * N + n, mask=(p < P) & (n < N), other=0.0)


@triton.jit
def decays(s_late, s_early):
    """exp(s_i - s_j), at most 1: where i < j, what it is multiplied with is 0."""
    return tl.exp2(tl.minimum(s_late - s_early, 0.0))


@triton.jit
def ssd_steps_kernel(dt_ptr, A_ptr, bias_ptr, step_ptr, s_ptr, T, heads, dt_b, dt_t, Q: tl.constexpr, BH: tl.constexpr):
    """step = softplus(dt + bias), 0 after the end, and s log2(e). Both (B, heads, chunks Q), float32: dt is read once,
    and then tokens are contiguous. Grid (heads / BH, chunks, B)."""
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    t = tl.program_id(1) * Q + tl.arange(0, Q)
    b = tl.program_id(2).to(tl.int64)
    here = (t < T)[:, None] & (h < heads)[None, :]
    dt = tl.load(dt_ptr + b * dt_b + t.to(tl.int64)[:, None] * dt_t + h[None, :], mask=here, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0) * LOG2E
    step = tl.where(here, softplus(dt + bias[None, :]), 0.0)
    at = (b * heads + h)[None, :] * (tl.num_programs(1) * Q) + t[:, None]
    tl.store(step_ptr + at, step, mask=(h < heads)[None, :])
    tl.store(s_ptr + at, tl.cumsum(step * A[None, :], 0), mask=(h < heads)[None, :])


@triton.jit
def ssd_states_kernel(
    x_ptr, B_ptr, step_ptr, s_ptr, first_ptr, states_ptr, last_ptr, T, heads, n_chunk, x_b, x_t, x_h, B_b, B_t,
    P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """The states before each chunk, (B, chunks, heads, P, N) in the products' dtype, and the last one in float32.

    REVERSE: from right to left, with dy for x and C for B, the gradients of the states after each chunk:
    dh = exp(s_last) dh' + sum_i exp(s_i) dy_i C_i^T. Grid (P / BP, heads, B), a state in registers. The floor is
    memory: x once, and 2 P N bytes a chunk.
    """
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, n, t = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    at, inside = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
    x_ptr += b * x_b + head * x_h
    B_ptr += b * B_b
    step_ptr += (b * heads + head) * n_chunk * Q
    s_ptr += (b * heads + head) * n_chunk * Q
    states_ptr += (b * n_chunk * heads + head) * (P * N)
    h = tl.zeros((BP, BN), tl.float32)
    if first_ptr is not None:
        h = tl.load(first_ptr + (b * heads + head) * (P * N) + at, mask=inside, other=0.0)
    for i in range(n_chunk):
        c = i
        if REVERSE:
            c = n_chunk - 1 - i
        tl.store(states_ptr + c.to(tl.int64) * heads * (P * N) + at, h.to(DOT), mask=inside)
        s, s_last = tl.load(s_ptr + c * Q + t), tl.load(s_ptr + c * Q + Q - 1)
        if REVERSE:
            weight = tl.exp2(s)
        else:
            weight = tl.exp2(s_last - s) * tl.load(step_ptr + c * Q + t)
        here = (p < P)[:, None] & (c * Q + t < T)[None, :]
        x = tl.load(x_ptr + c.to(tl.int64) * Q * x_t + (t[None, :] * x_t + p[:, None]), mask=here, other=0.0)  # (BP, Q)
        B = load_rows(B_ptr, c * Q, T, B_t, N, Q, BN, DOT)
        h = tl.dot((x.to(tl.float32) * weight[None, :]).to(DOT), B, h * tl.exp2(s_last), input_precision="ieee")
    tl.store(last_ptr + (b * heads + head) * (P * N) + at, h, mask=inside)


@triton.jit
def ssd_output_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, step_ptr, s_ptr, states_ptr, y_ptr,
    T, heads, group, n_chunk, x_b, x_t, x_h, B_b, B_t, C_b, C_t,
    P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y, chunk by chunk and head by head. Grid (groups of heads, chunks, B).

    For each token and head, 2 P (Q + N) operations of products, Q exponentials (half of them for nothing), and to
    read x and write y, 4 P bytes. The states' 2 P N / Q bytes are as many at N = Q = 128.
    """
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, p = tl.arange(0, Q), tl.arange(0, BP)
    at, here = t[:, None] * (heads * P) + p[None, :], (c * Q + t < T)[:, None] & (p < P)[None, :]
    C = load_rows(C_ptr + b * C_b, c * Q, T, C_t, N, Q, BN, DOT)
    B = load_rows(B_ptr + b * B_b, c * Q, T, B_t, N, Q, BN, DOT)
    CB = tl.where(t[:, None] >= t[None, :], tl.dot(C, B.T, input_precision="ieee"), 0.0)  # (Q, Q)
    first = tl.program_id(0) * group
    for head in range(first, tl.minimum(first + group, heads)):
        row = (b * heads + head) * n_chunk * Q + c * Q + t
        step, s = tl.load(step_ptr + row), tl.load(s_ptr + row)
        x = load_rows(x_ptr + b * x_b + head * x_h, c * Q, T, x_t, P, Q, BP, DOT)
        h = load_state(states_ptr + ((b * n_chunk + c) * heads + head) * (P * N), P, BP, N, BN)
        y = tl.dot(C, h.T, input_precision="ieee") * tl.exp2(s)[:, None]
        y = tl.dot((CB * decays(s[:, None], s[None, :]) * step[None, :]).to(DOT), x, y, input_precision="ieee")
        y += tl.load(D_ptr + head).to(tl.float32) * x.to(tl.float32)
        tl.store(y_ptr + ((b * T + c * Q) * heads + head) * P + at, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def ssd_backward_states_kernel(
    x_ptr, C_ptr, dy_ptr, step_ptr, s_ptr, states_ptr, dstates_ptr, before_ptr, through_ptr, dB_ptr, dC_ptr,
    T, heads, group, n_chunk, x_b, x_t, x_h, C_b, C_t, dy_b, dy_t, dy_h,
    P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The part that states have in the gradients of C, B and A (see ssd_backward_kernel): with h the state before a
    chunk and dh the gradient of the state after it,

        dC_i = e_i h^T dy_i      dB_j = w_j dh^T u_j      before_i = e_i dy_i . h C_i      through = exp(s_last) h . dh

    before (B, heads, chunks Q), through (B, chunks, heads). Grid (groups of heads, chunks, B).
    """
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, n = tl.arange(0, Q), tl.arange(0, BN)
    C = load_rows(C_ptr + b * C_b, c * Q, T, C_t, N, Q, BN, DOT)
    dB, dC = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, BN), tl.float32)
    first = tl.program_id(0) * group
    for head in range(first, tl.minimum(first + group, heads)):
        row = (b * heads + head) * n_chunk * Q + c * Q
        step, s, s_last = tl.load(step_ptr + row + t), tl.load(s_ptr + row + t), tl.load(s_ptr + row + Q - 1)
        x = load_rows(x_ptr + b * x_b + head * x_h, c * Q, T, x_t, P, Q, BP, DOT)
        dy = load_rows(dy_ptr + b * dy_b + head * dy_h, c * Q, T, dy_t, P, Q, BP, DOT)
        at = (b * n_chunk + c) * heads + head
        h = load_state(states_ptr + at * (P * N), P, BP, N, BN)
        dh = load_state(dstates_ptr + at * (P * N), P, BP, N, BN)
        dy_e = dy.to(tl.float32) * tl.exp2(s)[:, None]
        tl.store(before_ptr + row + t, tl.sum(tl.dot(C, h.T, input_precision="ieee") * dy_e, 1))
        tl.store(through_ptr + at, tl.exp2(s_last) * tl.sum(h.to(tl.float32) * dh.to(tl.float32)))
        dC = tl.dot(dy_e.to(DOT), h, dC, input_precision="ieee")
        u_w = x.to(tl.float32) * (step * tl.exp2(s_last - s))[:, None]
        dB = tl.dot(u_w.to(DOT), dh, dB, input_precision="ieee")
    at = ((tl.program_id(0) * tl.num_programs(2) + b) * T + c * Q + t)[:, None] * N + n[None, :]
    inside = (c * Q + t < T)[:, None] & (n < N)[None, :]
    tl.store(dB_ptr + at, dB.to(dB_ptr.dtype.element_ty), mask=inside)
    tl.store(dC_ptr + at, dC.to(dC_ptr.dtype.element_ty), mask=inside)


@triton.jit
def ssd_backward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, dy_ptr, step_ptr, s_ptr, dstates_ptr, before_ptr, through_ptr,
    dx_ptr, ddt_ptr, dB_ptr, dC_ptr, sums_ptr,
    T, heads, group, n_chunk, x_b, x_t, x_h, dt_b, dt_t, B_b, B_t, C_b, C_t, dy_b, dy_t, dy_h,
    P: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients within a chunk, and what follows from all. With

        L_ij = exp(s_i - s_j), i >= j, else 0      w_j = exp(s_last - s_j)      e_i = exp(s_i)
        G_ij = L_ij u_j . dy_i, the gradient of C_i . B_j                       Z_ij = G_ij (C_i . B_j)

        du_j = sum_i L_ij (C_i . B_j) dy_i + w_j dh B_j        dx = dt du + D dy
        dB_j = sum_i G_ij C_i + w_j dh^T u_j                   dC_i = sum_j G_ij B_j + e_i h^T dy_i

    and of a_t = dt_t A, whose exponential all decays from before t to t or later have in them,

        da_t = sum_{i >= t > j} Z_ij + sum_{i >= t} before_i + sum_{j < t} u_j . w_j dh B_j + through
        ddt_t = A da_t + x_t . du_t

    dB and dC are sums over heads: each program adds up the G of its own, and leaves the result in (groups, B, T, N).
    The products stand transposed, tokens j along rows, so that only the sum of all G is ever turned round. What a chunk
    adds to the gradients of A, the bias and D is in (3, B, chunks, heads). Grid (groups of heads, chunks, B).
    """
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    token = (c * Q + t).to(tl.int64)
    at, here = t[:, None] * (heads * P) + p[None, :], (token < T)[:, None] & (p < P)[None, :]
    B = load_rows(B_ptr + b * B_b, c * Q, T, B_t, N, Q, BN, DOT)
    C = load_rows(C_ptr + b * C_b, c * Q, T, C_t, N, Q, BN, DOT)
    BC = tl.where(t[:, None] <= t[None, :], tl.dot(B, C.T, input_precision="ieee"), 0.0)  # (Q, Q): j, i
    G_sum = tl.zeros((Q, Q), tl.float32)
    first = tl.program_id(0) * group
    for head in range(first, tl.minimum(first + group, heads)):
        row = (b * heads + head) * n_chunk * Q + c * Q
        step, s, s_last = tl.load(step_ptr + row + t), tl.load(s_ptr + row + t), tl.load(s_ptr + row + Q - 1)
        x = load_rows(x_ptr + b * x_b + head * x_h, c * Q, T, x_t, P, Q, BP, DOT)
        dy = load_rows(dy_ptr + b * dy_b + head * dy_h, c * Q, T, dy_t, P, Q, BP, DOT)
        chunk = (b * n_chunk + c) * heads + head
        dh = load_state(dstates_ptr + chunk * (P * N), P, BP, N, BN)
        decay = decays(s[None, :], s[:, None])
        G = tl.dot(x, dy.T, input_precision="ieee") * decay
        G_sum += G * step[:, None]
        M = (BC * decay).to(DOT)
        Z = G * BC
        x_du, y_dy = tl.sum(Z, 1), tl.sum(Z * step[:, None], 0)

        du = tl.dot(B, dh.T, input_precision="ieee") * tl.exp2(s_last - s)[:, None]
        after = tl.sum(du * x.to(tl.float32), 1)
        # s is never positive: this is dy, in the registers in which du is
        dD = tl.sum(tl.where(s_last <= 0.0, dy.to(tl.float32), du) * x.to(tl.float32))
        du = tl.dot(M, dy, du, input_precision="ieee")
        dx = du * step[:, None] + tl.load(D_ptr + head).to(tl.float32) * dy.to(tl.float32)
        tl.store(dx_ptr + ((b * T + c * Q) * heads + head) * P + at, dx.to(dx_ptr.dtype.element_ty), mask=here)

        to_end = y_dy - x_du * step + tl.load(before_ptr + row + t) - after * step
        da = tl.cumsum(to_end, 0, reverse=True) + tl.sum(after * step) + tl.load(through_ptr + chunk)
        raw = tl.load(dt_ptr + b * dt_b + token * dt_t + head, mask=token < T, other=0.0).to(tl.float32)
        ddt = (tl.load(A_ptr + head) * da + x_du + after) * sigmoid(raw + tl.load(bias_ptr + head).to(tl.float32))
        ddt = tl.where(token < T, ddt, 0.0)
        tl.store(ddt_ptr + (b * T + token) * heads + head, ddt.to(ddt_ptr.dtype.element_ty), mask=token < T)
        size = tl.num_programs(2) * n_chunk * heads
        tl.store(sums_ptr + chunk, tl.sum(da * step))
        tl.store(sums_ptr + size + chunk, tl.sum(ddt))
        tl.store(sums_ptr + 2 * size + chunk, dD)
    G = tl.where(t[:, None] <= t[None, :], G_sum, 0.0).to(DOT)
    dB = tl.dot(G, C, input_precision="ieee")
    dC = tl.dot(G.T, B, input_precision="ieee")
    at = ((tl.program_id(0) * tl.num_programs(2) + b) * T + token)[:, None] * N + n[None, :]
    inside = (token < T)[:, None] & (n < N)[None, :]
    tl.store(dB_ptr + at, dB.to(dB_ptr.dtype.element_ty), mask=inside)
    tl.store(dC_ptr + at, dC.to(dC_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------------------
# Launching


def large() -> bool:
    """Whether a program can have 227 KB of shared memory: the GPUs of data centers from Hopper on."""
    return 90 <= capability() < 120


def _tile(x: Tensor, B: Tensor, tokens: int) -> dict:
    """Constants of all kernels, for chunks of so many tokens: fewer in float32, and where there are no more."""
    t, p, n = x.shape[1], x.shape[3], B.shape[2]
    half = x.dtype == torch.bfloat16
    q = min(tokens if half else 16, max(16, triton.next_power_of_2(t)))
    blocks = dict(BP=max(16, triton.next_power_of_2(p)), BN=max(16, triton.next_power_of_2(n)))
    return dict(P=p, N=n, Q=q, DOT=tl.bfloat16 if half else tl.float32) | blocks


def _launch(tile: dict, num_warps: int, num_stages: int) -> dict:
    """A launch, its constants included. Float32 has no tensor core: operands lie in registers, hence more warps."""
    half = tile["DOT"] == tl.bfloat16
    return tile | dict(num_warps=num_warps if half else 8, num_stages=num_stages if half else 1)


def _dense(x: Tensor) -> Tensor:
    """x, copied unless its last axis is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _steps(dt: Tensor, A: Tensor, dt_bias: Tensor, q: int) -> tuple[Tensor, Tensor, int]:
    """step and s log2(e), (B, heads, chunks Q) both, and the number of chunks."""
    b, t, heads = dt.shape
    n_chunk = triton.cdiv(t, q)
    step, s = torch.empty(2, b, heads, n_chunk * q, dtype=torch.float32, device=dt.device)
    ssd_steps_kernel[(triton.cdiv(heads, 16), n_chunk, b)](
        dt, A, dt_bias, step, s, t, heads, *dt.stride()[:2], Q=q, BH=16
    )
    return step, s, n_chunk


def _states(x, B, step, s, first, n_chunk, tile, reverse=False) -> tuple[Tensor, Tensor]:
    """States before each chunk (with reverse, their gradients after it), and the one at the end."""
    (b, t, heads, p), n = x.shape, B.shape[2]
    dtype = torch.bfloat16 if tile["DOT"] == tl.bfloat16 else torch.float32
    states = torch.empty(b, n_chunk, heads, p, n, dtype=dtype, device=x.device)
    last = torch.empty(b, heads, p, n, dtype=torch.float32, device=x.device)
    tile = tile | dict(BP=min(32, tile["BP"]))
    ssd_states_kernel[(triton.cdiv(p, tile["BP"]), heads, b)](
        x, B, step, s, first, states, last, t, heads, n_chunk, *x.stride()[:3], *B.stride()[:2],
        REVERSE=reverse, **_launch(tile, 4, 3),
    )  # fmt: skip
    return states, last


def _groups(heads: int) -> tuple[int, int]:
    """Into how many groups of how many heads to divide them."""
    size = triton.cdiv(heads, triton.cdiv(heads, GROUP))
    return triton.cdiv(heads, size), size


@torch.library.custom_op("hymba::ssd", mutates_args=())
def _ssd_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, t, heads, p = x.shape
    x, dt, B, C = map(_dense, (x, dt, B, C))
    tile = _tile(x, B, 128 if large() else 64)
    step, s, n_chunk = _steps(dt, A, dt_bias, tile["Q"])
    states, last = _states(x, B, step, s, None if state is None else state.contiguous(), n_chunk, tile)
    y, (n_group, group) = x.new_empty(b, t, heads, p), _groups(heads)
    ssd_output_kernel[(n_group, n_chunk, b)](
        x, B, C, D, step, s, states, y, t, heads, group, n_chunk, *x.stride()[:3], *B.stride()[:2], *C.stride()[:2],
        **_launch(tile, 8 if tile["Q"] == 128 else 4, 3),
    )  # fmt: skip
    return y, last


@_ssd_forward.register_fake
def _(x, dt, A, B, C, D, dt_bias, state):
    last = x.new_empty(x.shape[0], *x.shape[2:], B.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape), last


@torch.library.custom_op("hymba::ssd_backward", mutates_args=())
def _ssd_backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor | None,
    dy: Tensor, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, B, C; of A, dt_bias and D (3, heads); of the state."""
    (b, t, heads, p), n = x.shape, B.shape[2]
    x, dt, B, C, dy = map(_dense, (x, dt, B, C, dy))
    tile = _tile(x, B, 64)
    step, s, n_chunk = _steps(dt, A, dt_bias, tile["Q"])
    states, _ = _states(x, B, step, s, None if state is None else state.contiguous(), n_chunk, tile)
    dlast = None if dlast is None else dlast.contiguous()
    dstates, dstate = _states(dy, C, step, s, dlast, n_chunk, tile, reverse=True)
    n_group, group = _groups(heads)
    dx, ddt = x.new_empty(b, t, heads, p), dt.new_empty(b, t, heads)
    # In bfloat16, rounding the sums of a few groups adds as much error as rounding the result. Of each, the first half
    # is the states' part, the second the one within chunks.
    sums = torch.bfloat16 if B.dtype == torch.bfloat16 else torch.float32
    dB, dC = torch.empty(2, 2, n_group, b, t, n, dtype=sums, device=x.device)
    before, through = torch.empty_like(s), s.new_empty(b, n_chunk, heads)
    of_heads = s.new_empty(3, b * n_chunk, heads)
    ssd_backward_states_kernel[(n_group, n_chunk, b)](
        x, C, dy, step, s, states, dstates, before, through, dB[0], dC[0], t, heads, group, n_chunk,
        *x.stride()[:3], *C.stride()[:2], *dy.stride()[:3],
        **_launch(tile, 4 if large() else 8, 2),
    )  # fmt: skip
    ssd_backward_kernel[(n_group, n_chunk, b)](
        x, dt, A, B, C, D, dt_bias, dy, step, s, dstates, before, through, dx, ddt, dB[1], dC[1], of_heads,
        t, heads, group, n_chunk,
        *x.stride()[:3], *dt.stride()[:2], *B.stride()[:2], *C.stride()[:2], *dy.stride()[:3],
        **_launch(tile, 4, 2),
    )  # fmt: skip
    dB, dC = (u.sum((0, 1)).to(B.dtype) for u in (dB, dC))  # in float32, rounded once
    return dx, ddt, dB, dC, of_heads.sum(1), dstate


@_ssd_backward.register_fake
def _(x, dt, A, B, C, D, dt_bias, state, dy, dlast):
    of_heads = A.new_empty(3, len(A))
    dstate = A.new_empty(x.shape[0], *x.shape[2:], B.shape[2])
    return *(u.new_empty(u.shape) for u in (x, dt, B, C)), of_heads, dstate


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlast):
    x, _, _, _, _, D, dt_bias, state = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dB, dC, (dA, dbias, dD), dstate = _ssd_backward(*ctx.saved_tensors, dy, dlast)
    return dx, ddt, dA, dB, dC, dD.to(D.dtype), dbias.to(dt_bias.dtype), None if state is None else dstate


_ssd_forward.register_autograd(_backward, setup_context=_setup_context)


def takes_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest, **options) -> bool:
    """Whether ssd runs on these inputs: a state of 64 x 128 numbers is the largest."""
    p, n = (triton.next_power_of_2(max(16, u.shape[-1])) for u in (x, B))
    return usable(x) and max(p, n) <= 128 and p * n <= 8192


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan: see model.ssd.

    x (B, T, heads, P), dt (B, T, heads), B, C (B, T, N): bfloat16, float16 or float32 (bfloat16 is fast), any strides
    if the last is 1 (else copied). A (heads,) float32, negative. D, dt_bias (heads,). state (B, heads, P, N) float32,
    or None for zeros. Returns y (B, T, heads, P) in x's dtype and the float32 state after the last token. All inputs
    get gradients, state too. Raises ValueError where shapes or dtypes do not fit.
    """
    (b, t, heads, p), n = x.shape, B.shape[-1]
    wanted = dict(dt=(b, t, heads), A=(heads,), B=(b, t, n), C=(b, t, n), D=(heads,), dt_bias=(heads,))
    wanted |= dict(state=(b, heads, p, n))
    given = dict(dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, state=state)
    for name, tensor in given.items():
        if tensor is not None and tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"ssd: {name} must be {wanted[name]} to match x and B, got {tuple(tensor.shape)}")
    for name in ("A", "state"):
        if given[name] is not None and given[name].dtype != torch.float32:
            raise ValueError(f"ssd: {name} must be float32, got {given[name].dtype}; call .float() on it")
    if not takes_ssd(x, dt, A, B):
        raise ValueError(f"ssd: P={p}, N={n} on {x.device} in {x.dtype}: needs an NVIDIA GPU, P, N <= 128, P N <= 8192")
    return direct(_ssd_forward)(x, dt, A, B, C, D, dt_bias, state)
