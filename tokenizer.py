"""
Tokenizers of data sets and of released models, text that streams token by token, and chat templates.

A tokenizer is a tiktoken.Encoding or a ReleasedTokenizer. Both have `encode_ordinary(text)`, `decode(tokens)`,
`n_vocab` (the size of the vocabulary) and `eot_token` (the token that ends a text). Tokens are lists of int.
"""

import base64
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tiktoken

import template
from files import brief, check_keys, read_json

EOT = "<|endoftext|>"
# How GPT-4 splits text before merging bytes: contractions, words with the sign before them, up to three digits,
# punctuation with the newlines after it, blank lines, spaces (the last one stays with the word that follows).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers of data sets


def bpe_size(spec: str) -> int:
    """The N of the tokenizer "bpe:N": 256 bytes, N - 257 merges, the end-of-text token. Raises ValueError if bad."""
    size = spec.removeprefix("bpe:")
    if not re.fullmatch("[0-9]{1,9}", size) or int(size) < 257:
        raise ValueError(f"tokenizer {brief(spec)}: N is the size of the vocabulary, at least 257; write bpe:16384")
    return int(size)


def load_tokenizer(spec: str, folder: Path | str, sha256: str | None = None) -> tiktoken.Encoding:
    """
    The tokenizer of a data set. `spec` is "tokenizer" in meta.json: "bytes", "bpe:N" or a name that tiktoken knows.
    `folder` holds tokenizer.tiktoken if `spec` is bpe:N; its checksum must be `sha256` if that is given. The token
    `eot_token` ends each document.

    Raises ValueError (bad spec, corrupt file), FileNotFoundError (no such file) or ConnectionError (cannot download).
    """
    if spec == "none":
        raise ValueError("the tokens of its data set stand for no text (to train on them: --sample_tokens=0)")
    if spec == "bytes":
        ranks = {bytes([b]): b for b in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={EOT: 256})
    if spec.startswith("bpe:"):
        n_vocab, path = bpe_size(spec), Path(folder) / "tokenizer.tiktoken"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}, which the tokenizer {spec!r} needs: prepare the data set again")
        try:
            text = path.read_bytes()
            lines = [line.split() for line in text.splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError:
            ranks = {}
        whole = len(ranks) == n_vocab - 1 and sorted(ranks.values()) == list(range(n_vocab - 1))
        if not whole or (sha256 and hashlib.sha256(text).hexdigest() != sha256):
            raise ValueError(f"{path} is corrupt, it should rank {n_vocab - 1} tokens: prepare the data set again")
        return tiktoken.Encoding(spec, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOT: n_vocab - 1})
    names = tiktoken.list_encoding_names()
    if spec not in names:
        raise ValueError(f"unknown tokenizer {brief(spec)}; use bytes, bpe:N (such as bpe:16384) or {', '.join(names)}")
    try:
        return tiktoken.get_encoding(spec)
    except (OSError, ValueError) as error:  # no network, or a download that is not the file that tiktoken expects
        raise ConnectionError(
            f"cannot download the tokenizer {spec!r} ({type(error).__name__}); use --tokenizer=bytes or "
            "--tokenizer=bpe:16384 (trained on your text), which need no network"
        ) from None


def train_bpe(texts: Iterable[str], spec: str, folder: Path) -> None:
    """
    Learn the merges of "bpe:N", and write folder/tokenizer.tiktoken: on each line a token in base64, a space, its rank.
    Raises ValueError if the texts have too few pairs that repeat for N tokens.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=bpe_size(spec) - 1, min_frequency=2, initial_alphabet=byte_level.alphabet()),
    )
    vocab = bpe.get_vocab()
    if len(vocab) + 1 < bpe_size(spec):
        raise ValueError(
            f"--tokenizer={spec} needs more training text, which has repeated pairs for {len(vocab) + 1} tokens only; "
            f"use --tokenizer=bpe:{len(vocab) + 1} or bytes"
        )
    # ByteLevel writes each byte as a printable character: its own in Latin-1, or else the next one from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {bytes([b]): b for b in range(256)}  # single bytes first, in the order of the tokenizer "bytes"
    ranks |= {bytes(map(byte_of.get, token)): rank for token, rank in vocab.items() if rank >= 256}
    with open(folder / "tokenizer.tiktoken", "w", newline="\n") as f:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            f.write(f"{base64.b64encode(token).decode()} {rank}\n")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers of released models


def whole(text: str) -> str:
    """text with a ? for each half of a surrogate pair, which UTF-8 has not: a terminal may send such, and JSON."""
    return text.encode("utf-8", "replace").decode()


@contextmanager
def quiet_rust() -> Iterator[None]:
    """Where Rust code panics, Python gets an exception, and Rust writes to stderr itself. Not in the with block."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


class ReleasedTokenizer:
    """A released model's tokenizer.json, under the names of tiktoken.Encoding as far as this repository uses them.

    `stops` is the set of all tokens that end a text, and `eot_token` is the first of these that the files name.
    Raises FileNotFoundError without tokenizer.json. Raises ValueError if it is corrupt, if no file says which token
    ends a text, or, with the line to install, if the package tokenizers is missing.
    """

    def __init__(self, folder: Path):
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{folder} needs a package that is missing: pip install tokenizers") from None
        file = folder / "tokenizer.json"
        try:
            with quiet_rust():
                self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
                self.tokenizer.no_truncation()  # some files were saved with the limits of their training
                self.tokenizer.no_padding()
                self.tokenizer.decode(self.tokenizer.encode("Hello").ids)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # the package raises no narrower class, and panics of Rust are none of Exception's
            raise ValueError(f"{file} is corrupt: {str(e)[:200]}") from None
        self.n_vocab = self.tokenizer.get_vocab_size()
        eos = special_tokens(folder).get("eos_token", "")
        ends = [self.tokenizer.token_to_id(eos)]
        for name in ("generation_config", "config"):
            if (file := folder / f"{name}.json").is_file():
                ids = read_json(file, may={"eos_token_id": int | list}).get("eos_token_id")
                ends += ids if isinstance(ids, list) else [ids]
        ends = [token for token in ends if token is not None]
        if bad := [token for token in ends if type(token) is not int or not 0 <= token < 2**31]:
            raise ValueError(f"{folder}: eos_token_id={brief(bad[0])} is no token")
        if not ends:
            raise ValueError(f"{folder} says nowhere which token ends a text: its config.json needs an eos_token_id")
        self.eot_token, self.stops = ends[0], set(ends)

    def encode_ordinary(self, text: str) -> list[int]:
        """The tokens of text, behind the token that begins every text if there is one."""
        return self.tokenizer.encode(whole(text)).ids

    def encode(self, text: str) -> list[int]:
        """The tokens of text and of the special tokens written in it, as a chat template writes them."""
        return self.tokenizer.encode(whole(text), add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens. Special tokens are left out."""
        return self.tokenizer.decode(tokens)


Tokenizer = tiktoken.Encoding | ReleasedTokenizer


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: config.json's "tokenizer" if train.py wrote it, else tokenizer.json.

    Raises what load_tokenizer and ReleasedTokenizer raise.
    """
    file = folder / "config.json"
    config = read_json(file, may={"tokenizer": str, "tokenizer_sha256": str}) if file.is_file() else {}
    if not config.get("tokenizer"):
        return ReleasedTokenizer(folder)
    try:
        return load_tokenizer(config["tokenizer"], folder, config.get("tokenizer_sha256"))
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def encode_piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a piece of text, without the one that begins every text of some released models."""
    return tokenizer.encode(text) if isinstance(tokenizer, ReleasedTokenizer) else tokenizer.encode_ordinary(text)


def stops(tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a text: a released model may have several."""
    return getattr(tokenizer, "stops", {tokenizer.eot_token})


# ----------------------------------------------------------------------------------------------------------------------
# Text, token by token


def detokenizer(tokenizer: Tokenizer, before: list[int]) -> Callable[[int], str]:
    """A function that takes one token after the other, and returns the text that each adds.

    `before` are the tokens of the text that is continued. A character whose bytes are spread over several tokens comes
    with the last of them.
    """
    tokens = before[-8:]  # some tokens read differently at the beginning of a text
    start, done = 0, len(tokens)  # the text of tokens[:done] has been returned; decoding begins at tokens[start]

    def add(token: int) -> str:
        nonlocal start, done
        if token >= tokenizer.n_vocab:  # a vocabulary padded to a multiple of 64 has tokens without text
            return ""
        tokens.append(token)
        old, new = tokenizer.decode(tokens[start:done]), tokenizer.decode(tokens[start:])
        if new.endswith("\ufffd") and len(tokens) - done < 4:  # a UTF-8 character has at most four bytes
            return ""
        start, done = done, len(tokens)
        return new[len(old) :]

    return add


# ----------------------------------------------------------------------------------------------------------------------
# Chat templates


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and the like, as far as tokenizer_config.json has them."""
    tokens, file = {}, folder / "tokenizer_config.json"
    may = dict.fromkeys(["bos_token", "eos_token", "unk_token", "pad_token"], str | dict)
    config = read_json(file, may=may) if file.is_file() else {}
    for name in may:
        token = config.get(name) or ""
        if isinstance(token, dict):
            check_keys(token, f"{file}: {name!r}", {"content": str})
        tokens[name] = whole(token["content"] if isinstance(token, dict) else token)
    return tokens


def chat_template(folder: Path) -> Callable[[list[dict]], str]:
    """A released model's chat template: a function from messages ({"role", "content"}) to the text the model continues.

    Raises ValueError if there is none, if it refuses the messages, or, with the line to install, without jinja2.
    """
    config, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    source = read_json(config, may={"chat_template": str | list}).get("chat_template") if config.is_file() else None
    if file.is_file():
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{file} is corrupt: {e}") from None
    if isinstance(source, list):  # several templates, each with a name
        for entry in source:
            check_keys(entry, f"{config}: 'chat_template'", {"name": str, "template": str})
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not source:
        raise ValueError(f"{folder} has no chat template, so it was not trained to chat: use --prompt")
    if not importlib.util.find_spec("jinja2"):
        raise ValueError("--chat needs a package that is missing: pip install jinja2")
    tokens = special_tokens(folder)

    def render(messages: list[dict]) -> str:
        try:
            return template.render(source, tokens, messages)
        except ValueError as e:
            raise ValueError(f"the chat template of {folder}: {e}") from None

    render([{"role": "user", "content": "Hello"}])  # a broken template fails here, before the model is loaded
    return render
