"""Accounting against counts of other origin."""

import torch

import cost
from conftest import (
    small,
    tokens,
)


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
    assert abs(cost.flops_per_token(model, T) - 3 * (matrices + attention + scan) / T) < 1e-6 * cost.flops_per_token(
        model, T
    )
    step = cost.flops_per_token(model, 100, training=False)
    assert step - cost.flops_per_token(model, 99, training=False) == 2 * 4 * 16  # one more key in the one full block
    assert cost.estimate_mfu(model, 1e6) is None  # no peak is known for a CPU
