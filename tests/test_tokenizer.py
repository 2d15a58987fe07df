"""Tokenizers of data sets and of released models, streaming text, and chat templates."""

import json
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from released import BAD_TEMPLATES, SPECIAL, TEMPLATE, write_chat_tokenizer

from tokenizer import ReleasedTokenizer, chat_template, detokenizer, load_tokenizer, stops, tokenizer_of

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_prepare_bytes_tokenizer_round_trip(text):
    encoding = load_tokenizer("bytes", "unused")
    tokens = encoding.encode_ordinary(text)
    assert tokens == list(text.encode()) and encoding.decode(tokens) == text
    assert (encoding.n_vocab, encoding.eot_token, encoding.decode([256])) == (257, 256, "<|endoftext|>")


def test_released_tokenizer(tmp_path):
    """What a text begins with is added to prompts alone; special tokens are read in templates alone, and not shown."""
    tokenizer = ReleasedTokenizer(write_chat_tokenizer(tmp_path))
    assert (tokenizer.n_vocab, tokenizer.eot_token, tokenizer.stops, stops(tokenizer)) == (31, 1, {1, 2, 3}, {1, 2, 3})
    tokens = tokenizer.encode("hello world")
    assert len(tokens) == 11 and min(tokens) >= len(SPECIAL)  # a token per letter, no truncation, nothing added
    assert tokenizer.encode_ordinary("hello world") == [0, *tokens]
    assert tokenizer.encode("<|user|>hello world</s>") == [2, *tokens, 1]
    assert tokenizer.decode([0, 2, *tokens, 1]) == "hello world"


def test_tokenizer_of_a_checkpoint_folder(tmp_path):
    """config.json of train.py names the data set's tokenizer; without one the folder is a released model's."""
    released = tokenizer_of(write_chat_tokenizer(tmp_path))
    assert isinstance(released, ReleasedTokenizer) and released.n_vocab == 31
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "tokenizer": "bytes"}))
    own = tokenizer_of(tmp_path)
    assert (own.name, own.n_vocab, stops(own)) == ("bytes", 257, {256})
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "tokenizer": "bpe:400"}))
    with pytest.raises(FileNotFoundError, match="no .*tokenizer.tiktoken, which the tokenizer 'bpe:400' needs"):
        tokenizer_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is corrupt: "):
        tokenizer_of(tmp_path)
    (tmp_path / "config.json").unlink()
    assert isinstance(tokenizer_of(tmp_path), ReleasedTokenizer)


def test_tokenizer_errors(tmp_path, monkeypatch):
    folder = write_chat_tokenizer(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="missing: pip install tokenizers"):
        patch.setitem(sys.modules, "tokenizers", None)
        tokenizer_of(folder)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    assert ReleasedTokenizer(folder).stops == {3}  # config.json's
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="says nowhere which token ends a text"):
        tokenizer_of(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is corrupt"):
        tokenizer_of(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        tokenizer_of(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Streaming text


def test_detokenizer_gives_what_the_whole_text_gives():
    """Tokens whose text depends on their neighbours: word boundaries, and characters cut into bytes."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r requirements-dev.txt")
    decoders = tokenizers.decoders
    vocab = {name: i for i, name in enumerate(["▁the", "▁fox", "es", "▁", *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(  # as Llama 2's
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = types.SimpleNamespace(n_vocab=260, decode=tokenizer.decode)
    ids = [0, 1, 2, 1, *(4 + b for b in "é🙂".encode()), 3, 1]
    for cut in range(len(ids) + 1):
        add = detokenizer(wrapped, ids[:cut])
        pieces = [add(t) for t in ids[cut:]]
        if not 4 < cut < 10:  # not inside of a character
            assert tokenizer.decode(ids[:cut]) + "".join(pieces) == "the foxes foxé🙂  fox"
    add = detokenizer(wrapped, [0])
    assert [add(4 + 0xFF) for _ in range(5)] + [add(1)] == ["", "", "", "\ufffd" * 4, "", "\ufffd fox"]
    assert add(10**6) == ""


def test_detokenizer_holds_back_half_characters():
    add = detokenizer(load_tokenizer("bytes", "."), list(b"<"))
    assert [add(byte) for byte in "né€🙂".encode()] == ["n", "", "é", "", "", "€", "", "", "", "🙂"]


# ----------------------------------------------------------------------------------------------------------------------
# Chat templates


def test_chat_template_against_transformers(tmp_path):
    tr, folder = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt"), tmp_path
    write_chat_tokenizer(folder)
    said = [("user", "hello"), ("assistant", " a\n"), ("user", "the {{ fox }}")]
    messages = [{"role": role, "content": text} for role, text in said]
    text = chat_template(folder)(messages)
    assert text == "<s><|user|>hello<|assistant|> a\n</s><|user|>the {{ fox }}<|assistant|>"
    file, other = str(folder / "tokenizer.json"), "{% for m in messages %}{{ loop.index0 }}{% break %}{% endfor %}"
    theirs = tr.PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>")
    for source in (TEMPLATE, other + "{{ strftime_now('%Y') }}\n  {% if 1 %}\nx\n  {% endif %}\n"):
        expected = theirs.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        (folder / "chat_template.jinja").write_text(source)  # goes before the one in tokenizer_config.json
        assert chat_template(folder)(messages) == expected


def test_chat_template_errors(tmp_path, monkeypatch):
    folder = write_chat_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="the chat template of .*: no system"):
        chat_template(folder)([{"role": "system", "content": "Be kind"}])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for template, message in BAD_TEMPLATES:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        with pytest.raises(ValueError, match=message):
            chat_template(folder)
    settings["chat_template"] = [{"name": "tool_use", "template": "y"}, {"name": "default", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_template(folder)([]) == "x"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="missing: pip install jinja2"):
        patch.setitem(sys.modules, "jinja2", None)
        chat_template(folder)
