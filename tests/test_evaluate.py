"""Measurements: each against an independent computation, a perfect predictor or a random one, and the command line."""

import importlib.util
import json
import math
import shutil
import sys
import tempfile
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import ROOT, prepare_bpe, train_here

import checkpoint
import cost
import evaluate
import hooks
import ops
import pictures
import recall
from conftest import MIXED, small, tokens
from engine import Engine
from evaluate import Text
from model import selective_scan
from tokenizer import load_tokenizer

TOKENS = tokens(700).numpy()
TEXT = Text(TOKENS, bytes_per_token=2.0)
BYTES = load_tokenizer("bytes", ".")


@pytest.mark.parametrize("pattern", MIXED)
def test_loss_and_loss_by_position(pattern):
    """Against logits, window by window, and positions against one window alone."""
    model = small(pattern)
    result = evaluate.loss(model, TEXT, length=20, longest=60, n_tokens=200)
    starts = np.linspace(0, 700 - 21, 10).astype(int)
    windows = torch.tensor(np.stack([TOKENS[s : s + 21] for s in starts]))
    near = F.cross_entropy(model(windows[:, :-1]).transpose(1, 2), windows[:, 1:], reduction="none")
    losses = near.mean(1)
    assert result["windows"] == 10 and abs(result["loss"] - losses.mean().item()) < 1e-5
    assert abs(result["error"] - losses.std().item() / 10**0.5) < 1e-5
    assert abs(result["perplexity"] - math.exp(result["loss"])) < 1e-9
    assert abs(result["bits_per_byte"] - result["loss"] / math.log(2) / 2) < 1e-9
    edges = result["edges"]
    assert edges[0] == 1 and 21 in edges and edges[-1] == 61 and len(result["by_position"]) == len(edges) - 1
    starts = np.linspace(0, 700 - 61, 200 // 60).astype(int)
    windows = torch.tensor(np.stack([TOKENS[s : s + 61] for s in starts]))
    far = F.cross_entropy(model(windows[:, :-1]).transpose(1, 2), windows[:, 1:], reduction="none")
    for i in range(len(edges) - 1):
        part = (near if edges[i + 1] <= 21 else far)[:, edges[i] - 1 : edges[i + 1] - 1].mean(1)
        assert abs(result["by_position"][i] - part.mean().item()) < 1e-4
        assert abs(result["by_position_error"][i] - part.std().item() / len(part) ** 0.5) < 1e-4
    assert evaluate.loss(model, Text(TOKENS[:100]), length=32)["edges"][-1] == 100  # 8 times 32 are more
    with pytest.raises(ValueError, match="100 tokens of text are too few for a window of 100 \\+ 1: use shorter"):
        evaluate.loss(model, Text(TOKENS[:100]), length=32, longest=100)
    assert evaluate.loss(model, Text(TOKENS[:33]), length=32)["error"] is None


def answers(records: np.ndarray) -> dict[bytes, np.ndarray]:
    return {np.maximum(r, ~r)[:-1].tobytes(): r[1:] for r in records.astype(np.int64)}


def test_recall_of_a_perfect_predictor_and_of_a_random_one(monkeypatch):
    pairs, length, vocab = (2, 4, 8), 32, 64
    rng = np.random.default_rng(0)
    records = np.concatenate([recall.draw(rng, p, 40, length, vocab) for p in pairs])
    text = Text(records.astype(np.int16).flatten(), record=length + 1)
    model = small("hM", vocab_size=vocab, n_embd=vocab, tied=False)
    random = evaluate.recall(model, text)
    assert list(random["pairs"]) == ["2", "4", "8"] and random["accuracy"] < 0.15
    with pytest.raises(ValueError, match="the text is no data set of recall.py"):
        evaluate.recall(model, Text(text.tokens))
    assert random["cache_bytes"] == cost.cache_bytes(model.config, length)
    expected, numbers = answers(records), dict(zip(answers(records), np.repeat(pairs, 40), strict=True))

    def perfect(idx, wrong=()):
        """States that are the right answers, one-hot, or another token for wrong numbers of pairs."""
        targets = torch.tensor(np.stack([expected[row.tobytes()] for row in idx.numpy()]))
        off = torch.tensor([[numbers[row.tobytes()] in wrong] for row in idx.numpy()])
        return F.one_hot((targets.clamp(min=0) + off) % vocab, vocab).float()

    model.lm_head = nn.Parameter(torch.eye(vocab))
    monkeypatch.setattr(model, "hidden", perfect)
    assert [p["accuracy"] for p in evaluate.recall(model, text)["pairs"].values()] == [1, 1, 1]
    monkeypatch.setattr(model, "hidden", lambda idx: perfect(idx, wrong=(4,)))
    assert [p["accuracy"] for p in evaluate.recall(model, text)["pairs"].values()] == [1, 0, 1]


@pytest.mark.parametrize("pattern", MIXED)
def test_likelihoods_of_answers(pattern):
    """Several answers behind one prompt, against each text read whole; greedy, against generate."""
    model = small(pattern)
    engine = Engine(model)
    prompts, choices = tokens(3, 19), tokens(3, 4, 5, seed=2)
    for b in range(3):
        choices[b, 2] = torch.tensor(list(model.generate(prompts[b].tolist(), 5, temperature=0)))
    scores, greedy = evaluate.likelihoods(engine, prompts, choices)
    for b in range(3):
        for n in range(4):
            text = torch.cat([prompts[b], choices[b, n]])[None]
            log_p = model(text[:, :-1]).log_softmax(-1).gather(2, text[:, 1:, None])[0, -5:].sum()
            assert abs(scores[b, n] - log_p) < 1e-4
    assert greedy.tolist() == [[False, False, True, False]] * 3


def test_needle_s_loss():
    """Of one cell, against its prompt read whole."""
    model, hay = small("hM", vocab_size=257, block_size=64), Text(np.frombuffer(b"some real text. " * 40, np.uint8))
    seen, likelihoods = [], evaluate.likelihoods
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "likelihoods", lambda *args: (seen.append(args[1:]), likelihoods(*args))[1])
        result = evaluate.needle(model, BYTES, hay, [80], depths=(0.5,), n=1)
    ((prompt, answers),) = seen
    text = torch.cat([prompt[0], answers[0, 0]])[None]
    logits = model(text[:, :-1])[0, -answers.shape[2] :]
    assert abs(result["loss"][0][0] - F.cross_entropy(logits, answers[0, 0], reduction="sum").item()) < 1e-4


def test_codes_that_are_all_alike(monkeypatch):
    """A tokenizer that has one token for all digits would make codes be looked for without an end."""
    monkeypatch.setattr(evaluate, "encode_piece", lambda tokenizer, text: [0 if c.isdigit() else 1 for c in text])
    with pytest.raises(ValueError, match="the same tokens for many numbers, so codes cannot be told apart"):
        evaluate.codes(BYTES, np.random.default_rng(0), 1000, " ")


def test_needle_of_a_reader_and_of_a_guesser(monkeypatch):
    """A stand-in that looks the code up gets everything, one that does not gets none; the prompts are what they say."""
    model, seen = small("hM", vocab_size=257, block_size=64), []
    hay = Text(np.frombuffer(b"some real text, again and again. " * 40, np.uint8))

    def look_up(engine, prompts, choices):
        seen.extend(prompts.tolist())
        texts = [bytes(row) for row in prompts.tolist()]
        there = torch.tensor([[bytes(c) in t for c in row] for t, row in zip(texts, choices.tolist(), strict=True)])
        return there.float(), there

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "likelihoods", look_up)
        result = evaluate.needle(model, BYTES, hay, [80, 200], depths=(0, 0.5, 1), n=4, fact="key = {};")
    for what in ("greedy", "choice"):
        assert result[what] == [[1, 1]] * 3
    assert [len(row) for row in seen] == [80 - 6] * 12 + [200 - 6] * 12  # without the answer, which is " 12345"
    for row, depth in zip(seen, [0] * 4 + [0.5] * 4 + [1] * 4 + [0] * 4 + [0.5] * 4 + [1] * 4, strict=True):
        text = bytes(row).decode()
        assert text.endswith("\nkey =") and text.count("key =") == 2 and text.count(";\n") == 1
        before, after = text.index("\nkey"), text.rindex("\nkey") - text.index(";\n") - 2
        assert abs(before / (before + after) - depth) < 0.02
    assert 0 < np.mean(evaluate.needle(model, BYTES, hay, n=8, fact="key = {};")["choice"]) < 0.3  # a tenth, by chance
    with pytest.raises(
        ValueError, match="--lengths: fact and question need 26 tokens at least, and there is text for 1,345"
    ):
        evaluate.needle(model, BYTES, hay, [80, 20], fact="key = {};")


@pytest.mark.parametrize("fusion", ["mean", "diff", "concat"])
def test_heads_removed(fusion):
    """Against the model in which what follows the heads multiplies them by zero."""
    pattern = "hhMTttH"  # of neighbours hh and tt, the second reads the keys and values of the first
    measured = evaluate.heads(small(pattern, fusion=fusion), lambda m: m(tokens(2, 12), tokens(2, 12)).item())
    for i, letter in enumerate(pattern):
        for kind in ("attn", "ssm"):
            if letter in {"attn": "M", "ssm": "Tt"}[kind]:
                assert measured[kind][i] is None
                continue
            model = small(pattern, fusion=fusion)
            mixer = model.blocks[i].mixer
            with torch.no_grad():
                if letter not in "Hh":
                    mixer.out_proj.weight.zero_()
                elif fusion == "concat":
                    half = mixer.out_proj.in_features // 2
                    mixer.out_proj.weight[:, slice(half) if kind == "attn" else slice(half, None)] = 0
                else:
                    getattr(mixer, f"{kind}_branch_norm").weight.zero_()
            expected = model(tokens(2, 12), tokens(2, 12)).item()
            assert abs(measured["whole"] + measured[kind][i] - expected) < 1e-6
            assert abs(measured[kind][i]) > 1e-5
    model = small(pattern, fusion=fusion)
    assert measured["whole"] == model(tokens(2, 12), tokens(2, 12)).item()
    windows = lambda m: np.array([m(tokens(1, 12, seed=i), tokens(1, 12, seed=i)).item() for i in range(3)])  # noqa: E731
    measured, whole = evaluate.heads(model, windows), windows(model)
    with hooks.removed(model.blocks[0], "ssm"):
        changes = windows(model) - whole
    assert abs(measured["ssm"][0] - changes.mean()) < 1e-6 and measured["ssm"][5] is measured["ssm_error"][5] is None
    assert abs(measured["ssm_error"][0] - changes.std(ddof=1) / 3**0.5) < 1e-6


@pytest.mark.parametrize("pattern,more", [("HhhMTt", {}), ("tTh", {"n_meta": 0}), ("hMH", {"ssm": "mamba2"})])
def test_attention(pattern, more, monkeypatch):
    """Shares, magnitudes and memory against a float64 pass that keeps everything."""
    n_meta, mamba2 = more.setdefault("n_meta", 5), "ssm" in more
    model = small(pattern, **more).double()
    M, T, c = n_meta, 24, model.config
    kept = {}
    for i, block in enumerate(model.blocks):
        for name in ("attn", "ssm", "attn_branch_norm", "ssm_branch_norm"):
            if getattr(block.mixer, name, None):
                keep = lambda m, args, out, key=(i, name): kept.update({key: (args, out)})  # noqa: E731
                getattr(block.mixer, name).register_forward_hook(keep)
        if block.mixer.ssm:
            keep = lambda m, args, out, key=(i, "dt"): kept.update({key: out})  # noqa: E731
            (block.mixer.in_proj if mamba2 else block.mixer.ssm.dt_proj).register_forward_hook(keep)
    n = len(TOKENS) // (T + 1)
    windows = np.stack([TOKENS[s : s + T] for s in np.linspace(0, len(TOKENS) - T - 1, n).astype(int)])
    plain = model(torch.tensor(windows))
    monkeypatch.setattr(evaluate, "PREFILL", n * T)  # one batch
    result = evaluate.attention(small(pattern, **more), TEXT, length=T, n_tokens=n * T)
    assert result["length"] == T
    for i, (letter, row) in enumerate(zip(pattern, result["blocks"], strict=True)):
        for name in ("attn", "ssm", "attn_branch_norm", "ssm_branch_norm"):
            assert (row[name] is None) == ((i, name) not in kept)
            if row[name] is not None:
                out = kept[i, name][1]
                out = (out[0] if isinstance(out, tuple) else out)[:, M:]
                assert abs(row[name] - out.square().mean().sqrt().item()) < 1e-5
        if letter in "MHh":
            ssm = model.blocks[i].mixer.ssm
            dt = kept[i, "dt"][:, M:]
            dt = dt.split(model.blocks[i].mixer.sizes, dim=-1)[-1] if mamba2 else dt
            dt = F.softplus(dt + ssm.dt_bias).mean((0, 1))
            lengths = 1 / (dt[:, None] * ssm.A_log.exp().view(len(dt), -1))
            assert abs(row["memory"]["mean"] / lengths.mean().item() - 1) < 1e-5
            assert abs(row["memory"]["50%"] / lengths.quantile(0.5).item() - 1) < 1e-4
            assert row["memory"]["10%"] < row["memory"]["50%"] < row["memory"]["90%"]
        else:
            assert row["memory"] is None
        if letter == "M":
            assert row["share"] is None and row["meta"] is None
            continue
        heads, ((qkv, *_), (_, handed)) = model.blocks[i].mixer.attn, kept[i, "attn"]
        q = qkv[0].unflatten(-1, (heads.H, heads.E))
        half = heads.E // 2
        angle = torch.arange(M + T)[:, None, None] * c.rope_base ** (-torch.arange(half) / half)
        turn = torch.polar(torch.ones(()).double(), angle.double())
        q = torch.complex(q[..., :half], q[..., half:]) * turn
        q = torch.cat([q.real, q.imag], -1)
        k = handed[0].repeat_interleave(heads.H // heads.G, 2)
        scores = torch.einsum("bthe,bshe->bhts", q, k) / heads.E**0.5
        s = torch.arange(M + T)
        ages = s[:, None] - s
        seen = (ages >= 0) & ((ages < c.window) | (s < M)) if letter in "th" else ages >= 0
        p = scores.masked_fill(~seen, -math.inf).softmax(-1)[:, :, M:].mean((0, 1))  # (T, M + T)
        own = p[range(T), range(M, M + T)].mean().item()
        first = p[1:, M].sum().item() / T
        meta = p[:, :M].mean(0)
        expected = [meta.sum().item(), first, own, 1 - meta.sum().item() - first - own]
        assert np.abs(np.array(list(row["share"].values())) - expected).max() < 1e-5
        assert list(row["share"]) == ["meta", "first", "self", "others"]
        assert np.abs(np.array(row["meta"]) - meta.numpy(force=True)).max(initial=0) < 1e-5
    again = small(pattern, **more)
    evaluate.attention(again, TEXT, length=T, n_tokens=100)
    assert torch.allclose(again(torch.tensor(windows)).double(), plain, atol=1e-4)  # nothing is left behind
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in again.modules())


def test_memory_is_where_a_state_has_decayed():
    """With dt that does not change, a state that is written once falls to 1 / e in as many tokens as it says."""
    model = small("M", n_meta=0, d_state=1, dt_rank=1)
    ssm = model.blocks[0].mixer.ssm
    with torch.no_grad():
        ssm.dt_proj.weight.zero_(), ssm.A_log.zero_()
        ssm.dt_bias.copy_(torch.linspace(-6, -2, len(ssm.dt_bias)))
    row = evaluate.attention(model, TEXT, length=32)["blocks"][0]["memory"]
    D, T = len(ssm.dt_bias), 500
    x, ones = torch.zeros(1, T, D), torch.ones(1, T, 1)
    x[:, 0] = 1  # written once
    y = selective_scan(x, torch.zeros(1, T, D), -ssm.A_log.exp(), ones, ones, torch.zeros(D), dt_bias=ssm.dt_bias)[0]
    left = (y[0] / y[0, :1]).T  # (D, T) of what was written
    lengths = torch.tensor([(row > math.exp(-1)).sum().item() for row in left]).float()  # in whole tokens
    assert abs(row["mean"] - lengths.mean().item()) < 1 and lengths.max() < T
    assert (
        abs(row["10%"] - lengths.quantile(0.1).item()) < 2 and abs(row["90%"] / lengths.quantile(0.9).item() - 1) < 0.05
    )


@pytest.mark.parametrize("task", [evaluate.losses, evaluate.attention])
def test_windows_begin_as_texts_do(task, monkeypatch):
    """Of a tokenizer that has a first token, each window has it, and no other token of it is lost."""
    seen = []
    model = small("hM", n_meta=2)
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx: (seen.append(idx), hidden(idx))[1])
    task(model, Text(np.arange(2, 62), begin=(1,)), 9, 1000)
    rows = torch.cat(seen)
    assert rows.shape == (6, 9) and (rows[:, 0] == 1).all() and (rows[:, 1:].diff() == 1).all()
    assert rows[0, 1] == 2


def test_shares_are_summed_in_float32():
    """Also where matrix products are in bfloat16: the watch sees the same as without, but for its inputs' rounding."""
    q, k, v = torch.randn(1, 40, 2, 8) * 4, torch.randn(1, 40, 1, 8).bfloat16().float() * 4, torch.randn(1, 40, 1, 8)
    shares = []
    for enabled in (False, True):
        watch = hooks.Watch(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            watch.attend(q.bfloat16().float(), (k, v), types.SimpleNamespace(window=None, n_meta=2))
        shares.append(watch.seen)
    assert torch.equal(*shares)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """out/a and out/b, trained on text; out/r, trained on records."""
    root = tmp_path_factory.mktemp("runs")
    recall.prepare_recall([2, 4], 300, data_dir=root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "KERNELS", {})
        train_here(corpus, f"--out_dir={root / 'out/a'}", "--max_steps=2")
        train_here(corpus, f"--out_dir={root / 'out/b'}", "--max_steps=2", "--pattern=MT", "--n_meta=0")
        train_here(root, f"--out_dir={root / 'out/r'}", "--max_steps=2", "--dataset=recall", "--block_size=16")
    return root


def run(capsys, task: str, *flags) -> tuple[dict, str]:
    """The JSON result of python evaluate.py, and what it printed."""
    evaluate.main([task, "--device=cpu", *map(str, flags)])
    printed = capsys.readouterr().out
    file = printed.splitlines()[-1].removeprefix("the results: ")
    with open(file) as f:
        return json.load(f), printed


def test_loss_command(runs, capsys):
    a, b = runs / "out/a", runs / "out/b"
    result, printed = run(capsys, "loss", f"--init_from={a}", b, "--tokens=500")
    assert list(result["models"]) == [str(a), str(b)] and result["task"] == "loss"
    model = result["models"][str(a)]
    assert model["folder"] == str(a / "best") and model["pattern"] == "HhhH"
    assert model["texts"]["words"]["length"] == 24 and model["texts"]["words"]["edges"][-1] == 8 * 24 + 1
    assert printed.splitlines()[0].startswith("| model") and f"{model['texts']['words']['loss']:.4f}" in printed
    assert (runs / "out/a_loss.json").is_file()
    (runs / "out/a_loss_2.png").write_text("a picture")
    again, _ = run(capsys, "loss", f"--init_from={a}", f"--init_from={b}", "--tokens=200")
    assert json.loads((runs / "out/a_loss.json").read_text()) == result  # nothing is replaced
    assert json.loads((runs / "out/a_loss_3.json").read_text()) == again and list(again["models"]) == [str(a), str(b)]
    assert (runs / "out/a_loss_2.png").read_text() == "a picture"
    if importlib.util.find_spec("matplotlib"):
        assert (runs / "out/a_loss.png").stat().st_size > 5000
    text = runs / "some.txt"
    text.write_bytes("é\r\n".encode() * 100)  # 4 bytes, and as many tokens
    (runs / "folder").mkdir()
    (runs / "folder/image.png").write_bytes(b"\x89PNG")  # no text: left out
    (runs / "folder/.hidden").write_text("hidden")
    assert len(evaluate.read_text(text, BYTES).tokens) == 400  # a file's bytes, line ends as they are
    text = text.rename(runs / "folder/some.txt").parent
    assert len(evaluate.read_text(text, BYTES).tokens) == 400
    result, _ = run(capsys, "loss", b / "last", f"--text={text}", f"--out={runs / 'x/y.json'}", "--longest=100")
    text = result["models"][str(b / "last")]["texts"][str(text)]
    assert text["edges"][-1] == 101 and abs(text["bits_per_byte"] - text["loss"] / math.log(2)) < 1e-9
    assert (runs / "x/y.json").is_file()


def test_the_validation_loss_is_training_s(runs, capsys):
    """Over the same windows, the loss that train.py logs."""
    logged = json.loads((runs / "out/a/metrics.jsonl").read_text().splitlines()[-1])
    result, _ = run(capsys, "loss", runs / "out/a", "--tokens=96")
    words = result["models"][str(runs / "out/a")]["texts"]["words"]
    assert abs(words["loss"] - logged["val_loss"]) < 1e-4 and abs(words["bits_per_byte"] - logged["val_bpb"]) < 1e-4
    logged = json.loads((runs / "out/r/metrics.jsonl").read_text().splitlines()[-1])
    assert logged["val_loss"] > 0 and logged["val_bpb"] is None
    result, _ = run(capsys, "loss", runs / "out/r", "--tokens=96")
    assert result["models"][str(runs / "out/r")]["texts"]["recall"]["bits_per_byte"] is None  # it is no text


def test_what_was_measured_is_not_lost(runs, capsys, monkeypatch):
    """If the second model fails, the first one's results and table are there, and no picture of another run."""
    a, b, picture = runs / "out/a", runs / "out/b", runs / "out/lost.png"
    picture.write_text("of another run")
    (runs / "out/lost.json").write_text('{"task": "loss", "flags": [], "models": {}}')  # may be replaced
    load = checkpoint.load

    def fails(name, *args):
        if name == str(b):
            raise ValueError("b is corrupt")
        return load(name, *args)

    monkeypatch.setattr(checkpoint, "load", fails)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="b is corrupt"):
        run(capsys, "loss", a, b, "--tokens=96", f"--out={runs / 'out/lost.json'}")
    printed = capsys.readouterr().out
    assert list(json.loads((runs / "out/lost.json").read_text())["models"]) == [str(a)]
    assert str(a) in printed and "the results: " in printed and not picture.exists()
    monkeypatch.setattr(checkpoint, "load", None)
    before = sorted((runs / "out").iterdir())
    with pytest.raises(TypeError):  # nothing was measured
        evaluate.main(["loss", str(a), "--device=cpu"])
    assert sorted((runs / "out").iterdir()) == before
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/nowhere/x"))
    monkeypatch.setattr(evaluate, "claim", lambda *args: open("/nowhere/x"))
    for out in ([], [f"--out={runs / 'new.json'}"]):
        with pytest.raises(OSError):  # a folder that cannot be written: said before anything is measured
            evaluate.main(["loss", str(a), "--device=cpu", *out])


def test_two_calls_have_two_files(runs, capsys, monkeypatch):
    """The second call chooses a name while the first one is at work."""
    load, both = checkpoint.load, []

    def begins(*args):
        monkeypatch.setattr(checkpoint, "load", load)
        both.append(run(capsys, "loss", runs / "out/b", "--tokens=96"))
        return load(*args)

    monkeypatch.setattr(checkpoint, "load", begins)
    both.append(run(capsys, "loss", runs / "out/b", "--tokens=120"))
    assert len({printed.splitlines()[-1] for _, printed in both}) == 2  # "the results: FILE"
    tokens = [result["flags"][-1] for result, _ in both]
    assert tokens == ["--tokens=96", "--tokens=120"]


def test_pictures_show_what_is_there(monkeypatch):
    """Tasks of the harness without an accuracy are left out, and each has its name below its models; texts of one name
    are two; what there is not is not drawn as zero; models of different tokenizers have the same unit."""
    plt = pytest.importorskip("matplotlib.pyplot")
    tasks = {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1, "exact_match,flexible": 0.75}
    models = {"a": {"tasks": {"x": tasks, "y": {"word_perplexity": 20.0}}}, "b": {"tasks": {"x": {"acc": 0.25}}}}
    pictures.draw_harness(plt, models)
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in plt.gca().patches if bar.get_height() > 0]
    assert np.allclose(bars, [(-0.2, 0.5), (0.8 + 0.4, 0.25)])  # of two kinds, which are not compared
    assert [label.get_text() for label in plt.gca().get_xticklabels()] == ["x\nexact_match,strict-match", "x\nacc"]
    (error,) = plt.gca().containers[1].errorbar.lines[2][0].get_segments()[:1]
    assert np.allclose(error, [[-0.2, 0.4], [-0.2, 0.6]])
    changes = {"attn": [0.5, None], "attn_error": [None, None], "ssm": [0.25, 0.125], "ssm_error": [0.1, 0.1]}
    pictures.draw_heads(plt, {"a": {"pattern": "HM", "loss": changes}})
    heights = np.array([bar.get_height() for bar in plt.gca().patches])
    assert np.allclose(heights, [0.5, math.nan, 0.25, 0.125], equal_nan=True)
    u = {"edges": [1, 4, 16], "by_position": [3.0, 2.0], "by_position_error": [0.1, None], "length": 8}
    u |= {"bits_per_byte": None, "loss": 2.5}
    pictures.draw_loss(plt, {"a": {"texts": {"x": u}}, "b": {"texts": {"y": u}}})
    assert [text.get_text() for text in plt.gca().get_legend().get_texts()] == ["a, x", "b, y"]
    assert np.allclose(plt.gca().lines[0].get_xdata(), [3**0.5, 60**0.5]) and plt.gca().get_xlabel() == "tokens read"
    few, many = (u | {"bits_per_byte": 2.5 / math.log(2) / size} for size in (1, 2))  # by bytes of a token
    pictures.draw_loss(plt, {"a": {"texts": {"x": few}}, "b": {"texts": {"x": many}}})
    a, b = (bars[0].get_xydata() for bars in plt.gca().containers)
    assert np.allclose(b, a * [2, 0.5]) and np.allclose(a[:, 1], np.array([3, 2]) / math.log(2))
    assert plt.gca().get_xlabel() == "bytes read" and plt.gca().get_ylabel() == "bits per byte"
    pictures.draw_loss(plt, {"a": {"texts": {"x": u | {"by_position": [], "by_position_error": []}}}})
    assert [line.get_xydata().tolist() for line in plt.gca().lines] == [[[8, 2.5]]]  # of records
    row = next(
        pictures.loss_rows({"texts": {"x": u | dict.fromkeys(["loss", "error", "perplexity", "bits_per_byte"])}})
    )
    assert list(row)[-1] == "4 to 15" and row["4 to 15"] == 2.0
    plt.close("all")


def test_a_picture_of_attention():
    """Panels of what a model does not have are not shown; meta tokens of one text are bars, those of several a map."""
    plt = pytest.importorskip("matplotlib.pyplot")
    nothing = dict.fromkeys(["share", "meta", "attn", "ssm", "attn_branch_norm", "ssm_branch_norm", "memory"])
    share, memory = {"meta": 0.5, "first": 0.25, "self": 0.25, "others": 0.0}, {"10%": 1.0, "50%": 4.0, "90%": 9.0}
    t = nothing | {"share": share, "meta": [0.125, 0.375], "attn": 2.0}
    m = nothing | {"ssm": 3.0, "memory": memory}
    models = {"a": {"pattern": "TTM", "texts": {"x": {"blocks": [t, t | {"meta": [0.25, 0.25]}, m]}}}}
    models["b"] = {"pattern": "M", "texts": {"x": {"blocks": [m]}}}
    pictures.draw_attention(plt, models)
    axes = np.array(plt.gcf().axes).reshape(2, 4)
    assert [[ax.get_visible() for ax in row] for row in axes] == [[True] * 4, [False, True, True, False]]
    shares, sizes, memories, meta = axes[0]
    assert [bar.get_height() for bar in shares.patches] == [0.5, 0.5, 0, 0.25, 0.25, 0, 0.25, 0.25, 0, 0, 0, 0]
    assert [label.get_text() for label in shares.get_xticklabels()] == ["T", "T", "M"]
    assert [bar.get_height() for bar in meta.patches] == [0.1875, 0.3125]  # means over blocks
    lines = {line.get_label(): line.get_ydata() for line in sizes.lines}
    assert np.allclose(lines["attn"], [2, 2, math.nan], equal_nan=True)
    assert np.allclose(lines["ssm"], [math.nan, math.nan, 3], equal_nan=True) and len(lines) == 2
    assert memories.lines[0].get_xydata().tolist() == [[2, 4]] and memories.collections[0].get_segments()[0][1, 1] == 9
    assert axes[0, 0].get_ylabel() == "a" and axes[1, 1].get_ylabel() == "b"
    texts = {"p/x.py": models["a"]["texts"]["x"], "y.md": {"blocks": [t | {"meta": [0.5, 0.25]}, t, m]}}
    pictures.draw_attention(plt, {"a": {"pattern": "TTM", "texts": texts}})
    *_, meta, colours = plt.gcf().axes
    assert meta.images[0].get_array().tolist() == [[0.1875, 0.3125], [0.3125, 0.3125]]
    assert colours.get_ylim() == (0, 0.3125) and axes[0, 3].get_title() == "share of each meta token"
    assert [label.get_text() for label in meta.get_yticklabels()] == ["x.py", "y.md"]
    plt.close("all")


@pytest.mark.parametrize("task", ["needle", "heads", "attention", "recall"])
def test_other_commands(runs, capsys, monkeypatch, task):
    """Each gives a table, a file and a picture, also without matplotlib."""
    flags = {
        "needle": [runs / "out/a", runs / "out/b", "--lengths=60,120", "--trials=2", "--needle=k={}."],
        "heads": [runs / "out/r", "--tokens=200"],
        "attention": [runs / "out/a", runs / "out/b", f"--text={ROOT / 'README.md'}", f"--text={ROOT / 'config'}"],
        "recall": [runs / "out/r", "--tokens=400"],
    }[task]
    result, printed = run(capsys, task, *flags)
    first = result["models"][str(flags[0])]
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in rows}) == 1  # aligned
    picture = runs / "out" / f"{flags[0].name}_{task}.png"
    if importlib.util.find_spec("matplotlib"):
        assert picture.stat().st_size > 5000
        picture.unlink()
    if task == "needle":
        assert np.array(first["choice"]).shape == (5, 2) and len(rows) == 2 + 4
    elif task == "heads":
        assert [v is not None for v in first["loss"]["attn"]] == [True] * 4 and len(rows) == 2 + 4
        assert set(first["recall"]) == {"whole", "attn", "ssm", "attn_error", "ssm_error"}
    elif task == "attention":
        blocks = first["texts"][str(ROOT / "config")]["blocks"]
        assert all(abs(sum(b["share"].values()) - 1) < 1e-4 for b in blocks) and len(rows) == 2 + 2 * 4 + 2 * 2
    else:
        assert list(first["pairs"]) == ["2", "4"] and len(rows) == 2 + 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, printed = run(capsys, task, *flags)
    assert f"no {picture.stem}_2.png: pip install matplotlib to get one" in printed


def test_what_is_wrong_is_said_first(runs, corpus, tmp_path, monkeypatch):
    """In one line, before a model is loaded."""
    a, r, latin = runs / "out/a", runs / "out/r", tmp_path / "latin.txt"
    latin.write_bytes(b"\xe9" * 100)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "long.txt").write_text("x" * 100)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "other.json").mkdir()
    (tmp_path / "own.json").write_text('{"models": 3}')
    (tmp_path / "photo.png").touch()
    (tmp_path / "model").mkdir()
    config = json.loads((a / "best/config.json").read_text())
    for name, change in (("other", {"tokenizer": "bpe:300"}), ("nothing", {"train": None})):
        shutil.copytree(a / "best", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    prepare_bpe(corpus / "words", "bpe", tmp_path / "data")
    shutil.copy(tmp_path / "data/bpe/tokenizer.tiktoken", tmp_path / "other")
    monkeypatch.setattr(checkpoint, "load", None)
    for flags, message in [
        (["loss"], "give one model or more: --init_from=FOLDER"),
        (["loss", a, a], f"--init_from names {a} twice"),
        (["nonsense", a], "invalid choice: 'nonsense'"),
        (["loss", tmp_path / "model"], "is not a checkpoint"),
        (["loss", a, "--tokens=-1"], "--tokens=-1: must be 0 or more"),
        (["loss", a, "--text=nowhere.txt"], "no file or folder nowhere.txt"),
        (["loss", a, f"--text={latin}"], "latin.txt is not UTF-8 text"),
        (["loss", a, f"--text={tmp_path / 'short.txt'}"], "has 5 tokens, too few for windows of 24: lower --length"),
        (["loss", a, f"--text={tmp_path / 'long.txt'}", "--longest=100"], "100 tokens, .* of 100: lower --longest"),
        (["loss", a, "--dataset=none"], "no data set at"),
        (["loss", tmp_path / "nothing"], "does not say what it was trained on: pass --text=FILE or --dataset=NAME"),
        (["loss", tmp_path / "other"], "has other tokens than .*: prepare it with that tokenizer, or pass --text"),
        (["loss", a, f"--out={a / 'best/config.json'}"], "config.json is not of evaluate.py: give the name of another"),
        (["loss", a, "--dataset=words", f"--text={latin}"], "give --text or --dataset, not both"),
        (["loss", a, f"--out={tmp_path / 'own.json'}"], "own.json is not of evaluate.py"),
        (["loss", a, f"--out={tmp_path / 'photo.json'}"], "photo.png is not of evaluate.py"),
        (["loss", r, "--length=8"], "recall has records, which are read whole"),
        (["loss", r, "--longest=80"], "recall has records, which are read whole"),
        (["loss", a, "--longest=24"], "--longest=24: must be more than a window of .*, 24"),
        (["needle", a, "--lengths=20,80"], "out/a/best, words: --lengths: fact and question need .* tokens at least"),
        (["loss", a, "--out=x.txt"], "--out=x.txt: give the name of a .json file"),
        (["recall", a], "words: no data set of recall.py"),
        (["needle", r], "its tokens stand for no text"),
        (["loss", r, f"--text={latin}"], "its tokens stand for no text"),
        (["needle", a, f"--text={tmp_path / 'empty.txt'}"], "empty.txt has no text"),
        (["loss", a, "--lengths=12"], "--lengths is not for the task loss but for needle"),
        (["harness", a, "--tasks=piqa", "--dataset=words"], "--dataset is not for the task harness"),
        (["needle", a, "--length=12"], "--length is not for the task needle but for loss and heads and attention"),
        (["loss", a, f"--out={tmp_path / 'other.json'}"], "other.json is a folder: give the name of another .json"),
        (["loss", a, f"--out={latin / 'x.json'}"], "cannot be a folder"),
        (["heads", a, f"--text={latin}", f"--text={latin}"], "--text: the task heads takes one text"),
        (["needle", a, "--needle=x"], "--needle: write {} where the code goes"),
        (["needle", a, "--lengths=1,x"], "--lengths=1,x: write numbers with commas"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            evaluate.main([*map(str, flags), "--device=cpu"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs a package that is missing: pip install lm_eval"):
        evaluate.main(["harness", str(a), "--tasks=piqa"])
