"""Every system of config/, at toy size: it learns, does not look ahead, and generates alike in every way."""

import json

import pytest
import torch
from runs import ROOT, losses, train_here

import cost
import engine
import ops
import train
import training
from conftest import error, on_device, small, tokens
from engine import Engine
from flags import TrainConfig
from model import Hymba, HymbaConfig

TOY = dict(n_layer=4, n_embd=32, n_head=4, n_kv_head=2, n_hidden=24)
FILES = [ROOT / "config/hymba_125m.py", *sorted((ROOT / "config/systems").glob("*.py"))]


def toy(file) -> Hymba:
    fields = cost.at_size(file, TOY) | dict(vocab_size=61, block_size=16, d_state=4, ssm_head=16, window=8)
    torch.manual_seed(0)
    return Hymba(HymbaConfig(**fields | {"n_meta": 3 if fields.get("n_meta", 128) else 0}))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_system(file):
    model, data = toy(file), tokens(4, 17)
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(50):
        loss = model(data[:, :-1], data[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        seen.append(loss.item())
    assert seen[0] > 4 and seen[-1] < 0.5 * seen[0]
    idx = tokens(2, 30, seed=3)
    changed = idx.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 61
    with torch.no_grad():
        full, other = model(idx), model(changed)
        cache = Engine(model).new_cache(2, 30)
        pieces = torch.cat([Engine(model).logits(u, cache) for u in idx.split([9, 1, 1, 14, 5], dim=1)], 1)
    assert error(full[:, :17], other[:, :17]) < 1e-6 and error(full[:, 17:], other[:, 17:]) > 1e-3
    assert error(pieces, full) < 1e-5
    prompts = [tokens(n, seed=n).tolist() for n in (3, 12, 1)]
    together = list(zip(*Engine(model).generate(prompts, 10, temperature=0), strict=True))
    for prompt, row in zip(prompts, together, strict=True):
        assert list(row) == list(model.generate(prompt, 10, temperature=0))


def test_experts_resume_to_the_bit(corpus, tmp_path, monkeypatch):
    """And metrics.jsonl says how many tokens each expert got."""
    flags = ["--n_expert=3", "--n_expert_active=2", "--grad_accum=2", "--pattern=hMH", "--hybrid="]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_here(corpus, f"--out_dir={whole}", *flags)
    step = train.train_step

    def stops(run, number):
        if number == 13:
            raise KeyboardInterrupt
        return step(run, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stops)
        train_here(corpus, f"--out_dir={cut}", *flags)
    train_here(corpus, f"--out_dir={cut}", *flags, "--resume")
    assert losses(cut) == losses(whole) and losses(cut, "val_loss") == losses(whole, "val_loss")
    assert losses(cut, "expert_load") == losses(whole, "expert_load") and len(losses(whole)) == 24
    a, b = (Hymba.from_pretrained(folder / "last").state_dict() for folder in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
    loads = losses(whole, "expert_load")
    assert list(loads) == [4, 8, 12, 16, 20, 24]
    assert all(len(load) == 3 and all(abs(sum(share) - 1) < 1e-3 for share in load) for load in loads.values())
    assert all(0.5 < balance < 3 for balance in losses(whole, "expert_balance").values())
    assert json.loads((whole / "last/config.json").read_text())["model"]["n_expert"] == 3


def test_weight_decay_reaches_experts():
    model = Hymba(HymbaConfig(pattern="M", n_embd=16, n_head=1, n_kv_head=1, n_hidden=8, n_expert=2, vocab_size=9))
    decay, rest = ({id(p) for p in g["params"]} for g in training.optimizer_for(model, TrainConfig()).param_groups)
    ffn = model.blocks[0].ffn
    assert {id(p) for p in ffn.parameters()} <= decay and id(model.embed.weight) in rest
    assert len(decay) + len(rest) == len(list(model.parameters()))


@pytest.mark.parametrize("flags", [["--n_expert=1"], ["--n_expert=4", "--n_hidden=0"]])
def test_experts_that_cannot_be(corpus, flags):
    with pytest.raises(ValueError, match="n_expert=. needs n_hidden, and to be n_expert_active or more"):
        train_here(corpus, *flags)


@on_device
@pytest.mark.parametrize(
    "options, by_kernels",
    [({"n_expert": 4}, 2), ({"branch_norm": "group", "fusion": "sum"}, 2), ({"rope": False, "fusion": "sum"}, 2),
     (dict(fusion="concat", n_head=1, head_size=16), 2)],
    ids=str,
)  # fmt: skip
def test_one_token_steps(options, by_kernels, device, monkeypatch):
    """With the kernels of one-token steps and without."""
    steps, outputs, idx = [], [], tokens(2, 9).to(device)
    step = engine.step_block
    monkeypatch.setattr(engine, "step_block", lambda *args: (steps.append(1), step(*args))[1])
    for on in (True, False):
        ops.use_kernels(on)
        model = small("hT", **dict(n_head=2, n_kv_head=1, window=4) | options).to(device)
        cache = Engine(model).new_cache(2, 9)
        with torch.no_grad():
            outputs.append(torch.cat([Engine(model).logits(u, cache) for u in idx.split([6, 1, 1, 1], dim=1)], 1))
    assert len(steps) == 3 * by_kernels
    with torch.no_grad():
        assert error(outputs[0], model(idx)) < 1e-5 and error(*outputs) < 1e-5
