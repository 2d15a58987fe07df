"""Accounting against counts of other origin."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cost
import train
from conftest import MEETINGS, SMALL, small, tokens
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


@pytest.mark.parametrize("options", [{}, *MEETINGS[2:], {"n_expert": 5, "n_expert_active": 3}], ids=str)
def test_flops_of_every_system(options):
    """Matrix products against torch's own counter, attention against the mask, the scan by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    model, T = small("hHMT", **options), 20
    c, n = model.config, 20 + 5
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens(1, T))
    flops = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")
    position, j = torch.arange(n)[:, None], torch.arange(n)
    causal = j <= position
    windowed = (causal & ((position - j < 7) | (j < 5))).sum().item()
    flops += 2 * c.n_head * ((8 + 16) * (windowed + causal.sum().item()) + (8 + 8) * causal.sum().item())
    flops += n * sum(7 * D * 4 + 2 * 4 * D for D in (128 - 16 * c.n_head, 128 - 16 * c.n_head, 64))
    assert abs(cost.flops_per_token(model, T) - 3 * flops / T) < 1e-6 * flops


def test_active_parameters():
    """All but the experts that a token does not go through."""
    assert cost.active_params(model := small("hM")) == model.num_params()
    model, one = small("hM", n_expert=5, n_expert_active=3), 3 * 32 * 40
    assert model.num_params() - cost.active_params(model) == 2 * 2 * one
    assert model.num_params() == small("hM", n_hidden=40).num_params() + 2 * (4 * one + 5 * 32)


def test_every_config_has_hymba_s_parameters():
    """Within 1%. Of experts, the active ones count. There is a config for each letter, ratio and kind."""
    files = sorted((ROOT / "config/systems").glob("*.py"))
    counts = {}
    for file in files:
        _, args = train.parse([str(file)])
        counts[file.stem] = cost.active_params(cost.meta_model(args | dict(vocab_size=32001)))
        cited = re.search(r"within ([\d.]+)%", file.read_text())
        assert abs(counts[file.stem] / 129_944_064 - 1) * 100 <= (float(cited[1]) + 0.05 if cited else 1), file
    assert all(train.parse([str(file)]) for file in (ROOT / "config").glob("*.py"))
    ratios = [f"{kind}_1to{b}_125m" for kind in ("inter", "intra") for b in (1, 3, 5, 12)]
    others = (
        "llama swa mamba mamba2 hymba_concat hymba_attn_1to3 hymba_attn_3to1 llama_moe inter_moe intra_moe hymba_moe"
    )
    assert {*ratios, *(f"{name}_125m" for name in others.split())} <= set(counts)


@pytest.mark.parametrize("match", ["params", "flops"])
def test_the_table_matches_sizes(match):
    rows = cost.systems("350m", match)
    key = {"params": "active M", "flops": "train MFLOP"}[match]
    values = [float(row[key].replace(",", "")) for row in rows]
    assert rows[0]["system"] == "hymba" and rows[0]["params M"] == "353.7" and rows[0]["n_hidden"] == 2432
    assert all(abs(value / values[0] - 1) < 0.01 for value in values), rows
    share = next(row for row in rows if row["system"] == "hymba_attn_1to3")
    assert float(share["cache 1M"].replace(",", "")) < 0.52 * float(rows[0]["cache 1M"].replace(",", ""))


def test_the_papers_figures(capsys):
    cost.main(["--sizes=125m"])
    out = capsys.readouterr().out
    assert re.search(r"^hymba +24 +1664 +129.9 +129.9 ", out, re.M)
    for line in (r"Hymba-1.5B +1,523 +79.1 +79", r"Transformer 1B +1,236 +256.0 +256.0 ", r"SWA 1B +1,236 +34.0 +34.0 ",
                 r"Mamba 1B +1,253 +13.4 +13.4 "):  # fmt: skip
        assert re.search(f"^{line}", out, re.M), line
    with pytest.raises(ValueError, match="size '2b': use 125m, 350m, 1b, 1.5b"):
        cost.main(["--sizes=2b"])


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


def test_all_sizes(capsys):
    """What python cost.py prints: 21 systems at four sizes, matched within 1.2%, and the papers beside them."""
    cost.main([])
    out = capsys.readouterr().out
    for size, least in (("125m", 125), ("350m", 330), ("1b", 900), ("1.5b", 1400)):
        table = out.partition(f"\n{size}: ")[2].partition("\n\n")[0].splitlines()[2:]
        assert len(table) == 21 and "Beside the papers" in out
        active = [float(line.split()[4].replace(",", "")) for line in table]
        assert min(active) > least and all(abs(n / active[0] - 1) < 0.012 for n in active)  # Mamba: to a block
