"""
Hymba (Dong et al. 2024, https://arxiv.org/abs/2411.13676) and the architectures it is compared with, in one file.

A model is a string with one letter for each block. The letter names the block's token mixer:

    T  full causal attention (Llama)          H  hybrid heads: full attention and SSM heads side by side
    t  sliding-window attention               h  hybrid heads: sliding-window attention and SSM heads
    M  SSM heads (Mamba, or with ssm="mamba2" Mamba-2)

Small letters are windowed, and a window always sees the meta tokens, too. T and M blocks are just Llama's and Mamba's
with n_meta = 0, and for Mamba n_hidden = 0.

Read from top to bottom: the configuration, the operations, the parts of a block, the block, the model. Everything here
is plain PyTorch, written as the papers have it. An operation marked @accelerated runs as something faster where there
is something: ops.py has versions for any device, kernels.py has Triton kernels for GPUs. Both are tested against the
definitions that you read here. engine.py generates text quickly, with a cache; this file only says what a block asks
a cache for. Without those files, this one trains and generates alone.

Letters used for sizes throughout:

    B batch            C model width (n_embd)      H query heads          E query/key head size
    T tokens in call   D inner width (expand * C)  G key/value heads      F value head size
    S keys seen        N SSM state size            M meta tokens          W window
    V vocabulary       K conv kernel               R dt rank              P channels of a Mamba-2 head
    X experts          k experts of a token

In shapes, a letter is always one of these sizes. In the scan, A, B, C and D are Mamba's tensors, too, and in a pattern,
T, H and M are kinds of blocks.

Parameters are float32 and matrix products run in the dtype that autocast says. A_log, D, the dt bias, softplus, exp,
the SSM state and the statistics of every norm stay in float32.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

try:
    import ops  # faster versions of the operations that are marked @accelerated
except ModuleNotFoundError as e:
    if e.name != "ops":  # it is there, but something that it needs is not
        raise
    ops = None


def accelerated(definition):
    """Mark an operation: at every call, ops.fastest picks the function to run, this definition or a faster equal.

    So the loop over tokens in selective_scan, for one, is there to be read. It runs only where ops.py is missing.
    """

    @functools.wraps(definition)
    def operation(*args, **options):
        f = definition if ops is None else ops.fastest(definition, *args, **options)
        return f(*args, **options)

    return operation


def check_fields(config, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError for a field of a dataclass of another type than it declares, or for a number that is out of its
    range, NaN included. Where ranges has none, 1 to 2**24. A whole number is a float, too."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type is float and type(value) is int and abs(value) < 2**63:
            setattr(config, f.name, value := float(value))
        if type(value) is not f.type:
            raise ValueError(f"{f.name}={repr(value)[:60]}: must be {f.type.__name__}")
        least, most = ranges.get(f.name, (1, 2**24))
        if f.type in (int, float) and not least <= value <= most:
            bound = f"{least} or more" if value < least else f"{most} or less" if value > most else "a number"
            raise ValueError(f"{f.name}={value}: must be {bound}")


@dataclass
class HymbaConfig:
    """Everything that makes one architecture. The defaults are Hymba-125M.

    Raises ValueError for sizes that do not fit together, saying what to change.
    """

    vocab_size: int = 32001  # train.py: the data set's, rounded up to a multiple of 64
    block_size: int = 2048  # training tokens, meta tokens not counted
    n_layer: int = 0  # 0: as many as the pattern has letters, or 24
    n_embd: int = 512  # width of the model
    n_head: int = 8  # query heads
    n_kv_head: int = 4  # grouped queries: n_head / n_kv_head query heads read each key/value head
    head_size: int = 0  # of queries and keys; 0: n_embd / n_head. Given, n_head says how wide attention is
    n_hidden: int = 1664  # of the SwiGLU feed-forward; 0 leaves it out, as pure Mamba does
    n_expert: int = 0  # mixture of experts: so many feed-forwards of n_hidden in each block; 0: one for all tokens
    n_expert_active: int = 2  # experts that a token goes through
    balance: float = 0.01  # weight of the loss that evens out how many tokens experts get
    d_state: int = 16  # numbers in the SSM's state for each inner channel
    d_conv: int = 4  # taps of the convolution before the SSM
    expand: int = 2  # inner channels of SSM heads for each channel of the model
    ssm: str = "mamba"  # SSM heads: mamba (Hymba) or mamba2, whose d_state is usually 64 to 128
    ssm_head: int = 64  # channels of a Mamba-2 head
    dt_rank: int = 0  # dt is made through a bottleneck this wide; 0: ceil(n_embd / 16)
    n_meta: int = 128  # learned tokens in front of every sequence
    window: int = 1024  # tokens a windowed query sees, itself included, meta tokens not counted
    pattern: str = ""  # empty: Hymba's, full attention in the first, middle and last block
    kv_share: bool = True  # neighbouring windowed blocks share keys and values
    fusion: str = "mean"  # how hybrid heads meet: mean (Hymba), sum, diff (attention - SSM) or concat
    branch_norm: str = "rms"  # of both kinds of heads before they meet: rms (Hymba), group (of each head) or none
    branch_scale: bool = True  # this norm has a learned scale
    ssm_norm: bool = False  # RMSNorm on dt, B, C in M blocks, too; hybrid blocks always have it
    rope: bool = True  # False: no position embedding (NoPE), order shows in masks and SSM heads alone
    rope_base: float = 10000.0  # of RoPE's wavelengths
    rope_orig: int = 0  # length the model was first trained on; a larger block_size stretches RoPE by NTK. 0: never
    rope_factor: float = 0.0  # 0: NTK; else Llama 3's stretch at any block_size: slow waves are slowed by this factor
    rope_low: float = 1.0  # slow: fewer periods than this in rope_orig tokens, slowed in full
    rope_high: float = 4.0  # fast: more periods than this, left alone; in between, a blend
    norm_eps: float = 1e-6  # added to the mean square in every norm
    tied: bool = True  # the embedding is the output layer, too

    def __post_init__(self):
        ranges = dict.fromkeys(["n_hidden", "rope_orig", "dt_rank", "head_size"], (0, 2**24)) | {"n_layer": (0, 1000)}
        ranges |= dict.fromkeys(["expand", "d_conv"], (1, 1024)) | {"norm_eps": (1e-12, 1), "rope_base": (1, 1e12)}
        ranges |= {"n_meta": (0, 2**16), "window": (1, 2**20)}  # a cache has this many slots, used or not
        ranges |= {"n_expert": (0, 4096), "balance": (0, 1e6)}
        check_fields(self, ranges | dict.fromkeys(["rope_factor", "rope_low", "rope_high"], (0, 1e12)))
        n = self.n_layer or len(self.pattern) or 24
        if n > 1000:
            raise ValueError(f"a pattern of {n} blocks is too long: give 1000 at most")
        if self.pattern and len(self.pattern) != n:
            pattern = self.pattern[:60]
            raise ValueError(f"pattern '{pattern}' has {len(self.pattern)} letters but n_layer={n}; leave one out")
        self.pattern = self.pattern or "".join("H" if i in {0, (n - 1) // 2, n - 1} else "h" for i in range(n))
        self.n_layer = n
        self.dt_rank = self.dt_rank or math.ceil(self.n_embd / 16)
        for letter in self.pattern:
            if letter not in "TtMHh":
                raise ValueError(f"pattern '{self.pattern[:60]}': unknown letter '{letter}'; use T, t, M, H or h")
        for name, choices in {"fusion": FUSE, "branch_norm": ("rms", "group", "none"), "ssm": SSM}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}='{getattr(self, name)[:60]}': use {', '.join(choices)}")
        if self.n_expert and (self.n_expert_active > self.n_expert or not self.n_hidden):
            raise ValueError(f"n_expert={self.n_expert} needs n_hidden, and to be n_expert_active or more")
        letters, hybrid = set(self.pattern), set(self.pattern) & set("Hh")
        if letters != {"M"}:  # attention heads must come out even
            if self.n_head % self.n_kv_head:
                raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
            if self.n_embd % (2 * self.n_head) and not self.head_size:
                raise ValueError(f"n_embd={self.n_embd} is not a multiple of 2 * n_head={2 * self.n_head} (RoPE pairs)")
            if self.head_size % 2:
                raise ValueError(f"head_size={self.head_size} must be even (RoPE pairs)")
        self.head_size = self.head_size or self.n_embd // self.n_head
        width = self.n_head * self.head_size  # of attention heads, before values are widened
        if hybrid and width != self.n_embd and (self.fusion != "concat" or width >= 2 * self.n_embd):
            raise ValueError(f"n_head * head_size = {width}: give n_embd, or with fusion=concat less than twice that")
        for letter in letters & set("MHh") if self.ssm == "mamba2" else ():
            if self.d_inner(letter) % self.ssm_head:
                raise ValueError(f"ssm_head={self.ssm_head} does not divide {self.d_inner(letter)} SSM channels")
        if hybrid and self.branch_norm == "group" and self.d_inner("H") % self.value_size("H"):
            raise ValueError(f"branch_norm=group needs a head_size that divides n_embd={self.n_embd}")
        if self.rope_orig and self.head_size == 2:
            raise ValueError("rope_orig needs heads of at least 4 channels: NTK's exponent is E / (E - 2)")
        if self.rope_factor and not (self.rope_orig and self.rope_low < self.rope_high):
            raise ValueError("rope_factor needs rope_orig, and rope_low less than rope_high")

    def value_size(self, letter: str) -> int:
        """F: hybrid blocks widen values as they widen SSM heads, so that both give D channels; else as wide as keys."""
        return self.expand * self.head_size if letter in "Hh" else self.head_size

    def d_inner(self, letter: str) -> int:
        """D, of SSM heads. In hybrid blocks, they have what attention heads leave of 2 expand n_embd channels."""
        attention = self.n_head * self.head_size if letter in "Hh" else self.n_embd
        return self.expand * (2 * self.n_embd - attention)

    def ssm_cache(self, letter: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what a block's SSM heads keep of a sequence: the convolution's last inputs, and the state."""
        D, N, P, K = self.d_inner(letter), self.d_state, self.ssm_head, self.d_conv
        return ((K - 1, D), (D, N)) if self.ssm == "mamba" else ((K - 1, D + 2 * N), (D // P, P, N))

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
                first = j  # of its group: 0 0 2 2 for n = 4, 0 0 0 3 3 for n = 5
                if self.kv_share and letter in "th":
                    first = 0 if j < 2 + n % 2 else j - (j - n % 2) % 2
                owner.append(None if letter == "M" else start + first)
        return owner


# ----------------------------------------------------------------------------------------------------------------------
# Operations


def float32(x: Tensor) -> Tensor:
    """x in float32, in which sensitive arithmetic is done; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@accelerated
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis of x (..., n), with weight (n,), in float32 (Zhang & Sennrich 2019)."""
    u = float32(x)
    return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@accelerated
def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D=None, z=None, dt_bias=None, state=None
) -> tuple[Tensor, Tensor]:
    """Mamba's selective scan (https://arxiv.org/abs/2312.00752, Algorithm 2, with dt B for (exp(dt A) - 1) / A B).

    Each token says how far it moves the state (dt), where it is written (B) and how it is read (C): "selective".

        dt = softplus(dt + dt_bias);  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = (C_t . h_t + D x_t) * silu(z_t)

    x, dt, z (B, T, D); A (D, N) negative; B, C (B, T, N); D (D,), the skip weight of each channel; dt_bias (D,);
    state (B, D, N), zeros if None. All is computed in float32. Returns y (B, T, D) in x's dtype and the last state.
    """
    u, dt, A, B, C = (float32(t) for t in (x, dt, A, B, C))
    dt = F.softplus(dt if dt_bias is None else dt + dt_bias)
    h = u.new_zeros(len(u), *A.shape) if state is None else state.to(u.dtype)
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)  # (B, D, N)
        h = decay * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]  # (B, D, N)
        ys.append((h * C[:, t, None]).sum(-1))  # (B, D)
    y = torch.stack(ys, dim=1)  # (B, T, D)
    y = y if D is None else y + D * u
    return (y if z is None else y * F.silu(z.to(u.dtype))).to(x.dtype), h


@accelerated
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D, dt_bias, state=None) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan (Dao & Gu 2024, https://arxiv.org/abs/2405.21060, Sec. 6): one decay for all channels of a head.

        dt = softplus(dt + dt_bias);  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t

    x (B, T, heads, P); dt (B, T, heads); A (heads,) negative; B, C (B, T, N), the same for all heads; D, dt_bias
    (heads,); state (B, heads, P, N), zeros if None. All is computed in float32. Returns y (B, T, heads, P) in x's dtype
    and the last state.
    """
    u, dt, A, B, C = (float32(t) for t in (x, dt, A, B, C))
    dt = F.softplus(dt + dt_bias)
    h = u.new_zeros(*u[:, 0].shape, B.shape[-1]) if state is None else state.to(u.dtype)
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]  # (B, heads, 1, 1)
        h = decay * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, None, None]  # (B, heads, P, N)
        ys.append((h * C[:, t, None, None]).sum(-1))  # (B, heads, P)
    return (torch.stack(ys, dim=1) + D[:, None] * u).to(x.dtype), h


@accelerated
def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, n_meta: int) -> Tensor:
    """Causal attention with grouped queries, inside a sliding window that always sees the meta tokens, too.

    q (B, T, H, E), k (B, S, G, E), v (B, S, G, F) -> (B, T, H, F), H a multiple of G. Query i stands at position
    S - T + i and sees key j where j <= position and (position - j < window or j < n_meta). window None: all keys.
    Query head h reads key/value head h // (H / G): softmax(q k^T / sqrt(E)) v over the keys that it sees.
    """
    T, S = q.shape[1], k.shape[1]
    position, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
    seen = (j <= position) & ((position - j < (window or S)) | (j < n_meta))  # (T, S)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))  # heads first: (B, H, T, E), (B, G, S, E), (B, G, S, F)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)


@accelerated
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU: y_t = silu(bias + sum_k weight[:, k] x_{t - K + 1 + k}).

    x (B, T, D), weight (D, K), bias (D,), tail (B, K - 1, D): the inputs just before x, zeros if None.
    Returns y (B, T, D) and the tail that the next tokens need.
    """
    T, K = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, K - 1, 0)) if tail is None else torch.cat([tail, x], dim=1)  # (B, K - 1 + T, D)
    y = sum(padded[:, k : k + T] * weight[:, k] for k in range(K)) + bias
    return F.silu(y).to(padded.dtype), padded[:, T:]


@accelerated
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, value by value (Shazeer 2020)."""
    return F.silu(gate) * up


@accelerated
def mixture(x: Tensor, expert: Tensor, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """sum over j < k of weight[:, j] * feed-forward number expert[:, j], for the k experts of each token.

    x (n, C), expert and weight (n, k), gate and up (X, hidden, C), down (X, C, hidden) -> (n, C).
    """
    y = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
    for e in range(len(gate)):
        token, j = torch.where(expert == e)
        out = F.linear(swiglu(F.linear(x[token], gate[e]), F.linear(x[token], up[e])), down[e])
        y = y.index_add(0, token, weight[token, j, None] * out)
    return y.to(x.dtype)


@accelerated
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the logits x weight^T. Targets are negative where there is nothing to predict.

    x (..., C), weight (V, C), targets (...) -> () float32, the mean over the targets (NaN if there is none), or with
    reduction "none", detached, the loss of each token (...), 0 where it has no target.
    """
    logits, targets = float32(F.linear(x, weight)), targets.clamp(min=-1)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction=reduction)
    return losses if reduction == "mean" else losses.view(targets.shape).detach()


@accelerated
def rope_table(pos: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of pos * freq: pos (b, T), freq (E / 2,) -> two (b, T, 1, E / 2)."""
    angle = pos[..., None, None] * freq
    return angle.cos(), angle.sin()


def rope_angles(config: HymbaConfig, pos: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for positions pos (b, T), meta tokens counted: two (b, T, 1, E / 2) float32 tensors.

    A block_size beyond rope_orig stretches the base by NTK, for calls of any length: base (2 block_size / rope_orig -
    1)^(E / (E - 2)), so that the slowest wave turns no further over the new length than it did over the old. With
    rope_factor, the slow waves alone are slowed, as in Llama 3.1 (rope_type "llama3" in its config.json).
    """
    c, E, base = config, config.head_size, config.rope_base
    pos = pos if c.rope else 0 * pos  # without RoPE, nothing turns
    if 0 < c.rope_orig < c.block_size and not c.rope_factor:
        base *= (2 * c.block_size / c.rope_orig - 1) ** (E / (E - 2))
    freq = base ** (-torch.arange(0, E, 2, device=pos.device, dtype=torch.float32) / E)  # (E / 2,)
    if c.rope_factor:
        periods = c.rope_orig * freq / (2 * math.pi)  # in rope_orig tokens
        keep = ((periods - c.rope_low) / (c.rope_high - c.rope_low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / c.rope_factor)
    return rope_table(pos, freq)


@accelerated
def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of x (B, T, H, E): channel i turns with channel i + E / 2."""
    (cos, sin), (a, b) = rope, x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a block. Both kinds of heads say in `sizes` how wide the slices are that they take of the block's one
# input projection.


class RMSNorm(nn.Module):
    """rms_norm with a learned scale of `size` channels."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class AttentionHeads(nn.Module):
    """Attention heads without their projections: queries, keys and values -> (B, T, H F).

    kv is handed from block to block: an owner replaces it, and any other block passes it on. A block that shares keys
    and values has queries alone, and reads what it was handed. cache.attend stores the kv of an owner, attends to all
    that is stored, and returns the output and the kv to hand on.
    """

    def __init__(self, config: HymbaConfig, layer: int):
        super().__init__()
        letter = config.pattern[layer]
        self.n_meta, self.window = config.n_meta, config.window if letter in "th" else None
        self.owns_kv = config.kv_owner[layer] == layer
        self.H, self.G, self.E, self.F = config.n_head, config.n_kv_head, config.head_size, config.value_size(letter)
        own = self.G if self.owns_kv else 0  # key/value heads that are computed here
        self.sizes = [self.H * self.E, own * self.E, own * self.F]  # q, k, v
        self.width = self.H * self.F

    def forward(self, qkv, rope, kv, cache):
        """q, k, v (B, T, size); kv that was handed on, an owner ignores it: keys (B, S, G, E), values (B, S, G, F)."""
        (q, k, v), (B, T, _) = qkv, qkv[0].shape
        q = apply_rope(q.view(B, T, self.H, self.E), rope)
        if self.owns_kv:
            kv = apply_rope(k.view(B, T, self.G, self.E), rope), v.view(B, T, self.G, self.F)
        if cache is None:
            y = windowed_attention(q, *kv, self.window, self.n_meta)
        else:
            y, kv = cache.attend(q, kv, self)
        return y.flatten(2), kv  # (B, T, H F), and keys and values for the blocks that share them


class MambaHeads(nn.Module):
    """SSM heads (Mamba, Fig. 3 and Algorithm 2) without their outer projections: x and gate z -> (B, T, D).

    Every channel is a head of its own, with a state of N numbers and A = -exp(A_log).

    In hybrid blocks, dt, B and C are RMS-normalised. The cache of a block is asked for the convolution's last inputs
    and the state, and to keep the new ones.
    """

    def __init__(self, config: HymbaConfig, layer: int):
        super().__init__()
        letter, N, R, eps = config.pattern[layer], config.d_state, config.dt_rank, config.norm_eps
        D, norm = config.d_inner(letter), letter != "M" or config.ssm_norm
        self.sizes, self.dtBC_sizes, self.width = [D, D], [R, N, N], D
        self.conv_weight = nn.Parameter(torch.empty(D, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(D))
        self.x_proj = nn.Linear(D, R + 2 * N, bias=False)
        self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(n, eps) if norm else nn.Identity() for n in (R, N, N))
        self.dt_proj = nn.Linear(R, D, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(D))
        self.A_log = nn.Parameter(torch.empty(D, N))
        self.D = nn.Parameter(torch.ones(D))  # the skip weight of each channel

    def forward(self, xz, cache):
        """x and z (B, T, D) -> (B, T, D)."""
        x, z = xz
        tail, state = (None, None) if cache is None else cache.ssm
        x, tail = causal_conv(x, self.conv_weight, self.conv_bias, tail)
        dt, B, C = self.x_proj(x).split(self.dtBC_sizes, dim=-1)  # (B, T, R), (B, T, N), (B, T, N)
        dt = self.dt_proj(self.dt_norm(dt))  # (B, T, D)
        A = -torch.exp(float32(self.A_log))
        y, state = selective_scan(x, dt, A, self.B_norm(B), self.C_norm(C), self.D, z, self.dt_bias, state)
        if cache is not None:
            cache.keep(tail, state)
        return y


class Mamba2Heads(nn.Module):
    """SSM heads (Mamba-2, Sec. 7) without their outer projections: gate z, x, B, C and dt -> (B, T, D).

    Heads of P channels with one A, dt and D each; B and C come straight from the input and pass the convolution, too.
    The gated output is RMS-normalised. In hybrid blocks, the norm of the branch is that norm.
    """

    def __init__(self, config: HymbaConfig, layer: int):
        super().__init__()
        letter = config.pattern[layer]
        D, N, self.P = config.d_inner(letter), config.d_state, config.ssm_head
        heads = D // self.P
        self.sizes, self.xBC_sizes, self.width = [D, D + 2 * N, heads], [D, N, N], D
        self.conv_weight = nn.Parameter(torch.empty(D + 2 * N, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(D + 2 * N))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(D, config.norm_eps) if letter == "M" else nn.Identity()

    def forward(self, zxBCdt, cache):
        """z (B, T, D), xBC (B, T, D + 2 N) and dt (B, T, heads) -> (B, T, D)."""
        z, xBC, dt = zxBCdt
        tail, state = (None, None) if cache is None else cache.ssm
        xBC, tail = causal_conv(xBC, self.conv_weight, self.conv_bias, tail)
        x, B, C = xBC.split(self.xBC_sizes, dim=-1)  # (B, T, D), (B, T, N), (B, T, N)
        A = -torch.exp(float32(self.A_log))
        y, state = ssd(x.unflatten(-1, (-1, self.P)), dt, A, B, C, self.D, self.dt_bias, state)
        if cache is not None:
            cache.keep(tail, state)
        return self.norm(swiglu(z, y.flatten(2)))


SSM = {"mamba": MambaHeads, "mamba2": Mamba2Heads}
FUSE = {  # how attention heads y and SSM heads s, normalised and both (B, T, D), meet
    "mean": lambda y, s: 0.5 * y + 0.5 * s,
    "sum": lambda y, s: y + s,
    "diff": lambda y, s: y - s,
    "concat": lambda y, s: torch.cat([y, s], dim=-1),
}


@accelerated
def fuse(y: Tensor, s: Tensor, y_norm: nn.Module, s_norm: nn.Module, fusion: str) -> Tensor:
    """Both branches (B, T, D), normalised each by its own norm, as one."""
    return FUSE[fusion](y_norm(y), s_norm(s))


class BranchNorm(nn.Module):
    """What a branch may have in place of RMSNorm: a norm of each head, or none, with a learned scale or without."""

    def __init__(self, config: HymbaConfig, size: int):
        super().__init__()
        self.group = {"rms": size, "group": config.value_size("H"), "none": 0}[config.branch_norm]
        self.weight = nn.Parameter(torch.ones(size)) if config.branch_scale else None
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        if self.group:
            x = rms_norm(x.unflatten(-1, (-1, self.group)), x.new_ones(self.group), self.eps).flatten(-2)
        return x if self.weight is None else (x * self.weight).to(x.dtype)


class Mixer(nn.Module):
    """The token mixer of every kind of block: attention heads, SSM heads, or both in parallel on the same input.

    Hymba, Sec. 2.1: one projection feeds all heads, both kinds give D channels, each branch is RMS-normalised with
    its own scale (their magnitudes differ a lot), the two are averaged and go through one output projection. For
    attention to give D channels, value heads are expand times as wide as query heads here, while a block of attention
    alone is Llama's and a block of SSM heads alone is Mamba's.
    """

    def __init__(self, config: HymbaConfig, layer: int):
        super().__init__()
        letter, C = config.pattern[layer], config.n_embd
        self.attn = AttentionHeads(config, layer) if letter != "M" else None
        self.ssm = SSM[config.ssm](config, layer) if letter in "MHh" else None
        heads = [h for h in (self.attn, self.ssm) if h]
        if len(heads) == 2:
            self.fusion, plain = config.fusion, config.branch_norm == "rms" and config.branch_scale
            norms = (RMSNorm(h.width, config.norm_eps) if plain else BranchNorm(config, h.width) for h in heads)
            self.attn_branch_norm, self.ssm_branch_norm = norms
        width = sum(h.width for h in heads) if config.fusion == "concat" else heads[0].width
        self.sizes = [size for h in heads for size in h.sizes]  # of in_proj's output
        self.in_proj = nn.Linear(C, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(width, C, bias=False)

    def forward(self, x, rope, kv, cache):
        """x (B, T, C) -> (B, T, C), and the keys and values that the blocks of its group read."""
        parts = self.in_proj(x).split(self.sizes, dim=-1)
        if self.attn:
            y, kv = self.attn(parts[:3], rope, kv, cache)  # of q, k, v: (B, T, H F)
        if self.ssm:
            s = self.ssm(parts[3:] if self.attn else parts, cache)  # (B, T, D)
            y = fuse(y, s, self.attn_branch_norm, self.ssm_branch_norm, self.fusion) if self.attn else s
        return self.out_proj(y), kv


class FeedForward(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020): down(silu(gate(x)) * up(x)), (B, T, C) -> (B, T, C)."""

    def __init__(self, config: HymbaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    """Mixture of experts: X SwiGLU feed-forwards, of which each token goes through the k that its router scores best.

    A softmax over these k scores weighs their outputs. Every token gets all of its k experts: none is dropped.
    """

    def __init__(self, config: HymbaConfig):
        super().__init__()
        X, C, hidden, self.k = config.n_expert, config.n_embd, config.n_hidden, config.n_expert_active
        self.router_proj = nn.Linear(C, X, bias=False)
        self.gate_proj, self.up_proj = (nn.Parameter(torch.empty(X, hidden, C)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.empty(X, C, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C). In training, self.load (X,) is each expert's share of all choices."""
        u = x.flatten(0, 1)  # (n, C)
        with torch.autocast(x.device.type, enabled=False):  # float32: rounding would change who is best
            scores = F.linear(float32(u), float32(self.router_proj.weight))  # (n, X)
        best, expert = scores.topk(self.k)  # (n, k)
        if torch.is_grad_enabled():  # Switch Transformer (https://arxiv.org/abs/2101.03961), Eq. 4
            self.load = torch.zeros_like(scores).scatter(1, expert, 1 / self.k).mean(0)
            self.balance = len(self.load) * (self.load * scores.softmax(-1).mean(0)).sum()  # 1 where all get as many
        return mixture(u, expert, best.softmax(-1), self.gate_proj, self.up_proj, self.down_proj).view_as(x)


class Block(nn.Module):
    """Pre-norm residual block: a token mixer, then the feed-forward unless n_hidden is 0."""

    def __init__(self, config: HymbaConfig, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mixer = Mixer(config, layer)
        self.ffn_norm = RMSNorm(config.n_embd, config.norm_eps) if config.n_hidden else None
        self.ffn = (Experts if config.n_expert else FeedForward)(config) if config.n_hidden else None

    def forward(self, x, rope, kv=None, cache=None):
        """x (B, T, C), its rotations (from rope_angles), kv of the block before, and this block's part of a cache.

        Only engine.py passes a cache. A block uses three things of it: attend(q, kv, heads) -> (y, kv), ssm, which is
        the convolution's tail and the state (config.ssm_cache), and keep(tail, state).

        Returns x (B, T, C) and the kv that the next block may share.
        """
        y, kv = self.mixer(self.mixer_norm(x), rope, kv, cache)
        x = x + y
        if self.ffn is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x, kv


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Hymba(nn.Module):
    """Decoder-only language model: embedding, blocks by config.pattern, norm, and the output layer."""

    def __init__(self, config: HymbaConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.meta = nn.Parameter(torch.empty(config.n_meta, config.n_embd)) if config.n_meta else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        if not self.embed.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """All random weights. Norm scales and D start at 1 and conv_bias at 0, where they are made.

        - Matrices and embeddings: normal, std 0.02; the projections back into the residual stream are divided by
          sqrt(2 n_layer), so that its variance does not grow with depth (GPT-2).
        - Meta tokens: like token embeddings, because they enter the residual stream in the same place: the first
          norm then treats them as words, and they differ from one another from the first step (equal ones would get
          equal gradients in an attention branch and stay nearly equal).
        - SSM (Mamba, Sec. 3.6): A = -(1 ... N) in every channel; the dt bias so that steps softplus(bias) spread
          log-uniformly over [1e-3, 1e-1], which gives channels memories of about 10 to 1000 tokens; dt_proj uniform
          within R^-1/2, so that dt varies around its bias on the scale of its input. Mamba-2: -A of a head is uniform
          in [1, 16].
        - Convolutions: uniform within K^-1/2, as PyTorch has it.

        Logarithms are taken on the CPU in float64, and rounded once: in float32 their last bit depends on the code that
        MKL chooses for a processor.
        """
        c = self.config
        for name, p in self.named_parameters():
            if name.endswith("A_log") and c.ssm == "mamba2":
                p.copy_(p.uniform_(1, 16).cpu().double().log())
            elif name.endswith("A_log"):
                p.copy_(torch.arange(1, c.d_state + 1, dtype=torch.float64, device="cpu").log().expand_as(p))
            elif name.endswith("dt_bias"):
                dt = torch.exp(torch.rand_like(p).cpu().double() * math.log(100) + math.log(1e-3))
                p.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            elif name.endswith("dt_proj.weight"):
                p.uniform_(-(c.dt_rank**-0.5), c.dt_rank**-0.5)
            elif name.endswith("conv_weight"):
                p.uniform_(-(c.d_conv**-0.5), c.d_conv**-0.5)
            elif name.endswith(("out_proj.weight", "down_proj.weight", "down_proj")):
                p.normal_(std=0.02 / math.sqrt(2 * c.n_layer))
            elif p.dim() > 1:
                p.normal_(std=0.02)

    @property
    def output(self) -> Tensor:
        """The output layer (V, C): the embedding again, unless config.tied is False."""
        return self.embed.weight if self.lm_head is None else self.lm_head

    def hidden(self, idx: Tensor) -> Tensor:
        """Final normed states (B, T, C) of tokens idx (B, T).

        The residual stream is in autocast's dtype, too: half the bytes for every norm and addition.
        """
        x = self.embed(idx)  # (B, T, C)
        if self.meta is not None:  # Hymba, Sec. 2.3: the meta tokens go before every sequence
            x = torch.cat([self.meta.expand(len(x), -1, -1), x], dim=1)  # (B, M + T, C)
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        rope, kv = rope_angles(self.config, torch.arange(x.shape[1], device=x.device)[None]), None
        for block in self.blocks:
            x, kv = block(x, rope, kv)
        return self.norm(x[:, self.config.n_meta :])

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens idx (B, T); with targets (B, T), the mean cross-entropy () in nats instead.

        targets[:, t] is the token after idx[:, t], negative where there is nothing to predict.
        """
        x = self.hidden(idx)
        if targets is None:
            return F.linear(x, self.output)
        loss = linear_cross_entropy(x, self.output, targets)
        for ffn in [block.ffn for block in self.blocks] if self.config.n_expert and loss.requires_grad else ():
            balance, ffn.balance = ffn.balance, ffn.balance.detach()
            loss = loss + self.config.balance * (balance - ffn.balance)  # + 0: of balance, only the gradient counts
        return loss

    @torch.no_grad()
    def generate(self, prompt: list[int], n: int, temperature: float = 1.0) -> Iterator[int]:
        """Yield n tokens that continue prompt, the slow way: all of it is read again for each. Temperature 0 is greedy.

        engine.Engine.generate draws from the same distribution, with a cache, for many prompts at once.
        """
        idx = torch.tensor([prompt], device=self.embed.weight.device)
        for _ in range(n):
            logits = self(idx)[0, -1].float()  # (V,)
            token = (logits / temperature).softmax(-1).multinomial(1) if temperature else logits.argmax(keepdim=True)
            idx = torch.cat([idx, token[None]], dim=1)
            yield token.item()

    def num_params(self) -> int:
        """Parameters; an embedding that is the output layer, too, counts once."""
        return sum(p.numel() for p in self.parameters())

    @staticmethod
    def from_pretrained(name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"):
        """Load a checkpoint, ours or a released one, from a folder or from huggingface.co: see checkpoint.load."""
        import checkpoint

        return checkpoint.load(name, dtype, device)

    def save_pretrained(self, folder: str | Path, **extra) -> None:
        """Write the weights and config.json into folder: see checkpoint.save."""
        import checkpoint

        checkpoint.save(self, folder, **extra)
