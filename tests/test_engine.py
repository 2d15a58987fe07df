"""Generation: the cache against the full forward pass, batches against single rows, samples against the softmax."""

import math
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import cost
import engine
import model as model_module
import ops
from conftest import MIXED, SMALL, SYSTEMS, TRITON, error, needs_gpu, on_device, small, tokens
from engine import Cache, Engine
from model import Hymba, HymbaConfig


@pytest.mark.parametrize("pattern, options", SYSTEMS, ids=str)
def test_cache_gives_the_full_forward(pattern, options):
    """One full forward = prefill + decode = prefill in pieces, far past the window, and bytes held = bytes promised."""
    model = small(pattern, **options)
    idx = tokens(2, 60)
    with torch.no_grad():
        full = model(idx)
        for sizes in ([20] + [1] * 40, [3, 1, 16, 9, 1, 1, 29], [60]):
            cache = Engine(model).new_cache(2, 60)
            assert cache.nbytes == 2 * cost.cache_bytes(model.config, 60, torch.float32)
            out = torch.cat([Engine(model).logits(piece, cache) for piece in idx.split(sizes, dim=1)], 1)
            assert error(out, full) < 1e-5
            assert cache.nbytes == 2 * cost.cache_bytes(model.config, 60, torch.float32)
        cache = Engine(model).new_cache(2, 4)  # too little room: grows
        out = torch.cat([Engine(model).logits(piece, cache) for piece in idx.split([3, 1, 1, 30, 25], dim=1)], 1)
        assert error(out, full) < 1e-5
        assert cache.capacity >= 60 and cache.nbytes == 2 * cost.cache_bytes(
            model.config, cache.capacity, torch.float32
        )


@pytest.mark.parametrize("n_meta", [0, 1, 40])
def test_cache_with_other_meta_counts(n_meta):
    model = small("HhhtMT", n_meta=n_meta, window=3)
    with torch.no_grad():
        cache, idx = Engine(model).new_cache(1, 20), tokens(1, 20)
        out = torch.cat([Engine(model).logits(piece, cache) for piece in idx.split([1, 5, 1, 13], dim=1)], 1)
        assert error(out, model(idx)) < 1e-5


def test_meta_tokens_run_once_and_follow_the_weights(monkeypatch):
    model, runs = small("HhH"), []
    monkeypatch.setattr(model_module.Block, "forward", count(model_module.Block.forward, runs))
    e = Engine(model)
    e.new_cache(1, 4), e.new_cache(3, 8)
    assert len(runs) == 3  # three blocks, once
    with torch.no_grad():
        model.blocks[0].mixer.ssm.D += 1  # as an optimizer would
    assert error(e.logits(tokens(1, 6), e.new_cache(1, 6)), model(tokens(1, 6))) < 1e-5


def count(f, calls: list):
    def counted(*args, **kwargs):
        calls.append(1)
        return f(*args, **kwargs)

    return counted


def test_a_model_made_in_inference_mode_generates():
    with torch.inference_mode():
        model = small("hM")
        expected = list(Engine(model).generate([[1, 2], [3]], 5, temperature=0))
    assert list(Engine(model).generate([[1, 2], [3]], 5, temperature=0)) == expected
    assert list(Engine(small("hM")).generate([[1, 2], [3]], 5, temperature=0)) == expected


@pytest.mark.parametrize("pattern", MIXED + ["TTT", "MMM"])
def test_ragged_batch_gives_each_row_what_it_gets_alone(pattern):
    model = small(pattern)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 20, 1, 9, 3)]
    for options in ({"temperature": 0}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 5}):
        together = list(zip(*Engine(model).generate(prompts, 25, **options), strict=True))
        assert list(together[0]) == [row[0] for row in Engine(model).generate(prompts[:1], 25, **options)]
        if options["temperature"] == 0:
            for prompt, row in zip(prompts, together, strict=True):
                assert list(row) == [t for (t,) in Engine(model).generate([prompt], 25, **options)]
                full = torch.tensor([prompt + list(row)])
                with torch.no_grad():  # and what the full forward pass would choose
                    best = model(full)[0, len(prompt) - 1 : -1].argmax(-1)
                assert best.tolist() == list(row)


def test_ragged_batch_of_64_equals_64_single_runs():
    """Rows end at different times, and the batch is halved as they do."""
    model, g = small("HhM"), torch.Generator().manual_seed(0)
    prompts = [tokens(int(n), seed=i).tolist() for i, n in enumerate(torch.randint(1, 12, (64,), generator=g))]
    alone = [[t for (t,) in Engine(model).generate([p], 24, temperature=0)] for p in prompts]
    stop = max(range(61), key=lambda t: sum(t in row for row in alone))  # the token that ends most rows
    together = list(zip(*Engine(model).generate(prompts, 24, temperature=0, stop=stop), strict=True))
    for row, expected in zip(together, alone, strict=True):
        n = expected.index(stop) if stop in expected else 24
        assert list(row) == expected[:n] + [None] * (len(row) - n)
    assert 8 < sum(stop in row for row in alone) < 64


def test_sampling_does_not_depend_on_the_batch():
    model, prompts = small("Hh"), [tokens(n, seed=n).tolist() for n in (5, 2, 9, 3)]
    options = dict(max_new_tokens=15, temperature=1.5, top_k=40, top_p=0.95, seed=7)
    together = list(zip(*Engine(model).generate(prompts, **options), strict=True))
    for i in range(4):
        assert [t for (t,) in Engine(model).generate(prompts[i : i + 1], first_row=i, **options)] == list(together[i])
    pair = zip(*Engine(model).generate(prompts[1:3], first_row=1, **options), strict=True)
    assert list(pair) == together[1:3]
    same = list(zip(*Engine(model).generate([prompts[0]] * 3, **options), strict=True))
    assert len(set(same)) == 3  # equal prompts, different streams


def test_random_numbers():
    """Exponentially distributed, without correlation along any of the counter's parts, each following from its own."""
    seeds, rows, pos = (0, 1, 2**64 - 1), torch.arange(40), torch.arange(40) * 3
    draws = torch.stack([engine.exponential(s, rows, pos + p, 500) for s in seeds for p in (0, 1)])  # (6, 40, 500)
    u = torch.exp(-draws.double()).flatten().sort().values  # uniform, then
    n = len(u)
    assert (u - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001
    z = torch.special.ndtri(torch.exp(-draws.double()).clamp(1e-12, 1 - 1e-12))
    for dim in range(3):
        a, b = z.narrow(dim, 0, z.shape[dim] - 1), z.narrow(dim, 1, z.shape[dim] - 1)
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
    assert draws.unique().numel() > 0.99 * n and (draws > 0).all()
    assert torch.equal(engine.exponential(1, rows[7:9], pos[7:9], 99), draws[2, 7:9, :99])


def test_prompts_are_read_in_pieces(monkeypatch):
    model, sizes = small("HhhMt"), []
    prompts = [tokens(n, seed=n).tolist() for n in (50, 23, 23, 23, 4)]
    expected = list(Engine(model).generate(prompts, 12, temperature=0))
    monkeypatch.setattr(engine, "PREFILL", 16)
    forward = Engine.hidden
    monkeypatch.setattr(Engine, "hidden", lambda m, idx, cache: sizes.append(idx.numel()) or forward(m, idx, cache))
    assert list(Engine(model).generate(prompts, 12, temperature=0)) == expected
    assert max(sizes) == 16 and sum(sizes[:-11]) == 50 + 3 * 23 + 4


def test_a_cache_that_generate_left_early():
    model, prompt = small("HhM"), tokens(9).tolist()
    cache = Engine(model).new_cache(1, 4)
    steps = Engine(model).generate([prompt], None, cache=cache)
    drawn = [next(steps)[0] for _ in range(4)]
    steps.close()
    with torch.no_grad():
        logits = Engine(model).logits(torch.tensor([drawn[-1:]]), cache)
        full = model(torch.tensor([prompt + drawn]))
    assert error(logits[0, -1], full[0, -1]) < 1e-5


def test_a_cache_after_a_stop_token_has_seen_all_that_was_yielded():
    model, prompt = small("HhM"), tokens(9).tolist()
    free = [t for (t,) in Engine(model).generate([prompt], 9, temperature=0)]
    for stop in set(free):
        cache = Engine(model).new_cache(1, 4)
        answer = [t for (t,) in Engine(model).generate([prompt], 20, temperature=0, stop=stop, cache=cache)]
        assert answer == free[: free.index(stop)] and cache.pos.tolist() == [5 + 9 + len(answer)]


def replaced(model: Hymba, how: str) -> Hymba:
    """With something in it that the kernels of one-token steps know nothing of."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    a, b = model.blocks
    if how == "owner":  # of the keys and values that b reads
        a.mixer.out_proj.__class__ = Doubled
    elif how == "reader":
        b.mixer.out_proj.__class__ = Doubled
    elif how == "hooked reader":
        b.ffn.up_proj.register_forward_hook(lambda module, args, out: 2 * out)
    elif how == "layers":
        a.mixer.out_proj.__class__ = b.ffn.up_proj.__class__ = Doubled
        a.ffn.down_proj.bias = torch.nn.Parameter(torch.ones_like(b.ffn_norm.weight))
    elif how == "norms":
        a.mixer_norm = torch.nn.LayerNorm(len(a.mixer_norm.weight)).to(a.mixer_norm.weight.device)
        a.mixer.attn_branch_norm, b.ffn_norm = torch.nn.Identity(), torch.nn.Identity()
    elif how == "parts":
        a.mixer.out_proj.register_forward_hook(lambda module, args, out: 2 * out)
        b.mixer.in_proj.weight = torch.nn.Parameter(b.mixer.in_proj.weight.t().contiguous().t())
        b.ffn = torch.nn.Sequential(b.ffn.gate_proj, torch.nn.Linear(40, 32, bias=False))
        b.ffn[1].weight.detach().fill_(0.1)
        b.ffn.to(b.ffn_norm.weight.device)
    return model


@on_device
@pytest.mark.parametrize(
    "pattern, fusion, rows, how, by_kernels",
    [("HM", "mean", 1, "", 2), ("ht", "diff", 5, "", 2), ("hT", "concat", 2, "layers", 0),
     ("hM", "mean", 2, "norms", 1), ("HM", "mean", 3, "parts", 0), ("hh", "mean", 2, "", 2),
     ("hh", "mean", 2, "owner", 1), ("hh", "diff", 1, "reader", 1), ("tt", "mean", 2, "hooked reader", 1)],
)  # fmt: skip
def test_inference_kernels_in_a_model(pattern, fusion, rows, how, by_kernels, device, monkeypatch):
    """A prompt in two pieces, then single tokens, by kernels and without, also where parts are not ours.

    Blocks choose one by one, and also where one reads the keys and values of another.
    """
    steps = []
    monkeypatch.setattr(engine, "step_block", count(engine.step_block, steps))
    sizes = dict(n_embd=32, n_head=2, n_kv_head=1, n_hidden=40, n_meta=3, window=4, vocab_size=50, fusion=fusion)
    idx, outputs = tokens(rows, 9, vocab=50).to(device), []
    for on in (True, False):
        ops.use_kernels(on)
        model = replaced(small(pattern, **sizes).to(device), how)
        cache = Engine(model).new_cache(rows, 12)
        with torch.no_grad():
            outputs.append(torch.cat([Engine(model).logits(u, cache) for u in idx.split([4, 2, 1, 1, 1], dim=1)], 1))
        assert len(steps) == 3 * by_kernels  # and none more without kernels
    with torch.no_grad():
        assert error(outputs[0], model(idx)) < 1e-5
    assert error(*outputs) < 1e-5


def test_mamba2_steps_through_its_blocks(monkeypatch, kernels_on):
    """The kernels of one-token steps know Mamba alone: beside them, a Mamba-2 block is called as it is."""
    steps = []
    monkeypatch.setattr(engine, "step_block", count(engine.step_block, steps))
    model = small("Mt2", n_head=2, n_kv_head=1, n_embd=32, window=4)
    with torch.no_grad():
        cache, idx = Engine(model).new_cache(2, 6), tokens(2, 6)
        out = torch.cat([Engine(model).logits(u, cache) for u in idx.split([4, 1, 1], dim=1)], 1)
        assert error(out, model(idx)) < 1e-5
    assert not TRITON or len(steps) == 2  # those of the attention block


def test_steps_across_a_doubling_of_the_buffers():
    model = small("TH")
    cache = Engine(model).new_cache(2, 6)
    row = torch.arange(2)
    greedy = lambda x, cache, row: F.linear(x, model.embed.weight).argmax(-1)  # noqa: E731
    first = torch.tensor([3, 5])
    loop = engine.TokenLoop(Engine(model), cache, first.clone(), row, greedy)
    seen, capacities = [], []
    for _ in range(30):
        loop.advance()
        seen.append(loop.tokens.tolist())
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [6, 12, 24, 48] and cache.nbytes == 2 * cost.cache_bytes(
        model.config, 48, torch.float32
    )
    assert seen == list(Engine(model).generate([[3], [5]], 30, temperature=0))


def test_a_cache_that_has_grown_frees_the_old_buffers(monkeypatch):
    model, caches, plain = small("T", n_meta=0), weakref.WeakSet(), Cache.map
    monkeypatch.setattr(Cache, "map", lambda cache, f: (caches.add(new := plain(cache, f)), new)[1])
    steps = Engine(model).generate([[1, 2], [3]], None)
    for _ in range(300):
        next(steps)
    held = {u.untyped_storage().data_ptr(): u.untyped_storage().nbytes() for c in caches for u in c.kv[0]}
    assert sum(held.values()) == 2 * cost.cache_bytes(model.config, 2 * (2 + 256), torch.float32)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pattern", ["HhhhH", "MtT"])
def test_captured_steps_equal_the_reference(pattern):
    """CUDA graphs, across growing caches and halved batches: the tokens of the plain model."""
    sizes = dict(n_embd=256, n_head=4, n_kv_head=2, n_hidden=512, n_meta=16, window=64, vocab_size=512)
    # seed 30: the two likeliest tokens are never nearer than 2e-3, a thousand times float32's error; seed 0: once 1e-6
    model = small(pattern, 30, **sizes).cuda()
    prompts = [tokens(n, vocab=512, seed=n).tolist() for n in (3, 200, 77, 30)]
    for n, options in ((200, dict(temperature=0)), (200, dict(temperature=0, stop=5)), (60, dict(seed=5, top_p=0.9))):
        ops.use_kernels(False)
        expected = list(Engine(model).generate(prompts, n, **options))
        ops.use_kernels(True)
        assert list(Engine(model).generate(prompts, n, **options)) == expected
        endless = Engine(model).generate(prompts, None, **options)
        assert [next(endless) for _ in expected] == expected
    one = [[t for (t,) in Engine(model).generate([p], 200, temperature=0)] for p in prompts]
    together = list(Engine(model).generate(prompts, 200, temperature=0))
    assert one == [list(row) for row in zip(*together, strict=True)]


@pytest.mark.gpu
@needs_gpu
def test_long_prompts_need_bounded_memory(kernels_on):
    """Beside the weights and the cache, a prompt of 128k tokens needs no more than one of 32k does."""
    with torch.device("cuda"):
        model = Hymba(HymbaConfig(n_embd=256, n_head=4, n_kv_head=2, n_hidden=512, pattern="HhhhH"))
    peaks, e = [], Engine(checkpoint.cast(model, torch.bfloat16))
    for n in (2**15, 2**17):
        prompt = tokens(n, vocab=32001).tolist()
        list(e.generate([prompt[:100]], 4))  # captures a step: cuBLAS keeps a workspace for that
        torch.cuda.reset_peak_memory_stats()
        list(e.generate([prompt], 4))
        peaks.append(torch.cuda.max_memory_allocated() - cost.cache_bytes(model.config, n + 4))
    assert peaks[1] < 1.1 * peaks[0]


def test_generate_stops_and_samples():
    model = small("HhH")
    prompts = [tokens(4, seed=s).tolist() for s in range(6)]
    free = list(zip(*Engine(model).generate(prompts, 30, temperature=0), strict=True))
    stop = free[2][4]
    for row, expected in zip(
        zip(*Engine(model).generate(prompts, 30, temperature=0, stop=stop), strict=True), free, strict=True
    ):
        n = expected.index(stop) if stop in expected else 30
        assert row[:n] == expected[:n] and set(row[n:]) <= {None}
    one = list(Engine(model).generate([prompts[2]], 30, temperature=0, stop=stop))
    assert len(one) == list(free[2]).index(stop)  # ends when all rows have
    several = {stop, free[2][2]}
    ends = min(free[2].index(token) for token in several)
    assert len(list(Engine(model).generate([prompts[2]], 30, temperature=0, stop=several))) == ends < len(one)
    assert any(a != b for a, b in Engine(model).generate([[1], [1]], 20, temperature=5.0, seed=2**60))
    draws = [t for (t,) in Engine(model).generate([[1]], 200, temperature=5.0, seed=1)]
    assert draws == [t for (t,) in Engine(model).generate([[1]], 200, temperature=5.0, seed=1)]
    assert draws != [t for (t,) in Engine(model).generate([[1]], 200, temperature=5.0, seed=2)]
    greedy = [t for (t,) in Engine(model).generate([[1]], 50, temperature=0)]
    assert greedy == [t for (t,) in Engine(model).generate([[1]], 50, temperature=3.0, top_k=1)]
    assert greedy == [t for (t,) in Engine(model).generate([[1]], 50, temperature=3.0, top_p=1e-6)]
    endless = Engine(model).generate([[1]], None, temperature=0)
    assert [next(endless)[0] for _ in range(300)] == [t for (t,) in Engine(model).generate([[1]], 300, temperature=0)]
    for bad in ([], [[]]):
        with pytest.raises(ValueError, match="every prompt needs at least one token"):
            next(Engine(model).generate(bad))
    with pytest.raises(ValueError, match="token 61 is outside of the vocabulary of 61"):
        next(Engine(model).generate([[61]]))
    for bad in (-1, math.nan):
        with pytest.raises(ValueError, match=f"temperature={bad}"):
            next(Engine(model).generate([[1]], temperature=bad))
    with pytest.raises(ValueError, match="max_new_tokens=-1: must be 0 or more"):
        next(Engine(model).generate([[1]], -1))


@pytest.mark.parametrize("pattern", MIXED + ["TTT", "MMM"])
def test_generate_continues_a_cache(pattern):
    model = small(pattern)
    cache, text = Engine(model).new_cache(1, 4), []  # with too little room: it grows
    for n, prompt in enumerate(tokens(3, 9).tolist()):
        new = text[-1:] + prompt if n else prompt  # the last token was yielded, but not read
        text += prompt
        answer = [t for (t,) in Engine(model).generate([new], 7, temperature=0, cache=cache)]
        assert answer == [t for (t,) in Engine(model).generate([text], 7, temperature=0)]
        text += answer
        assert cache.pos.tolist() == [5 + len(text) - 1]
    for prompts, rows in [([[1], [2]], 1), ([[1]], 2), ([[1], [2]], 2)]:
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts, {rows} cache rows: only one prompt continues"):
            next(Engine(model).generate(prompts, cache=Engine(model).new_cache(rows, 9)))


def test_top_k_and_top_p_distribution():
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.15, 0.3]])).repeat(4000, 1)
    counter = 0, torch.arange(4000), torch.full((4000,), 9)

    def shares(temperature=1.0, top_k=None, top_p=None):
        return torch.bincount(engine.sample_token(logits, temperature, top_k, top_p, counter), minlength=4) / 4000

    assert torch.allclose(shares(), torch.tensor([0.05, 0.5, 0.15, 0.3]), atol=0.03)
    assert torch.allclose(shares(top_k=2), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03)
    assert torch.allclose(shares(top_p=0.79), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03)
    assert torch.allclose(shares(top_p=0.81), torch.tensor([0, 0.5, 0.15, 0.3]) / 0.95, atol=0.03)
    assert torch.allclose(shares(temperature=0.5), torch.tensor([0.0025, 0.25, 0.0225, 0.09]) / 0.365, atol=0.03)
    assert shares(temperature=1e-40)[1] == 1


def test_a_lone_candidate_is_drawn():
    """Row 1791 draws an exponential for token 441 that would be infinite if its uniform number were 1."""
    logits = torch.zeros(1, 500).index_fill(1, torch.tensor([441]), 5.0)
    counter = 1, torch.tensor([1791]), torch.tensor([0])
    assert engine.sample_token(logits, 1.0, 1, None, counter).item() == 441
    assert engine.sample_token(logits, 1.0, None, 1e-6, counter).item() == 441


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(-(2**63), 2**64 - 1), row=st.integers(0, 10**6), pos=st.integers(0, 10**6))
def test_exponentials_are_finite_and_positive(seed, row, pos):
    draws = engine.exponential(seed, row + torch.arange(200), pos + torch.arange(200), 500)
    assert draws.isfinite().all() and (draws > 0).all()
    assert engine.exponential(1, torch.tensor([1791]), torch.tensor([0]), 500).isfinite().all()


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-46, 1e-39, 1e-31, 1e-20])  # float32 has none below 1e-45
def test_tiny_temperatures_are_greedy(temperature):
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    logits[0, :25] = float("-inf")
    counter = 0, torch.arange(40), torch.arange(40)
    for top_k, top_p in ((None, None), (3, None), (None, 0.5)):
        assert torch.equal(engine.sample_token(logits, temperature, top_k, top_p, counter), logits.argmax(-1))


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.text("TtMHh", min_size=1, max_size=4),
    options=st.fixed_dictionaries(
        dict(
            n_meta=st.integers(0, 5), window=st.integers(1, 9), kv_share=st.booleans(),
            fusion=st.sampled_from(["mean", "sum", "diff", "concat"]), n_hidden=st.sampled_from([0, 40]),
            branch_norm=st.sampled_from(["rms", "group", "none"]), branch_scale=st.booleans(), rope=st.booleans(),
            n_kv_head=st.sampled_from([1, 2, 4]), d_conv=st.integers(1, 5), expand=st.integers(1, 2),
            ssm=st.sampled_from(["mamba", "mamba2"]), ssm_norm=st.booleans(), tied=st.booleans(),
            rope_orig=st.sampled_from([0, 8]),
        )
    ),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
)  # fmt: skip
def test_greedy_tokens_are_the_naive_ones(pattern, options, lengths):
    """Prompts in a batch, against Hymba.generate, which reads everything again for each token."""
    model = small(pattern, **options)
    prompts = [tokens(n, seed=i).tolist() for i, n in enumerate(lengths)]
    expected = [list(model.generate(prompt, 12, temperature=0)) for prompt in prompts]
    assert [list(row) for row in zip(*Engine(model).generate(prompts, 12, temperature=0), strict=True)] == expected


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_samples_follow_the_naive_distribution(temperature):
    """Frequencies of two tokens drawn in a row, by 4,000 rows of the engine and from the softmax of model(idx)."""
    model, n, V = small("hM", n_meta=1), 4000, 61
    drawn = torch.tensor(list(Engine(model).generate([[1, 2]] * n, 2, temperature=temperature, seed=3))).T  # (n, 2)
    with torch.no_grad():
        first = (model(torch.tensor([[1, 2]]))[0, -1] / temperature).softmax(-1)
        pairs = torch.tensor([[1, 2, token] for token in range(V)])
        second = first @ (model(pairs)[:, -1] / temperature).softmax(-1)
    for column, p in zip(drawn.T, (first, second), strict=True):
        counts = torch.bincount(column, minlength=V).double()
        chi2 = ((counts - n * p) ** 2 / (n * p).clamp(min=1)).sum()
        assert chi2 < V + 4 * math.sqrt(2 * V)


def test_cache_refuses_long_calls_for_ragged_rows():
    cache = Cache(HymbaConfig(**SMALL, pattern="TT"), 2, 9, torch.float32, torch.device("cpu"))
    cache.ragged = True
    with pytest.raises(ValueError, match="one token a call"):
        cache.block(0).extend(None, torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8))


def test_generate_refuses_a_gpu_that_is_not_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    weight = types.SimpleNamespace(device=torch.device("cuda:1"))
    model = types.SimpleNamespace(config=HymbaConfig(**SMALL, pattern="T"), embed=types.SimpleNamespace(weight=weight))
    with pytest.raises(ValueError, match=r"on cuda:1: call torch.cuda.set_device\(1\) before generate"):
        next(Engine(model).generate([[1]]))
