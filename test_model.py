"""
The architecture, as a specification: pytest test_model.py. Each test compares with something independent of the code:
a float64 loop, a dense mask, a count by hand, or the papers' figures.

The definition of an operation is its __wrapped__; what runs in its place is tested in tests/test_ops.py.
"""

import functools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cost
import model as model_module
import training
from conftest import (
    LETTERS,
    MEETINGS,
    MIXED,
    SYSTEMS,
    compare_with_grads,
    cross_entropy_inputs,
    dense_attention,
    error,
    expert_inputs,
    experts_loop,
    plain_cross_entropy,
    scan_inputs,
    scan_loop,
    sizes,
    small,
    ssd_inputs,
    ssd_loop,
    tokens,
)
from engine import Engine
from flags import TrainConfig, parse
from model import Hymba, HymbaConfig

ROOT = Path(__file__).parent

# ----------------------------------------------------------------------------------------------------------------------
# Sizes


def test_check_figures():
    """Parameters and groups of the family, worked out by hand from the paper's table of sizes."""
    family = {"hymba_125m": 129_944_064, "hymba_350m": 353_701_888, "hymba_1.5b": 1_522_797_824}
    for name, params in family.items():
        _, args = parse([str(ROOT / f"config/{name}.py")])
        with torch.device("meta"):
            model = Hymba(HymbaConfig(**args, vocab_size=32001))
        assert model.num_params() == params
    assert model.config.pattern == "H" + "h" * 14 + "H" + "h" * 15 + "H"
    groups = (
        [1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13],
        [16, 16, 16, 19, 19, 21, 21, 23, 23, 25, 25, 27, 27, 29, 29],
    )
    assert model.config.kv_owner == [0, *groups[0], 15, *groups[1], 31]


@pytest.mark.parametrize(
    "args, message",
    [
        ({"pattern": "HxH"}, "pattern 'HxH': unknown letter 'x'; use T, t, M, H or h"),
        ({"pattern": "HhH", "n_layer": 4}, "has 3 letters but n_layer=4"),
        ({"n_head": 8, "n_kv_head": 3}, "n_head=8 is not a multiple of n_kv_head=3"),
        ({"n_embd": 100, "n_head": 8}, "n_embd=100 is not a multiple of 2 * n_head=16"),
        ({"fusion": "max"}, "use mean, sum, diff, concat"),
        ({"branch_norm": "layer"}, "branch_norm='layer': use rms, group, none"),
        ({"n_head": 4, "head_size": 64}, "n_head * head_size = 256: give n_embd, or with fusion=concat less"),
        ({"n_head": 16, "head_size": 64, "fusion": "concat"}, "n_head * head_size = 1024: give n_embd, or with fusion"),
        ({"head_size": 63}, "head_size=63 must be even"),
        ({"ssm": "s4"}, "ssm='s4': use mamba, mamba2"),
        ({"ssm": "mamba2", "ssm_head": 48}, "ssm_head=48 does not divide 1024 SSM channels"),
        ({"window": 0}, "window=0: must be 1 or more"),
        ({"n_meta": -1}, "n_meta=-1: must be 0 or more"),
        ({"rope_factor": 8.0}, "rope_factor needs rope_orig, and rope_low less than rope_high"),
    ],
)
def test_config_errors(args, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        HymbaConfig(**args)


# ----------------------------------------------------------------------------------------------------------------------
# The operations, as model.py defines them


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)),
    given=st.fixed_dictionaries({k: st.booleans() for k in ("D", "z", "dt_bias", "state")}),
    seed=st.integers(0, 1000),
)
def test_scan_is_the_recurrence(shape, given, seed):
    scan = model_module.selective_scan.__wrapped__
    forward, backward = compare_with_grads(scan, scan_loop, scan_inputs(*shape, seed, given))
    assert forward < 1e-5 and backward < 1e-4


def test_scan_works_in_float32_and_gives_what_it_got():
    inputs = {k: v.bfloat16() if k != "state" else v.float() for k, v in scan_inputs(2, 20, 6, 4, seed=0).items()}
    y, h = model_module.selective_scan.__wrapped__(**inputs)
    expected, last = scan_loop(**{k: v.double() for k, v in inputs.items()})
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert error(y, expected) < 1e-2 and error(h, last) < 1e-5


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 12, 4, 5, 9))),
    state=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_ssd_is_the_recurrence(shape, state, seed):
    inputs = ssd_inputs(*shape, seed)
    inputs = inputs if state else {k: v for k, v in inputs.items() if k != "state"}
    forward, backward = compare_with_grads(model_module.ssd.__wrapped__, ssd_loop, inputs)
    assert forward < 1e-5 and backward < 1e-4


@settings(max_examples=15, deadline=None)
@given(
    T=st.integers(1, 20),
    cached=st.integers(0, 10),
    window=st.one_of(st.none(), st.integers(1, 25)),
    n_meta=st.integers(0, 6),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (4, 4)]),
    seed=st.integers(0, 1000),
)
def test_attention_is_the_mask(T, cached, window, n_meta, heads, seed):
    g, (H, G), rule = torch.Generator().manual_seed(seed), heads, dict(window=window, n_meta=n_meta)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"q": r(2, T, H, 8), "k": r(2, T + cached, G, 8), "v": r(2, T + cached, G, 12)}
    attention = lambda **u: model_module.windowed_attention.__wrapped__(**u, **rule)  # noqa: E731
    forward, backward = compare_with_grads(attention, lambda **u: dense_attention(**u, **rule), inputs)
    assert forward < 1e-5 and backward < 1e-4


def test_conv_against_conv1d():
    torch.manual_seed(0)
    conv = model_module.causal_conv.__wrapped__
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    y, tail = conv(x, weight, bias)
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=5)).mT
    assert error(y, expected) < 1e-6 and torch.equal(tail, x[:, -3:])
    y1, tail = conv(x[:, :1], weight, bias)
    assert error(torch.cat([y1, conv(x[:, 1:], weight, bias, tail)[0]], 1), expected) < 1e-6


@pytest.mark.parametrize("n, V", [(1, 1), (50, 37)])
def test_linear_cross_entropy_is_a_linear_layer_and_cross_entropy(n, V):
    loss = model_module.linear_cross_entropy.__wrapped__
    inputs, targets = cross_entropy_inputs(n, V, seed=n)
    theirs = lambda **u: plain_cross_entropy(**u, targets=targets)[0]  # noqa: E731
    assert max(compare_with_grads(lambda **u: loss(**u, targets=targets), theirs, inputs)) < 1e-5
    losses = loss(**inputs, targets=torch.where(targets < 0, -100, targets), reduction="none")  # any negative one
    assert error(losses, plain_cross_entropy(**inputs, targets=targets)[1]) < 1e-5
    assert loss(**inputs, targets=torch.full((n,), -1)).isnan()  # as in F.cross_entropy


@pytest.mark.parametrize("n, C, hidden, X, k", [(1, 4, 8, 3, 1), (40, 16, 24, 5, 2), (9, 3, 5, 2, 2), (7, 8, 4, 6, 6)])
def test_mixture_is_a_loop_over_tokens(n, C, hidden, X, k):
    inputs, expert = expert_inputs(n, C, hidden, X, k, seed=n)
    fs = (functools.partial(f, expert=expert) for f in (model_module.mixture.__wrapped__, experts_loop))
    forward, backward = compare_with_grads(*fs, inputs)
    assert forward < 1e-5 and backward < 1e-4


@pytest.mark.parametrize("pattern", MIXED)
def test_the_model_that_runs_is_the_one_that_is_read(pattern, monkeypatch):
    """Logits, loss and gradients with ops.py and without."""
    model, idx, targets, outputs = small(pattern), tokens(2, 40), tokens(2, 40, seed=2), []
    for module in (model_module.ops, None):
        monkeypatch.setattr(model_module, "ops", module)
        loss = model(idx, targets)
        outputs.append([model(idx), loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert max(error(a, b) for a, b in zip(*outputs, strict=True)) < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("options", MEETINGS, ids=str)
@pytest.mark.parametrize("letter", ["H", "h"])
@pytest.mark.parametrize("runs", ["definitions", "ops"])
def test_hybrid_heads_against_a_plain_forward(runs, letter, options, monkeypatch):
    """A block's mixer in float64, from the released format's words: row order, norms, RoPE, mask, gate, fusion."""
    if runs == "definitions":
        monkeypatch.setattr(model_module, "ops", None)
    model = small(letter, **options).double()
    m, M, x = model.blocks[0].mixer, 5, torch.randn(2, 30, 32, dtype=torch.float64)
    with torch.no_grad():
        y, _ = m(x, model_module.rope_angles(model.config, torch.arange(30)[None]), None, None)
    w = {name.removeprefix("ssm."): p.detach() for name, p in m.named_parameters()}
    rms = lambda u, scale: u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale  # noqa: E731
    H, G = model.config.n_head, model.config.n_kv_head
    D = 128 - 16 * H  # what attention heads leave of 2 x 64 channels
    q, k, v, s, z = (x @ w["in_proj.weight"].T).split([8 * H, 8 * G, 16 * G, D, D], -1)
    angle = torch.arange(30.0).double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    angle = angle if options.get("rope", True) else torch.zeros_like(angle)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]  # channel i and i + E / 2 as one complex number

    def rotate(u, heads):
        u = torch.complex(*u.reshape(2, 30, heads, 2, 4).unbind(3)) * turn
        return torch.cat([u.real, u.imag], -1)

    window = model.config.window if letter == "h" else None
    attn = dense_attention(rotate(q, H), rotate(k, G), v.reshape(2, 30, G, 16), window, M).reshape(2, 30, 16 * H)
    s = F.silu(F.conv1d(F.pad(s.mT, (3, 0)), w["conv_weight"][:, None], w["conv_bias"], groups=D)).mT
    p = s @ w["x_proj.weight"].T
    dt = rms(p[..., :2], w["dt_norm.weight"]) @ w["dt_proj.weight"].T
    B, C = rms(p[..., 2:6], w["B_norm.weight"]), rms(p[..., 6:], w["C_norm.weight"])
    ssm, _ = scan_loop(s, dt, -w["A_log"].exp(), B, C, w["D"], z, w["dt_bias"])
    norm, branches = options.get("branch_norm", "rms"), []
    for u, name in ((attn, "attn_branch_norm.weight"), (ssm, "ssm_branch_norm.weight")):
        assert (name in w) == options.get("branch_scale", True)
        if norm == "group":
            u = torch.cat([rms(head, 1) for head in u.split(16, -1)], -1)
        branches.append((rms(u, 1) if norm == "rms" else u) * w.get(name, 1))
    fusion, signs = options.get("fusion", "mean"), {"mean": (0.5, 0.5), "diff": (1, -1), "sum": (1, 1)}
    if fusion == "concat":
        fused = torch.cat(branches, -1)
    else:
        fused = sum(k * u for k, u in zip(signs[fusion], branches, strict=True))
    assert error(y, fused @ w["out_proj.weight"].T) < 1e-5  # RoPE, norms and A are float32


@pytest.mark.parametrize("letter", ["M", "H"])
def test_mamba2_heads_against_a_plain_forward(letter):
    """In float64, from the paper's words: order of rows, the convolution over x, B and C, gate, then norm."""
    model = small(letter + "2").double()
    m, x = model.blocks[0].mixer, torch.randn(2, 30, 32, dtype=torch.float64)
    w = {name: p.detach() for name, p in m.ssm.named_parameters()}
    rows = m.in_proj.weight.detach()[-(2 * 64 + 2 * 4 + 4) :]
    z, xBC, dt = (x @ rows.T).split([64, 64 + 2 * 4, 4], -1)
    xBC = F.silu(F.conv1d(F.pad(xBC.mT, (3, 0)), w["conv_weight"][:, None], w["conv_bias"], groups=72)).mT
    s, B, C = xBC.split([64, 4, 4], -1)
    y, _ = ssd_loop(s.reshape(2, 30, 4, 16), dt, -w["A_log"].exp(), B, C, w["D"], w["dt_bias"])
    y = y.flatten(2) * F.silu(z)
    rms = lambda u, scale: u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale  # noqa: E731
    with torch.no_grad():
        mine = m.ssm(F.linear(x, rows).split(m.ssm.sizes, -1), None)
        if letter == "M":
            assert error(m(x, None, None, None)[0], rms(y, w["norm.weight"]) @ m.out_proj.weight.T) < 1e-6
        else:  # the norm is the branch's
            assert error(mine, y) < 1e-6 and "norm.weight" not in w
            assert error(m.ssm_branch_norm(mine), rms(y, m.ssm_branch_norm.weight)) < 1e-6


def test_kv_sharing():
    model = small("HhhHhhhH")
    owner = model.config.kv_owner
    assert owner == [0, 1, 1, 3, 4, 4, 4, 7]
    cache = Engine(model).new_cache(1, 10)
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
    idx, before = tokens(1, 20), model(tokens(1, 20))
    with torch.no_grad():
        model.blocks[1].mixer.in_proj.weight[32:48] += 1  # k of block 1, read by blocks 1 and 2
        model.blocks[1].mixer.out_proj.weight.zero_()
    assert error(model(idx), before) > 1e-3


@pytest.mark.parametrize("pattern, options", SYSTEMS, ids=str)
def test_causality(pattern, options):
    model = small(pattern, **options)
    idx = tokens(2, 30)
    changed = idx.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 61
    with torch.no_grad():
        a, b = model(idx), model(changed)
    assert torch.equal(a[:, :17], b[:, :17]) and (a[:, 17:] != b[:, 17:]).any(-1).all(0)[0]


def test_window_size_counts_the_query():
    """A window of 1 without meta tokens sees the token alone: permuting the past changes nothing."""
    model = small("t", n_meta=0, window=1)
    a, b = tokens(1, 9), tokens(1, 9).flip(1)
    b[:, -1] = a[:, -1]
    with torch.no_grad():
        assert error(model(a)[:, -1], model(b)[:, -1]) < 1e-6


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


@pytest.mark.parametrize("n_expert", [0, 4])
def test_compile_computes_sines_once(n_expert):
    """torch.compile takes the model whole, and sees one table of sines that it cannot repeat in every block."""
    model, graphs = small("tTt", n_expert=n_expert), []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph)[1])
    idx = tokens(2, 30)
    a, b = (torch.autograd.grad(m(idx, idx), list(model.parameters())) for m in (model, compiled))
    assert max(error(x, y) for x, y in zip(a, b, strict=True)) < 1e-6
    calls = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("rope_table" in c for c in calls) == 1 and not any(c in ("sin", "cos") for c in calls)


def test_loss():
    """Of the tied embedding, whose gradient comes from both ends, over two backward passes."""
    model = small("hM")
    idx, targets = tokens(2, 30), tokens(2, 30, seed=2)
    targets[:, :3] = -1
    logits = model(idx)
    expected = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), ignore_index=-1)
    theirs = torch.autograd.grad(3 * expected, list(model.parameters()))
    loss = model(idx, targets)
    loss.backward()
    (2 * model(idx, targets)).backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    assert max(error(p.grad, g) for p, g in zip(model.parameters(), theirs, strict=True)) < 1e-4


def test_experts():
    """Router, weights, balance and its gradient, from the papers' words, in float64."""
    model, idx = small("TM", n_expert=5, n_expert_active=2, balance=0.7, n_meta=0), tokens(2, 30)
    model, seen = model.double(), []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda ffn, args, y: seen.append((ffn, args[0], y)))
    loss, balance = model(idx, idx), 0
    assert not any(ffn.balance.requires_grad for ffn, _, _ in seen)  # no graph stays in the model
    for ffn, x, y in seen:
        x = x.flatten(0, 1)
        p = (x @ ffn.router_proj.weight.T).softmax(-1)
        top = p.sort(descending=True)
        expert, weight = top.indices[:, :2], top.values[:, :2] / top.values[:, :2].sum(-1, keepdim=True)
        assert error(y.flatten(0, 1), experts_loop(x, expert, weight, ffn.gate_proj, ffn.up_proj, ffn.down_proj)) < 1e-6
        share = torch.bincount(expert.flatten(), minlength=5) / 120
        assert torch.allclose(ffn.load.double(), share.double()) and share.min() < 0.8 / 5
        balance = balance + 5 * (share * p.mean(0)).sum()
        assert abs(ffn.balance - 5 * (share * p.mean(0)).sum()) < 1e-6
    plain = F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    assert abs(loss - plain) < 1e-6  # what is reported is the cross-entropy alone
    weights = list(model.parameters())
    mine, theirs = (torch.autograd.grad(u, weights, retain_graph=True) for u in (loss, plain + 0.7 * balance))
    assert max(error(a, b) for a, b in zip(mine, theirs, strict=True)) < 1e-5


def test_autocast():
    """Everything between the norms' statistics is bfloat16 then, the residual stream included; the loss is not."""
    model, idx = small("hTM"), tokens(2, 30)
    expected = model(idx, idx)
    with torch.autocast("cpu", torch.bfloat16):
        loss, hidden = model(idx, idx), model.hidden(idx)
    a, b = (torch.autograd.grad(u, list(model.parameters())) for u in (loss, expected))
    assert hidden.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert error(loss, expected) < 1e-2 and max(error(x, y) for x, y in zip(a, b, strict=True)) < 0.1


def test_untied_output_layer():
    """Every use of the output layer: logits, the loss, generation, and the counts of parameters and operations."""
    tied, model = small("hM"), small("hM", tied=False)
    with torch.no_grad():
        model.lm_head.normal_(std=0.5)
    idx = tokens(1, 9)
    logits, loss = model(idx), model(idx, idx)
    hidden = model.hidden(idx)
    assert torch.equal(logits, hidden @ model.lm_head.T)
    assert abs(loss - F.cross_entropy(logits[0], idx[0])) < 1e-5
    assert next(Engine(model).generate([idx[0].tolist()], 1, temperature=0)) == [logits[0, -1].argmax().item()]
    assert next(model.generate(idx[0].tolist(), 1, temperature=0)) == logits[0, -1].argmax().item()
    assert model.num_params() == tied.num_params() + 61 * 32
    assert cost.flops_per_token(model) == cost.flops_per_token(tied)
    groups = training.optimizer_for(model, TrainConfig()).param_groups
    assert any(p is model.lm_head for p in groups[1]["params"])


@pytest.mark.parametrize("pattern", LETTERS + ["hH"])
def test_overfits_a_batch(pattern):
    torch.manual_seed(0)
    model = Hymba(HymbaConfig(**sizes(pattern)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    idx = tokens(2, 17)
    for _ in range(120):
        loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_initialisation():
    torch.manual_seed(0)
    model = Hymba(HymbaConfig(n_embd=256, n_head=4, pattern="hhhh", vocab_size=512, n_hidden=64))
    mixer, ssm = model.blocks[0].mixer, model.blocks[0].mixer.ssm
    dt = F.softplus(ssm.dt_bias.detach()).log()
    assert dt.min() > math.log(0.99e-3) and dt.max() < math.log(1.01e-1)
    assert abs(dt.mean() - math.log(1e-2)) < 0.2 and abs(dt.std() - math.log(100) / math.sqrt(12)) < 0.2
    assert torch.allclose(ssm.A_log.exp(), torch.arange(1.0, 17.0).expand(512, 16))
    assert abs(mixer.out_proj.weight.std() - 0.02 / math.sqrt(8)) < 1e-3 and abs(model.meta.std() - 0.02) < 1e-3
    assert abs(model(tokens(2, 64, vocab=512), tokens(2, 64, vocab=512, seed=3)).item() - math.log(512)) < 0.3
    A = Hymba(HymbaConfig(n_embd=256, n_head=4, pattern="h", ssm="mamba2", ssm_head=1)).blocks[0].mixer.ssm.A_log.exp()
    assert 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16 and abs(A.mean() - 8.5) < 0.7


def test_initial_weights_do_not_depend_on_how_a_processor_takes_logarithms():
    """Intel's library, which torch may have, does it in several ways, whose last bits in float32 differ."""
    code = """if True:
        import hashlib, torch
        from model import Hymba, HymbaConfig
        for ssm in ("mamba", "mamba2"):
            torch.manual_seed(0)
            model = Hymba(HymbaConfig(n_embd=256, n_head=4, pattern="h", ssm=ssm, ssm_head=1, vocab_size=64))
            for name, p in model.named_parameters():
                print(ssm, name, hashlib.sha256(p.detach().numpy().tobytes()).hexdigest())
    """
    argv, common = [sys.executable, "-c", code], {"cwd": Path(__file__).parent, "text": True}
    here, old = (
        subprocess.check_output(argv, env=os.environ | {"MKL_CBWR": x}, **common) for x in ("AUTO", "COMPATIBLE")
    )
    assert here.splitlines() == old.splitlines() and here.count("A_log") == 2


# ----------------------------------------------------------------------------------------------------------------------
# Generation, the slow way


@pytest.mark.parametrize("pattern", MIXED + ["TTT", "MMM"])
def test_generate_is_greedy_at_temperature_0(pattern):
    model, prompt = small(pattern), tokens(9).tolist()
    drawn = list(model.generate(prompt, 12, temperature=0))
    with torch.no_grad():
        best = model(torch.tensor([prompt + drawn]))[0, len(prompt) - 1 : -1].argmax(-1)
    assert drawn == best.tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_generate_follows_the_softmax(temperature):
    """Frequencies of 3,000 tokens, drawn from a model that sees nothing but the last one, against its logits."""
    model, n, V = small("t", vocab_size=13, n_meta=0, window=1, n_embd=8, n_head=1, n_kv_head=1, n_hidden=8), 3000, 13
    with torch.no_grad():
        p = (model(torch.tensor([[1]]))[0, -1].double() / temperature).softmax(-1)
    torch.manual_seed(0)
    drawn = [next(model.generate([1], 1, temperature)) for _ in range(n)]
    chi2 = ((torch.bincount(torch.tensor(drawn), minlength=V) - n * p).square() / (n * p).clamp(min=1)).sum()
    assert chi2 < V + 4 * math.sqrt(2 * V) and p.max() < 0.9


# ----------------------------------------------------------------------------------------------------------------------
# The file

ALONE = """
from model import *
torch.manual_seed(0)
sizes = dict(vocab_size=31, n_embd=32, n_head=4, n_kv_head=2, n_hidden=40, d_state=4, n_meta=5, window=7)
model = Hymba(HymbaConfig(pattern="HhhMtT", **sizes))
optimizer, idx, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.arange(18)[None] % 5, []
for _ in range(30):
    loss = model(idx[:, :-1], idx[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(ops, losses[0] > 3 > 0.5 > losses[-1], list(model.generate([0, 1, 2, 3, 4, 0, 1], 5, temperature=0)))
"""


def test_runs_alone(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    run = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "None True [2, 3, 4, 0, 1]\n", run.stderr
