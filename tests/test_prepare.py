"""Data sets: what prepare.py writes, refuses and leaves behind, and what open_split accepts."""

import base64
import codecs
import collections
import hashlib
import http.client
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import files
import prepare
from tokenizer import EOT, SPLIT, load_tokenizer

ROOT = Path(prepare.__file__).parent
UNICODE = "naïve café — 東京 🤗👩‍👩‍👧 \u202eabc\r\n\ttabs  and   spaces \n\n\n<|endoftext|> ١٢٣ 1234567 I'LL\n"


def write_documents(folder, texts):
    """One file a document, in the order of the list."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:05d}.txt").write_bytes(text.encode())
    return str(folder)


def read_back(folder, split):
    """The documents of a split as bytes, cut at the end-of-text tokens."""
    tokens, meta = prepare.open_split(folder, split)
    encoding = prepare.load_tokenizer(meta["tokenizer"], folder)  # or the one that a test put in its place
    assert tokens[-1] == meta["eot"]
    ends = np.flatnonzero(tokens == meta["eot"])
    starts = np.concatenate([[0], ends[:-1] + 1])
    return [encoding.decode_bytes(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def contents(folder):
    """The bytes of each file in a folder, by name."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def command(*args, **kwargs):
    """python prepare.py with these arguments."""
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )


def test_prepare_meta_and_files(tmp_path):
    texts = [f"document {i}: " + "é" * i + "\n" for i in range(45)]
    source = write_documents(tmp_path / "in", texts)
    folder = prepare.prepare([source], "mine", data_dir=tmp_path / "data")
    assert folder == tmp_path / "data" / "mine"
    assert [p.name for p in sorted(folder.parent.iterdir())] == ["mine"]
    assert sorted(contents(folder)) == ["meta.json", "train.bin", "val.bin"]
    meta = json.loads((folder / "meta.json").read_text())
    assert list(meta) == ["tokenizer", "vocab_size", "eot", "dtype", "source", "train", "val", "duplicates"]
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["dtype"]) == ("bytes", 257, 256, "uint16")
    assert (meta["source"], meta["duplicates"]) == ([source], 0)
    for split, n_documents in (("train", 43), ("val", 2)):
        tokens, meta_read = prepare.open_split(folder, split)
        raw = (folder / f"{split}.bin").read_bytes()
        assert meta_read == meta and tokens.dtype == np.dtype("<u2") and not tokens.flags.writeable
        np.testing.assert_array_equal(tokens, np.frombuffer(raw, "<u2"))
        documents = read_back(folder, split)
        assert len(documents) == n_documents == meta[split]["documents"]
        assert meta[split]["tokens"] == len(tokens) == meta[split]["bytes"] + n_documents
        assert meta[split]["bytes"] == sum(map(len, documents))
        assert meta[split]["sha256"] == hashlib.sha256(raw).hexdigest()
    # A uniform model over the 256 bytes has 8 bits per byte by the formula that meta.json is for.
    meta["val"]["tokens"] -= meta["val"]["documents"]
    assert math.isclose(math.log(256) * meta["val"]["tokens"] / meta["val"]["bytes"] / math.log(2), 8)


def test_prepare_split_takes_the_smallest_hash_of_each_twenty(tmp_path):
    texts = [f"{i} squared is {i * i}\n" for i in range(59)]
    folder = prepare.prepare([write_documents(tmp_path / "in", texts)], "mine", data_dir=tmp_path)
    by_hash = lambda text: hashlib.sha256(text.encode()).digest()  # noqa: E731
    val = [min(texts[i : i + 20], key=by_hash) for i in (0, 20)]  # the last 19 are all for training
    assert [d.decode() for d in read_back(folder, "val")] == val
    assert [d.decode() for d in read_back(folder, "train")] == [text for text in texts if text not in val]


def test_prepare_split_of_few_documents_cuts_each_at_a_line_break(tmp_path):
    texts = ["".join(f"line {j} of {i}\n" for j in range(100)) for i in range(18)] + ["one line without an end"]
    folder = prepare.prepare([write_documents(tmp_path / "in", texts)], "mine", data_dir=tmp_path)
    train, val = read_back(folder, "train"), read_back(folder, "val")
    assert len(train) == 19 and len(val) == 18
    assert train.pop().decode() == texts.pop()
    for text, head, tail in zip(texts, train, val, strict=True):
        assert (head + tail).decode() == text and head.endswith(b"\n")
        assert 0.05 * len(text) <= len(tail) <= 0.05 * len(text) + len("line 99 of 17\n")
    late = write_documents(tmp_path / "late", ["one long line " * 9 + "\nend"])
    assert read_back(prepare.prepare([late], "late", data_dir=tmp_path / "data"), "val") == [b"end"]
    with pytest.raises(
        ValueError, match="no text for validation: give 20 documents or more, or one with several lines"
    ):
        prepare.prepare([write_documents(tmp_path / "short", ["no line break"])], "short", data_dir=tmp_path / "data")


def test_prepare_drops_duplicates_and_empty_documents_before_the_split(tmp_path):
    texts = [f"text {i}\n" for i in range(20)]
    data = tmp_path / "data"
    noisy = [t for text in texts for t in (text, "", text, texts[0])]
    a = prepare.prepare([write_documents(tmp_path / "a", texts)], "clean", data_dir=data)
    b = prepare.prepare([write_documents(tmp_path / "b", noisy)], "noisy", data_dir=data)
    assert contents(a)["train.bin"] == contents(b)["train.bin"] and contents(a)["val.bin"] == contents(b)["val.bin"]
    assert json.loads(contents(b)["meta.json"])["duplicates"] == 40
    # A long dropped document must leave nothing behind when a shorter one follows it.
    c = write_documents(tmp_path / "c", ["long " * 999 + "\nend\n", "long " * 999 + "\nend\n", "short\nlast\n"])
    assert read_back(prepare.prepare([c], "c", data_dir=data), "train")[1] == b"short\n"


def test_prepare_is_deterministic_on_any_number_of_cores(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "in", [UNICODE * (1 + i % 7) * 50 + str(i) for i in range(60)])
    monkeypatch.setattr(prepare, "PIECE", 5000)  # many jobs, and documents cut into several
    folders = []
    for n_cores in (1, 2, 7):
        monkeypatch.setattr(os, "cpu_count", lambda n=n_cores: n)
        folders.append(prepare.prepare([source], f"on{n_cores}", data_dir=tmp_path))
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    documents = read_back(folders[0], "train") + read_back(folders[0], "val")
    assert sorted(documents) == sorted((tmp_path / "in" / f"{i:05d}.txt").read_bytes() for i in range(60))


@pytest.mark.parametrize(
    "text", [UNICODE * 3000, "é" * 200_000 + "\n" + "🤗" * 100_000, " " * 2_000_000 + "x\n" * 200_000]
)
@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_prepare_long_documents_in_pieces(tmp_path, monkeypatch, text, tokenizer):
    if tokenizer == "gpt2":  # a stand-in that splits as GPT-4 does and merges nothing: the real one is a download
        ranks = {bytes([b]): b for b in range(256)}
        fake = tiktoken.Encoding("x", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOT: 256})
        monkeypatch.setattr(prepare, "load_tokenizer", lambda spec, folder: fake)
    (tmp_path / "long.txt").write_bytes(text.encode())
    folder = prepare.prepare([str(tmp_path / "long.txt")], "long", tokenizer, data_dir=tmp_path)
    train, val = read_back(folder, "train"), read_back(folder, "val")
    assert len(train) == len(val) == 1
    assert (train[0] + val[0]).decode() == text


def test_prepare_cut_pieces_covers_the_spans(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 64)
    text = (UNICODE * 20).encode() + "東".encode() * 100
    spans = [(0, 12), (12, 13), (13, len(text))]
    jobs = list(prepare.cut_pieces(text, spans))
    pieces = [piece for job in jobs for piece in job]
    assert pieces[0][0] == 0 and pieces[-1][1] == len(text)
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False))
    assert [stop for _, stop, is_end in pieces if is_end] == [12, 13, len(text)]
    assert all(0 < stop - start <= 64 for start, stop, _ in pieces)
    for start, stop, is_end in pieces[2:]:
        text[start:stop].decode()  # never cut inside a character
        assert is_end or text[stop - 1 : stop] == b"\n" or b"\n" not in text[start:stop]


def test_prepare_bpe(tmp_path):
    pytest.importorskip("tokenizers", reason="bpe:N needs: pip install tokenizers")
    lines = "".join(f"def function_{i}(self, x):\n    return x + {i}  # {UNICODE}" for i in range(400))
    texts = [lines[i : i + 2000] for i in range(0, len(lines), 2000)]
    source = write_documents(tmp_path / "in", texts)
    folder = prepare.prepare([source], "mine", "bpe:400", data_dir=tmp_path)
    assert contents(folder) == contents(prepare.prepare([source], "again", "bpe:400", data_dir=tmp_path))
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["dtype"]) == ("bpe:400", 400, 399, "uint16")
    documents = read_back(folder, "train") + read_back(folder, "val")
    assert sorted(d.decode() for d in documents) == sorted(texts)
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(lines.encode())
    assert meta["train"]["tokens"] < meta["train"]["bytes"] / 2
    # A plain tiktoken rank file: the 256 bytes first, in order, then the merges, each of two tokens before it.
    rows = [row.split(" ") for row in (folder / "tokenizer.tiktoken").read_text().splitlines()]
    tokens = [base64.b64decode(token) for token, _ in rows]
    assert [int(rank) for _, rank in rows] == list(range(399))
    assert tokens[:256] == [bytes([b]) for b in range(256)] and len(set(tokens)) == 399
    for rank, token in enumerate(tokens[256:], 256):
        assert any({token[:i], token[i:]} <= set(tokens[:rank]) for i in range(1, len(token)))
    # The first merge is the most frequent pair inside the pieces that the split pattern makes of the training text.
    pieces = tiktoken.Encoding(
        "x", pat_str=SPLIT, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    pattern = pieces._pat_str
    import regex  # a dependency of tiktoken

    pairs = collections.Counter()
    for document in read_back(folder, "train"):
        for piece in regex.findall(pattern, document.decode()):
            raw = piece.encode()
            pairs.update(zip(raw, raw[1:], strict=False))
    assert pairs[tuple(tokens[256])] == max(pairs.values())
    encoding = load_tokenizer("bpe:400", folder)
    for text in ("", "a", UNICODE, "\0\x7f\ufeff\U0010ffff", " " * 50_000, "word" * 20_000, "<|endoftext|>"):
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    with pytest.raises(ValueError, match=r"bpe:9000 needs more training text.* use --tokenizer=bpe:\d+ or bytes"):
        prepare.prepare([source], "toolarge", "bpe:9000", data_dir=tmp_path)
    # The rank file is checked when it is read.
    path = folder / "tokenizer.tiktoken"
    whole = path.read_bytes()
    for broken in (b"", whole[:-3], whole[: len(whole) // 2], whole.replace(b" 300\n", b" 301\n"), b"\xff" + whole):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="tokenizer.tiktoken is corrupt, it should rank 399 tokens"):
            load_tokenizer("bpe:400", folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no .*tokenizer.tiktoken, which the tokenizer 'bpe:400' needs"):
        load_tokenizer("bpe:400", folder)


def test_prepare_large_vocabulary_is_uint32(tmp_path, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    for n_vocab, dtype in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        special = {"<|endoftext|>": n_vocab - 1}
        encoding = tiktoken.Encoding("x", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
        monkeypatch.setattr(prepare, "load_tokenizer", lambda spec, folder, encoding=encoding: encoding)
        source = write_documents(tmp_path / "in", [f"{UNICODE}{i}" for i in range(20)])
        folder = prepare.prepare([source], dtype, "cl100k_base", data_dir=tmp_path)
        tokens, meta = prepare.open_split(folder, "val")
        assert (meta["dtype"], meta["vocab_size"], meta["eot"]) == (dtype, n_vocab, n_vocab - 1)
        assert tokens.dtype == dtype and tokens[-1] == n_vocab - 1
        assert read_back(folder, "val")[0].decode().startswith(UNICODE)


def test_prepare_jsonl(tmp_path):
    texts = [UNICODE + str(i) for i in range(19)] + ["lone surrogate \ud800 half\n"]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    folder = prepare.prepare([str(tmp_path / "a.jsonl")], "mine", data_dir=tmp_path)
    documents = {d.decode() for d in read_back(folder, "train") + read_back(folder, "val")}
    assert documents == {text.replace("\ud800", "?") for text in texts}
    for i, bad in enumerate(['{"id": 1}', '{"text": 3}', '{"text": null}', '["text"]', '"text"', "{", "text", "\xff"]):
        path = tmp_path / f"bad{i}.jsonl"
        path.write_bytes(f"{lines[0]}\n\n{bad}\n".encode("latin-1", "replace"))
        with pytest.raises(ValueError, match=rf"bad{i}.jsonl, line 3: expected a JSON object such as"):
            prepare.prepare([str(path)], "bad", data_dir=tmp_path)
    assert not (tmp_path / "bad").exists()


def test_prepare_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet needs: pip install pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [UNICODE + str(i) for i in range(3000)]
    columns = {"id": list(range(3001)), "text": [*texts, None]}
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"id": columns["id"], "text": pa.array(columns["text"], pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        folder = prepare.prepare([str(tmp_path / "a.parquet")], "mine", data_dir=tmp_path, overwrite=True)
        documents = [d.decode() for d in read_back(folder, "train") + read_back(folder, "val")]
        assert sorted(documents) == sorted(texts)
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_text("not parquet")
    pq.write_table(pa.table({"text": [b"\xff"]}), tmp_path / "e.parquet")
    for letter in "bcde":
        with pytest.raises(
            ValueError, match=rf"{letter}.parquet is not a parquet file with a column `text` of strings"
        ):
            prepare.prepare([str(tmp_path / f"{letter}.parquet")], "bad", data_dir=tmp_path)


def test_prepare_folders(tmp_path, capsys):
    root = tmp_path / "in"
    for name in (
        "b/2.md",
        "b/1.py",
        "a.txt",
        "c",
        ".hidden/x.txt",
        ".profile",
        "data/old/meta.json",
        "b/__pycache__/x.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\nlast\n")
    (root / "picture.png").write_bytes(b"\x89PNG\r\n")
    (root / "latin1.txt").write_bytes(b"a line\ncaf\xe9\n")
    (root / "cut.txt").write_bytes("é".encode()[:1])
    (root / "dangling").symlink_to(root / "nothing")
    folder = prepare.prepare([str(root), str(root / "a.txt")], "mine", data_dir=root / "data")
    assert read_back(folder, "train") == [b"a.txt\n", b"c\n", b"b/1.py\n", b"b/2.md\n", b"b/__pycache__/x.txt\n"]
    out = capsys.readouterr().out
    assert "left out: 1 duplicates, 3 files that are not UTF-8, 2 hidden ones" in out
    for name in ("latin1.txt", "cut.txt", "picture.png"):
        with pytest.raises(ValueError, match=f"{name} is not UTF-8 text; leave it out or convert it"):
            prepare.prepare([str(root / name)], "bad", data_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no text in .*empty; give UTF-8 text, .jsonl or .parquet files"):
        prepare.prepare([str(tmp_path / "empty")], "bad", data_dir=tmp_path)
    assert not list(tmp_path.glob("bad*"))


def test_prepare_python(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    for name in ("os.py", "json/decoder.py", "site-packages/x/y.py", "dist-packages/z.py", "data.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\npass\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.py").write_text("# w\npass\n")
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda key: str(library))
    monkeypatch.setattr(prepare.site, "getsitepackages", lambda: [str(library / "site-packages")])
    monkeypatch.setattr(prepare.site, "getusersitepackages", lambda: str(tmp_path / "nothing"))
    here = str(ROOT), os.getcwd(), str(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [*here, str(library / "site-packages"), str(library / "python.zip")])
    folder = prepare.prepare(["python"], data_dir=tmp_path)
    assert folder.name == "python" and read_back(folder, "train") == [b"# os.py\n", b"# json/decoder.py\n"]
    assert prepare.open_split(folder, "val")[1]["source"] == [f"Python {sys.version.split()[0]} standard library"]
    folder = prepare.prepare(["python"], data_dir=tmp_path, site_packages=True)
    names = ["w", "os.py", "dist-packages/z.py", "json/decoder.py", "site-packages/x/y.py"]
    assert folder.name == "site-packages" and read_back(folder, "train") == [f"# {name}\n".encode() for name in names]
    assert prepare.open_split(folder, "val")[1]["duplicates"] == 0


def test_prepare_shakespeare(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        assert url == prepare.SHAKESPEARE and 0 < timeout <= 60
        return open(tmp_path / "reply", "rb")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    (tmp_path / "reply").write_bytes(text)
    message = "cannot download https://.* run: python prepare.py path/to/input.txt --name=shakespeare"
    with pytest.raises(ConnectionError, match=message):  # a login page instead of the text
        prepare.prepare(["shakespeare"], data_dir=tmp_path / "data")
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    folder = prepare.prepare(["shakespeare"], data_dir=tmp_path / "data")
    assert (folder.name, sorted(contents(folder))) == ("shakespeare", ["meta.json", "train.bin", "val.bin"])
    assert read_back(folder, "train") + read_back(folder, "val") == text.splitlines(keepends=True)
    (tmp_path / "data" / f"again.tmp-{os.getpid()}").mkdir()  # what a crash left, of a process with the same id
    assert contents(prepare.prepare(["shakespeare"], "again", data_dir=tmp_path / "data")) == contents(folder)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError, match=message):

        def cut_off(url, timeout):
            raise http.client.IncompleteRead(b"")

        patch.setattr(prepare.urllib.request, "urlopen", cut_off)
        prepare.prepare(["shakespeare"], data_dir=tmp_path / "offline")
    (tmp_path / "reply").unlink()  # as urllib's errors, FileNotFoundError is an OSError
    with pytest.raises(ConnectionError, match=message):
        prepare.prepare(["shakespeare"], data_dir=tmp_path / "offline")
    assert not (tmp_path / "offline").exists()


def test_prepare_tiktoken_offline(tmp_path, monkeypatch):
    def get_encoding(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(
        ConnectionError, match="cannot download the tokenizer 'gpt2'.*--tokenizer=bytes or --tokenizer=bpe"
    ):
        prepare.prepare(["python"], tokenizer="gpt2", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_prepare_refuses_before_reading_anything(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "a.parquet").write_text("")
    a, data = str(tmp_path / "a.txt"), tmp_path / "data"
    monkeypatch.setattr(prepare, "read_documents", lambda path: pytest.fail("it began to read"))
    for sources, options, error, message in [
        ([a], {}, ValueError, "give the data set a name, such as --name=mine"),
        (["python", a], {}, ValueError, "give the data set a name"),
        ([a], {"name": "../up"}, ValueError, "--name=../up is not a plain folder name"),
        ([a], {"name": ""}, ValueError, "is not a plain folder name"),
        ([a], {"name": ".."}, ValueError, "is not a plain folder name"),
        ([a], {"name": "a/b"}, ValueError, "is not a plain folder name"),
        ([a], {"name": "a\n"}, ValueError, "is not a plain folder name"),
        ([a], {"name": "x", "site_packages": True}, ValueError, "--site-packages goes with the source python"),
        ([a, "nowhere.txt"], {"name": "x"}, FileNotFoundError, "no file or folder 'nowhere.txt'"),
        ([a], {"name": "x", "tokenizer": "bpe:"}, ValueError, "'bpe:': N is the size of the vocabulary, at least 257"),
        ([a], {"name": "x", "tokenizer": "bpe:256"}, ValueError, "at least 257; write bpe:16384"),
        ([a], {"name": "x", "tokenizer": "bpe:16k"}, ValueError, "at least 257; write bpe:16384"),
        (
            [a],
            {"name": "x", "tokenizer": "gpt9"},
            ValueError,
            "unknown tokenizer 'gpt9'; use bytes, bpe:N .* gpt2, .*cl100k",
        ),
    ]:
        with pytest.raises(error, match=message):
            prepare.prepare(sources, data_dir=data, **options)
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match="needs a package that is missing: pip install tokenizers"):
        prepare.prepare([a], "x", "bpe:300", data_dir=data)
    with pytest.raises(ValueError, match="needs a package that is missing: pip install pyarrow"):
        prepare.prepare([str(tmp_path / "a.parquet")], "x", data_dir=data)
    assert not data.exists()
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 89, 11))
    with pytest.raises(OSError, match="data has 0.0 MB free and this needs about 0.0 MB; make room or choose another"):
        prepare.prepare([a], "x", data_dir=data)
    assert not list(data.iterdir())


def test_prepare_overwrite_and_failure_leave_whole_data_sets(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "in", ["a\nb\n"])
    folder = prepare.prepare([source], "mine", data_dir=tmp_path / "data")
    before = contents(folder)
    write_documents(tmp_path / "in", ["c\nd\n"])
    with pytest.raises(FileExistsError, match="mine exists; pass --overwrite to replace it, or another --name"):
        prepare.prepare([source], "mine", data_dir=tmp_path / "data")

    def fail(*args, **options):
        assert contents(folder) == before  # the old data set is there until the new one is complete
        raise error

    for stage in ("read_documents", "cut_pieces", "load_tokenizer"):
        for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
            with monkeypatch.context() as patch, pytest.raises(type(error)):
                if stage == "load_tokenizer":  # inside the threads
                    encoding = tiktoken.Encoding(
                        "x", pat_str="x", mergeable_ranks={b"x": 0}, special_tokens={"<|endoftext|>": 1}
                    )
                    patch.setattr(tiktoken.Encoding, "encode_to_numpy", fail)
                    patch.setattr(prepare, stage, lambda spec, folder, encoding=encoding: encoding)
                else:
                    patch.setattr(prepare, stage, fail)
                prepare.prepare(
                    [source],
                    "mine",
                    "gpt2" if stage == "load_tokenizer" else "bytes",
                    tmp_path / "data",
                    overwrite=True,
                )
            assert contents(folder) == before and list(folder.parent.iterdir()) == [folder]
    (folder / "notes.txt").write_text("mine")  # --overwrite removes nothing that prepare.py did not write
    with pytest.raises(FileExistsError, match="mine holds other files than a data set's; pass another --name"):
        prepare.prepare([source], "mine", data_dir=tmp_path / "data", overwrite=True)
    (folder / "notes.txt").unlink()
    # Even if the last renaming is what fails, the old one comes back.
    rename = Path.rename
    with monkeypatch.context() as patch, pytest.raises(OSError, match="denied"):

        def deny(path, target):
            if path.name.endswith("~new"):
                raise OSError("denied")
            return rename(path, target)

        patch.setattr(Path, "rename", deny)
        prepare.prepare([source], "mine", data_dir=tmp_path / "data", overwrite=True)
    assert contents(folder) == before and list(folder.parent.iterdir()) == [folder]
    assert prepare.prepare([source], "mine", data_dir=tmp_path / "data", overwrite=True) == folder
    assert read_back(folder, "train") == [b"c\n"] and list(folder.parent.iterdir()) == [folder]


def test_prepare_clears_what_a_crash_left(tmp_path, capsys):
    """What killed runs left is removed, of this data set and of others, but not what another process writes now. A data
    set that was on its way out when the machine stopped is back."""
    source, data = write_documents(tmp_path / "in", ["a\nb\n"]), tmp_path / "data"
    folder, other = (prepare.prepare([source], name, data_dir=data) for name in ("mine", "other"))
    before = contents(folder)
    other.rename(data / "other~old")
    for name in ("mine~new", "mine~old", "other~new", "third~new", "busy~new", "fourth.tmp-123"):
        (data / name).mkdir()
        (data / name / "text").write_text("left")
    with files.locked(data / ".busy.lock", ""):
        prepare.prepare([source], "mine", data_dir=data, overwrite=True)
        with pytest.raises(ValueError, match="another prepare.py is writing .*busy"):
            prepare.prepare([source], "busy", data_dir=data)
    assert contents(folder) == contents(other) == before
    assert sorted(p.name for p in data.iterdir()) == ["busy~new", "fourth.tmp-123", "mine", "other"]
    printed = capsys.readouterr().out
    assert "removed what a run that was killed left of" in printed and "fourth.tmp-123 may have" in printed


def test_prepare_open_split_checks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, expected in [
        ("data/python", "no data set at data/python; prepare it with: python prepare.py python"),
        (
            "data/site-packages",
            "no data set at data/site-packages; prepare it with: python prepare.py python --site-packages",
        ),
        ("data/shakespeare", "no data set at data/shakespeare; prepare it with: python prepare.py shakespeare"),
        ("data/x", "no data set at data/x; prepare it with: python prepare.py FILES... --name=x"),
        ("/d/python", "no data set at /d/python; prepare it with: python prepare.py python --data_dir=/d"),
    ]:
        with pytest.raises(FileNotFoundError) as info:
            prepare.open_split(name, "train")
        assert str(info.value) == expected
    folder = prepare.prepare([write_documents(tmp_path / "in", ["some\ntext\n"])], "mine")
    assert str(folder) == "data/mine" or folder == Path("data/mine")
    with pytest.raises(ValueError, match="unknown split 'test'; use train or val"):
        prepare.open_split(folder, "test")
    again = "; rebuild it with: python prepare.py FILES... --name=mine --overwrite"
    whole = (folder / "train.bin").read_bytes()
    for broken, expected in [
        (whole[:-2], f"train.bin is truncated: {len(whole) - 2} bytes where meta.json says {len(whole)}{again}"),
        (whole[:-1], f"train.bin is truncated: {len(whole) - 1} bytes where"),
        (b"", f"train.bin is truncated: 0 bytes where meta.json says {len(whole)}"),
        (bytes([whole[0] ^ 1]) + whole[1:], f"train.bin is corrupt: its checksum is not the one in meta.json{again}"),
    ]:
        (folder / "train.bin").write_bytes(broken)
        with pytest.raises(ValueError) as info:
            prepare.open_split(folder, "train")
        assert expected in str(info.value)
    (folder / "train.bin").unlink()
    with pytest.raises(ValueError, match="train.bin is truncated: 0 bytes"):
        prepare.open_split(folder, "train")
    assert len(prepare.open_split(folder, "val")[0])  # the other split is untouched
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer": "bpe:300"}))
    with pytest.raises(ValueError, match="--name=mine --overwrite --tokenizer=bpe:300"):
        prepare.open_split(folder, "train")
    for broken in ("", "{", "[]", "null", "{}", json.dumps(meta | {"dtype": "int8"}), json.dumps(meta | {"train": {}})):
        (folder / "meta.json").write_text(broken)
        with pytest.raises(ValueError, match="meta.json.*; rebuild it with: python prepare.py FILES"):
            prepare.open_split(folder, "train")
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="mine has no meta.json; rebuild it with: python prepare.py"):
        prepare.open_split(folder, "train")


def test_prepare_drops_byte_order_marks(tmp_path):
    """Windows editors put one at the beginning of a file; inside of a text it is a character like any other."""
    mark, text = codecs.BOM_UTF8, b"a text\nof two lines \xef\xbb\xbf\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(mark + text)
    (tmp_path / "in/b.jsonl").write_bytes(mark + b'{"text": "another\\ntext\\n"}\n')
    (tmp_path / "in/c.txt").write_bytes(mark)
    folder = prepare.prepare([str(tmp_path / "in")], "mine", data_dir=tmp_path / "data")
    assert read_back(folder, "train") == [text[: text.index(b"of")], b"another\n"]
    assert read_back(folder, "val") == [text[text.index(b"of") :], b"text\n"]


def test_prepare_writes_no_bars_into_a_log(tmp_path):
    (tmp_path / "in.txt").write_text("some text\nand more\n" * 9)
    assert command("in.txt", "--name=mine", cwd=tmp_path).stderr == ""


def test_prepare_reads_in_blocks(tmp_path):
    """A document of 64 MB costs a few MB: the memory is that of the pieces being tokenized, not of the corpus."""
    import tracemalloc

    with open(tmp_path / "big.txt", "wb") as f:
        for i in range(64):
            f.write(f"{i:063d}\n".encode() * 2**14)
    tracemalloc.start()
    try:
        folder = prepare.prepare([str(tmp_path / "big.txt")], "big", data_dir=tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6 + 8 * (os.cpu_count() or 1) * prepare.PIECE * 5
    assert prepare.open_split(folder, "train")[1]["train"]["bytes"] > 60e6


def test_prepare_command_line(tmp_path):
    (tmp_path / "in.txt").write_text("some text\nand more\n" * 9)
    result = command("in.txt", "--name=mine", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data/mine/train.bin: 1 documents, 162 bytes, 163 tokens" in result.stdout.replace("\\", "/")
    assert read_back(tmp_path / "data/mine", "val") == [b"some text\nand more\n"[-9:]]
    for args, code, message in [
        (["in.txt", "--name=mine"], 1, "exists; pass --overwrite to replace it, or another --name\n"),
        (["in.txt", "--nam=mine"], 2, "unrecognized arguments: --nam=mine; see python prepare.py --help\n"),
    ]:
        result = command(*args, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (code, "")
        assert result.stderr.startswith("prepare.py: ") and result.stderr.endswith(message)
        assert result.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes without a signal they could handle")
@pytest.mark.parametrize("step", ["read_all", "split_documents", "write_tokens"])
def test_prepare_killed_leaves_nothing(step, tmp_path):
    """SIGTERM comes as a step begins."""
    (tmp_path / "in.txt").write_text("some text\nand more\n" * 9)
    code = f"""if True:
        import signal, flags, prepare
        step = prepare.{step}
        prepare.{step} = lambda *args: (signal.raise_signal(signal.SIGTERM), step(*args))[1]
        flags.run("prepare.py", prepare.main)"""
    args = [sys.executable, "-c", code, str(tmp_path / "in.txt"), "--name=mine", f"--data_dir={tmp_path / 'data'}"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr.endswith("prepare.py: interrupted, nothing was written\n")
    assert "Traceback" not in done.stderr and not list((tmp_path / "data").iterdir())
