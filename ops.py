"""
The operations of model.py, faster, in plain PyTorch on any device, and `fastest`, the only place that decides what
runs: a kernel of kernels.py where one takes the inputs, else the version here, else the definition in model.py.

Every function here has the name, the signature and the meaning of its definition, and is tested against it. Letters are
the ones of model.py.
"""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import kernels  # Triton kernels, for GPUs; optional
except ImportError as e:
    kernels = None
    if torch.cuda.is_available():
        warnings.warn(f"slower than need be, without kernels: {e}", stacklevel=2)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with x run in: autocast's dtype for x's device if that is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def untraced(f: Callable) -> Callable:
    """What torch.compiler.disable makes of f. That loads the compiler, which takes 1.5 s: here, only compiling does."""

    @functools.wraps(f)
    def call(*args, **options):
        return (torch.compiler.disable(f) if torch.compiler.is_compiling() else f)(*args, **options)

    return call


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype:  # PyTorch takes the statistics of bfloat16 in float32 itself, in one kernel
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Selective scan


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


@untraced  # a loop over tokens
def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D=None, z=None, dt_bias=None, state=None
) -> tuple[Tensor, Tensor]:
    """In float32 (float64 for float64 inputs), differentiable in every input. Keeps nothing of size B T D N."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        u, dt, B, C = (t.to(dtype).transpose(0, 1) for t in (x, dt, B, C))  # time first
        dt = F.softplus(dt if dt_bias is None else dt + dt_bias.to(dtype))
        h = torch.zeros(*x.shape[::2], A.shape[1], device=x.device) if state is None else state
        y, h = _Recurrence.apply(u, dt, A.to(dtype).t().contiguous(), B, C, h.to(dtype).mT.contiguous())
        y = y.transpose(0, 1) if D is None else (y + D * u).transpose(0, 1)
        return (y if z is None else y * F.silu(z.to(dtype))).to(x.dtype), h.mT


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, n_meta: int) -> Tensor:
    """Queries are taken in pieces that each meet only the keys in their reach: O(T (W + M)), not O(T S)."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Loss


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
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (n, C), weight (V, C), targets (n,) -> sum of the losses, the losses (n,), and the sum's gradients.

    Of 4,096 tokens at a time, the gradients are taken while their logits are there: no T x V tensor is ever held, and
    the backward pass need not multiply by weight again.
    """
    w, losses = weight.to(dtype), x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    dx = x.new_empty(x.shape if grad else 0)
    dw = weight.new_zeros(weight.shape if grad else 0, dtype=losses.dtype)
    for i in range(0, len(x), 4096):
        piece, now = x[i : i + 4096].to(dtype), slice(i, i + 4096)
        logits = piece @ w.t()  # (4096, V)
        losses[now] = fastest(cross_entropy, logits)(logits, targets[now], grad)
        if grad:
            dx[now] = logits @ w
            dw += logits.t() @ piece
        del logits  # before the next piece's are there
    return losses.sum(), losses, dx, dw


@_linear_cross_entropy.register_fake
def _(x, weight, targets, dtype, grad):
    losses = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    dx, dw = x.new_empty(x.shape if grad else 0), weight.new_empty(weight.shape if grad else 0, dtype=losses.dtype)
    return losses.new_empty(()), losses, dx, dw


def _linear_cross_entropy_save(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = inputs[1].dtype


def _linear_cross_entropy_grad(ctx, d, *_):
    dx, dw = ctx.saved_tensors
    return d * dx, (d * dw).to(ctx.dtype), None, None, None


_linear_cross_entropy.register_autograd(_linear_cross_entropy_grad, setup_context=_linear_cross_entropy_save)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Logits and their gradient are taken 4,096 tokens at a time."""
    grad = reduction == "mean" and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    args = x.flatten(0, -2), weight, targets.flatten(), compute_dtype(x), grad
    total, losses, _, _ = _linear_cross_entropy(*args)
    return total / (targets >= 0).sum() if reduction == "mean" else losses.view(targets.shape)


# ----------------------------------------------------------------------------------------------------------------------
# Rotary position embedding


def angles(pos: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    angle = pos[..., None, None] * freq
    return angle.cos(), angle.sin()


_rope_table = torch.library.custom_op("hymba::rope_table", angles, mutates_args=())


def rope_table(pos: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    """One operation to torch.compile, which else takes every sine in every block."""
    return (_rope_table if torch.compiler.is_compiling() else angles)(pos, freq)


@_rope_table.register_fake
def _(pos, freq):
    return tuple(torch.empty(*pos.shape, 1, len(freq), device=pos.device) for _ in range(2))


# ----------------------------------------------------------------------------------------------------------------------
# What runs


def fastest(definition: Callable, *args, **options) -> Callable:
    """The fastest version of an operation that takes these inputs.

    Tables are looked up at each call, so that a benchmark or a test can put something else into them.
    """
    name = definition.__name__
    if name in KERNELS:
        kernel, takes = KERNELS[name]
        if takes(*args, **options):
            return kernel
    return PLAIN.get(name, definition)


def use_kernels(wanted: bool) -> None:
    """Turn the kernels off (--kernels=False), or on again where they are installed."""
    KERNELS.clear()
    KERNELS.update(ALL_KERNELS if wanted else {})


def in_inference(x: Tensor, *_) -> bool:
    """Whether kernels without a backward pass run on x: not under torch.compile, which fuses such operations itself."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and kernels.usable(x)


def untouched(*modules: nn.Module) -> bool:
    """Whether modules and the ones inside do what model.py says and nothing else, so that a kernel can stand for them.

    Not where one was replaced (by LoRA's layers, say), has a hook or a bias, or is quantised.
    """
    for module in (u for v in modules for u in v.modules()):
        weight = getattr(module, "weight", None)
        plain = weight is None or (type(weight) is nn.Parameter and weight.is_contiguous())
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        ours = type(module) in (nn.Linear, nn.Identity) or type(module).__module__ == "model"
        if not ours or not plain or hooked or getattr(module, "bias", None) is not None:
            return False
    return True


def steps_by_kernels(block: nn.Module, x: Tensor) -> bool:
    """Whether one new token a row, x (B, 1, C), goes through a block by the kernels of engine_kernels.py."""
    if not KERNELS or not in_inference(x) or not untouched(block):
        return False
    attn, ssm = block.mixer.attn, block.mixer.ssm
    return (attn is None or kernels.takes_heads(attn.E, attn.F)) and (
        ssm is None or (kernels.takes_state(ssm.A_log) and kernels.takes_taps(ssm.conv_weight))
    )


BRANCH_WEIGHTS = {"mean": (0.5, 0.5), "diff": (1.0, -1.0)}  # what attention and SSM heads count in their sum


def fuse(y: Tensor, s: Tensor, y_norm: nn.Module, s_norm: nn.Module, fusion: str) -> Tensor:
    return kernels.normed_sum(y, s, y_norm.weight, s_norm.weight, *BRANCH_WEIGHTS[fusion], y_norm.eps)


def takes_fuse(y: Tensor, s: Tensor, y_norm: nn.Module, s_norm: nn.Module, fusion: str) -> bool:
    eps = {getattr(norm, "eps", None) for norm in (y_norm, s_norm)}
    alike = len(eps) == 1 and None not in eps  # the kernel knows RMSNorm, with one eps
    return fusion in BRANCH_WEIGHTS and in_inference(y) and alike and untouched(y_norm, s_norm)


PLAIN = {
    "rms_norm": rms_norm,
    "selective_scan": selective_scan,
    "windowed_attention": windowed_attention,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "rope_table": rope_table,
}
ALL_KERNELS = {}  # by the name of the definition: the kernel, and a function of the same inputs that says if it runs
if kernels:
    ALL_KERNELS = {
        "selective_scan": (kernels.selective_scan, kernels.takes_scan),
        "windowed_attention": (kernels.windowed_attention, kernels.takes_attention),
        "causal_conv": (kernels.causal_conv, kernels.takes_conv),
        "cross_entropy": (kernels.cross_entropy, kernels.usable),
        "apply_rope": (kernels.apply_rope, in_inference),
        "swiglu": (kernels.swiglu, in_inference),
        "fuse": (fuse, takes_fuse),
    }
KERNELS = dict(ALL_KERNELS)  # the ones in use
