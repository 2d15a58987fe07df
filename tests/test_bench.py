"""Benchmarks: what they count, and what they do when something does not fit."""

import json
import math

import pytest
import torch

import bench
import cost
from conftest import SMALL
from model import Hymba, HymbaConfig


def test_bench_counts_a_step_s_bytes():
    sizes = dict(n_embd=32, n_head=2, n_kv_head=1, n_hidden=16, d_state=4, n_meta=5, window=7, vocab_size=64)
    spec = dict(config=sizes | dict(pattern="HhhMT"), batch=2, contexts=[16], prefill=False, steps=1)
    (row,) = bench.decode_worker(spec, torch.device("cpu"))
    E, F_, D, steps = 16, 32, 64, 3 + 0  # three steps before the bytes are counted
    full, ring = 5 + 16 + steps + 1, 5 + 7
    kv = 2 * (full * (E + F_) + 2 * ring * (E + F_) + full * 2 * E)  # H; two blocks that read one ring; T
    ssm = 4 * (2 * 3 * D + 4 * D * 4)  # H, h, h, M: conv tail in bfloat16, state in float32
    with torch.device("meta"):
        model = Hymba(HymbaConfig(**sizes, pattern="HhhMT"))
    kept = 4 * (D * 4 + 3 * D + D * 4)  # float32 in H, h, h, M: conv_weight, conv_bias, dt_bias, D and A_log
    weights = 2 * model.num_params() + 2 * kept
    assert abs(row["read_gb"] * 1e9 - weights - 2 * (kv + ssm)) < 1
    assert row["cache_mb"] == row["formula_mb"] == cost.cache_bytes(model.config, 16 + 256) / 1e6
    assert {"ms_per_step", "tokens_per_s"} < set(row)


def test_bench_halves_a_batch_until_it_fits(monkeypatch):
    def row(engine, B, context, *rest):
        tried.append((context, B))
        if B * context > 100:
            raise torch.cuda.OutOfMemoryError("no room")
        return dict(context=context, batch=B)

    tried = []
    monkeypatch.setattr(bench, "decode_row", row)
    spec = dict(config=SMALL | dict(pattern="t"), batch=8, contexts=[10, 20, 100], prefill=False)
    assert [r["batch"] for r in bench.decode_worker(spec, torch.device("cpu"))] == [8, 4, 1]
    assert tried == [(10, 8), (20, 8), (20, 4), (100, 4), (100, 2), (100, 1)]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        bench.decode_worker(spec | {"contexts": [101]}, torch.device("cpu"))


class Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("please upgrade")


def test_bench_times_a_peer_without_a_backward_pass(monkeypatch, capsys):
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(bench, "timed", lambda f, repeats: (f(), (2.0, 0.0))[1])
    x, rows = torch.ones(3, requires_grad=True), []
    for name, f in (("ours", torch.exp), ("theirs", Refuses.apply)):
        rows.append(dict(shape="3", name=name) | bench.attempt(name, bench.forward_and_backward, f, [x], 1))
    bench.ratios(rows)
    bench.table(rows)
    assert rows[0]["bwd"] == rows[1]["fwd"] == 2 and math.isnan(rows[1]["bwd"]) and rows[1]["fwd_ratio"] == 1
    out, err = capsys.readouterr()
    assert "no backward pass: please upgrade" in err and "theirs: slower than ours 1.00x forward, nanx" in out


def test_bench_plot_says_what_it_cannot_show(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -r requirements-dev.txt")
    for what, message in [("decode", "no picture of decode"), ("sweep", "has no results")]:
        (tmp_path / "x.json").write_text(json.dumps({"what": what, "device": "", "rows": []}))
        with pytest.raises(ValueError, match=message):
            bench.plot([str(tmp_path / "x.json")])
