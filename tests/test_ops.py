"""ops.py against the definitions of model.py and float64 loops, and what `fastest` chooses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import (
    compare_with_grads,
    cross_entropy_inputs,
    dense_attention,
    error,
    plain_cross_entropy,
    scan_inputs,
    scan_loop,
    small,
    tokens,
)
from model import (
    linear_cross_entropy,
    selective_scan,
    windowed_attention,
)


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


def test_compile_computes_sines_once():
    """torch.compile takes the model whole, and sees one table of sines that it cannot repeat in every block."""
    model, graphs = small("tTt"), []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph)[1])
    idx = tokens(2, 30)
    a, b = (torch.autograd.grad(m(idx, idx), list(model.parameters())) for m in (model, compiled))
    assert max(error(x, y) for x, y in zip(a, b, strict=True)) < 1e-6
    calls = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("rope_table" in c for c in calls) == 1 and not any(c in ("sin", "cos") for c in calls)
