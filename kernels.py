"""
The operations of model.py as Triton kernels, with the same names and signatures: selective_scan, windowed_attention,
causal_conv, and cross_entropy of ops.py. Then the ones of inference alone, for what lies between matrix products:
apply_rope, swiglu and normed_sum. Optional: ops.py chooses them on NVIDIA GPUs from Ampere on. Beside each stands what
inputs it takes. Nothing here knows of the model.

Each kernel opens with the formula that it computes, its tiling and its floor. The kernels of training are PyTorch
operators with gradients, or run inside of one: torch.compile takes a model with fullgraph=True. None adds floats
atomically: gradients are the same to the bit from run to run.

Letters: B batch, T tokens (queries), S keys, D inner width (channels), N SSM state, H query heads, G key/value heads,
R = H / G query heads per key/value head, E query/key head size, F value head size, M meta tokens, W window, K taps.
"""

import functools
import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(f"the Triton kernels need Triton 3.6, and this is {triton.__version__}: pip install -U torch")
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")  # kernels then run on CPU tensors, for tests
OVERRIDE = int(os.environ.get("TRITON_OVERRIDE_ARCH", "").strip("sma") or 0)  # sm80 asks for an older GPU's code path


def capability(device: int | None = None) -> int:
    """Of a GPU, ten times: 80 is an A100, 86 a 3090, 89 a 4090 or L4, 90 an H100, 100 a B200, 120 a 5090."""
    if OVERRIDE or INTERPRET.value:
        return OVERRIDE or 90
    if torch.compiler.is_compiling():  # which warns of caches
        return capability_of.__wrapped__(device)
    return capability_of(torch.cuda.current_device() if device is None else device)


@functools.cache  # a short prompt asks hundreds of times
def capability_of(device: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


capability.__triton_builtin__ = True  # else Triton would not let launches_early call it


@triton.constexpr_function
def launches_early() -> bool:
    """Whether a kernel may be launched before its predecessor has ended (programmatic dependent launch)."""
    return not INTERPRET.value and capability() >= 90


def loads_by_tma() -> bool:
    """Whether attention's tiles are the ones of wgmma, fetched by the tensor memory accelerator. A consumer Blackwell
    (120) has the accelerator, but neither wgmma nor the shared memory: it does as GPUs before Hopper do."""
    return 90 <= capability() < 120


def usable(x: Tensor) -> bool:
    """Whether the kernels run on x: not in float64, and on NVIDIA's GPUs from Ampere on. (AMD's call themselves cuda,
    too.)"""
    nvidia = x.is_cuda and torch.version.hip is None
    there = INTERPRET.value or (nvidia and capability(x.device.index) >= 80)
    return there and x.dtype != torch.float64


def direct(op):
    """An operator, or where neither gradients nor torch.compile ask for one, the function that it was made of: going
    through PyTorch's dispatcher takes longer than a short prompt's kernels."""
    return op if torch.is_grad_enabled() or torch.compiler.is_compiling() else getattr(op, "_init_fn", op)


# ----------------------------------------------------------------------------------------------------------------------
# Selective scan (Mamba, https://arxiv.org/abs/2312.00752, Algorithm 2)


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(v * -LOG2E))


@triton.jit
def softplus(v):
    """log(1 + exp(v)) = max(v, 0) + log1p(e), e = exp(-|v|) in [0, 1]. log1p(e) / e is a degree-8 minimax polynomial,
    good to 1.5e-7 relative: dt is often 1e-3 and below, where the hardware's log2 is good only to 2e-7 absolute."""
    e = tl.exp2(tl.abs(v) * -LOG2E)
    p = 0.00523269069 * e - 0.0295052289
    p = p * e + 0.0782259443
    p = p * e - 0.13663246
    p = p * e + 0.191060074
    p = p * e - 0.248429826
    p = p * e + 0.333190969
    p = p * e - 0.499994931
    p = p * e + 1.0
    return tl.maximum(v, 0.0) + p * e


@triton.jit
def _right(a, b):
    return b


@triton.jit
def _pin(tile, axis: tl.constexpr):
    """The identity, written as a scan that keeps the right operand. To the compiler it is a fence: the tile is computed
    in the layout it was loaded in and then handed over, instead of being recomputed by every lane that will read it."""
    if INTERPRET:
        return tile
    return tl.associative_scan(tile, axis, _right)


@triton.jit
def _token(tile, t: tl.constexpr):
    """tile[:, t : t + 1, :] of a (BD, TT, BN) tile, in float32. Tokens lie in registers and t is a constant, so setting
    all other tokens to 0 and adding up the bits compiles to nothing."""
    here = tl.arange(0, tile.shape[1])[None, :, None] == t
    if tile.dtype.primitive_bitwidth == 16:
        bits = tl.where(here, tile.to(tl.int16, bitcast=True), 0)
        return tl.sum(bits, 1, keep_dims=True).to(tl.int16).to(tile.dtype, bitcast=True).to(tl.float32)
    else:
        bits = tl.where(here, tile.to(tl.int32, bitcast=True), 0)
        return tl.sum(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _own(A_ptr, D, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, TT: tl.constexpr, K: tl.constexpr):
    """What a program works on: channels d, tokens t of a tile, states n, where (state, channel) stands, and A.

    A's load decides the layout of every (BD, TT, BN) tile: K channels to a thread, lanes over channels, then states.
    """
    d = tl.program_id(0) * BD + tl.max_contiguous(tl.arange(0, BD), K)
    n = tl.arange(0, BN)
    state = d[:, None, None] + n[None, None, :] * D
    in_state = (d < D)[:, None, None] & (n < N)[None, None, :]
    A = tl.load(A_ptr + state, mask=in_state, other=0.0) * LOG2E  # (BD, 1, BN)
    return d, tl.arange(0, TT), n, d < D, state, in_state, A


@triton.jit
def _per_channel(ptr, d, D):
    """Of a (D,) vector, this program's part (BD, 1)."""
    return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _load_inner(x_ptr, dt_ptr, B_ptr, x_t, dt_t, B_t, d, t, n, here, in_n):
    """What the states of the next tile are made from: x, dt (BD, TT), B (TT, BN)."""
    x = tl.load(x_ptr + d[:, None] + t[None, :] * x_t, mask=here, other=0.0)
    dt = tl.load(dt_ptr + d[:, None] + t[None, :] * dt_t, mask=here, other=0.0)
    B = tl.load(B_ptr + t[:, None] * B_t + n[None, :], mask=in_n, other=0.0)
    return x, dt, B


@triton.jit
def _load_tile(x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, x_t, dt_t, z_t, B_t, C_t, d, t, n, here, in_n, HAS_Z: tl.constexpr):
    """The next tile of every input as it is in memory: x, dt, z (BD, TT), B, C (TT, BN)."""
    x, dt, B = _load_inner(x_ptr, dt_ptr, B_ptr, x_t, dt_t, B_t, d, t, n, here, in_n)
    z = x
    if HAS_Z:
        z = tl.load(z_ptr + d[:, None] + t[None, :] * z_t, mask=here, other=0.0)
    C = tl.load(C_ptr + t[:, None] * C_t + n[None, :], mask=in_n, other=0.0)
    return x, dt, z, B, C


@triton.jit
def _spread(tile, BD: tl.constexpr):
    """(TT, BN) -> (BD, TT, BN), handed to every channel's lanes once instead of loaded by each."""
    return tl.broadcast_to(_pin(tile, 0)[None, :, :], (BD, tile.shape[0], tile.shape[1]))


@triton.jit
def _enter(state, A, adds_ptr, total_ptr, first, last, step, offset, d, D, in_state, N: tl.constexpr):
    """Carries a state over whole segments: h <- exp(A * sum of dt) h + (what the segment adds to a zero state)."""
    for s in range(first, last, step):
        total = tl.load(total_ptr + s * D + d, mask=d < D, other=0.0)[:, None, None]
        state = tl.exp2(total * A) * state + tl.load(adds_ptr + s * D * N + offset, mask=in_state, other=0.0)
    return state


@triton.jit
def scan_segment_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, z_ptr, bias_ptr, adds_ptr, total_ptr,
    T, D, length, x_b, x_t, dt_b, dt_t, B_b, B_t, z_b, z_t,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, TT: tl.constexpr, K: tl.constexpr,
    HAS_Z: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a segment of `length` tokens adds to a zero state, and the sum of its dt. Where B x D is too few programs,
    T is cut into segments: this pass runs over all of them at once (REVERSE: over all but the ones that the backward
    pass takes first), then each program of the main pass starts from

        h_start = ... exp(A sum dt_1) (exp(A sum dt_0) h_0 + adds_0) + adds_1 ...

    The price is that each exponential is taken twice. Grid (D / BD, segments, B).

    REVERSE does the same for dh_t = a_t (dh_{t+1} + C_t dout_t), the gradient that token t hands to token t - 1: then
    x_ptr is dy, B_ptr is C, and dout = dy silu(z).
    """
    d, t, n, in_d, state, in_state, A = _own(A_ptr, D, N, BN, BD, TT, K)
    bias = _per_channel(bias_ptr, d, D)
    b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * length
    n_tile = tl.cdiv(tl.minimum(length, T - start), TT)
    h = tl.zeros((BD, 1, BN), tl.float32)
    total = tl.zeros((BD, TT), tl.float32)
    for i in range(0, n_tile):
        t0 = start + i * TT
        if REVERSE:
            t0 = start + (n_tile - 1 - i) * TT
        here = in_d[:, None] & (t0 + t < T)[None, :]
        in_n = (t0 + t < T)[:, None] & (n < N)[None, :]
        Bs = B_ptr + b * B_b + t0 * B_t
        u, dt, z, Bt, _ = _load_tile(
            x_ptr + b * x_b + t0 * x_t, dt_ptr + b * dt_b + t0 * dt_t, z_ptr + b * z_b + t0 * z_t, Bs, Bs,
            x_t, dt_t, z_t, B_t, B_t, d, t, n, here, in_n, HAS_Z,
        )  # fmt: skip
        u = u.to(tl.float32)
        dt = tl.where(here, softplus(dt.to(tl.float32) + bias), 0.0)
        total += dt
        if not REVERSE:
            u *= dt
        if HAS_Z:
            u *= z.to(tl.float32) * sigmoid(z.to(tl.float32))
        Bt = _spread(Bt, BD)
        u_p = _pin(u, 1)[:, :, None]
        dt_p = _pin(dt, 1)[:, :, None]
        for j in tl.static_range(TT):
            if REVERSE:
                h = tl.exp2(_token(dt_p, TT - 1 - j) * A) * (h + _token(u_p, TT - 1 - j) * _token(Bt, TT - 1 - j))
            else:
                h = tl.exp2(_token(dt_p, j) * A) * h + _token(u_p, j) * _token(Bt, j)
    row = b * tl.num_programs(1) + tl.program_id(1)
    tl.store(adds_ptr + row * D * N + state, h, mask=in_state)
    tl.store(total_ptr + row * D + d, tl.sum(total, 1), mask=in_d)


@triton.jit
def scan_forward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, adds_ptr, total_ptr, y_ptr, hT_ptr, chunk_ptr,
    T, D, length, x_b, x_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, TT: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    HAS_Z: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """h_t = exp(dt_t A) h_{t-1} + u_t B_t, y_t = (C_t . h_t + D x_t) silu(z_t), u_t = dt_t x_t.

    Grid (D / BD, segments, B). Per (token, channel, state): 1 exp2, which holds its unit for 8 cycles a warp, and about
    8 other instructions: dt A, u B, a h + u B, C h (summed over 4 states in the thread, then 4 lanes by shuffles), and
    a sixteenth of what a (token, channel) needs: loads, softplus, gate. Small tiles, one warp a program, many programs:
    T is walked in order, so what hides the latency of this warp's chain is other channels' warps. (The other way
    round, lanes over time and a scan across them, needs as many instructions and was slower.) SAVE keeps h before each
    CHUNK of tokens, for the backward pass.
    """
    d, t, n, in_d, state, in_state, A = _own(A_ptr, D, N, BN, BD, TT, K)
    skip = _per_channel(D_ptr, d, D)
    bias = _per_channel(bias_ptr, d, D)
    segment = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    start = segment.to(tl.int64) * length
    stop = tl.minimum(length, T - start).to(tl.int32)
    x_ptr += b * x_b + start * x_t
    dt_ptr += b * dt_b + start * dt_t
    z_ptr += b * z_b + start * z_t
    B_ptr += b * B_b + start * B_t
    C_ptr += b * C_b + start * C_t
    y_ptr += (b * T + start) * D
    chunk_ptr += (b * tl.cdiv(T, CHUNK) + start // CHUNK) * D * N
    n_add = tl.num_programs(1) - 1
    adds_ptr += b * n_add * D * N
    h = tl.load(h0_ptr + b * D * N + state, mask=in_state, other=0.0)
    h = _enter(h, A, adds_ptr, total_ptr + b * n_add * D, 0, segment, 1, state, d, D, in_state, N)
    here = in_d[:, None] & (t < stop)[None, :]
    in_n = (t < stop)[:, None] & (n < N)[None, :]
    x_next, dt_next, z_next, B_next, C_next = _load_tile(
        x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, x_t, dt_t, z_t, B_t, C_t, d, t, n, here, in_n, HAS_Z
    )
    for t0 in range(0, stop, TT):
        if SAVE:
            if t0 % CHUNK == 0:
                tl.store(chunk_ptr + state, h, mask=in_state)
                chunk_ptr += D * N
        x, dt, z = x_next.to(tl.float32), dt_next.to(tl.float32), z_next.to(tl.float32)
        Bt, Ct = _spread(B_next, BD), _spread(C_next, BD)
        # The next tile's loads go out before this tile's arithmetic.
        x_ptr += TT * x_t
        dt_ptr += TT * dt_t
        z_ptr += TT * z_t
        B_ptr += TT * B_t
        C_ptr += TT * C_t
        here = in_d[:, None] & (t0 + TT + t < stop)[None, :]
        in_n = (t0 + TT + t < stop)[:, None] & (n < N)[None, :]
        x_next, dt_next, z_next, B_next, C_next = _load_tile(
            x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, x_t, dt_t, z_t, B_t, C_t, d, t, n, here, in_n, HAS_Z
        )

        here = in_d[:, None] & (t0 + t < stop)[None, :]
        dt = tl.where(here, softplus(dt + bias), 0.0)  # past the end dt = 0: the state stands still
        u_p = _pin(dt * x, 1)[:, :, None]
        dt_p = _pin(dt, 1)[:, :, None]
        y = tl.zeros((BD, TT), tl.float32)
        for j in tl.static_range(TT):
            h = tl.exp2(_token(dt_p, j) * A) * h + _token(u_p, j) * _token(Bt, j)
            y = tl.where((t == j)[None, :], tl.sum(h * _token(Ct, j), 2), y)
        y += skip * x
        if HAS_Z:
            y *= z * sigmoid(z)
        tl.store(y_ptr + d[:, None] + t[None, :] * D, y.to(y_ptr.dtype.element_ty), mask=here)
        y_ptr += TT * D
    if segment == n_add:
        tl.store(hT_ptr + b * D * N + d[:, None, None] * N + n[None, None, :], h, mask=in_state)


@triton.jit
def scan_backward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, chunk_ptr, dy_ptr, dh_ptr, adds_ptr, total_ptr,
    turn_ptr, tile_ptr, dx_ptr, ddt_ptr, dz_ptr, dB_ptr, dC_ptr, dA_ptr, dD_ptr, dbias_ptr,
    T, D, length, x_b, x_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t, dy_b, dy_t,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, TT: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    HAS_Z: tl.constexpr,
):  # fmt: skip
    """All gradients, walking T backwards. With a_t = exp(dt_t A), u_t = dt_t x_t, dout_t = dy_t silu(z_t):

        g_t  = dL/dh_t = C_t dout_t + a_{t+1} g_{t+1}
        dB_t = sum_d u_t g_t          dC_t = sum_d dout_t h_t          du_t = sum_n B_t g_t
        q_t  = a_t g_t h_{t-1}        dA = sum_t dt_t q_t              ddt_t = (sum_n A q_t + x_t du_t) softplus'
        dx_t = dt_t du_t + D dout_t   dz_t = dy_t (C_t . h_t + D x_t) silu'(z_t)

    Nothing of size (B, T, D, N) is stored. From the saved state before a CHUNK of tokens, h is taken forward once more,
    and its values before each tile wait in a few KB of tile_ptr, which stay in the L2 cache.

    Grid (D / BD, parts x B, legs): T is cut into parts that run at once, each entered as in scan_segment_kernel, and
    each part into legs, the last tokens first: a leg waits in turn_ptr until the one before it has left its dh in
    dh_ptr. GPUs start programs in the order of their numbers, so what is waited for has started long ago. Legs cost
    next to nothing, and keep the chip full where the number of whole parts is not a multiple of what runs at once.
    """
    d, t, n, in_d, state, in_state, A = _own(A_ptr, D, N, BN, BD, TT, K)
    skip = _per_channel(D_ptr, d, D)
    bias = _per_channel(bias_ptr, d, D)
    leg = tl.program_id(2)
    n_leg = tl.num_programs(2)
    n_segment = tl.cdiv(T, length)
    row = tl.program_id(1).to(tl.int64)
    n_batch = tl.num_programs(1) // tl.cdiv(n_segment, n_leg)
    segment = row // n_batch * n_leg + n_leg - 1 - leg
    b = row % n_batch
    start = segment * length
    stop = tl.minimum(start + length, T)
    x_ptr += b * x_b
    dt_ptr += b * dt_b
    z_ptr += b * z_b
    B_ptr += b * B_b
    C_ptr += b * C_b
    dy_ptr += b * dy_b
    dx_ptr += b * T * D
    ddt_ptr += b * T * D
    dz_ptr += b * T * D
    dB_ptr += (tl.program_id(0) * n_batch + b) * T * N
    dC_ptr += (tl.program_id(0) * n_batch + b) * T * N
    chunk_ptr += b * tl.cdiv(T, CHUNK) * D * N
    tile_ptr += (row * tl.num_programs(0) + tl.program_id(0)) * (CHUNK // TT * BN * BD)
    tile_ptr += tl.arange(0, BN)[None, None, :] * BD + tl.max_contiguous(tl.arange(0, BD), K)[:, None, None]
    turn_ptr += row * tl.num_programs(0) + tl.program_id(0)
    while tl.atomic_add(turn_ptr, 0, sem="acquire") < leg:
        pass
    dh_ptr += row * D * N + d[:, None, None] * N + n[None, None, :]
    dh = tl.load(dh_ptr, mask=in_state, other=0.0)
    if leg == 0:  # adds_ptr has no rows for the first part's segments
        n_add = n_segment - n_leg
        adds_ptr += b * n_add * D * N
        total_ptr += b * n_add * D
        dh = _enter(dh, A, adds_ptr, total_ptr, n_add - 1, segment - n_leg, -1, state, d, D, in_state, N)
    dA = tl.zeros((BD, 1, BN), tl.float32)
    dD = tl.zeros((BD, TT), tl.float32)
    dbias = tl.zeros((BD, TT), tl.float32)
    for i in range(0, tl.cdiv(stop - start, CHUNK)):
        c = tl.cdiv(stop, CHUNK) - 1 - i
        t0 = c * CHUNK
        n_tile = tl.cdiv(tl.minimum(stop - t0, CHUNK), TT)
        # Forward once more, over all tiles but the last. The next tile's loads go out before this tile's arithmetic.
        h = tl.load(chunk_ptr + c * D * N + state, mask=in_state, other=0.0)
        here = in_d[:, None] & (t < stop - t0)[None, :]
        in_n = (t < stop - t0)[:, None] & (n < N)[None, :]
        x_next, dt_next, B_next = _load_inner(
            x_ptr + t0 * x_t, dt_ptr + t0 * dt_t, B_ptr + t0 * B_t, x_t, dt_t, B_t, d, t, n, here, in_n
        )
        tl.store(tile_ptr, h)
        for i_tile in range(1, n_tile):
            x, dt = x_next.to(tl.float32), softplus(dt_next.to(tl.float32) + bias)
            Bt = _spread(B_next, BD)
            t0 += TT
            here = in_d[:, None] & (t < stop - t0)[None, :]
            in_n = (t < stop - t0)[:, None] & (n < N)[None, :]
            x_next, dt_next, B_next = _load_inner(
                x_ptr + t0 * x_t, dt_ptr + t0 * dt_t, B_ptr + t0 * B_t, x_t, dt_t, B_t, d, t, n, here, in_n
            )
            u_p = _pin(dt * x, 1)[:, :, None]
            dt_p = _pin(dt, 1)[:, :, None]
            for j in tl.static_range(TT):
                h = tl.exp2(_token(dt_p, j) * A) * h + _token(u_p, j) * _token(Bt, j)
            tl.store(tile_ptr + i_tile * (BN * BD), h)

        # Backwards over the tiles.
        here = in_d[:, None] & (t < stop - t0)[None, :]
        in_n = (t < stop - t0)[:, None] & (n < N)[None, :]
        x_next, dt_next, z_next, B_next, C_next = _load_tile(
            x_ptr + t0 * x_t, dt_ptr + t0 * dt_t, z_ptr + t0 * z_t, B_ptr + t0 * B_t, C_ptr + t0 * C_t,
            x_t, dt_t, z_t, B_t, C_t, d, t, n, here, in_n, HAS_Z,
        )  # fmt: skip
        dy_next = tl.load(dy_ptr + t0 * dy_t + d[:, None] + t[None, :] * dy_t, mask=here, other=0.0)
        for i_tile in range(n_tile):
            x, dt, z = x_next.to(tl.float32), dt_next.to(tl.float32), z_next.to(tl.float32)
            dy = dy_next.to(tl.float32)
            Bt, Ct = _spread(B_next, BD), _spread(C_next, BD)
            here = in_d[:, None] & (t < stop - t0)[None, :]
            in_n = (t < stop - t0)[:, None] & (n < N)[None, :]
            h = tl.load(tile_ptr + (n_tile - 1 - i_tile) * (BN * BD))
            t1 = tl.maximum(t0 - TT, 0)
            more = in_d[:, None] & (t >= 0)[None, :] & (i_tile + 1 < n_tile)
            more_n = (t >= 0)[:, None] & (n < N)[None, :] & (i_tile + 1 < n_tile)
            x_next, dt_next, z_next, B_next, C_next = _load_tile(
                x_ptr + t1 * x_t, dt_ptr + t1 * dt_t, z_ptr + t1 * z_t, B_ptr + t1 * B_t, C_ptr + t1 * C_t,
                x_t, dt_t, z_t, B_t, C_t, d, t, n, more, more_n, HAS_Z,
            )  # fmt: skip
            dy_next = tl.load(dy_ptr + t1 * dy_t + d[:, None] + t[None, :] * dy_t, mask=more, other=0.0)

            dt += bias
            dsoftplus = tl.where(here, sigmoid(dt), 0.0)
            dt = tl.where(here, softplus(dt), 0.0)
            dout = dy
            if HAS_Z:
                sig = sigmoid(z)
                dout = dy * z * sig
            dt_p = _pin(dt, 1)[:, :, None]
            u_p = _pin(dt * x, 1)[:, :, None]
            dout_p = _pin(dout, 1)[:, :, None]

            # Forward again within the tile, keeping each token's h_{t-1} in registers ...
            before = tl.zeros((BD, TT, BN), tl.float32)
            dC = tl.zeros((TT, BN), tl.float32)
            y = tl.zeros((BD, TT), tl.float32)
            for j in tl.static_range(TT):
                before = tl.where((t == j)[None, :, None], h, before)
                h = tl.exp2(_token(dt_p, j) * A) * h + _token(u_p, j) * _token(Bt, j)
                dC = tl.where((t == j)[:, None], tl.sum(_token(dout_p, j) * h, 0), dC)
                if HAS_Z:
                    y = tl.where((t == j)[None, :], tl.sum(h * _token(Ct, j), 2), y)
            # ... and back: g_t = dL/dh_t = C_t dout_t + dh, where dh = a_{t+1} g_{t+1} is handed from token to token.
            dB = tl.zeros((TT, BN), tl.float32)
            du = tl.zeros((BD, TT), tl.float32)
            ddt = tl.zeros((BD, TT), tl.float32)
            for j in tl.static_range(TT - 1, -1, -1):
                g = _token(dout_p, j) * _token(Ct, j) + dh
                dB = tl.where((t == j)[:, None], tl.sum(_token(u_p, j) * g, 0), dB)
                du = tl.where((t == j)[None, :], tl.sum(g * _token(Bt, j), 2), du)
                dh = tl.exp2(_token(dt_p, j) * A) * g
                q = dh * _token(before, j)
                dA += q * _token(dt_p, j)
                ddt = tl.where((t == j)[None, :], tl.sum(q * A, 2), ddt)

            part = t0 * N + t[:, None] * N + n[None, :]
            tl.store(dC_ptr + part, dC.to(dC_ptr.dtype.element_ty), mask=in_n)
            tl.store(dB_ptr + part, dB.to(dB_ptr.dtype.element_ty), mask=in_n)
            dx = du * dt + skip * dout
            ddt = (ddt * LN2 + du * x) * dsoftplus
            dD += dout * x
            dbias += ddt
            tile = t0 * D + d[:, None] + t[None, :] * D
            if HAS_Z:
                dz = dy * (y + skip * x) * sig * (1.0 + z * (1.0 - sig))
                tl.store(dz_ptr + tile, dz.to(dz_ptr.dtype.element_ty), mask=here)
            tl.store(dx_ptr + tile, dx.to(dx_ptr.dtype.element_ty), mask=here)
            tl.store(ddt_ptr + tile, ddt.to(ddt_ptr.dtype.element_ty), mask=here)
            t0 = t1
    tl.store(dh_ptr, dh, mask=in_state)
    tl.debug_barrier()  # all threads have stored
    tl.atomic_add(turn_ptr, 1, sem="release")
    row += leg * tl.num_programs(1)
    tl.store(dA_ptr + row * D * N + d[:, None, None] * N + n[None, None, :], dA, mask=in_state)
    tl.store(dD_ptr + row * D + d, tl.sum(dD, 1), mask=in_d)
    tl.store(dbias_ptr + row * D + d, tl.sum(dbias, 1), mask=in_d)


def takes_state(A: Tensor) -> bool:
    """Whether the scan's kernels were written for A: (D, N) with up to 128 states, not Mamba-2's (heads,)."""
    return A.dim() == 2 and A.shape[1] <= 128


def takes_scan(x: Tensor, dt: Tensor, A: Tensor, *rest, **options) -> bool:
    """Whether selective_scan runs on these inputs."""
    return usable(x) and takes_state(A)


def _check(x, dt, A, B, C, D, z, dt_bias, state):
    if x.dim() != 3:
        raise ValueError(f"selective_scan: x must be (B, T, D), got {tuple(x.shape)}")
    (b, t, d), n = x.shape, A.shape[-1]
    if not takes_state(A):
        raise ValueError(f"selective_scan: state size {n} is over 128; use a smaller d_state")
    wanted = dict(dt=(b, t, d), A=(d, n), B=(b, t, n), C=(b, t, n), D=(d,), z=(b, t, d), dt_bias=(d,), state=(b, d, n))
    given = dict(dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state)
    for name, shape in wanted.items():
        tensor = given[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} must be {shape} to match x and A, got {tuple(tensor.shape)}")
    for name in ("A", "state"):
        if given[name] is not None and given[name].dtype != torch.float32:
            raise ValueError(f"selective_scan: {name} must be float32, got {given[name].dtype}; call .float() on it")


def _rows(tensor):
    """The tensor, copied only if its last axis is not contiguous."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


CHUNK = 32  # tokens between saved states: 4 N / CHUNK bytes per token and channel, in float32


def _tiles(n: int, channels: int, lanes: int, tokens: int) -> dict:
    """One warp's tile: `channels` channels to a thread; at N = 16, `lanes` of 32 lanes along D and the rest along N."""
    bn = triton.next_power_of_2(n)
    lanes = max(1, min(32, lanes * 16 // bn))
    return dict(N=n, BN=bn, BD=channels * lanes, K=channels, TT=min(tokens, CHUNK), num_warps=1)


FULL = 800  # one-warp programs that fill the chip: six on each of an H100's 132 multiprocessors


def _segments(n_program: int, t: int, room: int) -> tuple[int, int]:
    """Into how many segments, of how many tokens, to cut T: one where batch and channels alone fill the chip, because
    segments cost each exponential twice. Else so many, of 512 tokens or more, that the chip, with room for so many
    programs on a multiprocessor, is done in the least time: no last wave that leaves most of it idle. They may be as
    short as 128 tokens as long as all of them run at once. Each looks at all before it, hence 128 at the most."""
    slots = 132 * room
    most = 1 if n_program >= FULL else min(128, max(1, t // 512, min(t // 128, slots // n_program)))
    n_segment = min(range(1, most + 1), key=lambda n: (-(-n_program * n // slots) / n, -n))
    length = triton.cdiv(triton.cdiv(t, n_segment), CHUNK) * CHUNK
    return triton.cdiv(t, length), length


LEG = 256  # tokens of a leg, at least
PASS = 0.2  # time of the pass over segments, in parts of the backward pass's (an H100: 0.19)


def _legs(n_program: int, t: int, room: int) -> tuple[int, int]:
    """Into how many legs, of how many tokens, the backward pass cuts each part of T. Parts run at once, and cost a pass
    over segments; legs run one after another, and cost no pass. The cut that takes the least time, as in _segments."""
    slots = 132 * room
    most = min(128, max(1, t // 128), -(-slots // n_program))  # parts: as many as fill the chip
    cuts = [(p, leg) for p in {1, max(1, most - 1), most} for leg in range(1, max(1, min(16, t // p // LEG)) + 1)]

    def time(cut):
        p, leg = cut
        waves = -(-n_program * p * leg // slots)
        return max(waves / leg, 1) / p + PASS * (1 - 1 / p) * n_program / slots, p * leg

    n_part, n_leg = min(cuts, key=time)
    return n_leg, triton.cdiv(triton.cdiv(t, n_part * n_leg), CHUNK) * CHUNK


def _strides(*tensors):
    return [s for x in tensors for s in x.stride()[:2]]


@torch.library.custom_op("hymba::selective_scan", mutates_args=())
def _scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, state: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, t, d = x.shape
    n = A.shape[1]
    f32 = dict(dtype=torch.float32, device=x.device)
    y = x.new_empty(b, t, d)
    last = torch.empty(b, d, n, **f32)
    chunks = torch.empty(b, triton.cdiv(t, CHUNK) if save else 0, n, d, **f32)
    x, dt, B, C, z = map(_rows, (x, dt, B.float(), C.float(), z))  # every program reads B and C: converted once
    A = A.t().contiguous()  # (N, D): channels contiguous here too
    state = torch.zeros(b, n, d, **f32) if state is None else state.transpose(1, 2).contiguous()
    D, dt_bias = (torch.zeros(d, **f32) if u is None else u for u in (D, dt_bias))
    gate, has_z = (x, False) if z is None else (z, True)
    # Four channels to a thread are the fastest; two make twice as many programs, which may save the segments. Left
    # alone, the compiler takes 168 registers: 12 programs fit on a multiprocessor. With these, 14 or 16 do.
    tile, narrow, registers = _tiles(n, 4, 8, 4), _tiles(n, 2, 8, 8), 144 if save else 128
    if b * triton.cdiv(d, tile["BD"]) < FULL <= b * triton.cdiv(d, narrow["BD"]):
        tile, registers = narrow, None
    n_block = triton.cdiv(d, tile["BD"])
    n_segment, length = _segments(b * n_block, t, 14 if save else 16)
    adds, total = torch.empty(b, n_segment - 1, n, d, **f32), torch.empty(b, n_segment - 1, d, **f32)
    if n_segment > 1:
        segment = _tiles(n, 2, 8, 4)
        scan_segment_kernel[(triton.cdiv(d, segment["BD"]), n_segment - 1, b)](
            x, dt, A, B, x, dt_bias, adds, total, t, d, length, *_strides(x, dt, B, x),
            HAS_Z=False, REVERSE=False, **segment,
        )  # fmt: skip
    scan_forward_kernel[(n_block, n_segment, b)](
        x, dt, A, B, C, D, gate, dt_bias, state, adds, total, y, last, chunks,
        t, d, length, *_strides(x, dt, B, C, gate), CHUNK=CHUNK, HAS_Z=has_z, SAVE=save, **tile,
        maxnreg=registers if n <= 16 and x.element_size() == 2 else None,
    )  # fmt: skip
    return y, last, chunks


@_scan_forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, state, save):
    b, t, d = x.shape
    n = A.shape[1]
    n_chunk = (t + CHUNK - 1) // CHUNK if save else 0
    chunks = x.new_empty(b, n_chunk, n, d, dtype=torch.float32)
    return x.new_empty(b, t, d), x.new_empty(b, d, n, dtype=torch.float32), chunks


@torch.library.custom_op("hymba::selective_scan_backward", mutates_args=())
def _scan_backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, chunks: Tensor, dy: Tensor,
    dlast: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    b, t, d = x.shape
    n = A.shape[1]
    f32 = dict(dtype=torch.float32, device=x.device)
    x, dt, B, C, z, dy = map(_rows, (x, dt, B, C, z, dy))
    A = A.t().contiguous()
    skip, bias = (torch.zeros(d, **f32) if u is None else u for u in (D, dt_bias))
    gate, has_z = (x, False) if z is None else (z, True)
    tile = _tiles(n, 2, 8, 4)
    n_block = triton.cdiv(d, tile["BD"])
    n_leg, length = _legs(b * n_block, t, 8)
    n_segment = triton.cdiv(t, length)
    n_part, n_add, first = triton.cdiv(n_segment, n_leg), max(0, n_segment - n_leg), n_leg * length
    adds, total = torch.empty(b, n_add, n, d, **f32), torch.empty(b, n_add, d, **f32)
    if n_add:  # over all parts but the first, which hands its dh to nobody
        late = [u[:, first:] for u in (dy, dt, C, gate)]
        scan_segment_kernel[(n_block, n_add, b)](
            late[0], late[1], A, late[2], late[3], bias, adds, total, t - first, d, length, *_strides(*late),
            HAS_Z=has_z, REVERSE=True, **tile,
        )  # fmt: skip
    dx, ddt = x.new_empty(b, t, d), dt.new_empty(b, t, d)
    dz = z.new_empty(b, t, d) if has_z else dx
    # Sums over a program's channels. In bfloat16, rounding them adds as much error as rounding the result, and float32
    # would take 3% longer. (Not in float16, in which small gradients vanish.)
    sums = torch.bfloat16 if B.dtype == torch.bfloat16 else torch.float32
    dB, dC = torch.empty(2, n_block, b, t, n, dtype=sums, device=x.device)
    states = torch.empty(n_block * n_part * b, CHUNK // tile["TT"], tile["BN"], tile["BD"], **f32)
    dA = torch.empty(n_leg, n_part * b, d, n, **f32)
    dD, dbias = torch.empty(2, n_leg, n_part * b, d, **f32)
    # From leg to leg; at last, the first part's is the gradient of the state
    dh = torch.zeros(n_part * b, d, n, **f32) if dlast is None else dlast.repeat(n_part, 1, 1)
    turns = torch.zeros(n_part * b, n_block, dtype=torch.int32, device=x.device)
    scan_backward_kernel[(n_block, n_part * b, n_leg)](
        x, dt, A, B, C, skip, gate, bias, chunks, dy, dh, adds, total, turns, states,
        dx, ddt, dz, dB, dC, dA, dD, dbias, t, d, length, *_strides(x, dt, B, C, gate, dy),
        CHUNK=CHUNK, HAS_Z=has_z, **tile,
    )  # fmt: skip
    grads = [dx, ddt, dA.sum((0, 1)), *(u.sum(0, dtype=torch.float32).to(B.dtype) for u in (dB, dC))]
    grads.append(x.new_empty(0) if D is None else dD.sum((0, 1)).to(D.dtype))
    grads.append(x.new_empty(0) if z is None else dz)
    grads.append(x.new_empty(0) if dt_bias is None else dbias.sum((0, 1)).to(dt_bias.dtype))
    return grads + [dh[:b]]


@_scan_backward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, chunks, dy, dlast):
    grads = [g.new_empty(g.shape) for g in (x, dt, A, B, C)]
    grads += [x.new_empty(0) if g is None else g.new_empty(g.shape) for g in (D, z, dt_bias)]
    return grads + [x.new_empty(x.shape[0], *A.shape, dtype=torch.float32)]


def _setup_context(ctx, inputs, output):
    x, dt, A, B, C, D, z, dt_bias, state, save = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.has_state = state is not None


def _backward(ctx, dy, dlast, _):
    x, dt, A, B, C, D, z, dt_bias, chunks = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    grads = _scan_backward(x, dt, A, B, C, D, z, dt_bias, chunks, dy, dlast)
    for i, given in enumerate((x, dt, A, B, C, D, z, dt_bias, ctx.has_state or None)):
        if given is None:
            grads[i] = None
    return *grads, None


_scan_forward.register_autograd(_backward, setup_context=_setup_context)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba's selective scan: see model.selective_scan.

    x, dt, z (B, T, D), B, C (B, T, N): bfloat16, float16 or float32, any strides if the last is 1 (else copied).
    A (D, N) float32, negative. D, dt_bias (D,). state (B, D, N) float32, or None for zeros. N up to 128; 16 is fastest.
    Returns y (B, T, D) in x's dtype and the float32 state after the last token. All inputs get gradients, state too.
    Kept for backward: the inputs and one float32 state per CHUNK tokens.
    Raises ValueError where shapes or dtypes do not fit.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, state)
    given = [a for a in (x, dt, A, B, C, D, z, dt_bias, state) if a is not None]
    save = torch.is_grad_enabled() and any(a.requires_grad for a in given)
    y, last, _ = direct(_scan_forward)(x, dt, A, B, C, D, z, dt_bias, state, save)
    return y, last


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """selective_scan with the name, the signature and the layout of mamba-ssm's function, for models written for that.

    u, delta, z (B, D, T) with any strides (copied unless channels are dense); A (D, N); B, C (B, N, T), or
    (B, 1, N, T); D, delta_bias (D,). Returns y (B, D, T) in u's dtype, and with return_last_state the state (B, D, N).
    Raises ValueError for what mamba-ssm's can do and this one cannot: delta_softplus=False, complex A, B and C that do
    not change with time or belong to several groups.
    """
    if not delta_softplus:
        raise ValueError("selective_scan_fn: delta_softplus=False is not supported; pass delta_softplus=True")
    if A.is_complex():
        raise ValueError("selective_scan_fn: complex A is not supported; use a real one (S4D-real, as Mamba has)")
    if not takes_scan(u, delta, A):
        given = f"{u.dtype} on {u.device}, A {tuple(A.shape)}"
        raise ValueError(
            f"selective_scan_fn: needs an NVIDIA GPU from Ampere on, at most 32 bits, 128 states; got {given}"
        )
    rows = []
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() == 4 and tensor.shape[1] == 1:
            tensor = tensor.squeeze(1)
        if tensor.dim() != 3:
            raise ValueError(f"selective_scan_fn: {name} must be (batch, N, T), one group; got {tuple(tensor.shape)}")
        rows.append(tensor.mT)
    u, delta, z = (x if x is None else x.mT for x in (u, delta, z))
    y, last = selective_scan(u, delta, A.float(), *rows, D, z, delta_bias)
    return (y.mT, last) if return_last_state else y.mT


# Sizes that may take any value without compiling anew.
SIZES = ["T", "S", "H", "R", "window", "n_meta", "chunk", "n_chunk", "n_long", "skip"]


# ----------------------------------------------------------------------------------------------------------------------
# Sliding-window attention with meta tokens
#
# A query at position p sees the meta keys at the start of the sequence and a band of W keys that ends at itself:
#
#     key   0    M             p-W+1         p
#           |####|               |###########|
#            meta                   window
#
# Of the T x S square only about T * (W + M) pairs are seen. The kernels walk them in tiles of queries by keys, and sort
# the tiles alike: *inside* tiles, where every pair is seen, run without mask arithmetic; *edge* tiles (the diagonal,
# the window's left edge, a tile that is only partly meta) pay for it; what nobody sees is never loaded.
#
# Why 64 x 64, for head sizes 64 and 128 on an H100: forward, a tile takes its multiprocessor 384 cycles of tensor core,
# 256 of exponentials and some 340 instructions a warp. A warpgroup (4 warps) does one of these at a time, as each waits
# for the last; with 64 rows its scores and sums fit in 148 registers a thread, so three programs share a multiprocessor
# and fill each other's gaps. 128 rows would load every key half as often, but leave one or two programs: measured
# slower, even though L2 delivers 70% of its peak as it is. Tiles are fetched by the tensor memory accelerator (x.load
# of a descriptor): no pointers in registers, any strides, zeros for what lies past the end, so no load has a guard.
#
# All scores are in units of log2: scale holds log2(e) / sqrt(E), and exponentials are exp2.

CHUNK_QUERIES = 1024  # per partial sum for keys that all queries see: about a window, so that programs are alike


@triton.jit
def load_tile(x, b, h, row, N, ROWS: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows row ... row + ROWS of head h of batch b, of x (B, N, H, size). What lies past the end comes back as zeros;
    WHOLE: no row does. x is a descriptor or, without the accelerator, a pointer and steps: see `tiles`."""
    if isinstance(x, tl.tensor_descriptor):
        tile = x.load([b, h, row, 0]).reshape(ROWS, COLS)
    else:
        pointer, x_b, x_t, x_h, size = x
        rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
        pointers = pointer + (tl.cast(b, tl.int64) * x_b + tl.cast(row, tl.int64) * x_t + h * x_h) + rows * x_t + cols
        if not WHOLE:
            tile = tl.load(pointers, mask=(cols < size) & (row + rows < N), other=0.0)
        elif size < COLS:
            tile = tl.load(pointers, mask=cols < size, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def load_rows(x, b, h, row, T, H, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Numbers row ... row + ROWS of head h of batch b, of lse or delta. WHOLE: none lies past the end."""
    if isinstance(x, tl.tensor_descriptor):
        numbers = x.load([b, h, row]).reshape(ROWS)
    else:
        i = row + tl.arange(0, ROWS)
        numbers = tl.load(x + row_offset(b, h, T, H) + i, mask=None if WHOLE else i < T, other=None if WHOLE else 0.0)
    return numbers


@triton.jit
def store_tile(x, value, b, h, row, N, H, STEP, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows row ... row + ROWS of head h into D columns of a contiguous x (B, N, H, STEP)."""
    rows = row + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    x += (tl.cast(b, tl.int64) * N * H + h) * STEP
    pointers = x + tl.cast(rows, tl.int64)[:, None] * H * STEP + cols[None, :]
    tl.store(pointers, value.to(x.dtype.element_ty), mask=(rows < N)[:, None] & (cols < D)[None, :])


@triton.jit
def row_offset(b, h, T, H):
    """Where head h of batch b begins in lse and delta (B, H, T rounded up to a multiple of 4)."""
    return (tl.cast(b, tl.int64) * H + h) * (tl.cdiv(T, 4) * 4)


@triton.jit
def visible(position, key, window, n_meta):
    """The mask: 0 <= position - key < window, without the upper bound for meta keys.

    One unsigned comparison a pair checks both bounds: a negative distance reads as a huge one.
    """
    reach = tl.where(key < n_meta, 0x7FFFFFFF, window)
    return tl.cast(position - key, tl.uint32) < tl.cast(reach, tl.uint32)


@triton.jit
def key_tiles(first, last, window, n_meta, BK: tl.constexpr):
    """Key tiles seen from positions first ... last, as tile numbers a <= b <= c <= d <= e <= f.

    Inside: [0, a) meta and [d, e) window. Edges: [a, b) meta, [c, d) the window's left edge, [e, f) the diagonal.
    """
    window_start = tl.maximum(first - window + 1, 0) // BK  # the first row sees farthest to the left
    inside_start = tl.cdiv(tl.maximum(last - window + 1, 0), BK)  # what the last row still sees on the left, all see
    inside_end = (first + 1) // BK  # what the first row sees on the right, all see
    a = tl.minimum(n_meta, first + 1) // BK
    b = tl.minimum(tl.cdiv(tl.minimum(n_meta, last + 1), BK), tl.maximum(inside_start, a))
    c = tl.maximum(window_start, b)
    d = tl.maximum(inside_start, c)
    e = tl.maximum(inside_end, d)
    return a, b, c, d, e, last // BK + 1


@triton.jit
def query_tiles(k0, T, S, window, n_meta, BQ: tl.constexpr, BK: tl.constexpr):
    """Query tiles that see keys k0 ... k0 + BK, as tile numbers a <= b <= c <= d.

    Inside: [b, c). Edges: [a, b) the diagonal, [c, d) where the window leaves these keys behind, and the last, partly
    filled tile. Query i stands at position i + S - T.
    """
    offset = S - T
    last = tl.minimum(k0 + BK, S) - 1
    end = tl.where(k0 < n_meta, T, tl.minimum(T, last + window - offset))
    inside_end = tl.where(k0 + BK <= n_meta, T, tl.minimum(T, tl.maximum(k0 + window - offset, 0)))
    a = tl.maximum(k0 - offset, 0) // BQ
    d = tl.maximum(tl.cdiv(end, BQ), a)
    b = tl.minimum(tl.cdiv(tl.maximum(k0 + BK - 1 - offset, 0), BQ), d)
    c = tl.maximum(inside_end // BQ, b)
    return a, b, c, d


@triton.jit
def forward_tile(acc, m, total, query, k, v, b, g, k0, S, position, window, n_meta, scale,
                 BE: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """One step of the running softmax: shrink what is there to the new row maximum m, add one key tile."""
    key = load_tile(k, b, g, k0, S, BK, BE, not EDGE)
    score = tl.dot(query, key.T, input_precision="ieee")  # (BQ, BK)
    if EDGE:
        seen = visible(position[:, None], k0 + tl.arange(0, BK)[None, :], window, n_meta)
        score = tl.where(seen, score, float("-inf"))
    m_new = tl.maximum(m, tl.max(score, 1) * scale)
    p = tl.exp2(score * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    value = load_tile(v, b, g, k0, S, BK, BF, not EDGE)
    acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")  # (BQ, BF)
    return acc, m_new, total


@triton.jit(do_not_specialize=SIZES)
def attention_forward(q, k, v, o, lse, T, S, H, R, window, n_meta, scale,
                      E: tl.constexpr, F: tl.constexpr, BE: tl.constexpr, BF: tl.constexpr,
                      BQ: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """o_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i),  s_ij = q_i . k_j / sqrt(E),  lse_i = log sum_j exp(s_ij).

    One program a query tile and head; it loops over the key tiles it sees. Floor: 2 (E + F) operations on the tensor
    core and one exponential a visible pair; q, k, v read and o written once. Programs that run at one time are the
    heads of one batch entry and neighbouring query tiles, so keys and values come from L2. Late queries go first: in
    full attention they see the most keys.
    """
    h = tl.program_id(0) % H
    b = tl.program_id(1)
    q0 = (tl.cdiv(T, BQ) - 1 - tl.program_id(0) // H) * BQ
    first = q0 + S - T
    position = first + tl.arange(0, BQ)
    query = load_tile(q, b, h, q0, T, BQ, BE, False)
    acc = tl.zeros((BQ, BF), tl.float32)
    m = tl.full((BQ,), -1e30, tl.float32)  # finite: a row that has seen nothing yet stays free of NaN
    total = tl.zeros((BQ,), tl.float32)

    ka, kb, kc, kd, ke, kf = key_tiles(first, tl.minimum(first + BQ, S) - 1, window, n_meta, BK)
    for i in tl.range(ka + ke - kd):
        k0 = tl.where(i < ka, i, i - ka + kd) * BK
        acc, m, total = forward_tile(acc, m, total, query, k, v, b, h // R, k0, S, position, window, n_meta, scale,
                                     BE, BF, BK, False)  # fmt: skip
    for i in tl.range(kb - ka + kd - kc + kf - ke):
        tile = tl.where(i < kb - ka, ka + i, i - (kb - ka) + kc)
        k0 = tl.where(tile < kd, tile, tile - kd + ke) * BK
        acc, m, total = forward_tile(acc, m, total, query, k, v, b, h // R, k0, S, position, window, n_meta, scale,
                                     BE, BF, BK, True)  # fmt: skip

    row = q0 + tl.arange(0, BQ)
    tl.store(lse + row_offset(b, h, T, H) + row, m + tl.log2(total), mask=row < T)
    store_tile(o, acc / total[:, None], b, h, q0, T, H, F, F, BQ, BF)


@triton.jit
def backward_q_tile(dq, query, grad, lse, delta, k, v, b, g, k0, S, position, window, n_meta, scale,
                    BE: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """dq += ds k for one key tile."""
    key = load_tile(k, b, g, k0, S, BK, BE, not EDGE)
    value = load_tile(v, b, g, k0, S, BK, BF, not EDGE)
    score = tl.dot(query, key.T, input_precision="ieee")  # (BQ, BK)
    dp = tl.dot(grad, value.T, input_precision="ieee")  # (BQ, BK)
    p = tl.exp2(score * scale - lse[:, None])
    if EDGE:
        p = tl.where(visible(position[:, None], k0 + tl.arange(0, BK)[None, :], window, n_meta), p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def attention_backward_q(q, k, v, o, do, lse, delta, dq, T, S, H, R, window, n_meta, scale,
                         E: tl.constexpr, F: tl.constexpr, BE: tl.constexpr, BF: tl.constexpr,
                         BQ: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """dq_i = sum_j ds_ij k_j / sqrt(E),  ds_ij = p_ij (dp_ij - delta_i),  dp_ij = do_i . v_j,  delta_i = do_i . o_i.

    The forward kernel's walk, with p rebuilt from lse instead of a running softmax. It meets every row of o and do
    anyway, so it also leaves delta behind for the other kernel. Floor: 2 (2 E + F) operations a visible pair.
    """
    h = tl.program_id(0) % H
    b = tl.program_id(1)
    q0 = (tl.cdiv(T, BQ) - 1 - tl.program_id(0) // H) * BQ
    row = q0 + tl.arange(0, BQ)
    rows = row_offset(b, h, T, H) + row

    grad = load_tile(do, b, h, q0, T, BQ, BF, False)
    out = load_tile(o, b, h, q0, T, BQ, BF, False)
    row_delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + rows, row_delta, mask=row < T)
    row_lse = tl.load(lse + rows, mask=row < T, other=0.0)
    query = load_tile(q, b, h, q0, T, BQ, BE, False)
    acc = tl.zeros((BQ, BE), tl.float32)

    first = q0 + S - T
    position = first + tl.arange(0, BQ)
    ka, kb, kc, kd, ke, kf = key_tiles(first, tl.minimum(first + BQ, S) - 1, window, n_meta, BK)
    for i in tl.range(ka + ke - kd):
        k0 = tl.where(i < ka, i, i - ka + kd) * BK
        acc = backward_q_tile(acc, query, grad, row_lse, row_delta, k, v, b, h // R, k0, S, position, window, n_meta,
                              scale, BE, BF, BK, False)  # fmt: skip
    for i in tl.range(kb - ka + kd - kc + kf - ke):
        tile = tl.where(i < kb - ka, ka + i, i - (kb - ka) + kc)
        k0 = tl.where(tile < kd, tile, tile - kd + ke) * BK
        acc = backward_q_tile(acc, query, grad, row_lse, row_delta, k, v, b, h // R, k0, S, position, window, n_meta,
                              scale, BE, BF, BK, True)  # fmt: skip

    store_tile(dq, acc * (scale * LN2), b, h, q0, T, H, E, E, BQ, BE)  # ln 2: scale is in units of log2


@triton.jit
def backward_kv_tile(dk, dv, key, value, q, do, lse, delta, b, h, q0, T, H, k0, offset, window, n_meta, scale,
                     BE: tl.constexpr, BF: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
                     EDGE: tl.constexpr):  # fmt: skip
    """dv += p^T do and dk += ds^T q for one query tile."""
    row_lse = load_rows(lse, b, h, q0, T, H, BQ, not EDGE)
    query = load_tile(q, b, h, q0, T, BQ, BE, not EDGE)
    grad = load_tile(do, b, h, q0, T, BQ, BF, not EDGE)
    score = tl.dot(key, query.T, input_precision="ieee")  # (BK, BQ)
    p = tl.exp2(score * scale - row_lse[None, :])
    if EDGE:
        position = q0 + offset + tl.arange(0, BQ)
        p = tl.where(visible(position[None, :], k0 + tl.arange(0, BK)[:, None], window, n_meta), p, 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    row_delta = load_rows(delta, b, h, q0, T, H, BQ, not EDGE)
    dp = tl.dot(value, grad.T, input_precision="ieee")  # (BK, BQ)
    ds = p * (dp - row_delta[None, :])
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def attention_backward_kv(q, k, v, do, lse, delta, dk, dv, partial, T, S, H, R, window, n_meta, scale,
                          chunk, n_chunk, n_long, E: tl.constexpr, F: tl.constexpr, BE: tl.constexpr,
                          BF: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """dv_j = sum_i p_ij do_i,  dk_j = sum_i ds_ij q_i / sqrt(E), over the group's R query heads and their rows i.

    One program a key tile and key/value head; it loops over heads and query tiles, so nothing is added atomically and
    the sums come in one order. Scores are kept transposed, keys down and queries across: p^T and ds^T are then already
    where the tensor core wants its left operand, in registers. Floor: 2 (2 E + 2 F) operations a visible pair.

    Meta keys are seen by all queries, and would keep one program busy long after the others are done. The first n_long
    key tiles are therefore split into n_chunk parts, each over `chunk` query tiles, which leave float32 sums in
    partial (n_chunk, B, n_long * BK, G, E + F) for the launcher to add up.
    """
    G = H // R
    g = tl.program_id(0) % G
    item = tl.program_id(0) // G
    b = tl.program_id(1)
    is_long = item < n_long * n_chunk
    tile = tl.where(is_long, item // n_chunk, item - n_long * n_chunk + n_long)
    part = tl.where(is_long, item % n_chunk, 0)
    k0 = tile * BK
    key = load_tile(k, b, g, k0, S, BK, BE, False)
    value = load_tile(v, b, g, k0, S, BK, BF, False)
    acc_k = tl.zeros((BK, BE), tl.float32)
    acc_v = tl.zeros((BK, BF), tl.float32)

    qa, qb, qc, qd = query_tiles(k0, T, S, window, n_meta, BQ, BK)
    if is_long:
        qa = tl.maximum(qa, part * chunk)
        qd = tl.maximum(tl.minimum(qd, part * chunk + chunk), qa)
        qb = tl.minimum(tl.maximum(qb, qa), qd)
        qc = tl.minimum(tl.maximum(qc, qb), qd)
    h, i = g * R, qb
    for _ in tl.range((qc - qb) * R):
        acc_k, acc_v = backward_kv_tile(acc_k, acc_v, key, value, q, do, lse, delta, b, h, i * BQ, T, H, k0,
                                        S - T, window, n_meta, scale, BE, BF, BQ, BK, False)  # fmt: skip
        h, i = tl.where(i + 1 < qc, h, h + 1), tl.where(i + 1 < qc, i + 1, qb)
    n = qb - qa + qd - qc
    h, i = g * R, 0
    for _ in tl.range(n * R):
        q0 = tl.where(qa + i < qb, qa + i, qa + i - qb + qc) * BQ
        acc_k, acc_v = backward_kv_tile(acc_k, acc_v, key, value, q, do, lse, delta, b, h, q0, T, H, k0,
                                        S - T, window, n_meta, scale, BE, BF, BQ, BK, True)  # fmt: skip
        h, i = tl.where(i + 1 < n, h, h + 1), tl.where(i + 1 < n, i + 1, 0)

    acc_k *= scale * LN2
    if is_long:
        into = part * tl.num_programs(1) + b
        store_tile(partial, acc_k, into, g, k0, n_long * BK, G, E + F, E, BK, BE)
        store_tile(partial + E, acc_v, into, g, k0, n_long * BK, G, E + F, F, BK, BF)
    else:
        store_tile(dk, acc_k, b, g, k0, S, G, E, E, BK, BE)
        store_tile(dv, acc_v, b, g, k0, S, G, F, F, BK, BF)


# One program's queries and keys, its warps, and how many tiles are on their way (stages)
HOPPER = {
    attention_forward: (64, 64, 4, 2),
    attention_backward_q: (64, 64, 4, 2),
    attention_backward_kv: (64, 64, 4, 3),
}
AMPERE = {
    attention_forward: (128, 32, 4, 3),
    attention_backward_q: (128, 32, 4, 3),
    attention_backward_kv: (64, 64, 4, 2),
}
FLOAT32 = 32, 32, 8, 2  # float32 has no tensor core: plain multiply-adds with operands in registers


def attention_tile(kernel, q: Tensor, v: Tensor) -> dict:
    """The constants of one of the three kernels: head sizes, their paddings to powers of two, and the tile."""
    E, F = q.shape[-1], v.shape[-1]
    BE, BF = triton.next_power_of_2(E), triton.next_power_of_2(F)
    tile = FLOAT32 if q.dtype == torch.float32 else (HOPPER if loads_by_tma() else AMPERE)[kernel]
    tile = dict(zip(("BQ", "BK", "num_warps", "num_stages"), tile, strict=True))
    if BE + BF > 192:
        tile["num_stages"] = 2  # more do not fit
    return dict(E=E, F=F, BE=BE, BF=BF) | tile


def loadable(x: Tensor) -> Tensor:
    """x (B, T, H, E) itself if the tensor memory accelerator can address it (16-byte steps, dense last dimension)."""
    steps = [s * x.element_size() for n, s in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
    aligned = all(s > 0 and s % 16 == 0 for s in steps) and x.stride(3) == 1 and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def tiles(x: Tensor, rows: int, cols: int):
    """x (B, T, H, E) for load_tile, to be loaded in tiles of one head: for the tensor memory accelerator a descriptor
    of (B, H, T, E), else a pointer, the steps of B, T and H, and E, as a constant: most loads then need no mask."""
    x = loadable(x)
    # Along a dimension of one, PyTorch's stride means nothing and may be misaligned.
    b, t, h = (s if n > 1 else 16 for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
    if not loads_by_tma():
        return x, b, t, h, tl.constexpr(x.shape[3])
    return TensorDescriptor(x, [x.shape[i] for i in (0, 2, 1, 3)], [b, h, t, 1], [1, 1, rows, cols])


@torch.library.custom_op("hymba::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, window: int, n_meta: int) -> tuple[Tensor, Tensor]:
    """Returns o (B, T, H, F) and lse (B, H, T up to a multiple of 4), float32 and in units of log2."""
    (B, T, H, E), (S, G) = q.shape, k.shape[1:3]
    o, lse = q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, -(-T // 4) * 4, dtype=torch.float32)
    c = attention_tile(attention_forward, q, v)
    BQ, BK, BE, BF = c["BQ"], c["BK"], c["BE"], c["BF"]
    attention_forward[(H * triton.cdiv(T, BQ), B)](
        tiles(q, BQ, BE), tiles(k, BK, BE), tiles(v, BK, BF), o, lse,
        T, S, H, H // G, window, n_meta, math.log2(math.e) / math.sqrt(E), **c,
    )  # fmt: skip
    return o, lse


@attention.register_fake
def _(q, k, v, window, n_meta):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, -(-T // 4) * 4, dtype=torch.float32)


@torch.library.custom_op("hymba::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, n_meta: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, contiguous."""
    (B, T, H, E), (_, S, G, F) = q.shape, v.shape
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    scale = math.log2(math.e) / math.sqrt(E)
    c = attention_tile(attention_backward_q, q, v)
    BQ, BK, BE, BF = c["BQ"], c["BK"], c["BE"], c["BF"]
    attention_backward_q[(H * triton.cdiv(T, BQ), B)](
        tiles(q, BQ, BE), tiles(k, BK, BE), tiles(v, BK, BF), tiles(o, BQ, BF), tiles(do, BQ, BF), lse, delta, dq,
        T, S, H, H // G, window, n_meta, scale, **c,
    )  # fmt: skip

    c = attention_tile(attention_backward_kv, q, v)
    BQ, BK, BE, BF = c["BQ"], c["BK"], c["BE"], c["BF"]
    chunk = triton.cdiv(CHUNK_QUERIES, BQ)
    n_chunk = triton.cdiv(triton.cdiv(T, BQ), chunk)
    n_long = triton.cdiv(min(n_meta, S), BK) if n_chunk > 1 and window < S else 0
    partial = lse.new_empty(n_chunk, B, n_long * BK, G, E + F)
    if loads_by_tma():
        lse, delta = (TensorDescriptor(x, [B, H, T], x.stride(), [1, 1, BQ]) for x in (lse, delta))
    attention_backward_kv[(G * (n_long * n_chunk + triton.cdiv(S, BK) - n_long), B)](
        tiles(q, BQ, BE), tiles(k, BK, BE), tiles(v, BK, BF), tiles(do, BQ, BF), lse, delta, dk, dv, partial,
        T, S, H, H // G, window, n_meta, scale, chunk, n_chunk, n_long, **c,
    )  # fmt: skip
    if n_long:
        n = min(n_long * BK, S)
        total = partial.sum(0)
        dk[:, :n], dv[:, :n] = total[:, :n, :, :E], total[:, :n, :, E:]
    return dq, dk, dv


@attention_backward.register_fake
def _(do, q, k, v, o, lse, window, n_meta):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_save(ctx, inputs, output):
    q, k, v, ctx.window, ctx.n_meta = inputs
    ctx.save_for_backward(q, k, v, *output)


def _attention_grad(ctx, do, _):
    q, k, v, o, lse = ctx.saved_tensors
    return *attention_backward(do, q, k, v, o, lse, ctx.window, ctx.n_meta), None, None


attention.register_autograd(_attention_grad, setup_context=_attention_save)


def takes_heads(E: int, F: int) -> bool:
    """Whether the attention kernels were written for these head sizes."""
    return all(n % 16 == 0 and 16 <= n <= 128 for n in (E, F))


def takes_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, n_meta: int) -> bool:
    """Whether windowed_attention runs on these inputs. Not where all is causal and values are as wide as keys, as in
    Llama: PyTorch's own attention is as fast there."""
    plain = window is None and q.shape[-1] == v.shape[-1] and q.shape[1] == k.shape[1]
    return usable(q) and takes_heads(q.shape[-1], v.shape[-1]) and not plain


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, n_meta: int) -> Tensor:
    """Causal attention of grouped queries within a sliding window, plus meta tokens: see model.windowed_attention.

    bfloat16, float16 or float32; softmax and sums in float32. Slices of a fused projection are read in place if they
    start and step by 16 bytes. Saves q, k, v, o and one float per row for backward. Same bits from run to run.

    Raises ValueError where shapes, sizes or dtypes do not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v must be (batch, tokens, heads, size); got {q.shape}, {k.shape}, {v.shape}")
    (B, T, H, E), (S, G), F = q.shape, k.shape[1:3], v.shape[3]
    if k.shape != (B, S, G, E) or v.shape != (B, S, G, F):
        raise ValueError(f"k and v must be ({B}, S, G, {E}) and ({B}, S, G, F) to go with q; got {k.shape}, {v.shape}")
    if H % G or S < T:
        raise ValueError(f"need query heads a multiple of key/value heads, and S >= T; got {H=}, {G=}, {S=}, {T=}")
    if not takes_heads(E, F):
        raise ValueError(f"head sizes must be multiples of 16 up to 128; got E = {E}, F = {F}")
    if n_meta < 0 or (window is not None and window < 1):
        raise ValueError(f"window must be None or at least 1, and n_meta at least 0; got {window=}, {n_meta=}")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q, k, v must all be bfloat16, float16 or float32; got {q.dtype}, {k.dtype}, {v.dtype}")
    return direct(attention)(q, k, v, S if window is None else min(window, S), n_meta)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Causal depthwise convolution + SiLU
#
# y_t = p_t sigmoid(p_t),  p_t = bias + w_0 x_{t-3} + w_1 x_{t-2} + w_2 x_{t-1} + w_3 x_t, channel by channel.
#
# It does a dozen operations a value, so its floor is memory: x in and y out. A program owns a strip of channels and
# walks down the tokens with the last rows in registers, so each row is read once and no two threads ever share a sum.
# The next row is asked for before this one is used. Strips are cut into runs of tokens to fill the chip; a run reads
# up to three rows of its neighbours'.

RUN, STRIP, STRIP_WARPS = 64, 512, 4


@triton.jit
def load_tap(weight, cols, D, k: tl.constexpr, K: tl.constexpr):
    """Column k of weight (D, K) as if K were 4: shorter kernels begin with zeros."""
    return tl.load(weight + cols * K + (k + K - 4), mask=(cols < D) & (k + K >= 4), other=0.0).to(tl.float32)


@triton.jit
def load_row(x, t, stride, cols, T, D):
    """Row t of x, zeros outside 0 ... T."""
    row = tl.load(x + tl.cast(t, tl.int64) * stride + cols, mask=(cols < D) & (t >= 0) & (t < T), other=0.0)
    return row.to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def conv_forward(x, weight, bias, y, T, D, skip, x_b, x_t, K: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    """y (B, T - skip, D): the convolution of x (B, T, D) at rows skip ... T."""
    b = tl.cast(tl.program_id(2), tl.int64)
    first = skip + tl.program_id(1) * N
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    x += b * x_b
    y += b * (T - skip) * D + cols
    w0, w1 = load_tap(weight, cols, D, 0, K), load_tap(weight, cols, D, 1, K)
    w2, w3 = load_tap(weight, cols, D, 2, K), load_tap(weight, cols, D, 3, K)
    c = tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    x3, x2 = load_row(x, first - 3, x_t, cols, T, D), load_row(x, first - 2, x_t, cols, T, D)
    x1, x0 = load_row(x, first - 1, x_t, cols, T, D), load_row(x, first, x_t, cols, T, D)
    for t in tl.range(first, tl.minimum(first + N, T)):
        ahead = load_row(x, t + 1, x_t, cols, T, D)
        p = c + w0 * x3 + w1 * x2 + w2 * x1 + w3 * x0
        tl.store(y + tl.cast(t - skip, tl.int64) * D, (p * tl.sigmoid(p)).to(y.dtype.element_ty), mask=cols < D)
        x3, x2, x1, x0 = x2, x1, x0, ahead


@triton.jit(do_not_specialize=SIZES)
def conv_backward(x, weight, bias, dy, dx, partial, T, D, skip, x_b, x_t, dy_b, dy_t,
                  K: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """dx_t = w_3 g_t + w_2 g_{t+1} + w_1 g_{t+2} + w_0 g_{t+3},  dw_k = sum_t g_t x_{t-3+k},  dbias = sum_t g_t,
    with g = dy * silu'(p), p computed anew and silu'(p) = s + p s (1 - s), s = sigmoid(p).

    Row t's g goes to four rows of dx: a1, a2, a3 hold the unfinished ones. (Holding the last three g instead would read
    better, but Triton 3.6 miscompiles a loop whose values only move along, g3, g2 = g2, g1, if all start out equal.)
    Each run of tokens leaves its sums of dw and dbias in partial (runs, 5, D).
    """
    b = tl.cast(tl.program_id(2), tl.int64)
    first = tl.program_id(1) * N
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    x += b * x_b
    dy += b * dy_b
    dx += b * T * D + cols
    w0, w1 = load_tap(weight, cols, D, 0, K), load_tap(weight, cols, D, 1, K)
    w2, w3 = load_tap(weight, cols, D, 2, K), load_tap(weight, cols, D, 3, K)
    c = tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    x3, x2 = load_row(x, first - 3, x_t, cols, T, D), load_row(x, first - 2, x_t, cols, T, D)
    x1, x0 = load_row(x, first - 1, x_t, cols, T, D), load_row(x, first, x_t, cols, T, D)
    g = load_row(dy, first - skip, dy_t, cols, T - skip, D)
    zero = tl.zeros((BD,), tl.float32)
    a1, a2, a3 = zero, zero, zero
    d0, d1, d2, d3, dc = zero, zero, zero, zero, zero
    for t in tl.range(first, first + N + 3):
        ahead_x = load_row(x, t + 1, x_t, cols, T, D)
        ahead_g = load_row(dy, t + 1 - skip, dy_t, cols, T - skip, D)
        p = c + w0 * x3 + w1 * x2 + w2 * x1 + w3 * x0
        s = tl.sigmoid(p)
        g = g * (s + p * s * (1 - s))
        tl.store(dx + tl.cast(t - 3, tl.int64) * D, (a3 + w0 * g).to(dx.dtype.element_ty),
                 mask=(cols < D) & (t >= first + 3) & (t - 3 < T))  # fmt: skip
        a3, a2, a1 = a2 + w1 * g, a1 + w2 * g, w3 * g
        g = tl.where(t < first + N, g, 0.0)  # rows of the next run count for dx, not for the sums
        d0, d1, d2, d3, dc = d0 + g * x3, d1 + g * x2, d2 + g * x1, d3 + g * x0, dc + g
        x3, x2, x1, x0, g = x2, x1, x0, ahead_x, ahead_g
    partial += (b * tl.num_programs(1) + tl.program_id(1)) * 5 * D + cols
    tl.store(partial, d0, mask=cols < D)
    tl.store(partial + D, d1, mask=cols < D)
    tl.store(partial + 2 * D, d2, mask=cols < D)
    tl.store(partial + 3 * D, d3, mask=cols < D)
    tl.store(partial + 4 * D, dc, mask=cols < D)


@torch.library.custom_op("hymba::conv", mutates_args=())
def conv(x: Tensor, weight: Tensor, bias: Tensor, skip: int) -> Tensor:
    B, T, D = x.shape
    y = x.new_empty(B, T - skip, D)
    grid = (triton.cdiv(D, STRIP), triton.cdiv(T - skip, RUN), B)
    conv_forward[grid](
        x, weight, bias, y, T, D, skip, *x.stride()[:2], weight.shape[1], RUN, STRIP, num_warps=STRIP_WARPS
    )
    return y


@conv.register_fake
def _(x, weight, bias, skip):
    return x.new_empty(x.shape[0], x.shape[1] - skip, x.shape[2])


@torch.library.custom_op("hymba::conv_backward", mutates_args=())
def conv_backward_op(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, skip: int) -> tuple[Tensor, Tensor]:
    """Returns dx and (5, D) float32: the gradients of four taps and the bias."""
    B, T, D = x.shape
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    run = 2 * RUN  # half as many partial sums, and the H100 holds all programs of a training step at once
    dx, partial = x.new_empty(B, T, D), x.new_empty(B * triton.cdiv(T, run), 5, D, dtype=torch.float32)
    conv_backward[(triton.cdiv(D, STRIP), triton.cdiv(T, run), B)](
        x, weight, bias, dy, dx, partial, T, D, skip, *x.stride()[:2], *dy.stride()[:2], weight.shape[1], run, STRIP,
        num_warps=STRIP_WARPS,
    )  # fmt: skip
    return dx, partial.sum(0)


@conv_backward_op.register_fake
def _(dy, x, weight, bias, skip):
    return x.new_empty(x.shape), x.new_empty(5, x.shape[2], dtype=torch.float32)


def _conv_save(ctx, inputs, output):
    *tensors, ctx.skip = inputs
    ctx.save_for_backward(*tensors)


def _conv_grad(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, sums = conv_backward_op(dy, x, weight, bias, ctx.skip)
    return dx, sums[4 - weight.shape[1] : 4].T.to(weight.dtype), sums[4].to(bias.dtype), None


conv.register_autograd(_conv_grad, setup_context=_conv_save)


def takes_taps(weight: Tensor) -> bool:
    """Whether the convolution's kernels were written for so many taps, weight (D, K)."""
    return 2 <= weight.shape[-1] <= 4


def takes_conv(x: Tensor, weight: Tensor, *rest) -> bool:
    """Whether causal_conv runs on these inputs."""
    return usable(x) and takes_taps(weight)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over tokens, then SiLU.

    x (B, T, D) with channels dense, weight (D, K) with K from 2 to 4, bias (D,), tail (B, K - 1, D) the inputs before x
    or None for zeros -> y (B, T, D) in x's dtype, and the new tail (B, K - 1, D), a view: copy it to keep it.
    Sums are in float32. Raises ValueError where shapes do not fit.
    """
    (B, T, D), K = x.shape, weight.shape[-1]
    if weight.shape != (D, K) or bias.shape != (D,) or not takes_taps(weight):
        raise ValueError(f"weight must be ({D}, 2 to 4) and bias ({D},) to go with x; got {weight.shape}, {bias.shape}")
    if tail is not None and tail.shape != (B, K - 1, D):
        raise ValueError(f"tail must be ({B}, {K - 1}, {D}); got {tail.shape}")
    x, weight = x if x.stride(2) == 1 else x.contiguous(), weight.contiguous()
    y = direct(conv)(x, weight, bias, 0)
    if tail is None and T >= K - 1:
        return y, x[:, 1 - K :]
    before = x.new_zeros(B, K - 1, D) if tail is None else tail.to(x.dtype)
    first = torch.cat([before, x[:, : K - 1]], 1)  # (B, up to 2 K - 2, D)
    y[:, : K - 1] = direct(conv)(first, weight, bias, K - 1)
    return y, (x if T >= K - 1 else first)[:, 1 - K :]


# ----------------------------------------------------------------------------------------------------------------------
# Cross-entropy of rows of logits
#
# One program a row. A first pass sums exponentials, a second overwrites the logits with their gradient. The floor is
# memory, reading and writing each logit once, and holds only if the second pass finds its row in the cache. A row of
# 50,304 logits takes 100 KB and the H100's L2 holds 50 MB, so: large programs, few at a time; the first pass asks L2 to
# keep what it read, the second begins with what was read last and asks to forget. Each thread keeps a maximum of its
# own, so that no two wait for each other before the end of the row.

ROW_BLOCK, ROW_WARPS = 8192, 16


@triton.jit
def cross_entropy_row(logits, targets, losses, V, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """loss = log sum_j exp(z_j) - z_target, and with GRAD, z_j <- exp(z_j) / sum_k exp(z_k) - [j = target]."""
    row = tl.cast(tl.program_id(0), tl.int64)
    target = tl.load(targets + row)
    logits += row * V
    at = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    cols = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]  # eight columns a thread
    m = tl.full((BLOCK // 8,), -1e30, tl.float32)  # finite: a row that begins with -inf stays free of NaN
    total = tl.zeros((BLOCK // 8,), tl.float32)
    ahead = tl.load(logits + cols, mask=cols < V, other=float("-inf"), eviction_policy="evict_last")
    for i in tl.range(BLOCK, V + BLOCK, BLOCK):
        z = ahead.to(tl.float32)
        ahead = tl.load(logits + i + cols, mask=i + cols < V, other=float("-inf"), eviction_policy="evict_last")
        m_new = tl.maximum(m, tl.max(z, 1))
        total = total * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.exp2((z - m_new[:, None]) * LOG2E), 1)
        m = m_new
    top = tl.max(m, 0)
    lse = top + tl.log2(tl.sum(total * tl.exp2((m - top) * LOG2E), 0)) * LN2
    tl.store(losses + row, tl.where(target >= 0, lse - at, 0.0))
    if GRAD:
        for i in tl.range(0, V, BLOCK):
            col = (V - 1) // BLOCK * BLOCK - i + cols
            z = tl.load(logits + col, mask=col < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
            p = tl.exp2((z - lse) * LOG2E) - tl.where(col == target, 1.0, 0.0)
            p = tl.where(target >= 0, p, 0.0).to(logits.dtype.element_ty)
            tl.store(logits + col, p, mask=col < V, eviction_policy="evict_first")


def cross_entropy(logits: Tensor, targets: Tensor, grad: bool) -> Tensor:
    """Cross-entropy of each row of logits (n, V) in nats -> (n,) float32, 0 where targets (n,) is negative.

    With grad, logits (contiguous) become their own gradient in place: softmax minus one-hot, 0 in rows without a
    target. A target outside of the vocabulary gives NaN.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    cross_entropy_row[(len(logits),)](logits, targets, losses, logits.shape[1], grad, ROW_BLOCK, num_warps=ROW_WARPS)
    return losses


# ----------------------------------------------------------------------------------------------------------------------
# Inference: what lies between matrix products
#
# Bound by memory (activations are read once) or, in small batches, by the time from one kernel's end to the next one's
# start: some of a layer's twelve kernels take no longer than that. So these, and the ones of engine_kernels.py, are
# launched before their predecessor has ended (Hopper's programmatic dependent launch). They wait for it before they
# read its results and before they write at all. What it does not write, weights above all, is on its way by then.


@triton.jit
def wait():
    """Until all that was launched before is done, and written. Then the next kernel may start, too, and wait here."""
    if launches_early():
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rms(v, n, eps):
    """1 / the root mean square of v's n numbers (and zeros)."""
    return tl.rsqrt(tl.sum(v * v) / n + eps)


@triton.jit
def rope_kernel(x, cos, sin, y, T, x_b, x_t, cos_b, cos_t, H, E: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr):
    """y = R x, R the rotation of channels i and i + E / 2 by the angle whose cos and sin are given. Grid (T, B)."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h, i = tl.arange(0, BH)[:, None], tl.arange(0, BE)[None, :]
    here = (h < H) & (i < E // 2)
    wait()
    c = tl.load(cos + b * cos_b + t * cos_t + i, mask=i < E // 2, other=0.0)
    s = tl.load(sin + b * cos_b + t * cos_t + i, mask=i < E // 2, other=0.0)
    at = x + b * x_b + t.to(tl.int64) * x_t + h * E + i
    x0, x1 = tl.load(at, mask=here).to(tl.float32), tl.load(at + E // 2, mask=here).to(tl.float32)
    at = y + ((b * T + t) * H + h) * E + i
    tl.store(at, (x0 * c - x1 * s).to(y.dtype.element_ty), mask=here)
    tl.store(at + E // 2, (x1 * c + x0 * s).to(y.dtype.element_ty), mask=here)


def apply_rope(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of x (B, T, H, E) by cos and sin (B or 1, T, 1, E / 2) -> (B, T, H, E)."""
    (B, T, H, E), (cos, sin) = x.shape, (u.expand(len(x), -1, -1, -1) for u in angles)
    x = x if x.stride()[2:] == (E, 1) else x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rope_kernel[(T, B)](
        x, cos, sin, y, T, *x.stride()[:2], *cos.stride()[:2], H,
        E, triton.next_power_of_2(H), triton.next_power_of_2(E // 2), launch_pdl=launches_early(),
    )  # fmt: skip
    return y


@triton.jit
def swiglu_kernel(gate, up, y, n, BLOCK: tl.constexpr):
    """y = gate sigmoid(gate) up, value by value."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait()
    g = tl.load(gate + i, mask=i < n).to(tl.float32)
    u = tl.load(up + i, mask=i < n).to(tl.float32)
    tl.store(y + i, (g * sigmoid(g) * u).to(y.dtype.element_ty), mask=i < n)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in one pass."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    swiglu_kernel[(triton.cdiv(y.numel(), 1024),)](gate, up, y, y.numel(), 1024, launch_pdl=launches_early())
    return y


@triton.jit
def normed_sum_kernel(x, y, x_scale, y_scale, out, a, b, eps, D: tl.constexpr, BD: tl.constexpr):
    """out = a x / rms(x) x_scale + b y / rms(y) y_scale, one program a row."""
    row, d = tl.program_id(0).to(tl.int64) * D, tl.arange(0, BD)
    x_scale = a * tl.load(x_scale + d, mask=d < D, other=0.0).to(tl.float32)
    y_scale = b * tl.load(y_scale + d, mask=d < D, other=0.0).to(tl.float32)
    wait()
    x = tl.load(x + row + d, mask=d < D, other=0.0).to(tl.float32)
    y = tl.load(y + row + d, mask=d < D, other=0.0).to(tl.float32)
    x *= rms(x, D, eps)
    y *= rms(y, D, eps)
    tl.store(out + row + d, (x * x_scale + y * y_scale).to(out.dtype.element_ty), mask=d < D)


def normed_sum(x: Tensor, y: Tensor, x_scale: Tensor, y_scale: Tensor, a: float, b: float, eps: float) -> Tensor:
    """a rms_norm(x) + b rms_norm(y) of two branches (..., D) with scales (D,), in one pass."""
    (x, y), D = (u.contiguous() for u in (x, y)), x.shape[-1]
    out = torch.empty_like(x)
    normed_sum_kernel[(x.numel() // D,)](
        x, y, x_scale, y_scale, out, a, b, eps, D, triton.next_power_of_2(D), launch_pdl=launches_early()
    )
    return out
