"""ops.py against the definitions of model.py and float64 loops, and what `fastest` chooses."""

import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_module
import ops
from conftest import (
    TRITON,
    compare_with_grads,
    cross_entropy_inputs,
    dense_attention,
    error,
    expert_inputs,
    experts_loop,
    needs_gpu,
    plain_cross_entropy,
    scan_inputs,
    scan_loop,
    small,
    ssd_inputs,
    ssd_loop,
)
from ops import linear_cross_entropy, selective_scan, windowed_attention

needs_kernels = pytest.mark.skipif(not TRITON, reason="pip install triton: 3.6 or later")


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    given=st.fixed_dictionaries({k: st.booleans() for k in ("D", "z", "dt_bias", "state")}),
    seed=st.integers(0, 1000),
)
def test_scan_against_float64_loop(shape, given, seed):
    forward, backward = compare_with_grads(selective_scan, scan_loop, scan_inputs(*shape, seed, given))
    assert forward < 1e-5 and backward < 1e-4


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


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 4, 9, 9))), chunk=st.integers(1, 20), seed=st.integers(0, 1000)
)
def test_ssd_against_float64_loop(shape, chunk, seed):
    """For any length of chunks, with and without a state."""
    inputs = ssd_inputs(*shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "SSD_CHUNK", chunk)
        fresh = {k: v for k, v in inputs.items() if k != "state"}  # of one token, A would have no gradient
        for given in [inputs, fresh][: shape[1]]:
            # In float64: in float32, the gradient of one A may be a small difference of large numbers
            forward, backward = compare_with_grads(ops.ssd, ssd_loop, given, torch.float64)
            assert forward < 1e-6 and backward < 1e-6


def test_ssd_in_pieces_extremes_and_bfloat16():
    inputs = ssd_inputs(2, 150, 6, 8, 4, seed=0)
    forward, backward = compare_with_grads(ops.ssd, ssd_loop, inputs)
    assert forward < 1e-5 and backward < 1e-4
    y, h = ops.ssd(**inputs)
    cut = lambda at: {k: v[:, at] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}  # noqa: E731
    y1, h1 = ops.ssd(**cut(slice(0, 71)))
    y2, h2 = ops.ssd(**(cut(slice(71, None)) | {"state": h1}))
    assert error(torch.cat([y1, y2], 1), y) < 1e-12 and error(h2, h) < 1e-12
    dt = torch.where(torch.rand(2, 150, 6) < 0.5, -14.0, 50.0).double()  # softplus: 1e-6 and 50
    extreme = inputs | {"dt": dt, "A": -(10.0 ** torch.linspace(-4, 2, 6)).double(), "dt_bias": torch.zeros(6).double()}
    forward, backward = compare_with_grads(ops.ssd, ssd_loop, extreme)
    assert forward < 1e-3 and backward < 1e-2  # exponents are differences of sums up to 64 x 5,000
    inputs = {k: v.bfloat16() if k != "state" else v for k, v in inputs.items()}
    y, h = ops.ssd(**inputs)
    expected, _ = ssd_loop(**{k: v.double() for k, v in inputs.items()})
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32 and error(y, expected) < 1e-2


def test_ssd_keeps_its_inputs_alone():
    kept = []
    inputs = {k: v.float().requires_grad_() for k, v in ssd_inputs(2, 512, 4, 8, 16, seed=0).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda u: kept.append(u.numel()) or u, lambda u: u):
        ops.ssd(**inputs)
    assert max(kept) <= inputs["x"].numel() and sum(kept) < 6 * inputs["x"].numel()


def test_attention_over_a_long_cache_takes_few_queries_at_a_time(monkeypatch):
    """The score matrix of 40 queries and 200,000 keys is never whole."""
    r, sizes, sdpa = torch.Generator().manual_seed(0), [], F.scaled_dot_product_attention
    q, k, v = (torch.randn(1, n, 1, 8, generator=r) for n in (40, 200_000, 200_000))
    expected = dense_attention(q.double(), k.double(), v.double(), None, 0)
    measured = lambda q, k, v, mask, **o: (sizes.append(mask.numel()), sdpa(q, k, v, mask, **o))[1]  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", measured)
    assert error(windowed_attention(q, k, v, None, 0), expected) < 1e-5 and max(sizes) <= 32 * 200_000


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
    assert forward < 1e-5 and backward < 1e-4


@pytest.mark.parametrize("n, V", [(1, 1), (50, 37), (4100, 61)])  # 4,100 tokens: two pieces
def test_linear_cross_entropy(n, V):
    inputs, targets = cross_entropy_inputs(n, V, seed=n)
    both = compare_with_grads(
        lambda **u: linear_cross_entropy(**u, targets=targets),
        lambda **u: plain_cross_entropy(**u, targets=targets)[0],
        inputs,
    )
    assert max(both) < 1e-5
    with torch.no_grad():
        losses = linear_cross_entropy(**inputs, targets=targets, reduction="none")
        assert error(losses, plain_cross_entropy(**inputs, targets=targets)[1]) < 1e-5
        assert linear_cross_entropy(**inputs, targets=torch.full((n,), -1)).isnan()  # as in F.cross_entropy


def test_losses_of_each_token_are_the_definition_s():
    """Without gradient, in the shape of the targets, for any negative target."""
    inputs, targets = cross_entropy_inputs(12, 37, seed=0)
    x, targets = inputs["x"].view(3, 4, 16), torch.where(targets < 0, -100, targets).view(3, 4)
    losses = linear_cross_entropy(x.requires_grad_(), inputs["weight"], targets, reduction="none")
    expected = model_module.linear_cross_entropy.__wrapped__(x, inputs["weight"], targets, reduction="none")
    assert losses.shape == (3, 4) and not losses.requires_grad and (losses[targets < 0] == 0).all()
    assert error(losses, expected) < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(4, 70)),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    seed=st.integers(0, 1000),
)
def test_rms_norm(shape, eps, seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs, definition = {"x": 3 * r(*shape) + 1, "weight": r(shape[-1])}, model_module.rms_norm.__wrapped__
    mine, theirs = (lambda **u: ops.rms_norm(**u, eps=eps)), (lambda **u: definition(**u, eps=eps))
    assert max(compare_with_grads(mine, theirs, inputs)) < 1e-4
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    for dtype, weight_dtype, bound in [(bf16, f32, 5e-3), (bf16, bf16, 1e-2), (f64, f64, 1e-9)]:
        x, weight = inputs["x"].to(dtype), inputs["weight"].to(weight_dtype)
        y = ops.rms_norm(x, weight, eps)
        assert y.dtype == dtype and error(y, definition(x.double(), weight.double(), eps)) < bound


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), T=st.integers(1, 9), half=st.integers(1, 40), far=st.sampled_from([10, 10**4, 10**6]))
def test_rope_table(rows, T, half, far):
    """The numbers of the definition to the bit, and what torch.compile is told of them."""
    pos = torch.randint(0, far, (rows, T), generator=torch.Generator().manual_seed(half))
    freq = 10000.0 ** (-torch.arange(half) / half)
    mine, theirs = ops.rope_table(pos, freq), model_module.rope_table.__wrapped__(pos, freq)
    assert all(a.shape == (rows, T, 1, half) and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    torch.library.opcheck(torch.ops.hymba.rope_table.default, (pos, freq), test_utils="test_faketensor")


# ----------------------------------------------------------------------------------------------------------------------
# What runs


def test_a_kernel_runs_where_it_takes_the_inputs(monkeypatch):
    """And else the fast plain version, else the definition; tables are read at each call."""
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    definition = model_module.swiglu.__wrapped__
    assert ops.fastest(definition, gate, up) is definition
    kernel = lambda gate, up: gate - up  # noqa: E731
    monkeypatch.setitem(ops.KERNELS, "swiglu", (kernel, lambda gate, up: gate.shape[-1] % 2 == 0))
    assert ops.fastest(definition, gate, up) is kernel and torch.equal(model_module.swiglu(gate, up), gate - up)
    assert ops.fastest(definition, gate[:, :3], up[:, :3]) is definition
    assert torch.equal(model_module.swiglu(gate[:, :3], up[:, :3]), F.silu(gate[:, :3]) * up[:, :3])
    x, weight = torch.randn(2, 5), torch.ones(5)
    assert ops.fastest(model_module.rms_norm, x, weight, eps=1e-6) is ops.rms_norm
    monkeypatch.setitem(ops.PLAIN, "rms_norm", lambda x, weight, eps: x + 1)
    assert torch.equal(model_module.rms_norm(x, weight, 1e-6), x + 1)
    monkeypatch.setattr(model_module, "ops", None)
    assert error(model_module.rms_norm(x, weight, 1e-6), F.rms_norm(x, (5,), eps=1e-6)) < 1e-6


def test_kernels_can_be_turned_off_and_on():
    table = ops.KERNELS
    ops.use_kernels(True)
    assert table is ops.KERNELS and table == ops.ALL_KERNELS and table is not ops.ALL_KERNELS
    ops.use_kernels(False)
    assert table is ops.KERNELS and table == {}
    ops.use_kernels(True)
    assert table == ops.ALL_KERNELS and bool(table) == (ops.kernels is not None)


def test_every_operation_has_a_definition():
    """Names in the tables are names in model.py, but for cross_entropy, which is linear_cross_entropy's own."""
    names = {*ops.PLAIN, *ops.ALL_KERNELS} - {"cross_entropy"}
    assert all(hasattr(getattr(model_module, name), "__wrapped__") for name in names)
    assert ops.PLAIN["cross_entropy"] is ops.cross_entropy


def operations() -> dict:
    """Inputs that each kernel takes, by the name of its operation, in a tuple with some that it does not."""
    r, f64 = torch.randn, torch.float64

    def scan(N, dtype=torch.float32):
        return tuple(r(*shape, dtype=dtype) for shape in ((1, 3, 8), (1, 3, 8), (8, N), (1, 3, N), (1, 3, N)))

    def attention(T, S, E, F_, window, dtype=torch.float32):
        return r(1, T, 2, E, dtype=dtype), r(1, S, 1, E, dtype=dtype), r(1, S, 1, F_, dtype=dtype), window, 0

    conv = lambda K, dtype=torch.float32: (r(1, 3, 8, dtype=dtype), r(8, K, dtype=dtype), r(8, dtype=dtype))  # noqa: E731
    y, norm, hooked = r(1, 3, 8), model_module.RMSNorm(8, 1e-6), model_module.RMSNorm(8, 1e-6)
    grouped = model_module.BranchNorm(small("H", n_embd=4, n_head=1, n_kv_head=1, branch_norm="group").config, 8)
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    fused = lambda a, b, fusion: (y, y, a, b, fusion)  # noqa: E731
    return {
        "selective_scan": ([scan(4), scan(128)], [scan(129), scan(4, f64)]),
        "windowed_attention": (
            [attention(5, 5, 16, 32, None), attention(5, 5, 128, 128, 4), attention(5, 9, 16, 16, None)],
            [attention(5, 5, 8, 16, 4), attention(5, 5, 16, 24, 4), attention(5, 5, 144, 32, 4),
             attention(5, 5, 16, 16, None), attention(5, 5, 16, 32, 4, f64)],
        ),
        "causal_conv": ([conv(2), conv(4)], [conv(1), conv(5), conv(7), conv(4, f64)]),
        "cross_entropy": ([(r(3, 9),)], [(r(3, 9, dtype=f64),)]),
        "apply_rope": ([(r(1, 3, 2, 8), None)], [(r(1, 3, 2, 8, dtype=f64), None)]),
        "swiglu": ([(y, y)], [(y.double(), y.double())]),
        "fuse": (
            [fused(norm, norm, "mean"), fused(norm, norm, "diff"), fused(norm, norm, "sum")],
            [fused(norm, norm, "concat"), fused(norm, grouped, "mean"),
             fused(norm, hooked, "mean"), fused(nn.Identity(), norm, "mean"), fused(norm, nn.LayerNorm(8), "mean"),
             (y.double(), y.double(), norm, norm, "mean")],
        ),
    }  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("name", operations())
def test_each_kernel_takes_the_sizes_it_was_written_for(name, kernels_on):
    kernel, (taken, refused) = ops.ALL_KERNELS[name][0], operations()[name]
    definition = ops.cross_entropy if name == "cross_entropy" else getattr(model_module, name).__wrapped__
    plain = ops.PLAIN.get(name, definition)
    with torch.no_grad():
        assert all(ops.fastest(definition, *inputs) is kernel for inputs in taken)
        assert all(ops.fastest(definition, *inputs) is plain for inputs in refused)
    backward = name in ("selective_scan", "windowed_attention", "causal_conv", "cross_entropy")
    for inputs in taken:  # kernels without a backward pass are for inference alone
        assert (ops.fastest(definition, *inputs) is kernel) == backward


def touch(block: nn.Module, how: str) -> None:
    """Do to a part of the block what model.py does not say."""
    layer = block.mixer.out_proj

    class Mine(nn.Linear):
        pass

    class Quantised(nn.Parameter):
        pass

    if how == "replaced":
        block.mixer.out_proj = nn.Sequential(layer, nn.Identity())
    elif how == "subclassed":
        layer.__class__ = Mine
    elif how == "hook":
        layer.register_forward_hook(lambda module, args, out: out)
    elif how == "hook before":
        block.mixer.ssm.dt_norm.register_forward_pre_hook(lambda module, args: args)
    elif how == "biased":
        layer.bias = nn.Parameter(torch.zeros(32))
    elif how == "quantised":
        layer.weight = Quantised(layer.weight.detach())
    elif how == "packed":  # the weight is no parameter any more
        weight = layer.weight.detach()
        del layer.weight
        layer.register_buffer("weight", weight)
    elif how == "strided":
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    elif how == "parametrised":
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    elif how == "forward":  # of one object alone
        layer.forward = lambda x: x
    elif how == "another norm":
        block.ffn_norm = nn.LayerNorm(32)


TOUCHED = ["replaced", "subclassed", "hook", "hook before", "biased", "quantised", "packed", "strided", "parametrised"]


@pytest.mark.parametrize("how", TOUCHED + ["another norm", "forward"])
def test_untouched(how):
    a, b = small("hH").blocks
    assert ops.untouched(a, b) and ops.untouched(nn.Identity()) and ops.untouched()
    touch(a, how)
    assert not ops.untouched(a) and not ops.untouched(b, a) and ops.untouched(b)


@needs_kernels
def test_blocks_that_step_by_kernels():
    """Heads of 16 and 32 channels do, and 8 do not; nor states of 129, 5 taps, blocks that were touched, gradients."""
    block = lambda letter="h", **sizes: small(letter, **(dict(n_head=2, n_kv_head=1) | sizes)).blocks[0]  # noqa: E731
    steps, x = ops.steps_by_kernels, torch.zeros(1, 1, 32)
    hooked = block()
    touch(hooked, "hook")
    with torch.no_grad():
        assert not steps(block(), x)  # the tests begin without kernels
        ops.use_kernels(True)
        assert steps(block(), x) and steps(block("M"), x) and steps(block("T"), x)
        assert not steps(block(n_head=4, n_kv_head=2), x) and steps(block("M", n_head=4, n_kv_head=2), x)
        assert not steps(block("M2"), x) and not steps(block("h2"), x)
        assert not steps(block(d_state=129), x) and not steps(block(d_conv=5), x) and not steps(hooked, x)
        assert not steps(block(), x.double())
    assert not steps(block(), x)


@pytest.mark.parametrize(
    "n, C, hidden, X, k", [(1, 8, 8, 3, 1), (40, 16, 24, 5, 2), (9, 3, 5, 2, 2), (70, 8, 16, 9, 3)]
)
@pytest.mark.parametrize("how", ["loop", "grouped", "all"])
def test_mixture_sorts_by_expert(how, n, C, hidden, X, k, monkeypatch):
    """Each way of the products by groups, experts without tokens among them."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: how == "all")
    if how == "grouped" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped product")
    inputs, expert = expert_inputs(n, C, hidden, X, k, seed=n)
    dtype = torch.bfloat16 if how == "grouped" else torch.float32
    fast, loop = (functools.partial(f, expert=expert) for f in (ops.mixture, experts_loop))
    forward, backward = compare_with_grads(fast, loop, inputs, dtype)
    bound, grad_bound = (1e-5, 1e-4) if dtype == torch.float32 else (2e-2, 2e-2)
    assert forward < bound and backward < grad_bound
    if n > 1 and X > k:  # autograd's own gradient of a gather adds up in an order that is left to chance, on a GPU
        u = {name: v.float().requires_grad_() for name, v in inputs.items()}
        names = {type(node).__name__ for node in graph_of(ops.mixture(expert=expert, **u).grad_fn)}
        assert "_PermutationBackward" in names and "IndexBackward0" not in names


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("n, C, hidden, X, k", [(2, 16, 32, 8, 2), (3000, 512, 832, 8, 2), (77, 24, 40, 5, 5)])
def test_mixture_on_a_gpu(n, C, hidden, X, k, dtype, bound, monkeypatch):
    """The host never waits, so that CUDA graphs can hold it. Twice the same to the bit."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    inputs, expert = expert_inputs(n, C, hidden, X, k, seed=n)
    expert, outputs = expert.cuda(), []

    def mixture(**u):
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs.append(ops.mixture(expert=expert, **u))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return outputs[-1]

    loop = functools.partial(experts_loop, expert=expert)
    for _ in range(2):
        forward, backward = compare_with_grads(mixture, loop, inputs, dtype, "cuda")
        assert forward < bound and backward < bound
    assert torch.equal(*outputs)


def graph_of(node) -> list:
    return [node, *(n for child, _ in node.next_functions if child for n in graph_of(child))]


@pytest.mark.parametrize("enabled", [True, False])
def test_compute_dtype(enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert ops.compute_dtype(torch.zeros(1)) == (torch.bfloat16 if enabled else torch.float32)
