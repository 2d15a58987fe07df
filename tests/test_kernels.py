"""Each kernel against float64, on a GPU or in Triton's interpreter, which is slow: shapes are small there."""

import itertools
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_module
import ops
import training
from conftest import (
    BOUNDS,
    GPU,
    SMALL,
    TRITON,
    compare_with_grads,
    cross_entropy_inputs,
    dense_attention,
    error,
    needs_gpu,
    on_device,
    plain_cross_entropy,
    scan_inputs,
    scan_loop,
    small,
    tokens,
)
from engine import Engine
from flags import TrainConfig
from model import Hymba, HymbaConfig, causal_conv, linear_cross_entropy, selective_scan

if TRITON:
    import kernels

needs_triton = pytest.mark.skipif(not TRITON, reason="pip install triton: 3.6 or later")


def check(f, ref, inputs, dtype, device):
    """Outputs and gradients within bounds of the float64 reference."""
    forward, backward = compare_with_grads(f, ref, inputs, dtype, device)
    assert forward <= BOUNDS[dtype][0] and backward <= BOUNDS[dtype][1], (forward, backward)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(6))
def test_scan_kernel(case, dtype, device, poisoned, monkeypatch):
    rng = np.random.default_rng(case)
    T = [1, 2, 9, 19, 17, 24] if device == "cpu" else [1, 2, 127, 128, 129, 600]
    D = int(rng.integers(1, 40 if device == "cpu" else 700))
    N = [16, 5, 1, 16, 33, 16][case] if device == "cuda" else [16, 5, 1, 16, 3, 16][case]
    given = {k: bool(rng.integers(2)) or case == 0 for k in ("D", "z", "dt_bias", "state")}
    monkeypatch.setattr(kernels, "CHUNK", 8 if device == "cpu" else 16)
    if case % 2:  # in segments, as few channels and many tokens are
        monkeypatch.setattr(kernels, "_segments", lambda n, t, room: (-(-t // 16), 16))
        monkeypatch.setattr(kernels, "_legs", lambda n, t, room: (2, kernels.CHUNK))  # in parts of two legs
    B = int(rng.integers(1, 3))
    if case % 3 == 0:  # two channels to a thread, as where four leave too few programs
        monkeypatch.setattr(kernels, "FULL", B * -(-D // kernels._tiles(N, 2, 8, 8)["BD"]))
    inputs = scan_inputs(B, T[case], D, N, case, given)
    check(kernels.selective_scan, scan_loop, inputs, dtype, device)


@needs_triton
@pytest.mark.parametrize("room", [8, 14, 16])
def test_scan_segments(room):
    """They cover T, in whole chunks, and none of them is short; a chip that is full needs none."""
    for n_program, T in itertools.product([1, 100, 400, 799, 800, 5000], [1, 511, 1024, 8320, 2**20 + 1]):
        n_segment, length = kernels._segments(n_program, T, room)
        assert (n_segment - 1) * length < T <= n_segment * length and length % kernels.CHUNK == 0
        alone, at_once = n_program >= 800 or T < 256, n_program * n_segment <= 132 * room
        assert n_segment == 1 if alone else length >= (128 if at_once else 512) and n_segment <= 128


@needs_triton
@pytest.mark.parametrize("n_program", [1, 100, 400, 799, 800, 1057, 1600, 5000])
def test_scan_legs(n_program):
    """Whole chunks, none short; as many parts as fill the chip, and legs where it holds less than all programs."""
    for T in [1, 511, 1024, 2176, 8320, 2**20 + 1]:
        n_leg, length = kernels._legs(n_program, T, 8)
        assert length % kernels.CHUNK == 0 and length >= min(T, 128 if n_leg == 1 else kernels.LEG)
        n_part = -(-T // (length * n_leg))
        assert n_part <= 128 and n_program * (n_part - 1) < 1056 and 1 <= n_leg <= 16
        assert n_leg == 1 or n_program * n_part > 1056
    cuts = {(1600, 2176): (7, 320), (2048, 2176): (1, 2176), (400, 8320): (7, 416), (200, 65536): (7, 1568)}
    assert {size: kernels._legs(*size, 8) for size in cuts} == cuts  # an H100 at the shapes of bench.py


@on_device
@pytest.mark.parametrize("options", [True, False])
def test_selective_scan_fn(options, device, poisoned):
    """mamba-ssm's signature: channels before tokens, strides of both kinds, one group or none."""
    inputs = scan_inputs(2, 19, 12, 4, seed=0, given=dict.fromkeys(("D", "z", "dt_bias"), options) | {"state": False})
    cut = lambda u: u.to(device).repeat(1, 2, 1)[:, : u.shape[1]]  # noqa: E731

    def mine(x, dt, A, B, C, D=None, z=None, dt_bias=None):
        B, C = (B.mT[:, None], C.mT.contiguous()) if options else (cut(B.mT), C.mT)
        x, dt, z = x.mT, dt.mT.contiguous(), z if z is None else z.mT
        y, last = kernels.selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, True, True)
        return y.mT, last

    check(mine, scan_loop, inputs, torch.float32, device)


@on_device
def test_scan_in_transformers_mamba(device, monkeypatch):
    """The example of docs/speed.md: the same logits with and without a cache."""
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba", reason="pip install transformers")
    if not hasattr(mamba, "mamba_selective_scan"):
        pytest.skip("this transformers has no function of its own for the scan")
    torch.manual_seed(0)
    config = mamba.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4, use_mambapy=False)
    model, idx, ran = mamba.MambaForCausalLM(config).to(device).eval(), tokens(2, 19).to(device), []

    def scan(*inputs, use_mambapy, use_associative_scan, **options):
        ran.append(options["return_last_state"])
        return kernels.selective_scan_fn(*inputs, **options)

    with torch.no_grad():
        expected = model(idx, use_cache=False).logits
        monkeypatch.setattr(mamba, "mamba_selective_scan", scan)
        logits = [model(idx, use_cache=cached).logits for cached in (False, True)]
    assert ran == [False] * 2 + [True] * 2 and max(error(u, expected) for u in logits) < 1e-5


@on_device
@pytest.mark.parametrize(
    "change, message",
    [(dict(delta_softplus=False), "delta_softplus"), (dict(A=torch.ones(12, 4, dtype=torch.complex64)), "complex"),
     (dict(B=torch.ones(12, 4)), "one group"), (dict(C=torch.ones(2, 3, 4, 19)), "one group"),
     (dict(u=torch.ones(2, 12, 19).double()), "float64")],
)  # fmt: skip
def test_selective_scan_fn_says_what_it_cannot(change, message, device):
    given = dict(u=torch.ones(2, 12, 19), delta=torch.ones(2, 12, 19), A=-torch.ones(12, 4), B=torch.ones(2, 4, 19))
    given |= dict(C=torch.ones(2, 4, 19), delta_softplus=True) | change
    with pytest.raises(ValueError, match=message):
        kernels.selective_scan_fn(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()})


@on_device
def test_scan_kernel_extremes(device, poisoned):
    torch.manual_seed(0)
    inputs = scan_inputs(2, 33, 24, 4, seed=0)
    dt = torch.where(torch.rand(2, 33, 24) < 0.5, -14.0, 50.0).double()  # softplus: 1e-6 and 50
    A = -(10.0 ** torch.linspace(-4, 3, 96).view(24, 4)).double()
    extreme = inputs | {"dt": dt, "A": A, "dt_bias": torch.zeros(24).double(), "z": 80 * inputs["z"].sign()}
    check(kernels.selective_scan, scan_loop, extreme, torch.float32, device)


@on_device
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", range(8))
def test_attention_kernel(case, dtype, tma, device, poisoned, monkeypatch):
    """With tiles fetched by the tensor memory accelerator, and without it (on a GPU: as on the ones before Hopper)."""
    if tma and not kernels.loads_by_tma():
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setattr(kernels, "loads_by_tma", lambda: tma)
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 products")
    rng = np.random.default_rng(case)
    T = [1, 2, 15, 16, 17, 40, 65, 50] if device == "cpu" else [1, 2, 127, 128, 129, 700, 1500, 300]
    cached = [0, 20, 0, 3, 0, 16, 0, 37][case]
    window = [None, 7, 1, None, 1000, 16, 20, 33][case]
    n_meta = [0, 5, 0, 3, 0, 16, 17, 200][case]
    E, F_ = [(16, 32), (64, 128), (32, 32), (48, 80), (16, 16), (64, 64), (16, 32), (16, 32)][case]
    G, R = [(1, 1), (2, 2), (1, 3), (2, 1)][case % 4]
    fused = torch.from_numpy(rng.standard_normal((2, T[case] + cached, G * R * E + G * (E + F_))))
    q, k, v = fused.split([G * R * E, G * E, G * F_], dim=-1)  # slices of a projection
    inputs = {"q": q[:, cached:].unflatten(2, (G * R, E)), "k": k.unflatten(2, (G, E)), "v": v.unflatten(2, (G, F_))}
    rule = dict(window=window, n_meta=n_meta)
    if window == 1 and n_meta == 0 or len(k[0]) == 1:  # one key: q and k get no gradient, and nothing to compare
        inputs = {"v": inputs["v"]}
        rule |= {
            "q": q.to(device, dtype)[:, cached:].unflatten(2, (G * R, E)),
            "k": k.to(device, dtype).unflatten(2, (G, E)),
        }
        as64 = {n: u.double() if isinstance(u, torch.Tensor) else u for n, u in rule.items()}
    else:
        as64 = rule
    mine, theirs = (lambda **u: kernels.windowed_attention(**u, **rule)), (lambda **u: dense_attention(**u, **as64))
    check(mine, theirs, inputs, dtype, device)


@on_device
@pytest.mark.parametrize(
    "T, K, with_tail", [(50, 4, False), (1, 4, False), (17, 3, True), (2, 4, True), (33, 2, False)]
)
def test_conv_kernel(T, K, with_tail, device, poisoned):
    g = torch.Generator().manual_seed(T)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"x": r(2, T, 45)[..., 3:], "weight": r(42, K), "bias": r(42)} | (
        {"tail": r(2, K - 1, 42)} if with_tail else {}
    )
    check(kernels.causal_conv, causal_conv, inputs, torch.float32, device)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(4))
def test_cross_entropy_kernel(case, dtype, device, poisoned):
    V = [1, 16, 50, 64] if device == "cpu" else [1, 8192, 50304, 32001]
    inputs, targets = cross_entropy_inputs([1, 3, 37, 20][case], V[case], case)
    ops.use_kernels(True)
    mine = lambda **u: linear_cross_entropy(**u, targets=targets.to(device))  # noqa: E731
    check(mine, lambda **u: plain_cross_entropy(**u, targets=targets)[0], inputs, dtype, device)


@on_device
def test_cross_entropy_kernel_extremes(device, poisoned):
    """Logits of +-1e4, rows that begin with -inf, a target outside of the vocabulary."""
    logits = 1e4 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[:, :20], targets = float("-inf"), torch.tensor([49, 48, -1, 20, 30, 50])
    a, b = logits.clone().to(device), logits.clone()[:5]
    losses = kernels.cross_entropy(a, targets.to(device), True).cpu()
    assert losses[5].isnan() and error(losses[:5], ops.cross_entropy(b, targets[:5], True)) < 1e-6
    assert error(a[:5].cpu(), b) < 1e-6


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(3))
def test_kernels_between_products(case, dtype, device, poisoned):
    """RoPE of a slice of a projection, SwiGLU, and the normalised sum of two branches, against float64."""
    (B, T, H, E), D = [(1, 1, 1, 4), (2, 5, 3, 6), (3, 7, 5, 64)][case], [1, 33, 320][case]
    g = torch.Generator().manual_seed(case)
    r = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype)  # noqa: E731
    x = r(B, T, 3 + H * E + 5)[..., 3 : 3 + H * E].unflatten(2, (H, E))
    pos = torch.randint(0, 10**4, (B if case else 1, T), generator=g).to(device)
    cos, sin = model_module.rope_angles(HymbaConfig(n_embd=2 * E, n_head=2, n_kv_head=1), pos)
    y = kernels.apply_rope(x, (cos, sin))
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, model_module.apply_rope(x.double(), (cos.double(), sin.double()))) < BOUNDS[dtype][0]
    a, b, scales = r(B, T, D), r(B, T, 2 * D)[..., :D], [r(D).float(), r(D)]
    assert error(kernels.swiglu(a, b), F.silu(a.double()) * b.double()) < BOUNDS[dtype][0]
    normed = [F.rms_norm(u.double(), (D,), scale.double(), 1e-6) for u, scale in zip((a, b), scales, strict=True)]
    fused = kernels.normed_sum(a, b, *scales, 0.5, -2.0, 1e-6)
    assert fused.shape == a.shape and error(fused, 0.5 * normed[0] - 2 * normed[1]) < BOUNDS[dtype][0]


@needs_triton
@pytest.mark.parametrize(
    "capability, hip, expected",
    [(90, None, True), (80, None, True), (75, None, False), (94, "6.4", False)],
)
def test_gpus_that_the_kernels_run_on(capability, hip, expected, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", kernels.tl.constexpr(False))
    monkeypatch.setattr(kernels, "OVERRIDE", 0)
    monkeypatch.setattr(kernels, "capability_of", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    x = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert kernels.usable(x) == expected


@needs_triton
def test_the_compiler_does_not_warn_of_a_cache(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", kernels.tl.constexpr(False))
    monkeypatch.setattr(kernels, "OVERRIDE", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    f = torch.compile(lambda x: x + kernels.capability(0), backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f(torch.zeros(1)) == 90


@on_device
def test_float64_uses_the_reference(device):
    model, idx = small("hHMtT", n_head=2, n_kv_head=1).double().to(device), tokens(1, 9).to(device)
    outputs = []
    for on in (True, False):
        ops.use_kernels(on)
        outputs.append((model(idx, idx), list(Engine(model).generate([[1, 2], [3]], 4, seed=1))))
    assert torch.equal(outputs[0][0], outputs[1][0]) and outputs[0][1] == outputs[1][1]


@on_device
@pytest.mark.parametrize("pattern", ["hH", "Mt", "M2"])
def test_model_with_kernels_equals_model_without(pattern, device, poisoned):
    model = small(pattern, n_head=2, n_kv_head=1).to(device)
    idx, targets, losses, grads = tokens(2, 24).to(device), tokens(2, 24, seed=2).to(device), [], []
    for on in (True, False):
        ops.use_kernels(on)
        losses.append(model(idx, targets))
        grads.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    assert error(*losses) < 1e-5 and max(error(a, b) for a, b in zip(*grads, strict=True)) < 1e-3
    with torch.no_grad():
        logits = model(idx)
    ops.use_kernels(True)
    again = torch.autograd.grad(model(idx, targets), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads[0], again, strict=True))
    cache = Engine(model).new_cache(2, 24)
    out = torch.cat([Engine(model).logits(piece, cache) for piece in idx.split([10, 1, 12, 1], dim=1)], 1)
    assert error(out, logits) < 1e-5


@on_device
@pytest.mark.parametrize(
    "sizes, expected",
    [(dict(d_conv=7), {"selective_scan", "cross_entropy"}), (dict(d_state=130), {"causal_conv", "cross_entropy"}),
     (dict(n_head=2, n_kv_head=1), {"selective_scan", "windowed_attention", "causal_conv", "cross_entropy"})],
)  # fmt: skip
def test_sizes_without_a_kernel_use_the_reference(sizes, expected, device, monkeypatch):
    """Each operation by itself: 7 taps, states of 130, and heads of 8 channels have none; the other kernels run."""
    model, idx, ran, outputs = small("hM", **sizes).to(device), tokens(1, 9).to(device), set(), []
    fastest = ops.fastest

    def noted(definition, *args, **options):
        f = fastest(definition, *args, **options)
        kernel = ops.KERNELS.get(definition.__name__, [None])[0]
        ran.update({definition.__name__} if f is kernel else ())
        assert f is kernel or f is ops.PLAIN.get(definition.__name__, definition)
        return f

    monkeypatch.setattr(ops, "fastest", noted)
    for on in (True, False):
        ops.use_kernels(on)
        loss = model(idx, idx)
        outputs.append([model(idx), loss, *torch.autograd.grad(loss, list(model.parameters()))])
        assert ran == (expected if on else set())
        ran.clear()
    assert max(error(a, b) for a, b in zip(*(u[:2] for u in outputs), strict=True)) < 1e-5
    assert max(error(a, b) for a, b in zip(*outputs, strict=True)) < 1e-3


@on_device
@pytest.mark.parametrize("pattern", ["hM", "M2"])
def test_kernels_compile_without_graph_breaks(pattern, device, monkeypatch):
    ops.use_kernels(True)
    monkeypatch.setattr(kernels, "RUN", kernels.RUN if GPU else 8)
    model = small(pattern, n_head=2, n_kv_head=1).to(device)
    idx = tokens(2, 8).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    a, b = (torch.autograd.grad(m(idx, idx), list(model.parameters())) for m in (model, compiled))
    assert max(error(x, y) for x, y in zip(a, b, strict=True)) < 1e-4
    if GPU:
        with torch.autocast(device, torch.bfloat16):
            compiled(idx, idx).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
@needs_gpu
def test_kernels_on_long_sequences():
    """65,537 tokens: the scan against the same in float64 pieces, attention against rows of the dense mask."""
    T, D, N = 65537, 48, 16
    inputs = scan_inputs(1, T, D, N, seed=0, given={"state": False})
    inputs = {k: v.cuda() for k, v in inputs.items()}
    with torch.no_grad():
        y, h = kernels.selective_scan(**{k: v.float() for k, v in inputs.items()})
        expected, last = selective_scan(**inputs)
        assert error(y, expected) < 1e-5 and error(h, last) < 1e-5
        q, k, v = (torch.randn(1, T, 2, n, device="cuda") for n in (64, 64, 128))
        o = kernels.windowed_attention(q, k, v, 1024, 128)
        for i in (0, 1000, 40000, T - 1):
            row = dense_attention(q[:, i : i + 1].double(), k[:, : i + 1].double(), v[:, : i + 1].double(), 1024, 128)
            assert error(o[:, i : i + 1], row) < 1e-5


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ssm", ["mamba", "mamba2"])
def test_training_with_kernels_on_and_off(ssm):
    """200 steps in bfloat16: the same curve within its noise, and the same bits for the same seed."""

    def curve(on: bool) -> list[float]:
        ops.use_kernels(on)
        torch.manual_seed(0)
        model = Hymba(HymbaConfig(**(SMALL | dict(pattern="HhhH", n_embd=64, ssm=ssm)))).cuda()
        optimizer = training.optimizer_for(model, TrainConfig())
        data, out = tokens(3000).cuda() // 8, []
        for step in range(200):
            at = (torch.arange(8)[:, None] * 331 + step * 13 + torch.arange(33)) % 3000
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(data[at[:, :-1]], data[at[:, 1:]])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return out

    a, again, b = curve(True), curve(True), curve(False)
    assert a == again
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.05 and a[-1] < a[0] - 0.2
