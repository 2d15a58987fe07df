"""
What a training step is made of: its rate and optimizer, windows of tokens, the loss in bfloat16, and on a GPU, compiled
blocks and CUDA graphs. train.py puts them together.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from flags import TrainConfig
from model import SSM, AttentionHeads, Hymba, HymbaConfig, rope_angles


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """The rate of a step (0, 1, ...): linear warmup, then constant and linear decay (wsd), or a half cosine."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    rest = cfg.max_steps - cfg.warmup_steps
    span = rest if cfg.schedule == "cosine" else min(cfg.decay_steps, rest)
    left = min(1.0, (cfg.max_steps - step) / max(1, span))  # 1 before the decay, then down towards 0
    share = 0.5 - 0.5 * math.cos(math.pi * left) if cfg.schedule == "cosine" else left
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)


def optimizer_for(model: Hymba, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear layers alone.

    Not on norms, biases, A_log and D: they are scales, for which zero is no neutral value. Not on embeddings and
    meta tokens: a rare token's row would shrink at every step and grow only when it is seen, and small rows make the
    first norm's gradients large.
    """
    named, matrices = list(model.named_parameters()), ("proj.weight", "_proj")  # the latter: of experts
    decay = [p for name, p in named if name.endswith(matrices)]
    rest = [p for name, p in named if not name.endswith(matrices)]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)


def draw_windows(
    sets: list[np.ndarray], mix: float, seed: tuple[int, ...], n: int, T: int, record: int = 1
) -> np.ndarray:
    """n random windows of T + 1 tokens (n, T + 1), each from sets[1] with probability mix: a function of seed. They
    begin at multiples of record."""
    rng = np.random.default_rng(seed)
    which, where = rng.random(n) < mix, rng.random(n)
    windows = []
    for second, u in zip(which, where, strict=True):
        data = sets[int(second)]
        start = int(u * ((len(data) - T - 1) // record + 1)) * record
        windows.append(data[start : start + T + 1])
    return np.stack(windows).astype(np.int64)


def even_starts(n_tokens: int, T: int, n: int, record: int = 1) -> np.ndarray:
    """Where up to n windows of T + 1 tokens begin, evenly spaced over n_tokens, at multiples of record."""
    there = (n_tokens - T - 1) // record + 1
    return np.linspace(0, there - 1, min(n, there)).astype(int) * record


def to_device(windows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (n, T) of windows (n, T + 1) of tokens. The host does not wait for the copy.

    A token t that is not to be predicted stands there as ~t: negative, as the model's targets are then."""
    windows = torch.from_numpy(windows)
    windows = (windows.pin_memory() if device.type == "cuda" else windows).to(device, non_blocking=True)
    return torch.maximum(windows, ~windows)[:, :-1], windows[:, 1:]


def mean_loss(model: torch.nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy () of the targets, in bfloat16 on a GPU."""
    with torch.autocast("cuda", torch.bfloat16) if idx.is_cuda else nullcontext():
        return model(idx, targets)


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


def compile_blocks(model: Hymba) -> None:
    """torch.compile for each block by itself. Blocks of one kind share what is compiled, so that 32 of them take little
    longer than four: compiling the model whole gave the same speed and took minutes."""
    torch._dynamo.config.recompile_limit = 64  # kinds of blocks, times block sizes of a length curriculum
    for block in model.blocks:
        block.compile(dynamic=False)


def compile_kernels(config: HymbaConfig, n: int, T: int, device: torch.device) -> list[Future]:
    """Have threads compile the kernels of a forward and backward pass of n sequences of T tokens, while the model is
    made and torch.compile is at its blocks: each kind of heads runs once, with anything for weights."""

    def once(kind: type, layer: int, rest: tuple) -> None:
        with torch.device("meta"):  # draws nothing from the generator that the model's weights come from
            heads = kind(config, layer).to_empty(device=device)
        x = torch.zeros(n, config.n_meta + T, sum(heads.sizes), device=device, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            out = heads(x.bfloat16().split(heads.sizes, dim=-1), *rest)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    jobs, pool = {}, ThreadPoolExecutor()
    rope = rope_angles(config, torch.arange(config.n_meta + T, device=device)[None])
    for layer, letter in enumerate(config.pattern):
        alone, size = letter == "M", config.value_size(letter)
        if letter in "MHh" and ("ssm", alone) not in jobs:
            jobs["ssm", alone] = pool.submit(once, SSM[config.ssm], layer, (None,))
        if letter != "M" and ("attention", size) not in jobs:
            jobs["attention", size] = pool.submit(once, AttentionHeads, layer, (rope, None, None))
    pool.shutdown(wait=False)
    return list(jobs.values())


class StepGraphs:
    """Forward and backward pass of n sequences of T tokens as two CUDA graphs. A step launches these two instead of
    some thousand kernels, so the GPU never waits for the host. The first alone serves evaluation.

    The gradients are the mean over `pieces` calls of loss. They stay at the same addresses. While a job of `busy` runs,
    it may use the GPU, which capturing does not allow.
    """

    def __init__(self, model: Hymba, n: int, T: int, pieces: int, busy: Sequence[Future] = ()):
        device = model.embed.weight.device
        self.parameters, self.pieces = list(model.parameters()), pieces
        self.idx, self.targets = torch.zeros(2, n, T, dtype=torch.long, device=device)
        stream = torch.cuda.Stream()  # capturing asks for another than the default one
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            mean_loss(model, self.idx, self.targets).backward()  # compiles everything
            for job in busy:
                job.result()
            mean_loss(model, self.idx, self.targets).backward()  # leaves no first time to the graph
        torch.cuda.current_stream().wait_stream(stream)
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if pieces > 1 else None
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward):
            self.mean = mean_loss(model, self.idx, self.targets) / pieces
        with torch.cuda.graph(self.backward, pool=self.forward.pool()):
            self.mean.backward()
        self.mean = self.mean.detach()

    def zero_gradients(self) -> None:
        if self.pieces > 1:  # else each backward pass writes them anew
            torch._foreach_zero_([p.grad for p in self.parameters])

    def loss(self, windows: np.ndarray, backward: bool = False) -> Tensor:
        """Mean loss () of windows (up to n, T + 1), divided by pieces if their gradients are taken, too."""
        idx, targets = to_device(windows, self.idx.device)
        self.idx[: len(idx)].copy_(idx)
        self.targets.fill_(-1)[: len(idx)].copy_(targets)
        self.forward.replay()
        if not backward:
            return self.mean * self.pieces
        self.backward.replay()
        return self.mean.clone()
