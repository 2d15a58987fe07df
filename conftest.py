"""
What the tests share: fixtures, small models and random inputs, and independent computations to compare with.

Without a GPU, Triton's interpreter runs kernels on CPU tensors. It is slow, so kernels are off in every test that does
not ask for the fixture `kernels_on`.
"""

import math
import os
import signal

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import ops  # noqa: E402
import prepare  # noqa: E402
from model import Hymba, HymbaConfig  # noqa: E402

torch.set_num_threads(1)  # the tensors here are too small to share
os.environ["OMP_NUM_THREADS"] = "1"  # in what the tests start, too
ops.use_kernels(False)  # while fixtures of a whole module are made, too
hypothesis.settings.register_profile("same", derandomize=True)  # cases that are the same in each run
hypothesis.settings.load_profile("same")

TRITON = ops.kernels is not None
if TRITON:
    import triton
    import triton.runtime.interpreter as interpreter

    builder = interpreter.InterpreterBuilder
    patch_tensors, splat, dot = interpreter._patch_lang_tensor, builder.create_splat, builder.create_dot

    def with_index(tensor, scope):
        """Triton 3.6 takes int() of one-element arrays for loop bounds, which NumPy 2.4 refuses."""
        patch_tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    def splat_bool(self, ret_ty, arg):
        """A comparison spread over a tensor becomes 32-bit integers, which 3.9 refuses as a mask."""
        tensor = splat(self, ret_ty, arg)
        tensor.data = tensor.data.astype(bool) if ret_ty.scalar == triton.language.int1 else tensor.data
        return tensor

    def dot_bfloat16(self, a, b, *rest):
        """The interpreter keeps bfloat16 as integers, and would multiply those."""
        wide = lambda u: interpreter.TensorHandle(  # noqa: E731
            (u.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32
        )
        return dot(self, *(wide(u) if u.dtype.scalar == triton.language.bfloat16 else u for u in (a, b)), *rest)

    interpreter._patch_lang_tensor, builder.create_splat, builder.create_dot = with_index, splat_bool, dot_bfloat16

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
on_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(GPU or not TRITON, reason="pip install triton: 3.6 or later")),
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
    ],
)


@pytest.fixture(autouse=True)
def _kernels_off(monkeypatch):
    monkeypatch.setattr(ops, "KERNELS", {})


@pytest.fixture(autouse=True)
def _signals():
    """Scripts choose what a kill does. In a test's own process that may not stay: a child that is forked later and then
    killed would not end, but go on in the tests."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def kernels_on(_kernels_off, monkeypatch):
    monkeypatch.setattr(ops, "KERNELS", dict(ops.ALL_KERNELS))


@pytest.fixture
def poisoned(monkeypatch):
    """New tensors begin as NaN, so that what a kernel does not write shows; small tiles for the interpreter."""
    import engine_kernels
    import kernels

    for where, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        f = getattr(where, name)
        nan = lambda u: (u.detach().fill_(math.nan), u)[1] if u.is_floating_point() else u  # noqa: E731
        monkeypatch.setattr(where, name, lambda *a, f=f, nan=nan, **k: nan(f(*a, **k)))
    if not GPU:
        tile = 16, 16, 4, 2
        tiles = dict(
            FLOAT32=tile, HOPPER=dict.fromkeys(kernels.HOPPER, tile), AMPERE=dict.fromkeys(kernels.AMPERE, tile)
        )
        for name, value in (tiles | dict(CHUNK_QUERIES=16, RUN=16, STRIP=32, ROW_BLOCK=16)).items():
            monkeypatch.setattr(kernels, name, value)
        monkeypatch.setattr(engine_kernels, "DECODE_KEYS", 16)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
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


# ----------------------------------------------------------------------------------------------------------------------
# Small models and inputs

SMALL = dict(
    vocab_size=61,
    block_size=32,
    n_embd=32,
    n_head=4,
    n_kv_head=2,
    n_hidden=40,
    d_state=4,
    n_meta=5,
    window=7,
    ssm_head=16,
)
LETTERS = ["TTT", "ttt", "MMM", "HHH", "hhh", "MMM2"]
MIXED = ["HhhHhhhH", "MMTMtH", "hMH2"]


def sizes(pattern: str, **options) -> dict:
    """Fields of a small model. A 2 after the pattern: its SSM heads are Mamba-2's."""
    ssm = "mamba2" if pattern.endswith("2") else "mamba"
    return SMALL | {"pattern": pattern.removesuffix("2"), "ssm": ssm} | options


SHARES = {"1:3": dict(n_head=2, n_kv_head=1), "3:1": dict(n_head=6, n_kv_head=3)}  # attention : SSM
MEETINGS = [{"fusion": fusion} for fusion in ("mean", "diff", "concat", "sum")]  # of attention and SSM heads
MEETINGS += [{"branch_scale": False}, {"branch_norm": "none", "branch_scale": False, "fusion": "diff"}]
MEETINGS += [{"branch_norm": "none"}, {"rope": False}]
MEETINGS += [{"branch_norm": "group"}, {"branch_norm": "group", "branch_scale": False, "fusion": "concat"}]
MEETINGS += [dict(fusion="concat", head_size=8, branch_norm="group", **share) for share in SHARES.values()]
SYSTEMS = [(pattern, {}) for pattern in LETTERS + MIXED] + [("hH", options) for options in MEETINGS[1:]]
SYSTEMS += [("hH2", dict(fusion="concat", head_size=8, **share)) for share in SHARES.values()]
SYSTEMS += [(pattern, {"n_expert": 4, "n_expert_active": 2}) for pattern in ("HhT", "MTM2")]


def small(pattern: str, seed: int = 0, **options) -> Hymba:
    """A small model whose weights are large enough that every part matters in its output."""
    torch.manual_seed(seed)
    model = Hymba(HymbaConfig(**sizes(pattern, **options)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("proj.weight", "_proj", "embed.weight", "meta")):
                p.normal_(std=0.15)
            elif name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
    return model


def tokens(*shape: int, vocab: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error: norm of the difference over norm of the reference b."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def scan_inputs(B, T, D, N, seed, given=None) -> dict:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"x": r(B, T, D), "dt": r(B, T, D) - 1, "A": -torch.exp(r(D, N)), "B": r(B, T, N), "C": r(B, T, N)}
    options = {"D": r(D), "z": r(B, T, D), "dt_bias": r(D), "state": r(B, D, N)}
    return inputs | {k: v for k, v in options.items() if (given or {}).get(k, True)}


def expert_inputs(n, C, hidden, X, k, seed) -> tuple[dict, torch.Tensor]:
    """Inputs of mixture, and which experts each token has: one expert gets nothing where X > k."""
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"x": r(n, C), "weight": r(n, k), "gate": r(X, hidden, C), "up": r(X, hidden, C), "down": r(X, C, hidden)}
    scores = torch.rand(n, X, generator=g)
    scores[:, 0] -= 2 * (X > k)
    return inputs, scores.topk(k).indices


# ----------------------------------------------------------------------------------------------------------------------
# Independent computations


def scan_loop(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None):
    """The recurrence as it is written in the paper, token by token, in the dtype of its inputs."""
    h = x.new_zeros(len(x), *A.shape) if state is None else state
    dt = torch.log1p(torch.exp(dt if dt_bias is None else dt + dt_bias))
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        y = (h * C[:, t, None, :]).sum(-1)
        y = y if D is None else y + D * x[:, t]
        ys.append(y if z is None else y * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(ys, 1), h


def experts_loop(x, expert, weight, gate, up, down):
    """Each token through each of its experts, one by one."""
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for e, w in zip(expert[t].tolist(), weight[t], strict=True):
            g = gate[e] @ x[t]
            row = row + w * (down[e] @ (g * torch.sigmoid(g) * (up[e] @ x[t])))
        rows.append(row)
    return torch.stack(rows)


def ssd_inputs(B, T, heads, P, N, seed) -> dict:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    inputs = {"x": r(B, T, heads, P), "dt": r(B, T, heads) - 1, "A": -torch.exp(r(heads)), "B": r(B, T, N)}
    return inputs | {"C": r(B, T, N), "D": r(heads), "dt_bias": r(heads), "state": r(B, heads, P, N)}


def ssd_loop(x, dt, A, B, C, D, dt_bias, state=None):
    """Mamba-2 as the scan of Mamba: every channel a head of its own, with the dt and A of its head."""
    P, N = x.shape[-1], B.shape[-1]
    spread = lambda u: u.repeat_interleave(P, dim=-1)  # noqa: E731
    state = None if state is None else state.flatten(1, 2)
    A = spread(A)[:, None].expand(-1, N)
    y, h = scan_loop(x.flatten(2), spread(dt), A, B, C, spread(D), None, spread(dt_bias), state)
    return y.view(x.shape), h.unflatten(1, (-1, P))


def dense_attention(q, k, v, window, n_meta):
    """The rule of windowed_attention's docstring, with the whole mask."""
    (T, H, E), (S, G) = q.shape[1:], k.shape[1:3]
    position, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
    seen = (j <= position) & ((position - j < (window or S)) | (j < n_meta))
    k, v = (u.repeat_interleave(H // G, dim=2) for u in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(E)
    return torch.einsum("bhts,bshf->bthf", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def compare_with_grads(f, ref, inputs: dict, dtype=torch.float32, device="cpu") -> tuple[float, float]:
    """Largest relative errors of the outputs and of all gradients of f in dtype against ref in float64."""
    kept = ("A", "D", "dt_bias", "state", "weight", "bias")  # float32 in any case
    dtypes = {k: torch.float32 if k in kept else dtype for k in inputs}
    mine = {k: v.to(device, dtypes[k]).detach().requires_grad_() for k, v in inputs.items()}
    theirs = {k: v.to(dtypes[k]).double().to(device).detach().requires_grad_() for k, v in inputs.items()}
    out, expected = f(**mine), ref(**theirs)
    out, expected = [u if isinstance(u, tuple) else (u,) for u in (out, expected)]
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(u.shape, generator=g, dtype=torch.float64).to(o) for u, o in zip(expected, out, strict=True)]
    torch.autograd.backward(out, grads)
    torch.autograd.backward(expected, [u.double() for u in grads])
    forward = max(error(a, b) for a, b in zip(out, expected, strict=True))
    return forward, max(error(mine[k].grad, theirs[k].grad) for k in inputs)


def cross_entropy_inputs(n, V, seed) -> tuple[dict, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    inputs = {"x": torch.randn(n, 16, generator=g), "weight": torch.randn(V, 16, generator=g)}
    targets = torch.randint(0, V, (n,), generator=g)
    return inputs, targets.where(torch.rand(n, generator=g) < 0.7, -1).index_fill(0, torch.tensor([n // 2]), V - 1)


def plain_cross_entropy(x, weight, targets):
    logits, targets = F.linear(x, weight), targets.to(x.device)
    return F.cross_entropy(logits, targets, ignore_index=-1), F.cross_entropy(
        logits, targets, None, None, -1, None, "none"
    )


BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)}
