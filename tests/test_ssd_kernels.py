"""Mamba-2's kernels against a float64 loop over tokens, on a GPU or in Triton's interpreter (small shapes)."""

import pytest
import torch

import model as model_module
import ops
from conftest import BOUNDS, TRITON, compare_with_grads, error, needs_gpu, on_device, ssd_inputs, ssd_loop

if TRITON:
    import ssd_kernels


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(6))
def test_ssd_kernel(case, dtype, device, poisoned, monkeypatch):
    """Outputs, the last state and all gradients; heads in one group and in several, whole chunks and not, any sizes."""
    monkeypatch.setattr(ssd_kernels, "GROUP", [10, 1, 2, 10, 2, 1][case])
    monkeypatch.setattr(ssd_kernels, "large", lambda: case % 2 == 0)
    if device == "cpu":
        T, heads, P, N = [(1, 1, 16, 16), (37, 3, 8, 5), (64, 2, 16, 16), (70, 3, 16, 20), (19, 5, 3, 4),
                          (33, 2, 64, 16)][case]  # fmt: skip
    else:
        T, heads, P, N = [(1, 24, 64, 128), (37, 3, 8, 5), (256, 12, 64, 64), (700, 7, 64, 128), (129, 25, 48, 100),
                          (128, 4, 128, 64)][case]  # fmt: skip
    inputs = ssd_inputs(1 + case % 2, T, heads, P, N, case)
    if case in (1, 2):
        del inputs["state"]
    forward, backward = compare_with_grads(ssd_kernels.ssd, ssd_loop, inputs, dtype, device)
    assert forward <= BOUNDS[dtype][0] and backward <= BOUNDS[dtype][1], (forward, backward)


@on_device
def test_ssd_kernel_reads_slices(device, poisoned):
    """Of the convolution's output and of the projection, as a block has them, and gradients that are slices, too."""
    g, (T, heads, P, N) = torch.Generator().manual_seed(0), (40, 2, 16, 16)
    xBC, z_dt = (torch.randn(2, T, n, generator=g) for n in (heads * P + 2 * N, 9 + heads))
    A, D, bias, weight = -torch.rand(heads), torch.randn(heads), torch.randn(heads), torch.randn(2, T, heads, 2 * P)

    def gradients(ssd, device, dtype):
        first, second = (u.to(device, dtype).clone().requires_grad_() for u in (xBC, z_dt))
        x, B, C = first.split([heads * P, N, N], -1)
        vectors = [u.to(device, dtype) for u in (A, D, bias)]
        y, _ = ssd(x.unflatten(-1, (heads, P)), second[..., 9:], vectors[0], B, C, *vectors[1:])
        torch.autograd.backward(y, weight.to(device, dtype)[..., P:])
        return y, first.grad, second.grad

    mine, theirs = gradients(ssd_kernels.ssd, device, torch.float32), gradients(ssd_loop, "cpu", torch.float64)
    assert max(error(a.cpu(), b) for a, b in zip(mine, theirs, strict=True)) < 1e-4


@on_device
def test_ssd_kernel_in_pieces_extremes_and_bits(device, poisoned):
    inputs = {k: v.to(device, torch.float32) for k, v in ssd_inputs(2, 70, 3, 16, 16, seed=0).items()}
    y, h = ssd_kernels.ssd(**inputs)
    cut = lambda at: {k: v[:, at] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}  # noqa: E731
    y1, h1 = ssd_kernels.ssd(**cut(slice(0, 41)))
    y2, h2 = ssd_kernels.ssd(**(cut(slice(41, None)) | {"state": h1}))
    assert error(torch.cat([y1, y2], 1), y) < 1e-5 and error(h2, h) < 1e-5
    assert torch.equal(y, ssd_kernels.ssd(**inputs)[0])
    dt = torch.where(
        torch.rand(2, 70, 3, generator=torch.Generator().manual_seed(0)) < 0.5, -14.0, 50.0
    ).double()  # softplus: 1e-6 and 50
    extreme = ssd_inputs(2, 70, 3, 16, 16, seed=0) | {"dt": dt, "A": -torch.tensor([1e-4, 1.0, 100.0]).double()}
    forward, backward = compare_with_grads(ssd_kernels.ssd, ssd_loop, extreme, device=device)
    assert forward < 1e-3 and backward < 1e-2  # exponents are differences of sums up to 64 x 5,000


@on_device
@pytest.mark.parametrize(
    "change, message",
    [(dict(B=torch.ones(2, 9, 5)), r"C must be \(2, 9, 5\)"), (dict(A=-torch.ones(3).double()), "A must be float32"),
     (dict(x=torch.ones(2, 9, 3, 200)), r"P=200, N=16 .* P, N <= 128"), (dict(D=torch.ones(4)), r"D must be \(3,\)")],
)  # fmt: skip
def test_ssd_kernel_says_what_it_cannot(change, message, device):
    inputs = {k: v.float() for k, v in ssd_inputs(2, 9, 3, 16, 16, seed=0).items() if k != "state"} | change
    with pytest.raises(ValueError, match=message):
        ssd_kernels.ssd(**{k: v.to(device) for k, v in inputs.items()})


@on_device
def test_ssd_kernel_runs_where_it_takes_the_inputs(device, kernels_on):
    inputs = {k: v.to(device) for k, v in ssd_inputs(1, 9, 3, 16, 16, seed=0).items()}
    choose = lambda **change: ops.fastest(model_module.ssd.__wrapped__, **(inputs | change))  # noqa: E731
    half = {k: v.bfloat16() if k in ("x", "dt", "B", "C") else v.float() for k, v in inputs.items()}
    assert choose(**half) is ssd_kernels.ssd and choose() is ops.ssd  # float64
    wide = lambda *shape: torch.zeros(*shape, device=device)  # noqa: E731
    assert choose(**(half | dict(B=wide(1, 9, 256)))) is ops.ssd
    assert choose(**(half | dict(x=wide(1, 9, 3, 128), B=wide(1, 9, 128)))) is ops.ssd


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("T, heads, N", [(2176, 50, 128), (65537, 4, 64)])
def test_ssd_kernel_on_long_sequences(T, heads, N):
    """In bfloat16, against the same inputs by chunks in float64; gradients are the same bits at every run."""
    inputs = {k: v.cuda() for k, v in ssd_inputs(1, T, heads, 64, N, seed=0).items() if k != "state"}
    inputs |= dict(
        dt=0.3 * inputs["dt"],
        A=-torch.linspace(1, 16, heads).double().cuda(),
        dt_bias=torch.full((heads,), -4.0).double().cuda(),
    )
    forward, backward = compare_with_grads(ssd_kernels.ssd, ops.ssd, inputs, torch.bfloat16, "cuda")
    assert forward < 1e-2 and backward < 1e-2
    runs = []
    for _ in range(2):
        mine = {k: v.bfloat16() if v.dim() > 1 else v.float() for k, v in inputs.items()}
        mine = {k: v.requires_grad_() for k, v in mine.items()}
        y, _ = ssd_kernels.ssd(**mine)
        runs.append([y, *torch.autograd.grad(y.square().sum(), list(mine.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
