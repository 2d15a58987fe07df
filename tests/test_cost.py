"""Accounting against counts of other origin."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cost
import train
from conftest import SMALL, small, tokens
from engine import Cache
from model import HymbaConfig

ROOT = Path(__file__).parents[1]


def test_check_figures():
    """Cache bytes of the family at 8,192 tokens, worked out by hand from the paper's table of sizes."""
    for name, expected in {"125m": 57_753_600, "350m": 66_551_808, "1.5b": 86_056_960}.items():
        _, args = train.parse([str(ROOT / f"config/hymba_{name}.py")])
        assert cost.cache_bytes(HymbaConfig(**args, vocab_size=32001), 8192) == expected
    llama = HymbaConfig(
        vocab_size=128256, pattern="T" * 28, n_embd=3072, n_head=24, n_kv_head=8, n_hidden=8192, n_meta=0
    )
    assert cost.cache_bytes(llama, 8192) == 939_524_096  # Llama-3.2-3B


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.text("TtMHh", min_size=1, max_size=9),
    options=st.fixed_dictionaries(
        dict(
            n_meta=st.integers(0, 9), window=st.integers(1, 9), kv_share=st.booleans(),
            n_kv_head=st.sampled_from([1, 2, 4]), d_state=st.integers(1, 9), d_conv=st.integers(1, 5),
            expand=st.integers(1, 3), ssm=st.sampled_from(["mamba", "mamba2"]),
        )
    ),
    rows=st.integers(1, 3),
    room=st.integers(0, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_cache_bytes_are_what_a_cache_holds(pattern, options, rows, room, dtype):
    config = HymbaConfig(**(SMALL | dict(pattern=pattern) | options))
    cache = Cache(config, rows, room, dtype, torch.device("meta"))
    assert cache.nbytes == rows * cost.cache_bytes(config, room, dtype)
    cache.reserve(80)
    assert cache.nbytes == rows * cost.cache_bytes(config, cache.capacity, dtype)


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
    flops = cost.flops_per_token(model, T)
    assert abs(flops - 3 * (matrices + attention + scan) / T) < 1e-6 * flops
    two = small("hMT2", n_meta=3)
    scan2 = 2 * (3 + T) * (5 * 64 * 4 + 2 * 4 * (64 + 2 * 4))
    matrices += sum(2 * (3 + T) * (b.mixer.in_proj.weight.numel() - a.mixer.in_proj.weight.numel()
                                   - a.mixer.ssm.x_proj.weight.numel() - a.mixer.ssm.dt_proj.weight.numel())
                    for a, b in zip(model.blocks[:2], two.blocks[:2], strict=True))  # fmt: skip
    flops2 = cost.flops_per_token(two, T)
    assert abs(flops2 - 3 * (matrices + attention + scan2) / T) < 1e-6 * flops2
    step = cost.flops_per_token(model, 100, training=False)
    assert step - cost.flops_per_token(model, 99, training=False) == 2 * 4 * 16  # one more key in the one full block
    assert cost.estimate_mfu(model, 1e6) is None  # no peak is known for a CPU


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA A10", 125e12), ("Quadro P4000", None)],
)  # fmt: skip
def test_mfu_is_a_share_of_the_named_gpu_s_peak(name, peak, monkeypatch):
    model = SimpleNamespace(embed=SimpleNamespace(weight=SimpleNamespace(is_cuda=True)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(cost, "flops_per_token", lambda model: 2e9)
    assert cost.estimate_mfu(model, 1e5) == (peak and pytest.approx(2e14 / peak))


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.text("TtMHh", min_size=1, max_size=6), n_tokens=st.integers(0, 40), n_meta=st.integers(0, 5),
    window=st.integers(1, 9), kv_share=st.booleans(), expand=st.integers(1, 3), d_conv=st.integers(2, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_cache_bytes_are_the_bytes_that_the_cache_holds(pattern, n_tokens, dtype, **options):
    config = HymbaConfig(**(SMALL | dict(pattern=pattern) | options))
    cache = Cache(config, 3, n_tokens, dtype, torch.device("meta"))
    assert cache.nbytes == 3 * cost.cache_bytes(config, n_tokens, dtype)
