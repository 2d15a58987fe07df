"""
Hymba (Dong et al. 2024, https://arxiv.org/abs/2411.13676) and the architectures it is compared with, in one file.

A model is a pattern string, one letter a block, which names the block's token mixer:

    T  Transformer: full causal attention               H  hybrid heads: full attention and SSM heads side by side
    t  Transformer: sliding-window attention            h  hybrid heads: sliding-window attention and SSM heads
    M  Mamba: SSM heads                                 (sliding windows always see the meta tokens, too)

Read from top to bottom: configuration, the reference operations (selective_scan, windowed_attention and smaller ones),
the parts of a block, the block, the cache, the model, and how it draws tokens. Letters used for sizes throughout:

    B batch            C model width (n_embd)      H query heads          E query/key head size
    T tokens in call   D inner width (expand * C)  G key/value heads      F value head size
    S keys seen        N SSM state size            M meta tokens          W window
    V vocabulary       K conv kernel               R dt rank

Parameters are float32, matrix products run in whatever autocast says, and A_log, D, the dt bias, softplus, exp, the
SSM state and the statistics of every norm stay in float32.
"""

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import weights

try:
    import kernels  # the same operations as Triton kernels, for GPUs; optional
except ImportError:
    kernels = None


@dataclass
class HymbaConfig:
    """Everything that makes one architecture. The defaults are Hymba-125M.

    Raises ValueError for sizes that do not fit together, saying what to change.
    """

    vocab_size: int = 32001
    block_size: int = 2048  # training tokens, meta tokens not counted
    n_layer: int = 0  # 0: as many as the pattern has letters, or 24
    n_embd: int = 512
    n_head: int = 8
    n_kv_head: int = 4  # grouped queries: n_head / n_kv_head query heads read each key/value head
    n_hidden: int = 1664  # of the SwiGLU feed-forward; 0 leaves it out, as pure Mamba does
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0  # 0: ceil(n_embd / 16)
    n_meta: int = 128
    window: int = 1024  # tokens a windowed query sees, itself included, meta tokens not counted
    pattern: str = ""  # empty: Hymba's, full attention in the first, middle and last block
    kv_share: bool = True  # neighbouring windowed blocks share keys and values
    fusion: str = "mean"  # how hybrid heads meet: mean (Hymba), diff (attention - SSM) or concat
    ssm_norm: bool = False  # RMSNorm on dt, B, C in M blocks, too; hybrid blocks always have it
    rope_base: float = 10000.0
    rope_orig: int = 0  # first training length; once block_size exceeds it, RoPE's base is stretched (NTK). 0: never
    rope_factor: float = 0.0  # Llama 3's way instead of NTK (0): RoPE's slow waves are slowed down by this factor:
    rope_low: float = 1.0  # those of fewer periods than this in rope_orig tokens in full,
    rope_high: float = 4.0  # those of more than this not at all, and in between a blend
    norm_eps: float = 1e-6
    tied: bool = True  # the embedding is the output layer, too
    kernels: bool = True  # use kernels.py where there are a GPU and Triton

    def __post_init__(self):
        n = self.n_layer or len(self.pattern) or 24
        self.pattern = self.pattern or "".join("H" if i in {0, (n - 1) // 2, n - 1} else "h" for i in range(n))
        self.n_layer = n
        self.dt_rank = self.dt_rank or math.ceil(self.n_embd / 16)
        for f in fields(self):
            least = 0 if f.name in {"n_meta", "n_hidden", "rope_orig"} else 1
            if f.type in (int, "int") and getattr(self, f.name) < least:
                raise ValueError(f"{f.name}={getattr(self, f.name)}: must be {least} or more")
        for letter in self.pattern:
            if letter not in "TtMHh":
                raise ValueError(f"pattern '{self.pattern}': unknown letter '{letter}'; use T, t, M, H or h")
        if self.rope_orig and self.head_size == 2:
            raise ValueError("rope_orig needs heads of at least 4 channels: NTK's exponent is E / (E - 2)")
        if self.rope_factor and not (self.rope_orig and self.rope_low < self.rope_high):
            raise ValueError("rope_factor needs rope_orig, and rope_low less than rope_high")
        if len(self.pattern) != n:
            raise ValueError(f"pattern '{self.pattern}' has {len(self.pattern)} letters but n_layer={n}; leave one out")
        if self.fusion not in FUSE:
            raise ValueError(f"fusion='{self.fusion}': use {', '.join(FUSE)}")
        if set(self.pattern) != {"M"}:  # attention heads must come out even
            if self.n_head % self.n_kv_head:
                raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
            if self.n_embd % (2 * self.n_head):
                raise ValueError(f"n_embd={self.n_embd} is not a multiple of 2 * n_head={2 * self.n_head} (RoPE pairs)")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def d_inner(self) -> int:
        return self.expand * self.n_embd

    @property
    def kv_owner(self) -> list[int | None]:
        """The block whose keys and values each block reads (None: it has no attention; itself: it owns them).

        Hymba, Sec. 2.2: neighbouring windowed blocks share one cache in pairs, and in a run of odd length the first
        group has three. Neighbours here are windowed blocks of the same letter.
        """
        owner = []
        for letter, run in groupby(self.pattern):
            start, n = len(owner), len(list(run))
            for j in range(n):
                if self.kv_share and letter in "th":
                    j = 0 if j < 2 + n % 2 else j - (j - n % 2) % 2
                owner.append(None if letter == "M" else start + j)
        return owner


def use_kernels(wanted: bool, x: Tensor) -> bool:
    """Whether kernels.py works on x: where it is wanted, installed, and there is a GPU for it."""
    return wanted and kernels is not None and kernels.usable(x)


def use_inference_kernels(wanted: bool, x: Tensor, *modules: nn.Module) -> bool:
    """The same for kernels without a backward pass, which do what modules and those in them do.

    Not under torch.compile, which fuses such operations itself; and not where a module was replaced (by LoRA's layers,
    say), hooked or quantised, which the kernels would pass over.
    """
    ours = nn.Linear, nn.Identity, RMSNorm, HybridHeads, FeedForward
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not use_kernels(wanted, x):
        return False
    for module in (u for v in modules for u in v.modules()):
        weight = getattr(module, "weight", None)
        plain = weight is None or (type(weight) is nn.Parameter and weight.is_contiguous())
        hooked = module._forward_hooks or module._forward_pre_hooks
        if type(module) not in ours or not plain or hooked or getattr(module, "bias", None) is not None:
            return False
    return True


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with x run in: autocast's dtype for x's device if that is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ----------------------------------------------------------------------------------------------------------------------
# The reference operations, in plain PyTorch. Faster kernels share their signatures and are tested against them.


class _Recurrence(torch.autograd.Function):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = C_t . h_t   (Mamba, https://arxiv.org/abs/2312.00752, Eq. 2).

    The idea: all that must run token by token is one multiply-add on (B, N, D) numbers; everything else runs on a
    whole chunk of tokens in a few vectorised calls. Left to autograd, that loop would record every step and keep
    every state, so the backward pass is written out here: the forward pass keeps only the state before each chunk,
    the backward pass recomputes a chunk's states from it and runs the adjoint recurrence

        g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}        (the gradient of h_t)

    from right to left. Time is the first axis and channels the last, so that each step touches contiguous memory.
    """

    CHUNK = 16  # tokens: a chunk's states should fit the processor's cache, and 1 in 16 of all states is kept

    @staticmethod
    def states(x, dt, A, B, h):
        """Decays and states of a chunk: x, dt (L, B, D), A (N, D), B (L, B, N), h (B, N, D) -> two (L, B, N, D)."""
        decay = torch.exp(dt.unsqueeze(-2) * A)
        hs = (dt * x).unsqueeze(-2) * B.unsqueeze(-1)
        for decay_t, h_t in zip(decay.unbind(0), hs.unbind(0), strict=True):
            h = h_t.addcmul_(decay_t, h)
        return decay, hs

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        """x, dt (T, B, D), A (N, D), B, C (T, B, N), h (B, N, D) -> y (T, B, D) and the last h."""
        y, kept = torch.empty(x.shape, dtype=x.dtype, device=x.device), []
        for s in range(0, len(x), _Recurrence.CHUNK):
            c = slice(s, s + _Recurrence.CHUNK)
            kept.append(h)
            _, hs = _Recurrence.states(x[c], dt[c], A, B[c], h)
            y[c] = (C[c].unsqueeze(-2) @ hs).squeeze(-2)
            h = hs[-1].clone()
        ctx.save_for_backward(x, dt, A, B, C, *kept)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        x, dt, A, B, C, *kept = ctx.saved_tensors
        dA, (dx, ddt, dB, dC) = torch.zeros_like(A), (torch.empty_like(u) for u in (x, dt, B, C))
        for s in reversed(range(0, len(x), _Recurrence.CHUNK)):
            c, h = slice(s, s + _Recurrence.CHUNK), kept.pop()
            decay, hs = _Recurrence.states(x[c], dt[c], A, B[c], h)
            g = dy[c].unsqueeze(-2) * C[c].unsqueeze(-1)  # (L, B, N, D)
            g[-1] += dh
            for t in reversed(range(len(g) - 1)):
                g[t].addcmul_(decay[t + 1], g[t + 1])
            dh = decay[0] * g[0]  # of the state before this chunk
            dC[c] = (hs @ dy[c].unsqueeze(-1)).squeeze(-1)
            dB[c] = (g @ (dt[c] * x[c]).unsqueeze(-1)).squeeze(-1)
            dxdt = (B[c].unsqueeze(-2) @ g).squeeze(-2)  # of the product dt_t x_t
            dx[c] = dxdt * dt[c]
            decay[0] *= h
            decay[1:] *= hs[:-1]
            decay *= g  # now the gradient of dt_t A, in place: g_t exp(dt_t A) h_{t-1}
            ddt[c] = torch.mul(decay, A, out=hs).sum(-2) + dxdt * x[c]
            dA += decay.mul_(dt[c].unsqueeze(-2)).sum((0, 1))
        return dx, ddt, dA, dB, dC, dh


@torch.compiler.disable  # a loop over tokens is not for tracing
def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D=None, z=None, dt_bias=None, state=None
) -> tuple[Tensor, Tensor]:
    """Mamba's selective scan (Mamba, Algorithm 2, and Eq. 2 with the simplified discretisation of its B).

        dt = softplus(dt + dt_bias);  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = (C_t . h_t + D x_t) * silu(z_t)

    x, dt, z (B, T, D); A (D, N) negative; B, C (B, T, N); D, dt_bias (D,); state (B, D, N), zeros if None.
    Returns y (B, T, D) in x's dtype and the last state (B, D, N) in float32. All of it is computed in float32
    (float64 for float64 inputs), is differentiable in every input, and keeps nothing of size B T D N for backward.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        u, dt, B, C = (t.to(dtype).transpose(0, 1) for t in (x, dt, B, C))  # time first
        dt = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dtype))
        h = torch.zeros(*x.shape[::2], A.shape[1], device=x.device) if state is None else state
        y, h = _Recurrence.apply(u, dt, A.to(dtype).t().contiguous(), B, C, h.to(dtype).mT.contiguous())
        y = y.transpose(0, 1) if D is None else (y + D * u).transpose(0, 1)
        return (y if z is None else y * F.silu(z.to(dtype))).to(x.dtype), h.mT


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, n_meta: int) -> Tensor:
    """Causal attention with grouped queries, inside a sliding window that always sees the meta tokens, too.

    q (B, T, H, E), k (B, S, G, E), v (B, S, G, F) -> (B, T, H, F), H a multiple of G. Query i stands at position
    S - T + i and sees key j where j <= position and (position - j < window or j < n_meta); window None sees all j <=
    position. Queries are taken in pieces that each meet only the keys in their reach: O(T (W + M)), not O(T S).
    """
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))  # heads first: (B, H, T, E), (B, G, S, E), (B, G, S, F)
    T, S = q.shape[2], k.shape[2]
    W = S if window is None else min(window, S)
    if W == S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    out, step = [], max(32, min(max(W, 128), 1024, 2**22 // W))  # few at a time where they see very many keys
    for i in range(0, T, step):
        first, end = S - T + i, min(S - T + i + step, S)  # positions of this piece's queries
        low = max(first - W + 1, 0)  # the first key in its window
        j = torch.cat([torch.arange(min(n_meta, low)), torch.arange(low, end)]).to(q.device)  # meta tokens, window
        seen = slice(end) if low <= n_meta else j
        position = torch.arange(first, end, device=q.device)[:, None]
        mask = (j <= position) & ((position - j < W) | (j < n_meta))
        o = F.scaled_dot_product_attention(q[:, :, i : i + step], k[:, :, seen], v[:, :, seen], mask, enable_gqa=True)
        out.append(o)
    return torch.cat(out, dim=2).transpose(1, 2)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    """One new token's attention over the cache: q (B, 1, H, E), k (B, S, G, E), v (B, S, G, F) -> (B, 1, H, F).

    pos (B,): the token's position. The slots of a cache fill from the left and all that it holds is in reach, so a
    row sees slots 0 ... pos (all S once the ring is full). Their order does not matter: RoPE was applied before.
    """
    mask = torch.arange(k.shape[1], device=q.device) <= pos[:, None]  # (B, S)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True).transpose(1, 2)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU: y_t = silu(bias + sum_k weight[:, k] x_{t - K + 1 + k}).

    x (B, T, D), weight (D, K), bias (D,), tail (B, K - 1, D): the inputs just before x, zeros if None.
    Returns y (B, T, D) and the next call's tail. K shifted multiply-adds need no transposes, and compile to one kernel.
    """
    T, K = x.shape[1], weight.shape[1]
    x = F.pad(x, (0, 0, K - 1, 0)) if tail is None else torch.cat([tail, x], dim=1)  # (B, K - 1 + T, D)
    y = sum(x[:, k : k + T] * weight[:, k] for k in range(K)) + bias
    return F.silu(y).to(x.dtype), x[:, T:]


def cross_entropy(logits: Tensor, targets: Tensor, grad: bool) -> Tensor:
    """Cross-entropy of each row of logits (n, V) in nats -> (n,), 0 where targets (n,) is negative.

    With grad, logits become their own gradient in place: softmax minus one-hot, 0 in rows without a target.
    """
    z, seen = logits.to(torch.promote_types(logits.dtype, torch.float32)), targets >= 0
    target, lse = targets.clamp(min=0)[:, None], z.logsumexp(-1, keepdim=True)
    losses = torch.where(seen, (lse - z.gather(1, target)).squeeze(1), 0.0)
    if grad:
        z.sub_(lse).exp_().scatter_add_(1, target, -torch.ones_like(lse)).mul_(seen[:, None])
        logits.copy_(z)
    return losses


@torch.library.custom_op("hymba::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, fast: bool, grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (n, C), weight (V, C), targets (n,) -> sum of the losses, the losses (n,), and the sum's gradients.

    Of 4,096 tokens at a time, the gradients are taken while their logits are there: no T x V tensor is ever held, and
    the backward pass need not multiply by weight again.
    """
    rows = kernels.cross_entropy if fast else cross_entropy
    w, losses = weight.to(dtype), x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    dx = x.new_empty(x.shape if grad else 0)
    dw = weight.new_zeros(weight.shape if grad else 0, dtype=losses.dtype)
    for i in range(0, len(x), 4096):
        piece, now = x[i : i + 4096].to(dtype), slice(i, i + 4096)
        logits = piece @ w.t()  # (4096, V)
        losses[now] = rows(logits, targets[now], grad)
        if grad:
            dx[now] = logits @ w
            dw += logits.t() @ piece
        del logits  # before the next piece's are there
    return losses.sum(), losses, dx, dw


@_linear_cross_entropy.register_fake
def _(x, weight, targets, dtype, fast, grad):
    losses = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    dx, dw = x.new_empty(x.shape if grad else 0), weight.new_empty(weight.shape if grad else 0, dtype=losses.dtype)
    return losses.new_empty(()), losses, dx, dw


def _linear_cross_entropy_save(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = inputs[1].dtype


def _linear_cross_entropy_grad(ctx, d, *_):
    dx, dw = ctx.saved_tensors
    return d * dx, (d * dw).to(ctx.dtype), None, None, None, None


_linear_cross_entropy.register_autograd(_linear_cross_entropy_grad, setup_context=_linear_cross_entropy_save)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, fast: bool = False) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the logits x weight^T: its mean over the targets, and that of each token.

    x (..., C), weight (V, C), targets (...), negative where there is nothing to predict -> () and (...), float32. Only
    the mean can be differentiated. Tokens without a target have loss 0; if none has one, the mean is NaN.
    """
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    args = x.flatten(0, -2), weight, targets.flatten(), compute_dtype(x), fast, grad
    total, losses, _, _ = _linear_cross_entropy(*args)
    return total / (targets >= 0).sum(), losses.view(targets.shape)


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a block


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019), statistics in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:  # PyTorch takes the statistics of bfloat16 in float32 itself, in one kernel
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def scale_of(norm: nn.Module | None) -> tuple[Tensor | None, float]:
    """An RMSNorm's scale and eps, (None, 0) of no norm."""
    return (norm.weight, norm.eps) if isinstance(norm, RMSNorm) else (None, 0.0)


def linear_step(layer: nn.Module, x: Tensor, norm: nn.Module | None = None, add: Tensor | None = None) -> Tensor:
    """layer(norm(x)) + add for one token a row, x (B, 1, C): of few rows, all of it in one kernel."""
    if kernels.fits_matvec(x):
        return kernels.matvec(x, layer.weight, None, *scale_of(norm), add)
    y = layer(x if norm is None else norm(x))
    return y if add is None else add + y


@torch.library.custom_op("hymba::rope_table", mutates_args=())  # else torch.compile takes every sine in every block
def rope_table(pos: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    angle = pos[..., None, None] * freq
    return angle.cos(), angle.sin()


@rope_table.register_fake
def _(pos, freq):
    return tuple(torch.empty(*pos.shape, 1, len(freq), device=pos.device) for _ in range(2))


def rope_angles(config: HymbaConfig, pos: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for positions pos (b, T), meta tokens counted: two (b, T, 1, E / 2) float32 tensors.

    Longer sequences than rope_orig stretch the base by NTK: base (2 block_size / rope_orig - 1)^(E / (E - 2)), so
    that the slowest wave turns no further over the new length than it did over the old. With rope_factor,
    the slow waves alone are slowed down, as in the release of Llama 3.1 (rope_type "llama3" in its config.json).
    """
    c, E, base = config, config.head_size, config.rope_base
    if 0 < c.rope_orig < c.block_size and not c.rope_factor:
        base *= (2 * c.block_size / c.rope_orig - 1) ** (E / (E - 2))
    freq = base ** (-torch.arange(0, E, 2, device=pos.device, dtype=torch.float32) / E)  # (E / 2,)
    if c.rope_factor:
        periods = c.rope_orig * freq / (2 * math.pi)  # in rope_orig tokens
        keep = ((periods - c.rope_low) / (c.rope_high - c.rope_low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / c.rope_factor)
    return rope_table(pos, freq)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2021), half-split form: channel i turns with channel i + E / 2."""
    (cos, sin), (a, b) = rope, x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


FUSE = {"mean": (0.5, 0.5), "diff": (1.0, -1.0), "concat": None}  # what attention and SSM heads count in their sum


class HybridHeads(nn.Module):
    """The token mixer of every kind of block: attention heads, SSM heads, or both in parallel on the same input.

    Hymba, Sec. 2.1: one projection feeds all heads, both kinds give D channels, each branch is RMS-normalised with
    its own scale (their magnitudes differ a lot), the two are averaged and go through one output projection. So
    value heads are twice (expand times) as wide as query heads here, while a block of attention alone is Llama's
    and a block of SSM heads alone is Mamba's.
    """

    def __init__(self, config: HymbaConfig, layer: int):
        super().__init__()
        letter, C, D = config.pattern[layer], config.n_embd, config.d_inner
        self.n_meta = config.n_meta
        self.fusion, self.eps = config.fusion, config.norm_eps
        self.has_attn, self.has_ssm = letter != "M", letter in "MHh"
        self.window = config.window if letter in "th" else None
        self.owns_kv = config.kv_owner[layer] == layer
        self.E, width, sizes = config.head_size, 0, []
        if self.has_attn:
            self.H, self.G = config.n_head, config.n_kv_head
            self.F = D // self.H if self.has_ssm else self.E
            sizes += [self.H * self.E] + [self.G * self.E, self.G * self.F] * self.owns_kv  # q, k, v
            width = self.H * self.F
        if self.has_ssm:
            N, R, eps = config.d_state, config.dt_rank, config.norm_eps
            sizes += [D, D]  # x, z
            width = 2 * D if self.has_attn and config.fusion == "concat" else D
            self.conv_weight = nn.Parameter(torch.empty(D, config.d_conv))
            self.conv_bias = nn.Parameter(torch.zeros(D))
            self.x_proj = nn.Linear(D, R + 2 * N, bias=False)
            self.x_sizes = [R, N, N]
            normed = self.has_attn or config.ssm_norm
            self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(n, eps) if normed else nn.Identity() for n in (R, N, N))
            self.dt_proj = nn.Linear(R, D, bias=False)
            self.dt_bias = nn.Parameter(torch.empty(D))
            self.A_log = nn.Parameter(torch.empty(D, N))
            self.D = nn.Parameter(torch.ones(D))
        if self.has_attn and self.has_ssm:
            self.attn_norm, self.ssm_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)
        heads = [self.E, self.F] if self.has_attn else []
        self.kernels = (  # sizes that kernels.py was written for
            config.kernels and all(n % 16 == 0 and n <= 128 for n in heads)
            and (not self.has_ssm or (config.d_state <= 128 and 2 <= config.d_conv <= 4))
        )  # fmt: skip
        self.sizes = sizes
        self.in_proj = nn.Linear(C, sum(sizes), bias=False)
        self.out_proj = nn.Linear(width, C, bias=False)

    def attend(self, parts, rope, kv, cache):
        """Attention heads: parts q (B, T, H E), and k, v where this block owns them -> (B, T, H F) and its k, v."""
        B, T, _ = parts[0].shape
        rotate = kernels.rope if use_inference_kernels(self.kernels, parts[0]) else apply_rope
        q = rotate(parts.pop(0).view(B, T, self.H, self.E), rope)
        if self.owns_kv:
            k = rotate(parts.pop(0).view(B, T, self.G, self.E), rope)
            kv = k, parts.pop(0).view(B, T, self.G, self.F)
            if cache is not None:
                kv = cache.write(self.window, *kv) if T == 1 else cache.extend(self.window, *kv)
        if cache is not None and T == 1:
            return decode_attention(q, *kv, cache.pos).flatten(2), kv
        llama = self.window is None and self.F == self.E and kv[0].shape[1] == T  # PyTorch's own is as fast here
        attention = kernels.windowed_attention if use_kernels(self.kernels, q) and not llama else windowed_attention
        return attention(q, *kv, self.window, self.n_meta).flatten(2), kv

    def scan(self, x, z, cache):
        """SSM heads (Mamba, Fig. 3 and Algorithm 2): x and gate z (B, T, D) -> (B, T, D)."""
        tail, state = (None, None) if cache is None else cache.ssm
        conv, scan = causal_conv, selective_scan
        if use_kernels(self.kernels, x):
            conv, scan = kernels.causal_conv, kernels.selective_scan
        x, next_tail = conv(x, self.conv_weight, self.conv_bias, tail)
        dt, B, C = self.x_proj(x).split(self.x_sizes, dim=-1)  # (B, T, R), (B, T, N), (B, T, N)
        dt = self.dt_proj(self.dt_norm(dt))  # (B, T, D)
        A = -torch.exp(self.A_log.float())
        y, next_state = scan(x, dt, A, self.B_norm(B), self.C_norm(C), self.D, z, self.dt_bias, state)
        if cache is not None:
            tail.copy_(next_tail)
            state.copy_(next_state)
        return y

    def fuse(self, y, s):
        """The branches' sum, each normalised: y, s (B, T, D) -> (B, T, D), or (B, T, 2 D) for concat."""
        weights, norms = FUSE[self.fusion], (self.attn_norm, self.ssm_norm)
        if weights is None:
            return torch.cat([self.attn_norm(y), self.ssm_norm(s)], dim=-1)
        if use_inference_kernels(self.kernels, y, *norms) and all(isinstance(norm, RMSNorm) for norm in norms):
            return kernels.fuse(y, s, *(norm.weight for norm in norms), *weights, self.eps)
        return weights[0] * self.attn_norm(y) + weights[1] * self.ssm_norm(s)

    def step(self, proj, rope, cache):
        """What lies between the projections for one new token a row, by kernels that update the cache in place.

        proj (B, 1, ...), all parts of in_proj's output together -> (B, 1, width of out_proj's input).
        """
        if self.has_attn:
            window = self.window or 0
            q = kernels.rope_append(proj, *rope, cache.pos, *cache.kv, self.H, self.owns_kv, window, self.n_meta)
            y = kernels.decode_attention(q, *cache.kv, cache.pos).flatten(2)  # (B, 1, H F)
        if self.has_ssm:
            tail, state = cache.ssm
            x = kernels.conv_step(proj, self.conv_weight, self.conv_bias, tail)  # (B, 1, D)
            dtBC = linear_step(self.x_proj, x)  # (B, 1, R + 2 N)
            dt = linear_step(self.dt_proj, dtBC[..., : self.x_sizes[0]], self.dt_norm)  # (B, 1, D)
            scales = [getattr(norm, "weight", None) for norm in (self.B_norm, self.C_norm)]
            s = kernels.scan_step(x, dt, self.A_log, dtBC, self.D, proj, self.dt_bias, state, *scales, self.eps)
            y = self.fuse(y, s) if self.has_attn else s
        return y

    def forward(self, x, rope, kv, cache):
        """x (B, T, C) -> (B, T, C), and the keys and values that the blocks of its group read."""
        parts = list(self.in_proj(x).split(self.sizes, dim=-1))  # q, [k, v,] x, z: as many as the block has
        if self.has_attn:
            y, kv = self.attend(parts, rope, kv, cache)  # (B, T, H F)
        if self.has_ssm:
            s = self.scan(*parts, cache)  # (B, T, D)
            y = self.fuse(y, s) if self.has_attn else s
        return self.out_proj(y), kv


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), (B, T, C) -> (B, T, C)."""

    def __init__(self, config: HymbaConfig, with_kernels: bool):
        super().__init__()
        self.kernels = with_kernels
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        fast = use_inference_kernels(self.kernels, gate)
        return self.down_proj(kernels.swiglu(gate, up) if fast else F.silu(gate) * up)

    def step(self, x, norm):
        """norm, forward and the residual addition for one new token a row, x (B, 1, C)."""
        if kernels.fits_matvec(x):
            h = kernels.matvec(x, self.gate_proj.weight, self.up_proj.weight, *scale_of(norm))
        else:
            h = norm(x)
            h = kernels.swiglu(self.gate_proj(h), self.up_proj(h))
        return linear_step(self.down_proj, h, add=x)


class Block(nn.Module):
    """Pre-norm residual block: a token mixer, then the feed-forward unless n_hidden is 0."""

    def __init__(self, config: HymbaConfig, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mixer = HybridHeads(config, layer)
        self.kernels = self.mixer.kernels
        self.ffn = None
        if config.n_hidden:
            self.ffn_norm = RMSNorm(config.n_embd, config.norm_eps)
            self.ffn = FeedForward(config, self.kernels)

    def forward(self, x, rope, kv, cache):
        if cache is not None and x.shape[1] == 1 and use_inference_kernels(self.kernels, x, *self.children()):
            return self.step(x, rope, cache), kv
        y, kv = self.mixer(self.mixer_norm(x), rope, kv, cache)
        x = x + y
        if self.ffn is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x, kv  # (B, T, C)

    def step(self, x, rope, cache):
        """forward for one new token a row, x (B, 1, C); keys and values go through the cache, so none are handed on."""
        y = self.mixer.step(linear_step(self.mixer.in_proj, x, self.mixer_norm), rope, cache)
        x = linear_step(self.mixer.out_proj, y, add=x)
        return x if self.ffn is None else self.ffn.step(x, self.ffn_norm)


# ----------------------------------------------------------------------------------------------------------------------
# The cache


class Cache:
    """What generation keeps of B sequences, for each block only what it owns:

    - full attention: keys and values of every token, in a buffer with room for n_tokens that grows when it is full;
    - windowed attention: keys and values of the meta tokens, pinned, and a ring of the last `window` tokens;
    - SSM: the last K - 1 inputs of the convolution and the float32 state.

    Made by Hymba.new_cache, which fills in the meta tokens. Rows may stand at different positions while they take one
    token a call; a longer call needs rows of equal length (Hymba.generate shows how: prefill equal rows together).
    """

    def __init__(self, config: HymbaConfig, batch_size: int, n_tokens: int, dtype: torch.dtype, device: torch.device):
        c, new = config, lambda *shape, dtype=dtype: torch.zeros(batch_size, *shape, dtype=dtype, device=device)
        self.n_meta, self.pattern, self.kv_owner, self.capacity = c.n_meta, c.pattern, c.kv_owner, n_tokens
        self.pos = torch.zeros(batch_size, dtype=torch.long, device=device)  # tokens each row has seen, meta included
        self.longest, self.ragged = 0, False  # the largest of pos and whether they differ, known without a device sync
        self.kv, self.ssm = {}, {}  # by block
        for i, letter in enumerate(c.pattern):
            if self.kv_owner[i] == i:
                slots = c.n_meta + (c.window if letter in "th" else n_tokens)
                value_size = c.d_inner // c.n_head if letter in "Hh" else c.head_size
                self.kv[i] = new(slots, c.n_kv_head, c.head_size), new(slots, c.n_kv_head, value_size)
            if letter in "MHh":
                self.ssm[i] = new(c.d_conv - 1, c.d_inner), new(c.d_inner, c.d_state, dtype=torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes held: Hymba.cache_bytes(capacity, dtype) for each row."""
        return sum(u.nbytes for pair in [*self.kv.values(), *self.ssm.values()] for u in pair)

    def map(self, f) -> "Cache":
        """A cache with f applied to every tensor: rows are the first axis of each."""
        new = copy.copy(self)
        new.pos = f(self.pos)
        new.kv, new.ssm = ({i: tuple(f(u) for u in pair) for i, pair in d.items()} for d in (self.kv, self.ssm))
        return new

    def reserve(self, n_tokens: int) -> None:
        """Make room for n_tokens more in every row; buffers at least double, so that growing costs O(1) a token."""
        if (need := self.longest + n_tokens - self.n_meta) > self.capacity:
            more, self.capacity = max(self.capacity, need - self.capacity), max(2 * self.capacity, need)
            for i in self.kv:
                if self.pattern[i] in "TH":
                    self.kv[i] = tuple(F.pad(u, (0, 0, 0, 0, 0, more)) for u in self.kv[i])  # along the slots

    def block(self, i: int) -> "BlockCache":
        """What block i needs of the cache."""
        kv = self.kv.get(self.kv_owner[i])
        return BlockCache(kv, self.ssm.get(i), self.pos, self.longest, self.ragged, self.n_meta)


@dataclass
class BlockCache:
    """One block's part of a Cache: the same tensors, None where it has none."""

    kv: tuple[Tensor, Tensor] | None  # keys (B, slots, G, E) and values (B, slots, G, F), its own or its producer's
    ssm: tuple[Tensor, Tensor] | None  # conv tail (B, K - 1, D) and state (B, D, N)
    pos: Tensor
    longest: int
    ragged: bool
    n_meta: int

    def slot(self, window: int | None, pos: Tensor) -> Tensor:
        """Where the token at position pos is kept."""
        M = self.n_meta
        return pos if window is None else torch.where(pos < M, pos, M + (pos - M) % window)

    def write(self, window: int | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token of each row, k (B, 1, G, E), v (B, 1, G, F), and return the whole buffers."""
        for buffer, new in zip(self.kv, (k, v), strict=True):
            buffer[torch.arange(len(k), device=k.device), self.slot(window, self.pos)] = new[:, 0]
        return self.kv

    @torch.compiler.disable  # the host decides what is where
    def extend(self, window: int | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, G, E or F) and return what their queries see: (B, S, G, E), (B, S, G, F).

        Keys come in order of position with the new ones last, as windowed_attention takes them: what lies between the
        meta tokens and the window is gone, but that changes no distance inside the window.
        """
        T, M, p = k.shape[1], self.n_meta, self.longest
        if self.ragged:
            raise ValueError("the rows of this cache differ in length: feed them one token a call, or apart")
        if window is None:
            for buffer, new in zip(self.kv, (k, v), strict=True):
                buffer[:, p : p + T] = new
            return tuple(buffer[:, : p + T] for buffer in self.kv)
        on = dict(device=k.device)  # slots are made where they are used: the host would wait for a copy
        old = torch.cat([torch.arange(min(p, M), **on), torch.arange(max(p - window + 1, M), max(p, M), **on)])
        n = T if p < M else min(T, window)  # what the ring keeps of this call
        old, last = self.slot(window, old), self.slot(window, torch.arange(p + T - n, p + T, **on))
        seen = []
        for buffer, new in zip(self.kv, (k, v), strict=True):
            seen.append(torch.cat([buffer[:, old], new], dim=1))
            buffer[:, last] = new[:, T - n :]
        return tuple(seen)


# ----------------------------------------------------------------------------------------------------------------------
# The model

PREFILL = 16384  # tokens, of all rows together, that generate reads in one call: bounds the memory of long prompts

# Dense bf16 peak of a GPU by words of the name it reports, FLOP/s (vendors' data sheets, without sparsity)
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "A10": 125e12, "4090": 165e12, "3090": 71e12}  # fmt: skip


class Hymba(nn.Module):
    """Decoder-only language model: embedding, blocks by config.pattern, norm, and the output layer.

    The output layer is the embedding again, unless config.tied is False.
    """

    def __init__(self, config: HymbaConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.meta = nn.Parameter(torch.empty(config.n_meta, config.n_embd)) if config.n_meta else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self._meta_cache = None
        self.source = None  # where from_pretrained has it from: format, config.json, dtypes; None: our own format
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """All initialisation there is.

        - Matrices and embeddings: normal, std 0.02; the projections back into the residual stream are divided by
          sqrt(2 n_layer), so that its variance does not grow with depth (GPT-2).
        - Meta tokens: like token embeddings, because they enter the residual stream in the same place: the first
          norm then treats them as words, and they differ from one another from the first step (equal ones would get
          equal gradients in an attention branch and stay nearly equal).
        - SSM (Mamba, Sec. 3.6): A = -(1 ... N) in every channel; the dt bias so that steps softplus(bias) spread
          log-uniformly over [1e-3, 1e-1], which gives channels memories of about 10 to 1000 tokens; dt_proj uniform
          within R^-1/2, so that dt varies around its bias on the scale of its normalised input.
        """
        cfg = self.config
        for name, p in self.named_parameters():
            if name.endswith("A_log"):
                p.copy_(torch.arange(1, cfg.d_state + 1, dtype=torch.float32, device=p.device).log().expand_as(p))
            elif name.endswith("dt_bias"):
                dt = torch.exp(torch.rand_like(p) * math.log(100) + math.log(1e-3))
                p.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            elif name.endswith("dt_proj.weight"):
                p.uniform_(-(cfg.dt_rank**-0.5), cfg.dt_rank**-0.5)
            elif name.endswith("conv_weight"):
                p.uniform_(-(cfg.d_conv**-0.5), cfg.d_conv**-0.5)
            elif name.endswith(("out_proj.weight", "down_proj.weight")):
                p.normal_(std=0.02 / math.sqrt(2 * cfg.n_layer))
            elif p.dim() == 2:
                p.normal_(std=0.02)

    @property
    def output(self) -> Tensor:
        """The output layer (V, C)."""
        return self.embed.weight if self.lm_head is None else self.lm_head

    def run(self, x: Tensor, cache: Cache | None) -> Tensor:
        """All blocks on embeddings x (B, T, C), which continue the cache if there is one -> (B, T, C), not normed.

        Under autocast the residual stream is in its dtype, too: half the bytes for every norm and addition.
        """
        x = x.to(compute_dtype(x))
        pos = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        if cache is not None:
            cache.reserve(x.shape[1])
            pos = pos + cache.pos[:, None]  # (B, T)
        rope, kv = rope_angles(self.config, pos), None
        for i, block in enumerate(self.blocks):
            x, kv = block(x, rope, kv, cache and cache.block(i))
        if cache is not None:
            cache.pos += x.shape[1]
            cache.longest += x.shape[1]
        return x

    def hidden(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Final normed states (B, T, C) of tokens idx (B, T)."""
        x = self.embed(idx)
        if cache is not None:
            with torch.no_grad():
                return self.norm(self.run(x, cache))
        if self.meta is not None:  # Hymba, Sec. 2.3: the meta tokens go before every sequence
            x = torch.cat([self.meta.expand(len(x), -1, -1), x], dim=1)  # (B, M + T, C)
        return self.norm(self.run(x, None)[:, self.config.n_meta :])

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None):
        """Logits or loss of tokens idx (B, T).

        Without targets: (logits (B, T, V), None). With targets (B, T), -1 where there is nothing to predict:
        (None, mean cross-entropy in nats per token). With a cache (from new_cache), idx continues it.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return F.linear(x, self.output), None
        return None, linear_cross_entropy(x, self.output, targets, use_kernels(self.config.kernels, x))[0]

    def new_cache(self, batch_size: int, n_tokens: int) -> Cache:
        """A cache for batch_size sequences that has seen the meta tokens and has room for n_tokens before it grows.

        The meta tokens run once per model, not per cache; weights that were changed in place, as optimizers and
        load_state_dict do, are noticed and run them again.
        """
        device, dtype = self.embed.weight.device, compute_dtype(self.embed.weight)
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters()]
        stamp = [str(self.config), dtype, versions]
        if self._meta_cache is None or self._meta_cache[0] != stamp:
            once = Cache(self.config, 1, 0, dtype, device)
            if self.meta is not None:
                with torch.no_grad():
                    self.run(self.meta[None], once)
            self._meta_cache = stamp, once
        cache = self._meta_cache[1].map(lambda u: u.repeat_interleave(batch_size, dim=0))
        cache.reserve(n_tokens)
        return cache

    def cast(self, dtype: torch.dtype) -> "Hymba":
        """Weights in dtype, for inference, but for those named in weights.FLOAT32."""
        for name, p in self.named_parameters():
            if not name.endswith(weights.FLOAT32):
                p.data = p.data.to(dtype)
        return self

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Collection[int] | None = None,
        seed: int = 0,
        first_row: int = 0,
        cache: Cache | None = None,
    ) -> Iterator[list[int | None]]:
        """Continue every prompt (token ids; lengths may differ), yielding one token for each at every step.

        Each item is a list with the next token of every prompt, None for those that have ended with a token in
        `stop` (which is not yielded). Ends when all have, or after max_new_tokens. Temperature 0 is greedy; top_k
        keeps the k likeliest tokens, top_p the likeliest that together reach probability p. Row i draws from its own
        stream of random numbers, (seed, first_row + i): what else is in the batch does not change it. (Matrix
        products of other sizes may round differently, and turn a near-tie: in bfloat16, now and then.)

        With a cache of one row (from new_cache), the one prompt continues it. The cache has then seen the prompt and
        all tokens that were yielded but the last; where a token in `stop` ended the iteration, the last one, too.
        """
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("every prompt needs at least one token: begin an empty one with the end-of-text token")
        if bad := [t for p in prompts for t in p if not 0 <= t < self.config.vocab_size]:
            raise ValueError(f"token {bad[0]} is outside of the vocabulary of {self.config.vocab_size}")
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        if cache is not None and not len(prompts) == len(cache.pos) == 1:
            raise ValueError(f"{len(prompts)} prompts, {len(cache.pos)} cache rows: only one prompt continues one row")
        device = self.embed.weight.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():  # kernels and graphs go to that one
            raise ValueError(f"the model is on {device}: call torch.cuda.set_device({device.index}) before generate")
        rows = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the prompt of each row of the batch
        room = len(prompts[rows[-1]]) + (256 if max_new_tokens is None else min(max_new_tokens, 4096))
        ahead = cache is None
        cache = cache or self.new_cache(len(rows), room)
        cache.reserve(room)

        last, lengths = [], []  # prefill: rows of equal length together, each group in its own rows of the cache
        for length, group in groupby([prompts[i] for i in rows], key=len):
            group = torch.tensor([list(prompt) for prompt in group], device=device)
            for idx in group.split(max(1, PREFILL // length)):
                own = slice(len(lengths), len(lengths) + len(idx))
                part = cache.map(lambda u, own=own: u[own])
                for piece in idx.split(PREFILL, dim=1):
                    x = self.hidden(piece, part)[:, -1]
                last.append(x)
                lengths += [length] * len(idx)
        cache.longest, cache.ragged = part.longest, lengths[0] < lengths[-1]

        def draw(x: Tensor, cache: Cache, row: Tensor) -> Tensor:  # (B, C) -> (B,)
            logits = F.linear(x, self.output).float()
            return sample_token(logits, temperature, top_k, top_p, (seed, row, cache.pos))

        row = torch.tensor(rows, device=device) + first_row
        decoder = Decoder(self, cache, draw(torch.cat(last), cache, row), row, draw)
        del cache, part, last, x  # what the decoder leaves behind as its cache grows is free
        ends = {stop} if isinstance(stop, int) else set(stop or ())
        step, going, cuda = 0, set(rows), device.type == "cuda"
        while max_new_tokens is None or step < max_new_tokens:
            step += 1
            drawn = decoder.tokens.to("cpu", non_blocking=cuda, copy=True)
            arrived = cuda and torch.cuda.current_stream(device).record_event()
            if ahead and step != max_new_tokens:  # the next step runs while the host reads this one's tokens
                decoder.step()
            if arrived:
                arrived.synchronize()
            out: list[int | None] = [None] * len(prompts)
            for i, token in zip(rows, drawn.tolist(), strict=True):
                if token in ends:
                    going.discard(i)
                out[i] = token if i in going else None
            if not going:
                return
            yield out
            if not ahead and step != max_new_tokens:
                decoder.step()
            if 2 * len(going) <= len(rows):  # rows that have ended leave the batch: by halves, as each size is captured
                keep = torch.tensor([j for j, i in enumerate(rows) if i in going], device=device)
                rows = [i for i in rows if i in going]
                decoder = decoder.take(keep)

    def num_params(self) -> int:
        """Parameters; an embedding that is the output layer, too, counts once."""
        return sum(p.numel() for p in self.parameters())

    def cache_bytes(self, n_tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the cache of one sequence with room for n_tokens (meta tokens not counted): what Cache holds."""
        return Cache(self.config, 1, n_tokens, dtype, torch.device("meta")).nbytes

    def flops_per_token(self, n_tokens: int | None = None, training: bool = True) -> float:
        """Floating-point operations per text token, a multiply-add counted as two.

        Forward: 2 for each weight of a matrix (the output layer's, too), 2 H (E + F) for each key that attention sees,
        7 D N for the scan (dt A, exp, decay h, dt x B, +, and C . h), 2 K D for the convolution.
        Training: three times the forward pass (backward is two), averaged over n_tokens (block_size if None), the
        meta tokens' work included. Inference (training=False): one token's forward pass after n_tokens others.
        """
        c, T = self.config, self.config.block_size if n_tokens is None else n_tokens
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        last = c.n_meta + T  # position of the token in inference; in training, how many there are
        p = torch.arange(last, dtype=torch.float64) if training else torch.tensor([last], dtype=torch.float64)
        flops = 2.0 * matrices * len(p)
        for mixer in (block.mixer for block in self.blocks):
            if mixer.has_attn:
                seen = p + 1
                if mixer.window is not None:  # the window, and the meta tokens to the left of it
                    seen = seen.clamp(max=mixer.window) + (seen - mixer.window).clamp(0, c.n_meta)
                flops += 2 * mixer.H * (mixer.E + mixer.F) * seen.sum().item()
            if mixer.has_ssm:
                flops += (7 * c.d_inner * c.d_state + 2 * c.d_conv * c.d_inner) * len(p)
        output = 2 * self.output.numel()  # text tokens only
        return 3 * (flops / T + output) if training else flops + output

    def estimate_mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation in training: the share of the GPU's bf16 peak that flops_per_token explains.

        None on a device whose peak is not in PEAK_FLOPS (CPUs among them).
        """
        name = torch.cuda.get_device_name().replace("-", " ") if self.embed.weight.is_cuda else ""
        peak = next((peak for gpu, peak in PEAK_FLOPS.items() if set(gpu.split()) <= set(name.split())), None)
        return peak and self.flops_per_token() * tokens_per_second / peak

    def save_pretrained(self, folder: str | Path, **extra) -> None:
        """Write model.safetensors and config.json into folder, each whole or not at all.

        A model that from_pretrained read from another project's format goes back into that format, the same to the
        bit as long as nothing has changed it; any other has our names and {"model": the configuration, **extra}.
        """
        weights.save(self, Path(folder), extra)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> "Hymba":
        """Load a checkpoint: a folder with config.json and safetensors (one file, or shards and their index), or a
        model on huggingface.co, such as "nvidia/Hymba-1.5B-Base".

        Reads what save_pretrained (and so train.py) writes, released Hymba weights, and transformers' Llama and Mamba.
        Parameters get dtype, or keep the file's if it is None; those in weights.FLOAT32 are float32 at least. On a CPU
        they stay where the file is mapped into memory as long as neither dtype nor rows change: no second copy.

        Raises FileNotFoundError for a missing file, ConnectionError for a failed download, ValueError for a config.json
        that this file cannot compute and for tensors that do not fit it, naming each missing, unexpected or misshapen.
        """
        folder = weights.pretrained_folder(name, weights=False)
        kind, config, arguments = weights.read_config(folder)
        try:
            with torch.device("meta"):
                model = cls(HymbaConfig(**arguments))
        except TypeError as e:
            raise ValueError(f"{folder / 'config.json'} describes no model: {e}") from None
        weights.load(model, name, kind, config, dtype, device)
        return model.requires_grad_()


class Decoder:
    """One-token steps of a batch: each feeds `tokens` (B,) to the model and puts what is drawn next in their place.

    Nothing in a step needs the host: on a GPU, all of it is one CUDA graph. A graph is bound to the addresses it was
    captured with, so the first step, and each after the cache has grown, runs operation by operation (which also
    compiles the kernels); the second is captured, and replayed from then on.
    """

    def __init__(self, model: Hymba, cache: Cache, tokens: Tensor, row: Tensor, draw):
        """row (B,): the number of each row's random stream; draw(hidden states (B, C), cache, row) -> tokens (B,)."""
        self.model, self.cache, self.tokens, self.row, self.draw = model, cache, tokens, row, draw
        self.capacity, self.graph = None, None

    def run(self) -> None:
        x = self.model.hidden(self.tokens[:, None], self.cache)[:, -1]
        self.tokens.copy_(self.draw(x, self.cache, self.row))

    @torch.no_grad()
    def step(self) -> None:
        self.cache.reserve(1)
        fits = self.capacity == self.cache.capacity and self.tokens.is_cuda
        if not fits or torch.is_autocast_enabled("cuda"):  # (weights that autocast converts outlive no graph)
            self.capacity, self.graph = self.cache.capacity, None
            return self.run()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()
        else:
            self.cache.longest += 1  # what else the host does in a step
        self.graph.replay()

    def take(self, keep: Tensor) -> "Decoder":
        """The steps of some rows alone, in the same memory: keep (b,) says which, in ascending order."""
        n = len(keep)
        pick = lambda u: u[:n].copy_(u[keep])  # noqa: E731
        return Decoder(self.model, self.cache.map(pick), pick(self.tokens), pick(self.row), self.draw)


def check_sampling(max_new_tokens: int | None, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for what generate cannot do."""
    if not temperature >= 0 or (top_k is not None and top_k < 1) or not (top_p is None or 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: use >= 0, >= 1, and 0 < p <= 1")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be 0 or more, or None for no limit")


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, counter: tuple[int, Tensor, Tensor]
) -> Tensor:
    """Draw one token a row from logits (B, V) -> (B,), with the random numbers of counter (see exponential).

    Exponentials race, and token v, with rate p_v, comes in first with probability p_v: the Gumbel-max trick.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # 0 / 1e-40 is no infinity
    if top_k is not None or top_p is not None:
        ranked, order = probs.sort(-1, descending=True)
        if top_k is not None:
            ranked[:, top_k:] = 0
        if top_p is not None:  # drop what is preceded by p already
            ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p * ranked.sum(-1, keepdim=True), 0)
        probs = probs.scatter(1, order, ranked)
    return (probs / exponential(*counter, logits.shape[1])).argmax(-1)


def exponential(seed: int, row: Tensor, pos: Tensor, n: int) -> Tensor:
    """Exponentially distributed numbers (B, n), float32; number (b, j) follows from (seed, row[b], pos[b], j) alone.

    A counter-based generator: SplitMix64 (Steele, Lea & Flood 2014), whose finaliser mixes the counter's bits, in
    PyTorch's wrapping 64-bit integers. row and pos (B,) int64.
    """
    shift = lambda x, k: (x >> k) & ((1 << (64 - k)) - 1)  # of unsigned numbers  # noqa: E731

    def mix(x):
        x = (x ^ shift(x, 30)) * -0x40A7B892E31B1A47
        x = (x ^ shift(x, 27)) * -0x6B2FB644ECCEEE15
        return x ^ shift(x, 31)

    gamma, key = -0x61C8864680B583EB, torch.full_like(row, (seed + 2**63) % 2**64 - 2**63)
    for u in (row, pos):
        key = mix(key + gamma) + u
    bits = mix(mix(key + gamma)[:, None] + gamma * torch.arange(1, n + 1, device=row.device))
    u = (shift(bits, 11).float() + 0.5) * 2.0**-53  # in (0, 1], finest near 0, where the race is decided
    return -torch.log1p(-u)
