"""
Hooks on the blocks of a model, for measurements: watching what goes on inside in forward passes, and removing heads.
Nothing is left of them after the with block. Letters are the ones of model.py.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Block, Hymba, windowed_attention


@contextmanager
def removed(block: Block, kind: str) -> Iterator[None]:
    """In the with block, the attention ("attn") or SSM heads ("ssm") of a block give zeros. In a hybrid block, that is
    their normalised branch, before the two are fused; in another, the whole mixer."""
    mixer = block.mixer
    if mixer.attn is not None and mixer.ssm is not None:
        module, zeros = getattr(mixer, f"{kind}_branch_norm"), lambda _, args, y: torch.zeros_like(y)
    else:
        module, zeros = mixer, lambda _, args, out: (torch.zeros_like(out[0]), out[1])  # keys and values are handed on
    hook = module.register_forward_hook(zeros)
    try:
        yield
    finally:
        hook.remove()


class Watch:
    """A block's cache that keeps nothing. It sums up what it sees of the tokens of the text: where attention goes, the
    squares of the heads' outputs, and the steps dt of the SSM."""

    ssm = None, None

    def __init__(self, n_meta: int):
        self.M, self.seen, self.queries = n_meta, 0.0, 0
        self.squares, self.dt, self.steps = {}, 0.0, 0

    def keep(self, tail: Tensor, state: Tensor) -> None:
        pass

    def attend(self, q: Tensor, kv: tuple[Tensor, Tensor], attn) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention as it is. Its probabilities are summed over heads and queries, for some queries at a time: those on
        each meta token, on the first token of the text, on the query's own, and on all others: seen (M + 3,)."""
        (B, T, H, E), M, k = q.shape, self.M, kv[0].float().repeat_interleave(q.shape[2] // kv[0].shape[2], dim=2)
        step, j = max(1, 2**24 // (B * H * T)), torch.arange(T, device=q.device)
        for first in range(M, T, step):
            i = j[first : first + step, None]
            with torch.autocast(q.device.type, enabled=False):  # in float32
                scores = torch.einsum("bthe,bshe->bhts", q[:, first : first + step].float(), k) / math.sqrt(E)
            mask = (j <= i) & ((i - j < (attn.window or T)) | (j < M))
            p = scores.masked_fill(~mask, -math.inf).softmax(-1).sum((0, 1))  # (t, T)
            own = p.gather(1, i).sum()
            start = p[:, M].masked_fill(i[:, 0] == M, 0).sum()  # what the first token gives itself is its own
            meta = p[:, :M].sum(0)
            self.seen += torch.cat([meta, torch.stack([start, own, p.sum() - meta.sum() - start - own])])
        self.queries += B * H * (T - M)
        return windowed_attention(q, *kv, attn.window, attn.n_meta), kv

    def note_output(self, name: str, out: Tensor | tuple) -> None:
        y = (out[0] if isinstance(out, tuple) else out)[:, self.M :].float()
        total, n = self.squares.get(name, (0.0, 0))
        self.squares[name] = total + y.square().sum().item(), n + y.numel()

    def note_steps(self, dt: Tensor, bias: Tensor) -> None:
        """dt, the last channels of (B, T, ...), are still without their bias."""
        dt = F.softplus(dt[:, self.M :, -len(bias) :].float() + bias.float()).flatten(0, 1)
        self.dt, self.steps = self.dt + dt.sum(0), self.steps + len(dt)

    def lengths(self, A_log: Tensor) -> Tensor:
        """1 / (dt A) for each of the states of a block: tokens in which exp(-m dt A) falls to 1 / e."""
        dt = self.dt / self.steps  # (D,), or (heads,) where all channels of a head have one dt and one A
        return (1 / (dt[:, None] * torch.exp(A_log.float()).view(len(dt), -1))).flatten()


@contextmanager
def watching(model: Hymba) -> Iterator[list[Watch]]:
    """A Watch for each block, which sees all forward passes of the with block."""
    watches, hooks = [Watch(model.config.n_meta) for _ in model.blocks], []
    for watch, block in zip(watches, model.blocks, strict=True):
        give = partial(lambda watch, _, args, options: (args, options | {"cache": watch}), watch)
        hooks.append(block.register_forward_pre_hook(give, with_kwargs=True))
        for name in ("attn", "ssm", "attn_branch_norm", "ssm_branch_norm"):
            if (module := getattr(block.mixer, name, None)) is not None:
                note = partial(lambda watch, name, _, args, out: watch.note_output(name, out), watch, name)
                hooks.append(module.register_forward_hook(note))
        if ssm := block.mixer.ssm:
            note = partial(lambda watch, bias, _, args, out: watch.note_steps(out, bias), watch, ssm.dt_bias)
            source = getattr(ssm, "dt_proj", block.mixer.in_proj)  # Mamba-2 has dt last in the block's projection
            hooks.append(source.register_forward_hook(note))
    try:
        yield watches
    finally:
        for hook in hooks:
            hook.remove()
