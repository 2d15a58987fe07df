"""What a training step is made of: schedules, windows of tokens, which weights decay; CUDA graphs (on a GPU)."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import ops
import training
from conftest import SMALL, error, needs_gpu, small, tokens
from flags import TrainConfig
from model import Hymba, HymbaConfig, causal_conv


def test_schedules():
    cfg = TrainConfig(max_steps=100, warmup_steps=10, decay_steps=20, learning_rate=1.0, min_lr=0.1)
    rates = [training.learning_rate(cfg, i) for i in range(101)]
    assert rates[0] == 0.1 and rates[9:81] == [1.0] * 72 and abs(rates[90] - 0.55) < 1e-9 and rates[100] == 0.1
    cfg.schedule = "cosine"
    rates = [training.learning_rate(cfg, i) for i in range(101)]
    assert rates[10] == 1.0 and abs(rates[55] - 0.55) < 1e-9 and abs(rates[100] - 0.1) < 1e-9
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_windows_are_a_function_of_the_seed():
    """Each is whole, and the second set has its share."""
    a, b = np.arange(1000), np.arange(1000, 3000)
    windows = training.draw_windows([a, b], 0.25, (0, 3), 400, 8)
    assert windows.shape == (400, 9) and (np.diff(windows) == 1).all()
    assert 0.15 < (windows[:, 0] >= 1000).mean() < 0.35
    assert (windows == training.draw_windows([a, b], 0.25, (0, 3), 400, 8)).all()
    assert (training.draw_windows([a, b], 0.25, (0, 4), 400, 8) != windows).any()


def test_weight_decay_on_matrices_alone():
    model = small("hMT")
    optimizer = training.optimizer_for(model, TrainConfig())
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name.split(".")[-2] for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"in_proj", "x_proj", "dt_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pieces", [1, 3])
def test_step_graphs_are_the_model(pieces):
    """Losses and gradients of CUDA graphs of compiled blocks are the ones of the model itself, step after step, and an
    evaluation in between, with fewer sequences, changes nothing and compiles nothing."""
    ops.use_kernels(True)
    model, plain, exact = (small("HhhhH", n_embd=64, n_head=2, n_kv_head=1, window=16).cuda() for _ in range(3))
    exact = exact.double()
    training.compile_blocks(model)
    with ThreadPoolExecutor() as pool:  # something that uses the GPU, which has to end before capturing
        busy = [pool.submit(lambda: [torch.ones(8, device="cuda").cpu() for _ in range(10_000)])]
        graphs, rng = training.StepGraphs(model, 4, 24, pieces, busy), np.random.default_rng(0)
    for _ in range(2):
        batch = rng.integers(0, 61, (pieces, 4, 25))
        graphs.zero_gradients()
        losses = [graphs.loss(piece, backward=True) for piece in batch]
        mine = [p.grad.clone() for p in model.parameters()]
        with torch.compiler.set_stance("fail_on_recompile"):
            part = graphs.loss(batch[0, :3])
        assert abs(part - training.mean_loss(plain, *training.to_device(batch[0, :3], part.device))) < 1e-2
        data = [training.to_device(piece, part.device) for piece in batch]
        expected = [training.mean_loss(plain, *piece) / pieces for piece in data]
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-2
        grads = torch.autograd.grad(sum(expected), list(plain.parameters()))
        truth = torch.autograd.grad(sum(exact(*piece) / pieces for piece in data), list(exact.parameters()))
        mine, grads, truth = (torch.cat([g.flatten() for g in gs]) for gs in (mine, grads, truth))
        assert error(mine, truth) < 1.2 * error(grads, truth)  # bfloat16 rounds them as much without graphs


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ssm", ["mamba", "mamba2"])
def test_kernels_compiled_ahead_are_the_ones_that_run(ssm, monkeypatch):
    """After compile_kernels, a forward and backward pass compiles no kernel of kernels.py anew but the loss's; and the
    weights are drawn as without it."""
    import triton

    import kernels

    ops.use_kernels(True)
    config = HymbaConfig(**(SMALL | dict(pattern="HhhM", n_embd=96, n_head=3, n_kv_head=1, ssm=ssm)))
    torch.manual_seed(0)
    expected = Hymba(config)
    torch.manual_seed(0)
    for job in training.compile_kernels(config, 2, 24, torch.device("cuda")):
        job.result()
    model = Hymba(config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda fn, **_: compiled.append(fn.name))
    idx = tokens(2, 24).cuda()
    training.mean_loss(model.cuda(), idx, idx).backward()
    assert {name.split(".")[-1] for name in compiled} <= {"cross_entropy_row"}
    compiled.clear()
    monkeypatch.setattr(kernels, "conv_forward", triton.jit(kernels.conv_forward.fn))  # as if never compiled
    causal_conv(*(torch.randn(*shape, device="cuda") for shape in ((2, 9, 7), (7, 3), (7,))))
    assert [name.split(".")[-1] for name in compiled] == ["conv_forward"]
