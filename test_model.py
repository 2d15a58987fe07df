"""
All tests: pytest test_model.py. Each compares with something independent of what it tests: a float64 loop, a dense
mask, transformers' own Llama and Mamba (pip install -r requirements-dev.txt), or the papers' figures.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_module
import prepare
import sample
import train
from model import Cache, Hymba, HymbaConfig, causal_conv, selective_scan, windowed_attention

ROOT = Path(__file__).parent
torch.set_num_threads(1)  # the tensors here are too small to share
SMALL = dict(vocab_size=61, block_size=32, n_embd=32, n_head=4, n_kv_head=2, n_hidden=40, d_state=4, n_meta=5, window=7)
LETTERS = ["TTT", "ttt", "MMM", "HHH", "hhh"]
MIXED = ["HhhHhhhH", "MMTMtH"]


def small(pattern: str, seed: int = 0, **options) -> Hymba:
    """A small model whose weights are large enough that every part matters in its output."""
    torch.manual_seed(seed)
    model = Hymba(HymbaConfig(**(SMALL | {"pattern": pattern} | options)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("proj.weight", "embed.weight", "meta")):
                p.normal_(std=0.15)
            elif name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
    return model


def tokens(*shape: int, vocab: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error: norm of the difference over norm of the reference b."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


# ----------------------------------------------------------------------------------------------------------------------
# The reference operations


def scan_loop(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None):
    """The recurrence as it is written in the paper, token by token."""
    h = torch.zeros(len(x), *A.shape, dtype=x.dtype) if state is None else state
    dt = torch.log1p(torch.exp(dt if dt_bias is None else dt + dt_bias))
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        y = (h * C[:, t, None, :]).sum(-1)
        y = y if D is None else y + D * x[:, t]
        ys.append(y if z is None else y * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(ys, 1), h


def scan_inputs(B, T, D, N, seed, given=None) -> dict:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"x": r(B, T, D), "dt": r(B, T, D) - 1, "A": -torch.exp(r(D, N)), "B": r(B, T, N), "C": r(B, T, N)}
    options = {"D": r(D), "z": r(B, T, D), "dt_bias": r(D), "state": r(B, D, N)}
    return inputs | {k: v for k, v in options.items() if (given or {}).get(k, True)}


def compare_with_grads(f, ref, inputs: dict, dtype=torch.float32) -> tuple[float, float]:
    """Largest relative errors of the outputs and of all gradients of f in dtype against ref in float64."""
    mine = {k: v.to(dtype).detach().requires_grad_() for k, v in inputs.items()}
    theirs = {k: v.to(dtype).double().detach().requires_grad_() for k, v in inputs.items()}
    out, expected = f(**mine), ref(**theirs)
    out, expected = [u if isinstance(u, tuple) else (u,) for u in (out, expected)]
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(u.shape, generator=g, dtype=torch.float64) for u in expected]
    torch.autograd.backward(out, [u.to(o.dtype) for u, o in zip(grads, out, strict=True)])
    torch.autograd.backward(expected, grads)
    forward = max(error(a, b) for a, b in zip(out, expected, strict=True))
    return forward, max(error(mine[k].grad, theirs[k].grad) for k in inputs)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    given=st.fixed_dictionaries({k: st.booleans() for k in ("D", "z", "dt_bias", "state")}),
    seed=st.integers(0, 1000),
)
def test_scan_against_float64_loop(shape, given, seed):
    forward, backward = compare_with_grads(selective_scan, scan_loop, scan_inputs(*shape, seed, given))
    assert forward < 1e-5 and backward < 1e-5


def test_scan_in_pieces_and_extremes():
    inputs = scan_inputs(2, 50, 6, 4, seed=0)
    y, h = selective_scan(**inputs)
    first = {k: v[:, :23] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    then = {k: v[:, 23:] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    y1, h1 = selective_scan(**first)
    y2, h2 = selective_scan(**(then | {"state": h1}))
    assert error(torch.cat([y1, y2], 1), y) < 1e-12 and error(h2, h) < 1e-12
    dt = torch.where(torch.rand(2, 50, 6) < 0.5, -14.0, 50.0).double()  # softplus: 1e-6 and 50
    A = -(10.0 ** torch.linspace(-4, 3, 24).view(6, 4)).double()
    extreme = inputs | {"dt": dt, "A": A, "dt_bias": torch.zeros(6).double(), "z": 80 * inputs["z"].sign()}
    forward, backward = compare_with_grads(selective_scan, scan_loop, extreme)
    assert forward < 1e-5 and backward < 1e-5


def test_scan_keeps_no_states_for_backward():
    B, T, D, N = 2, 512, 32, 16
    kept = []
    inputs = {k: v.float().requires_grad_() for k, v in scan_inputs(B, T, D, N, seed=0).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda u: kept.append(u.numel()) or u, lambda u: u):
        selective_scan(**inputs)
    assert max(kept) <= B * T * max(D, N) and sum(kept) < B * T * D * N


def test_scan_bfloat16_gives_float32_state():
    inputs = {k: v.bfloat16() if k != "state" else v for k, v in scan_inputs(2, 20, 6, 4, seed=0).items()}
    y, h = selective_scan(**inputs)
    expected, _ = scan_loop(**{k: v.double() for k, v in inputs.items()})
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32 and error(y, expected) < 1e-2


def dense_attention(q, k, v, window, n_meta):
    """The rule of the docstring, with the whole mask."""
    (T, H, E), (S, G) = q.shape[1:], k.shape[1:3]
    position, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    seen = (j <= position) & ((position - j < (window or S)) | (j < n_meta))
    k, v = (u.repeat_interleave(H // G, dim=2) for u in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(E)
    return torch.einsum("bhts,bshf->bthf", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 300),
    cached=st.integers(0, 50),
    window=st.one_of(st.none(), st.integers(1, 400)),
    n_meta=st.integers(0, 20),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (4, 4)]),
    seed=st.integers(0, 1000),
)
def test_attention_against_dense_mask(T, cached, window, n_meta, heads, seed):
    g, (H, G) = torch.Generator().manual_seed(seed), heads
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"q": r(1, T, H, 8), "k": r(1, T + cached, G, 8), "v": r(1, T + cached, G, 12)}
    rule = dict(window=window, n_meta=n_meta)
    forward, backward = compare_with_grads(
        lambda **k: windowed_attention(**k, **rule), lambda **k: dense_attention(**k, **rule), inputs
    )
    assert forward < 1e-5 and backward < 1e-5


def test_conv_against_conv1d():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    y, tail = causal_conv(x, weight, bias)
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=5)).mT
    assert error(y, expected) < 1e-6 and torch.equal(tail, x[:, -3:])
    y1, tail = causal_conv(x[:, :1], weight, bias)
    assert error(torch.cat([y1, causal_conv(x[:, 1:], weight, bias, tail)[0]], 1), expected) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# The architecture


def test_check_figures():
    """Parameters and cache bytes of the family, worked out from the paper's table (FACTS of its Table: 125M ...)."""
    family = {"hymba_125m": (129_944_064, 57_753_600), "hymba_350m": (353_701_888, 66_551_808)}
    family |= {"hymba_1.5b": (1_522_797_824, 86_056_960)}
    for name, (params, cache) in family.items():
        _, args = train.parse([str(ROOT / f"config/{name}.py")])
        with torch.device("meta"):
            model = Hymba(HymbaConfig(**args, vocab_size=32001))
        assert (model.num_params(), model.cache_bytes(8192)) == (params, cache)
    assert model.config.pattern == "H" + "h" * 14 + "H" + "h" * 15 + "H"
    groups = (
        [1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13],
        [16, 16, 16, 19, 19, 21, 21, 23, 23, 25, 25, 27, 27, 29, 29],
    )
    assert model.config.kv_owner == [0, *groups[0], 15, *groups[1], 31]
    llama = HymbaConfig(
        vocab_size=128256, pattern="T" * 28, n_embd=3072, n_head=24, n_kv_head=8, n_hidden=8192, n_meta=0
    )
    with torch.device("meta"):
        assert Hymba(llama).cache_bytes(8192) == 939_524_096  # Llama-3.2-3B


def test_baseline_configs_match_in_parameters():
    counts = {}
    for name in ("hymba", "llama", "mamba", "swa", "inter"):
        _, args = train.parse([str(ROOT / f"config/{name}_125m.py")])
        with torch.device("meta"):
            counts[name] = Hymba(HymbaConfig(**args, vocab_size=32000)).num_params()
    assert all(abs(n / counts["hymba"] - 1) < 0.02 for n in counts.values()), counts
    assert all(train.parse([str(f)]) for f in (ROOT / "config").glob("*.py"))


def test_kv_sharing():
    model = small("HhhHhhhH")
    owner = model.config.kv_owner
    assert owner == [0, 1, 1, 3, 4, 4, 4, 7]
    cache = model.new_cache(1, 10)
    E, heads, kv = 8, 4, 2
    for i, block in enumerate(model.blocks):
        rows = heads * E + 2 * 64 + (kv * (E + 16) if owner[i] == i else 0)
        assert block.mixer.in_proj.weight.shape == (rows, 32)
        assert (i in cache.kv) == (owner[i] == i)
    assert all(o is None or HymbaConfig(pattern="h" * n).kv_owner[o] == o
               for n in range(1, 12) for o in HymbaConfig(pattern="h" * n).kv_owner)  # fmt: skip
    assert small("HhhHhhhH", kv_share=False).config.kv_owner == list(range(8))
    assert HymbaConfig(pattern="MhhTtttM").kv_owner == [None, 1, 1, 3, 4, 4, 4, None]
    # A consumer's output depends on its producer's keys
    idx, before = tokens(1, 20), model(tokens(1, 20))[0]
    with torch.no_grad():
        model.blocks[1].mixer.in_proj.weight[32:48] += 1  # k of block 1, read by blocks 1 and 2
        model.blocks[1].mixer.out_proj.weight.zero_()
    assert error(model(idx)[0], before) > 1e-3


@pytest.mark.parametrize("fusion", ["mean", "diff", "concat"])
@pytest.mark.parametrize("pattern", LETTERS + MIXED)
def test_causality(pattern, fusion):
    if fusion != "mean" and not set(pattern) & set("Hh"):
        pytest.skip("fusion concerns hybrid blocks alone")
    model = small(pattern, fusion=fusion)
    idx = tokens(2, 30)
    changed = idx.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 61
    with torch.no_grad():
        a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :17], b[:, :17]) and (a[:, 17:] != b[:, 17:]).any(-1).all(0)[0]


@pytest.mark.parametrize("fusion", ["mean", "diff", "concat"])
@pytest.mark.parametrize("pattern", LETTERS + MIXED)
def test_cache_gives_the_full_forward(pattern, fusion):
    """One full forward = prefill + decode = prefill in pieces, far past the window, and bytes held = bytes promised."""
    model = small(pattern, fusion=fusion)
    idx = tokens(2, 60)
    with torch.no_grad():
        full = model(idx)[0]
        for sizes in ([20] + [1] * 40, [3, 1, 16, 9, 1, 1, 29], [60]):
            cache = model.new_cache(2, 60)
            assert cache.nbytes == 2 * model.cache_bytes(60, torch.float32)
            out = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(sizes, dim=1)], 1)
            assert error(out, full) < 1e-5
            assert cache.nbytes == 2 * model.cache_bytes(60, torch.float32)
        cache = model.new_cache(2, 4)  # too little room: grows
        out = torch.cat([model(piece, cache=cache)[0] for piece in idx.split([3, 1, 1, 30, 25], dim=1)], 1)
        assert error(out, full) < 1e-5
        assert cache.capacity >= 60 and cache.nbytes == 2 * model.cache_bytes(cache.capacity, torch.float32)


@pytest.mark.parametrize("n_meta", [0, 1, 40])
def test_cache_with_other_meta_counts(n_meta):
    model = small("HhhtMT", n_meta=n_meta, window=3)
    with torch.no_grad():
        cache, idx = model.new_cache(1, 20), tokens(1, 20)
        out = torch.cat([model(piece, cache=cache)[0] for piece in idx.split([1, 5, 1, 13], dim=1)], 1)
        assert error(out, model(idx)[0]) < 1e-5


def test_meta_tokens_run_once_and_follow_the_weights(monkeypatch):
    model, runs = small("HhH"), []
    monkeypatch.setattr(model_module.Block, "forward", count(model_module.Block.forward, runs))
    model.new_cache(1, 4), model.new_cache(3, 8)
    assert len(runs) == 3  # three blocks, once
    with torch.no_grad():
        model.blocks[0].mixer.D += 1  # as an optimizer would
    assert error(model(tokens(1, 6), cache=model.new_cache(1, 6))[0], model(tokens(1, 6))[0]) < 1e-5


def count(f, calls: list):
    def counted(*args, **kwargs):
        calls.append(1)
        return f(*args, **kwargs)

    return counted


def test_window_size_counts_the_query():
    """A window of 1 without meta tokens sees the token alone: permuting the past changes nothing."""
    model = small("t", n_meta=0, window=1)
    a, b = tokens(1, 9), tokens(1, 9).flip(1)
    b[:, -1] = a[:, -1]
    with torch.no_grad():
        assert error(model(a)[0][:, -1], model(b)[0][:, -1]) < 1e-6


def test_rope_stretch():
    """NTK as the released checkpoint has it: base 10000 * (2 * 8192 / 2048 - 1) ** (64 / 62)."""
    config = HymbaConfig(n_embd=1600, n_head=25, n_kv_head=5, block_size=8192, rope_orig=2048)
    cos, sin = model_module.rope_angles(config, torch.tensor([[777]]))
    base = 10000 * 7 ** (64 / 62)
    angle = 777 * torch.tensor([base ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    assert error(cos.flatten(), angle.cos()) < 1e-4 and error(sin.flatten(), angle.sin()) < 1e-4
    config.block_size = 2048
    assert error(model_module.rope_angles(config, torch.tensor([[3]]))[0].flatten()[1:2],
                 torch.tensor([math.cos(3 * 10000 ** (-2 / 64))])) < 1e-5  # fmt: skip


def test_loss_in_pieces():
    model = small("hM")
    idx = tokens(40, 70)  # 2,800 tokens: two pieces
    targets = tokens(40, 70, seed=2)
    targets[:, :3] = -1
    none, loss = model(idx, targets)
    logits, no_loss = model(idx)
    expected = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), ignore_index=-1)
    assert none is None and no_loss is None and abs(loss.item() - expected.item()) < 1e-5
    mine = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    assert max(error(a, b) for a, b in zip(mine, theirs, strict=True)) < 1e-4


@pytest.mark.parametrize("pattern", LETTERS + ["hH"])
def test_overfits_a_batch(pattern):
    torch.manual_seed(0)
    model = Hymba(HymbaConfig(**(SMALL | {"pattern": pattern})))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    idx = tokens(2, 17)
    for _ in range(120):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_initialisation():
    torch.manual_seed(0)
    model = Hymba(HymbaConfig(n_embd=256, n_head=4, pattern="hhhh", vocab_size=512, n_hidden=64))
    mixer = model.blocks[0].mixer
    dt = F.softplus(mixer.dt_bias.detach()).log()
    assert dt.min() > math.log(0.99e-3) and dt.max() < math.log(1.01e-1)
    assert abs(dt.mean() - math.log(1e-2)) < 0.2 and abs(dt.std() - math.log(100) / math.sqrt(12)) < 0.2
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(512, 16))
    assert abs(mixer.out_proj.weight.std() - 0.02 / math.sqrt(8)) < 1e-3 and abs(model.meta.std() - 0.02) < 1e-3
    assert abs(model(tokens(2, 64, vocab=512), tokens(2, 64, vocab=512, seed=3))[1].item() - math.log(512)) < 0.3


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
    assert abs(model.flops_per_token(T) - 3 * (matrices + attention + scan) / T) < 1e-6 * model.flops_per_token(T)
    step = model.flops_per_token(100, training=False)
    assert step - model.flops_per_token(99, training=False) == 2 * 4 * 16  # one more key in the one full block
    assert model.estimate_mfu(1e6) is None  # no peak is known for a CPU


def test_runs_alone_with_kernels_absent(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    code = "from model import *; m = Hymba(HymbaConfig(n_embd=32, n_head=2, n_kv_head=1, pattern='HhM')); "
    code += "m(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))[1].backward(); print('ok')"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "ok\n", run.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        ({"pattern": "HxH"}, "pattern 'HxH': unknown letter 'x'; use T, t, M, H or h"),
        ({"pattern": "HhH", "n_layer": 4}, "has 3 letters but n_layer=4"),
        ({"n_head": 8, "n_kv_head": 3}, "n_head=8 is not a multiple of n_kv_head=3"),
        ({"n_embd": 100, "n_head": 8}, "n_embd=100 is not a multiple of 2 * n_head=16"),
        ({"fusion": "sum"}, "use mean, diff or concat"),
        ({"window": 0}, "window=0: must be 1 or more"),
        ({"n_meta": -1}, "n_meta=-1: must be 0 or more"),
    ],
)
def test_config_errors(args, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        HymbaConfig(**args)


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers, with random weights carried over


def transformers():
    return pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")


def test_against_llama():
    tr = transformers()
    model = small("TTT", n_meta=0, vocab_size=67)
    llama = tr.LlamaForCausalLM(tr.LlamaConfig(vocab_size=67, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True,
    )).eval()  # fmt: skip
    own = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        p = f"model.layers.{i}."
        own[p + "input_layernorm.weight"] = block.mixer_norm.weight
        own[p + "post_attention_layernorm.weight"] = block.ffn_norm.weight
        names = (f"{p}self_attn.{n}_proj.weight" for n in "qkv")
        own |= dict(zip(names, block.mixer.in_proj.weight.split(block.mixer.sizes), strict=True))
        own[p + "self_attn.o_proj.weight"] = block.mixer.out_proj.weight
        own |= {p + f"mlp.{n}_proj.weight": getattr(block.ffn, f"{n}_proj").weight for n in ("gate", "up", "down")}
    missing = llama.load_state_dict(own, strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"]) and not missing.unexpected_keys
    idx = tokens(2, 40, vocab=67)
    with torch.no_grad():
        assert error(model(idx)[0], llama(idx).logits) < 1e-5


def test_against_mamba():
    """A pure M model (n_hidden=0) against MambaForCausalLM, whose slow path also checks the mixer and the scan."""
    tr = transformers()
    model = small("MMM", n_meta=0, n_hidden=0, vocab_size=67)
    mamba = tr.MambaForCausalLM(tr.MambaConfig(vocab_size=67, hidden_size=32, state_size=4, num_hidden_layers=3,
        conv_kernel=4, expand=2, time_step_rank=2, layer_norm_epsilon=1e-6, use_mambapy=False, residual_in_fp32=True,
        tie_word_embeddings=True, use_cache=False)).eval()  # fmt: skip
    own = {"backbone.embeddings.weight": model.embed.weight, "backbone.norm_f.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        p, m = f"backbone.layers.{i}.", block.mixer
        own[p + "norm.weight"] = block.mixer_norm.weight
        own |= {p + f"mixer.{n}.weight": getattr(m, n).weight for n in ("in_proj", "x_proj", "dt_proj", "out_proj")}
        own |= {p + "mixer.dt_proj.bias": m.dt_bias, p + "mixer.A_log": m.A_log, p + "mixer.D": m.D}
        own |= {p + "mixer.conv1d.weight": m.conv_weight[:, None], p + "mixer.conv1d.bias": m.conv_bias}
    missing = mamba.load_state_dict(own, strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"]) and not missing.unexpected_keys
    idx = tokens(2, 40, vocab=67)
    with torch.no_grad():
        assert error(model(idx)[0], mamba(idx).logits) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("pattern", MIXED + ["TTT", "MMM"])
def test_ragged_batch_gives_each_row_what_it_gets_alone(pattern):
    model = small(pattern)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 20, 1, 9, 3)]
    for options in ({"temperature": 0}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 5}):
        together = list(zip(*model.generate(prompts, 25, **options), strict=True))
        assert list(together[0]) == [row[0] for row in model.generate(prompts[:1], 25, **options)]
        if options["temperature"] == 0:
            for prompt, row in zip(prompts, together, strict=True):
                assert list(row) == [t for (t,) in model.generate([prompt], 25, **options)]
                full = torch.tensor([prompt + list(row)])
                with torch.no_grad():  # and what the full forward pass would choose
                    best = model(full)[0][0, len(prompt) - 1 : -1].argmax(-1)
                assert best.tolist() == list(row)


def test_generate_stops_and_samples():
    model = small("HhH")
    prompts = [tokens(4, seed=s).tolist() for s in range(6)]
    free = list(zip(*model.generate(prompts, 30, temperature=0), strict=True))
    stop = free[2][4]
    for row, expected in zip(
        zip(*model.generate(prompts, 30, temperature=0, stop=stop), strict=True), free, strict=True
    ):
        n = expected.index(stop) if stop in expected else 30
        assert row[:n] == expected[:n] and set(row[n:]) <= {None}
    one = list(model.generate([prompts[2]], 30, temperature=0, stop=stop))
    assert len(one) == list(free[2]).index(stop)  # ends when all rows have
    draws = [t for (t,) in model.generate([[1]], 200, temperature=5.0, seed=1)]
    assert draws == [t for (t,) in model.generate([[1]], 200, temperature=5.0, seed=1)]
    assert draws != [t for (t,) in model.generate([[1]], 200, temperature=5.0, seed=2)]
    greedy = [t for (t,) in model.generate([[1]], 50, temperature=0)]
    assert greedy == [t for (t,) in model.generate([[1]], 50, temperature=3.0, top_k=1)]
    assert greedy == [t for (t,) in model.generate([[1]], 50, temperature=3.0, top_p=1e-6)]
    endless = model.generate([[1]], None, temperature=0)
    assert [next(endless)[0] for _ in range(300)][:50] == greedy
    for bad in ([], [[]]):
        with pytest.raises(ValueError, match="every prompt needs at least one token"):
            next(model.generate(bad))
    with pytest.raises(ValueError, match="token 61 is outside of the vocabulary of 61"):
        next(model.generate([[61]]))
    with pytest.raises(ValueError, match="temperature=-1"):
        next(model.generate([[1]], temperature=-1))


def test_top_k_and_top_p_distribution():
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.15, 0.3]])).repeat(4000, 1)
    rng = [torch.Generator().manual_seed(0)] * 4000

    def shares(temperature=1.0, top_k=None, top_p=None):
        return torch.bincount(model_module.sample_token(logits, temperature, top_k, top_p, rng), minlength=4) / 4000

    assert torch.allclose(shares(), torch.tensor([0.05, 0.5, 0.15, 0.3]), atol=0.03)
    assert torch.allclose(shares(top_k=2), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03)
    assert torch.allclose(shares(top_p=0.79), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03)
    assert torch.allclose(shares(top_p=0.81), torch.tensor([0, 0.5, 0.15, 0.3]) / 0.95, atol=0.03)
    assert torch.allclose(shares(temperature=0.5), torch.tensor([0.0025, 0.25, 0.0225, 0.09]) / 0.365, atol=0.03)


def test_pretrained_round_trip_and_errors(tmp_path):
    from safetensors.torch import load_file, save_file

    model = small("HhM")
    model.save_pretrained(tmp_path, step=3)
    again = Hymba.from_pretrained(tmp_path)
    assert asdict(again.config) == asdict(model.config)
    assert torch.equal(again(tokens(1, 9))[0], model(tokens(1, 9))[0])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["extra"] = tensors.pop("meta")
    tensors["norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"extra is unexpected; meta is missing; norm.weight is \(3,\), not \(32,\)"):
        Hymba.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        Hymba.from_pretrained(tmp_path / "nowhere")


def test_cache_refuses_long_calls_for_ragged_rows():
    cache = Cache(HymbaConfig(**SMALL, pattern="TT"), 2, 9, torch.float32, torch.device("cpu"))
    cache.ragged = True
    with pytest.raises(ValueError, match="one token a call"):
        cache.append(0, None, torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8))


# ----------------------------------------------------------------------------------------------------------------------
# Training


TINY = ["--pattern=HhhH", "--n_embd=32", "--n_head=2", "--n_kv_head=1", "--n_hidden=32", "--d_state=2", "--n_meta=4"]
TINY += ["--window=8", "--block_size=24", "--batch_size=2", "--warmup_steps=4", "--decay_steps=6", "--max_steps=24"]
TINY += ["--eval_interval=8", "--eval_windows=4", "--log_interval=4", "--prompt=", "--dataset=words", "--device=cpu"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with data/words and data/other: a few thousand bytes of text."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name in ("words", "other"):
        (root / name).mkdir()
        for i in range(25):
            words = rng.choice(["alpha", "beta", "gamma", "delta", "omega"], 120)
            (root / name / f"{i}.txt").write_text(name + " " + " ".join(words))
        prepare.prepare([str(root / name)], name=name, data_dir=root / "data")
    return root


def run_train(root: Path, *flags: str, launcher=(), wait: bool = True, **env):
    """python train.py in a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *TINY, f"--data_dir={root / 'data'}", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, cwd=root)
    if not wait:
        return process
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_kill_and_resume_to_the_bit(corpus, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, out, err = run_train(corpus, f"--out_dir={whole}", "--prompt=alpha", "--sample_tokens=5")
    assert code == 0 and "alpha" in out.splitlines()[-1], err
    assert sorted(losses(whole)) == list(range(1, 25))
    # SIGKILL just after a checkpoint: what is on disk is whole, and the run continues from it
    process = run_train(corpus, f"--out_dir={cut}", wait=False)
    wait_for(lambda: (cut / "last/config.json").exists(), process)
    process.kill()
    process.communicate()
    # SIGTERM in the middle: saves, says so, exits with 0
    process = run_train(corpus, f"--out_dir={cut}", "--resume", "--max_steps=24", wait=False)
    wait_for(lambda: len(losses(cut)) >= 12, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume continues from" in out, err
    stopped = json.loads((cut / "last/config.json").read_text())["step"]
    if stopped < 24:
        code, out, err = run_train(corpus, f"--out_dir={cut}", "--resume")
        assert code == 0, err
    assert losses(cut) == losses(whole)
    a, b = (Hymba.from_pretrained(folder / "last").state_dict() for folder in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
    code, _, err = run_train(corpus, f"--out_dir={cut}", "--resume")
    assert code == 1 and "raise --max_steps" in err
    code, _, err = run_train(corpus, f"--out_dir={cut}")
    assert code == 1 and "--resume continues it" in err
    code, _, err = run_train(corpus, f"--out_dir={cut}", "--resume", "--max_steps=30", "--n_hidden=48")
    assert code == 1 and "another architecture: n_hidden=32 there and 48 here" in err


def wait_for(condition, process) -> None:
    deadline = time.time() + 60
    while True:
        try:
            if condition():
                return
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        if process.poll() is not None or time.time() > deadline:
            raise AssertionError(process.communicate())
        time.sleep(0.005)


def test_two_processes_equal_one_with_twice_the_batch(corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = run_train(corpus, f"--out_dir={one}", "--batch_size=4", "--max_steps=8", "--grad_accum=2")
    assert code == 0, err
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517")
    flags = ("--batch_size=2", "--max_steps=8", "--grad_accum=2")
    code, _, err = run_train(corpus, f"--out_dir={two}", *flags, launcher=launcher)
    assert code == 0, err
    a, b = losses(one), losses(two)
    assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-4 for k in a)


def test_annealing_and_length_curriculum(corpus, tmp_path):
    flags = [
        "--anneal_dataset=other",
        "--anneal_mix=1.0",
        "--length_stages=24:16,48:8",
        "--rope_orig=24",
        "--compile=False",
    ]
    code, out, err = run_train(corpus, f"--out_dir={tmp_path}", *flags)
    assert code == 0, err
    assert Hymba.from_pretrained(tmp_path / "last").config.block_size == 48
    cfg, _ = train.parse(["--length_stages=24:16,48:8", "--max_steps=24", "--batch_size=2"])
    assert train.parse_stages(cfg, 24) == [(0, 24), (16, 48)]
    for stages, message in [
        ("24:16,48:9", "is 25 steps, but max_steps=24"),
        ("24:16,36:8", "do not divide"),
        ("x", "write"),
    ]:
        cfg.length_stages = stages
        with pytest.raises(ValueError, match=message):
            train.parse_stages(cfg, 24)
    a, b = np.arange(1000), np.arange(1000, 3000)
    windows = train.draw([a, b], 0.25, (0, 3), 400, 8)
    assert windows.shape == (400, 9) and (np.diff(windows) == 1).all()
    assert 0.15 < (windows[:, 0] >= 1000).mean() < 0.35
    assert (windows == train.draw([a, b], 0.25, (0, 3), 400, 8)).all()
    assert (train.draw([a, b], 0.25, (0, 4), 400, 8) != windows).any()


def test_schedules():
    cfg = train.TrainConfig(max_steps=100, warmup_steps=10, decay_steps=20, learning_rate=1.0, min_lr=0.1)
    rates = [train.learning_rate(cfg, i) for i in range(101)]
    assert rates[0] == 0.1 and rates[9:81] == [1.0] * 72 and abs(rates[90] - 0.55) < 1e-9 and rates[100] == 0.1
    cfg.schedule = "cosine"
    rates = [train.learning_rate(cfg, i) for i in range(101)]
    assert rates[10] == 1.0 and abs(rates[55] - 0.55) < 1e-9 and abs(rates[100] - 0.1) < 1e-9
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_weight_decay_on_matrices_alone():
    model = small("hMT")
    optimizer = train.optimizer_for(model, train.TrainConfig())
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name.split(".")[-2] for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"in_proj", "x_proj", "dt_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_nan_stops_and_keeps_the_last_good_checkpoint(corpus, tmp_path):
    flags = (f"--out_dir={tmp_path}", "--learning_rate=1e30", "--min_lr=0", "--warmup_steps=14", "--grad_clip=0")
    code, _, err = run_train(corpus, *flags)
    assert code == 1 and " at step " in err and "try a lower learning_rate" in err
    assert len(err.splitlines()) == 1
    if (tmp_path / "last").exists():
        assert all(p.isfinite().all() for p in Hymba.from_pretrained(tmp_path / "last").parameters())


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = small("M")
    optimizer = train.optimizer_for(model, train.TrainConfig())
    model(tokens(1, 5), tokens(1, 5))[1].backward()
    optimizer.step()
    folder = tmp_path / "last"
    train.save_checkpoint(folder, model, optimizer, {"step": 1}, Path("none"))
    before = sorted((f.name, f.read_bytes()) for f in folder.iterdir())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train.save_checkpoint(folder, model, optimizer, {"step": 2}, Path("none"))
    assert [f.name for f in tmp_path.iterdir()] == ["last"]
    assert sorted((f.name, f.read_bytes()) for f in folder.iterdir()) == before
    folder.rename(tmp_path / "last.old")  # as if it stopped between the two renames
    assert train.load_checkpoint(folder, model, optimizer)["step"] == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--btach_size=3"], "unknown flag 'btach_size': did you mean batch_size?"),
        (["--batch_size=three"], "batch_size='three': must be int"),
        (["--learning_rate=fast"], "learning_rate='fast': must be float"),
        (["--resume=maybe"], "resume='maybe': must be bool"),
        (["config/nothing.py"], "no config file config/nothing.py"),
        (["--pattern=HxH"], "unknown letter 'x'"),
        (["--n_head=4", "--n_kv_head=3"], "n_head=4 is not a multiple of n_kv_head=3"),
        (["--schedule=linear"], "schedule='linear': use wsd or cosine"),
        (["--batch_size=0"], "batch_size=0: must be 1 or more"),
        (["--min_lr=1"], "min_lr=1.0 must lie between 0 and learning_rate"),
        (["--dataset=nothing"], "python prepare.py"),
        (["--vocab_size=100"], "vocab_size=100 is too small for data set words"),
        (["--block_size=100000"], "too few for sequences of 100000"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_training_errors(corpus, tmp_path, flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        train.main([*TINY, f"--data_dir={corpus / 'data'}", f"--out_dir={tmp_path / 'out'}", *flags])
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("out/*"))


def test_training_errors_of_data_and_disk(corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus / "data", tmp_path / "data")
    flags = [*TINY, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: os.terminal_size((1, 1)) and type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="0 MB free, but checkpoints need"):
        train.main(flags)
    file = tmp_path / "data/words/train.bin"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="train.bin"):
        train.main(flags)
    file.write_bytes(data[:-7])
    with pytest.raises(ValueError, match="train.bin"):
        train.main(flags)


def test_config_file_and_command_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('"""doc"""\nn_layer = 4\nlearning_rate = 1\nbatch_size = 3\n')
    cfg, args = train.parse([str(file), "--batch_size=5", "--pattern=HhhhHhhhH", "--resume"])
    assert (cfg.learning_rate, cfg.batch_size, cfg.out_dir, cfg.resume) == (1.0, 5, "out/mine", True)
    assert HymbaConfig(**args).pattern == "HhhhHhhhH"  # a pattern on the command line replaces the file's n_layer
    assert HymbaConfig(**train.parse([str(file)])[1]).pattern == "HHhH"
    file.write_text("n_layers = 4\n")
    with pytest.raises(ValueError, match="unknown flag 'n_layers': did you mean n_layer?"):
        train.parse([str(file)])
    file.write_text("n_layer = 4.5\n")
    with pytest.raises(ValueError, match="n_layer=4.5: must be int"):
        train.parse([str(file)])


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def test_sample_command(corpus, tmp_path):
    run = lambda *flags: subprocess.run(  # noqa: E731
        [sys.executable, str(ROOT / "sample.py"), "--device=cpu", *flags], cwd=tmp_path, capture_output=True, text=True
    )
    done = run()
    assert done.returncode == 1 and done.stderr == (
        "sample.py: no checkpoint under out/: run python train.py first, or pass --init_from=FOLDER\n"
    )
    code, _, err = run_train(corpus, f"--out_dir={tmp_path / 'out/x'}", "--max_steps=2")
    assert code == 0, err
    flags = [
        "--prompt=alpha ",
        "--n_samples=3",
        "--temperature=0.8",
        "--top_k=50",
        "--top_p=0.95",
        "--max_new_tokens=20",
    ]
    a, b, c = run(*flags, "--seed=1"), run(*flags, "--seed=1"), run(*flags, "--seed=2")
    assert a.returncode == 0 and a.stdout == b.stdout != c.stdout, a.stderr
    assert a.stdout.count("alpha ") >= 3 and "out/x/best" in a.stderr
    assert run("--max_new_tokens=5").returncode == 0


def test_streaming_holds_back_half_characters(capsys):
    tokenizer = prepare.load_tokenizer("bytes", ".")

    class Fixed:
        """A model that says what it is told."""

        def generate(self, prompts, max_new_tokens, stop):
            yield from ([b] for b in "né€🙂".encode())

    assert sample.stream(Fixed(), tokenizer, "<", 99) == "<né€🙂"
    assert capsys.readouterr().out == "<né€🙂\n"
