"""Sampling and chat from the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from released import BAD_TEMPLATES, TEMPLATE, write_chat_model
from runs import ROOT, prepare_bpe, train_here

import checkpoint
import ops
import sample
from conftest import SMALL, small
from engine import Cache, Engine
from model import Hymba, HymbaConfig, rope_angles
from tokenizer import ReleasedTokenizer, chat_template, detokenizer, load_tokenizer


def test_sample_command(corpus, tmp_path, monkeypatch, capsys):
    def run(*flags):
        command = [sys.executable, str(ROOT / "sample.py"), "--device=cpu", *flags]
        env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONUTF8": "1"}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=env)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def run_here(*flags):
        sample.main(["--device=cpu", *flags])
        return capsys.readouterr()

    code, _, err = run()
    assert code == 1
    assert err == "sample.py: no checkpoint under out/: run python train.py first, or pass --init_from=FOLDER\n"
    train_here(corpus, f"--out_dir={tmp_path / 'out/x'}", "--max_steps=2")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    flags = ["--prompt=alpha ", "--n_samples=3", "--temperature=0.8", "--top_k=50", "--top_p=0.95"]
    flags += ["--max_new_tokens=20"]
    code, out, err = run(*flags, "--seed=1")
    assert code == 0 and out.count("alpha ") >= 3 and "out/x/best" in err, err
    assert run_here(*flags, "--seed=1").out == out != run_here(*flags, "--seed=2").out
    run_here("--max_new_tokens=5")


def test_sample_file(tmp_path, capsys):
    """--file writes a line for each prompt in order, the same in batches of any size, and complains before it loads."""
    torch.manual_seed(0)
    model = Hymba(HymbaConfig(**(SMALL | dict(pattern="hM", vocab_size=320))))
    model.save_pretrained(tmp_path / "model", tokenizer="bytes")
    file = tmp_path / "prompts.txt"
    prompts = ["one", "a longer prompt", "", "two \u00e9", "form\x0cfeed", "\u2028five", ""]
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    flags = [f"--init_from={tmp_path / 'model'}", "--device=cpu", "--max_new_tokens=12", f"--file={file}"]
    outputs = []
    for size in (1, 2, 64):
        sample.main([*flags, f"--batch_size={size}", "--seed=3"])
        outputs.append(capsys.readouterr().out)
    rows = [json.loads(line) for line in outputs[0].splitlines()]
    assert [row["prompt"] for row in rows] == prompts and outputs[0] == outputs[1] == outputs[2]
    assert len({row["text"] for row in rows}) > 1 and set(rows[0]) == {"prompt", "text"}
    file.write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    for bad, kind, message in [
        ([], ValueError, "prompts.txt is empty: write one prompt a line"),
        ([f"--file={tmp_path / 'nowhere.txt'}"], FileNotFoundError, "nowhere.txt"),
        ([f"--file={tmp_path / 'latin.txt'}"], ValueError, "latin.txt is not UTF-8 text"),
        (["--temperature=-1"], ValueError, "temperature=-1.0, .* use >= 0"),
        (["--max_new_tokens=-1"], ValueError, "max_new_tokens=-1: must be 0 or more"),
        (["--n_samples=0"], ValueError, "n_samples=0: must be 1 or more"),
    ]:
        with pytest.raises(kind, match=message):  # before the model: there is none
            sample.main([*flags, f"--init_from={tmp_path / 'no model'}", *bad])
    file.write_text("x")
    with pytest.raises(ValueError, match="--batch_size of 1 or more"):
        sample.main([*flags, "--batch_size=0"])


def test_a_run_s_folder_is_enough(corpus, tmp_path, monkeypatch, capsys):
    """Its best checkpoint, or else its last, also where a crash left it. A path is not looked up elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # asking for it would be another error
    train_here(corpus, "--out_dir=out/x", "--max_steps=8")
    flags, out = ["--device=cpu", "--max_new_tokens=1"], tmp_path / "out/x"
    for name, change in [
        ("best", lambda: None),
        ("last", lambda: (out / "best").rename(tmp_path / "elsewhere")),
        ("last.old", lambda: (out / "last").rename(out / "last.old")),
    ]:
        change()
        for asked in (["--init_from=out/x"], []):
            sample.main([*flags, *asked])
            assert capsys.readouterr().err.startswith(f"out/x/{name}: ")
    sample.main([*flags, "--init_from=out/x/last"])
    assert capsys.readouterr().err.startswith("out/x/last.old: ")
    for path in ("out/y", "elsewhere/y", "./y/z", "/y/z", "~/y"):
        with pytest.raises(FileNotFoundError, match=f"{path} is not a checkpoint: neither a folder nor owner/model"):
            sample.main([*flags, f"--init_from={path}"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_prompts_from_a_pipe(corpus, tmp_path, capsys):
    """A pipe says that it has no bytes, before they come: sample.py --file=<(...)."""
    train_here(corpus, f"--out_dir={tmp_path}", "--max_steps=1")
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=("alpha\n\nbeta\n",)).start()
    capsys.readouterr()
    sample.main([f"--init_from={tmp_path}", f"--file={tmp_path / 'pipe'}", "--max_new_tokens=1", "--device=cpu"])
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["alpha", "", "beta"]


def test_models_that_cannot_generate(corpus, tmp_path, monkeypatch):
    """A tokenizer of another model, and a cache that no memory holds, before a token is drawn."""
    train_here(corpus, f"--out_dir={tmp_path}", "--max_steps=1")
    flags, config = [f"--init_from={tmp_path}", "--device=cpu", "--max_new_tokens=1"], tmp_path / "best/config.json"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the cache of 1 texts needs .*lower --batch"):
        patch.setattr(sample, "memory", lambda device: 1000)
        sample.main(flags)
    values = json.loads(config.read_text())
    prepare_bpe(corpus / "words", "bpe", tmp_path / "data")
    shutil.copy(tmp_path / "data/bpe/tokenizer.tiktoken", tmp_path / "best")
    values["tokenizer"], eot = "bpe:300", 299
    config.write_text(json.dumps(values))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"ends texts with token {eot}, its model has"):
        patch.setattr(checkpoint, "load", lambda *args: small("M", vocab_size=257))
        sample.main(flags)


def test_half_characters_in_prompts(tmp_path, monkeypatch):
    """What a terminal sends that is no UTF-8 is a ? for a released tokenizer, too."""
    folder = write_chat_model(tmp_path)
    tokenizer = ReleasedTokenizer(folder)
    assert tokenizer.encode_ordinary("the \udcff fox") == tokenizer.encode_ordinary("the ? fox")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "\n"}))
    monkeypatch.setattr("builtins.input", lambda prompt: "hello")
    with pytest.raises(ValueError, match="the chat template made a text in which there is no token"):
        sample.main([f"--init_from={folder}", "--chat", "--device=cpu"])


def test_a_gpu_called_by_its_number_becomes_the_current_one(monkeypatch):
    """Triton launches on the current one, wherever the tensors are, and torch.cuda.graph captures its streams."""
    current = []
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cpu", "cuda", "cuda:1"):
        assert sample.pick_device(name) == torch.device(name)
    assert current == [torch.device("cuda:1")]


def test_jsonl_lines_come_as_soon_as_they_can():
    """Rows end in the order 1, 2, 0, 3: nothing is written before row 0 has ended, then three lines at once."""
    tokenizer, printed = load_tokenizer("bytes", "."), []

    class Fixed:
        def generate(self, prompts, max_new_tokens, stop, first_row):
            a = ord("a")
            for step in ([a, a, a, a], [a, None, a, a], [a, None, None, a], *[[None, None, None, a]] * 2):
                printed.append(None)
                yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda line, **_: printed.append(json.loads(line)["text"]))
        sample.write_jsonl(Fixed(), tokenizer, list("wxyz"), 8, 9)
    assert printed == [None] * 4 + ["aaa", "a", "aa", None, "aaaaa"]


def test_jsonl_text_continues_the_prompt(capsys):
    """A word's first token, decoded alone, would lose the blank before it."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r requirements-dev.txt")
    decoders = tokenizers.decoders
    words = tokenizers.Tokenizer(tokenizers.models.BPE({"▁the": 0, "▁fox": 1, "es": 2}, []))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = types.SimpleNamespace(n_vocab=3, eot_token=9, decode=words.decode, encode_ordinary=lambda text: [0])

    class Fixed:
        def generate(self, prompts, max_new_tokens, stop, first_row):
            yield from ([1, 0], [2, None], [7, None])  # 7: beyond the tokenizer's vocabulary

    sample.write_jsonl(Fixed(), tokenizer, ["the", "the"], 8, 9)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] + row["text"] for row in rows] == ["the foxes", "the the"]


def test_streaming_holds_back_half_characters(capsys):
    tokenizer = load_tokenizer("bytes", ".")

    class Fixed:
        """A model that says what it is told."""

        def generate(self, prompts, max_new_tokens, stop):
            yield from ([b] for b in "né€🙂".encode())

    assert sample.stream(Fixed(), tokenizer, "<", 99) == "<né€🙂"
    assert capsys.readouterr().out == "<né€🙂\n"


def talk(folder: Path, lines: list[str], monkeypatch, capsys, *flags: str) -> tuple[list[str], str]:
    """What python sample.py --chat answers to the lines, and what it writes to stderr."""
    lines = iter([*lines, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    capsys.readouterr()
    sample.main([f"--init_from={folder}", "--chat", "--device=cpu", "--max_new_tokens=12", *flags])
    out, err = capsys.readouterr()
    return out.split("\n")[:-1], err


def test_chat_keeps_the_cache(tmp_path, monkeypatch, capsys):
    """Greedy answers are those to the whole conversation without a cache, but each turn reads only what is new."""
    folder, read, run = write_chat_model(tmp_path), [], Engine.hidden
    said = ["hello", "the fox", "why"]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "hidden", lambda self, idx, cache: read.append(idx.shape[1]) or run(self, idx, cache))
        patch.setattr(Cache, "nbytes", 12_345_678)
        answers, err = talk(folder, said, patch, capsys, "--temperature=0")
    model, tokenizer = Hymba.from_pretrained(folder), ReleasedTokenizer(folder)
    text, held = "<s>", []
    for line, answer in zip(said, answers, strict=True):
        text += f"<|user|>{line}<|assistant|>"
        prompt, expected = tokenizer.encode(text), []
        for token in model.generate(prompt, 12, temperature=0):
            if token in (1, 2, 3):
                break
            expected.append(token)
        assert tokenizer.encode(answer) == [token for token in expected if token]  # <s> is no text
        held.append(len(prompt) + min(len(expected), 11))  # the last of 12 tokens has not been read
        text += answer + "</s>"
    assert len(set(answers)) == 3 and "reading the whole" not in err
    assert re.findall(r"\[cache: 12.3 MB, (\d+) tokens\]", err) == [str(n) for n in held]
    assert sum(read) == held[-1] and sum(n > 1 for n in read) == 3


@pytest.mark.parametrize("reason", ["tokens", "template"])
def test_chat_reads_again_what_the_cache_does_not_hold(reason, tmp_path, monkeypatch, capsys):
    """Tokens that their text is not cut into again, or a template that forgets: the answers stay right."""
    forgets = {"chat_template": TEMPLATE.replace("in messages %}", "in messages[-1:] %}")}
    folder = write_chat_model(tmp_path, **({"merges": 300} if reason == "tokens" else forgets))
    said = ["the dog", "over the fox", "the lazy dog"]
    answers, err = talk(folder, said, monkeypatch, capsys, "--temperature=0")
    assert "[reading the whole conversation again: nothing is lost but time]" in err
    render, tokenizer = chat_template(folder), ReleasedTokenizer(folder)
    messages = []
    for line, answer in zip(said, answers, strict=True):
        messages.append({"role": "user", "content": line})
        add, text = detokenizer(tokenizer, prompt := tokenizer.encode(render(messages))), ""
        for token in Hymba.from_pretrained(folder).generate(prompt, 12, temperature=0):
            if token in (1, 2, 3):
                break
            text += add(token)
        assert text == answer
        messages.append({"role": "assistant", "content": answer})


def test_chat_survives_ctrl_c(tmp_path, monkeypatch, capsys):
    folder = write_chat_model(tmp_path)
    plain, _ = talk(folder, ["hello"], monkeypatch, capsys, "--temperature=0")
    run, calls = Engine.hidden, []

    def interrupted(self, idx, cache):
        calls.append(1)
        if len(calls) == 4:  # between two blocks, say
            rope = rope_angles(self.model.config, torch.zeros(1, 1))
            self.model.blocks[0](torch.zeros(1, 1, 32), rope, None, cache.block(0))
            raise KeyboardInterrupt
        return run(self, idx, cache)

    monkeypatch.setattr(Engine, "hidden", interrupted)
    answers, err = talk(folder, ["hello", "go on"], monkeypatch, capsys, "--temperature=0")
    assert answers[0] == plain[0][:3] and "[stopped: the next turn reads the whole conversation again]" in err
    messages = [{"role": r, "content": t} for r, t in [("user", "hello"), ("assistant", answers[0]), ("user", "go on")]]
    tokenizer = ReleasedTokenizer(folder)
    prompt = tokenizer.encode(chat_template(folder)(messages))
    expected = list(Hymba.from_pretrained(folder).generate(prompt, len(answers[1]), temperature=0))
    assert tokenizer.decode(expected) == answers[1] and "[cache:" in err


def test_chat_and_tokenizer_errors(tmp_path, monkeypatch):
    folder = write_chat_model(tmp_path)
    args = [f"--init_from={folder}", "--chat", "--device=cpu"]
    with pytest.raises(ValueError, match="--chat goes without --prompt and --n_samples"):
        sample.main([*args, "--prompt=Hello"])
    monkeypatch.setattr(checkpoint, "load", lambda *args: pytest.fail("it began to load the weights"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for template, message in BAD_TEMPLATES:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        with pytest.raises(ValueError, match=message):
            sample.main(args)
    settings["chat_template"] = [{"name": "default", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="missing: pip install jinja2"):
        patch.setitem(sys.modules, "jinja2", None)
        sample.main(args)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="missing: pip install tokenizers"):
        patch.setitem(sys.modules, "tokenizers", None)
        sample.main(args)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="says nowhere which token ends a text"):
        sample.main(args)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is corrupt"):
        sample.main(args)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        sample.main(args)


def test_sample_released_weights_without_chat(tmp_path, capsys):
    """The tokenizer's own beginning of a text, and each of several tokens that may end it."""
    folder = write_chat_model(tmp_path)
    model, tokenizer = Hymba.from_pretrained(folder), ReleasedTokenizer(folder)
    for letter in "abcdefghijklmnopqrstuvwxyz":  # one whose continuation does not end at once
        prompt, ends = [0, *tokenizer.encode(letter)], []
        answer = list(model.generate(prompt, 9, temperature=0))
        if not {1, 3} & set(answer[:3]):
            break
    for stops in ([1], [1, answer[2]]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        sample.main(
            [f"--init_from={folder}", f"--prompt={letter}", "--device=cpu", "--temperature=0", "--max_new_tokens=9"]
        )
        ends.append(next(i for i, t in enumerate([*answer, 3]) if t in {*stops, 3}))
        assert capsys.readouterr().out == tokenizer.decode(prompt + answer[: ends[-1]]) + "\n"
    assert ends[0] > 2 >= ends[1]


def test_kernels_are_a_flag(kernels_on):
    for flag, expected in (("--kernels=True", ops.ALL_KERNELS), ("--kernels=False", {})):
        with pytest.raises(ValueError, match="n_samples=0"):
            sample.main([flag, "--n_samples=0"])
        assert ops.KERNELS == expected
