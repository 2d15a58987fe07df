"""
Turn text into token files that train.py reads: data/NAME/{train,val}.bin and meta.json.

    python prepare.py python                          source code of Python's own standard library, no download
    python prepare.py python --site-packages          all Python source on this machine, hundreds of MB
    python prepare.py shakespeare                     downloads tinyshakespeare, 1 MB
    python prepare.py notes/ book.txt --name=mine     your own text: files, and folders with all that is in them
    python prepare.py wiki.jsonl --name=wiki --tokenizer=bpe:16384

A document is a text file (.txt, .md, .py, any UTF-8), or the `text` of a line of .jsonl or of a row of .parquet.
Two documents with the same content count once. Of every 20 documents one goes to validation. Each is followed by the
end-of-text token. The same text always gives the same files, on any number of cores.

Tokenizers:
    bytes       a token per byte, 257 in all; needs no download (the default)
    bpe:16384   byte pairs learned from the training split, 16384 tokens in all: 256 bytes, merges, end of text
    gpt2        or any other encoding that tiktoken knows: cl100k_base, o200k_base, ...; downloaded once
"""

import argparse
import base64
import codecs
import hashlib
import http.client
import importlib.util
import json
import mmap
import os
import platform
import re
import shutil
import signal
import site
import sys
import sysconfig
import urllib.request
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
import tqdm

EOT = "<|endoftext|>"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# How GPT-4 splits text before merging bytes: contractions, words with the sign before them, up to three digits,
# punctuation with the newlines after it, blank lines, spaces (the last one stays with the word that follows).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GROUP = 20  # documents of which one is for validation
OUTPUTS = {"train.bin", "val.bin", "meta.json", "tokenizer.tiktoken"}  # all that --overwrite may remove
PIECE = 2**18  # bytes tokenized in one go; tiktoken's regex gives up on runs of about 2**20 spaces


def bpe_size(spec: str) -> int:
    """The N of the tokenizer "bpe:N": 256 bytes, N - 257 merges, and the end-of-text token."""
    size = spec.removeprefix("bpe:")
    if not re.fullmatch("[0-9]{1,9}", size) or int(size) < 257:
        raise ValueError(f"tokenizer {spec!r}: N is the size of the vocabulary, at least 257; write bpe:16384")
    return int(size)


def load_tokenizer(spec: str, folder: Path | str) -> tiktoken.Encoding:
    """
    The encoding of a data set: `spec` is meta.json's "tokenizer" ("bytes", "bpe:N" or a name that tiktoken knows), and
    `folder` holds tokenizer.tiktoken if that is bpe:N. Its `eot_token` ends each document, `n_vocab` is the vocabulary.
    Raises ValueError (bad spec, corrupt file), FileNotFoundError (no such file) or ConnectionError (cannot download).
    """
    if spec == "bytes":
        ranks = {bytes([b]): b for b in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={EOT: 256})
    if spec.startswith("bpe:"):
        n_vocab, path = bpe_size(spec), Path(folder) / "tokenizer.tiktoken"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}, which the tokenizer {spec!r} needs: prepare the data set again")
        try:
            lines = [line.split() for line in path.read_bytes().splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError:
            ranks = {}
        if len(ranks) != n_vocab - 1 or sorted(ranks.values()) != list(range(n_vocab - 1)):
            raise ValueError(f"{path} is corrupt, it should rank {n_vocab - 1} tokens: prepare the data set again")
        return tiktoken.Encoding(spec, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOT: n_vocab - 1})
    names = tiktoken.list_encoding_names()
    if spec not in names:
        raise ValueError(f"unknown tokenizer {spec!r}; use bytes, bpe:N (such as bpe:16384) or {', '.join(names)}")
    try:
        return tiktoken.get_encoding(spec)
    except (OSError, ValueError) as error:  # no network, or a download that is not what tiktoken expects
        raise ConnectionError(
            f"cannot download the tokenizer {spec!r} ({type(error).__name__}); use --tokenizer=bytes or "
            "--tokenizer=bpe:16384 (trained on your text), which need no network"
        ) from None


def open_split(folder: Path | str, split: str) -> tuple[np.memmap, dict]:
    """
    The tokens of a split ("train" or "val"), one-dimensional, mapped from disk and read-only, and all of meta.json.
    Raises FileNotFoundError if there is no data set, and ValueError if its files are not what meta.json says: by size,
    and up to 1 GiB by checksum as well (reading larger files whole would delay each start of training by seconds).
    """
    folder = Path(folder)
    sources = {"python": "python", "site-packages": "python --site-packages", "shakespeare": "shakespeare"}
    command = f"python prepare.py {sources.get(folder.name, f'FILES... --name={folder.name}')}"
    if folder.parent != Path("data"):
        command += f" --data_dir={folder.parent}"
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}; use train or val")
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set at {folder}; prepare it with: {command}")
    again = f"rebuild it with: {command} --overwrite"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        n_bytes, sha256 = meta[split]["tokens"] * dtype.itemsize, meta[split]["sha256"]
        if meta["tokenizer"] != "bytes":
            again += f" --tokenizer={meta['tokenizer']}"
    except FileNotFoundError:
        raise ValueError(f"{folder} has no meta.json; {again}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'meta.json'} is corrupt; {again}") from None
    path = folder / f"{split}.bin"
    size = path.stat().st_size if path.is_file() else 0
    if size != n_bytes:
        raise ValueError(f"{path} is truncated: {size:,} bytes where meta.json says {n_bytes:,}; {again}")
    tokens = np.memmap(path, dtype, mode="r")
    if size <= 2**30 and hashlib.sha256(tokens).hexdigest() != sha256:
        raise ValueError(f"{path} is corrupt: its checksum is not the one in meta.json; {again}")
    return tokens, meta


def find_files(sources: list[str], site_packages: bool, data_dir: Path) -> tuple[list[tuple[Path, bool]], int]:
    """All files in corpus order, each with whether the user named it, and the number of hidden ones left out."""
    files, n_hidden = [], 0
    for source in sources:
        folders, suffix, excluded = [source], "", set()
        if source == "python":
            folders, suffix = [sysconfig.get_path("stdlib")], ".py"
            if site_packages:
                here = {Path(__file__).resolve().parent, Path.cwd()}  # on sys.path as well, but not installed
                folders += [folder for folder in sys.path if Path(folder).resolve() not in here]
                folders += [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")]
                folders = {Path(folder).resolve() for folder in folders}
                folders = sorted(folder for folder in folders if not folders & set(folder.parents))  # no nested ones
            else:
                excluded = {"site-packages", "dist-packages"}
        elif Path(source).is_file():
            files.append((Path(source), True))
            continue
        for folder in folders:
            for parent, subfolders, names in os.walk(folder):
                n_hidden += sum(name.startswith(".") for name in subfolders + names)
                subfolders[:] = sorted(
                    name
                    for name in subfolders
                    # Data sets made before are not text to read, should they be inside the folder.
                    if not name.startswith(".") and name not in excluded and Path(parent, name).resolve() != data_dir
                )
                names = sorted(name for name in names if not name.startswith(".") and name.endswith(suffix))
                files += [(path, False) for name in names if (path := Path(parent, name)).is_file()]
    return files, n_hidden


def read_documents(path: Path) -> Iterator[Iterable[bytes]]:
    """Each document of a file as blocks of UTF-8 bytes, so that no document has to fit in memory."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"].encode("utf-8", "replace")  # half a surrogate pair becomes ?
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(
                        f'{path}, line {number}: expected a JSON object such as {{"text": "..."}}'
                    ) from None
                yield [text]
    elif suffix == ".parquet":
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as f:
                for batch in f.iter_batches(batch_size=1024, columns=["text"]):
                    for text in batch.column("text").to_pylist():
                        yield [b"" if text is None else text.encode()]
        except (pyarrow.ArrowException, KeyError, AttributeError):
            raise ValueError(f"{path} is not a parquet file with a column `text` of strings") from None
    else:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(path, "rb") as f:

            def blocks():
                while block := f.read(2**20):
                    decoder.decode(block)  # raises UnicodeDecodeError
                    yield block
                decoder.decode(b"", final=True)

            yield blocks()


def cut_pieces(text: mmap.mmap, spans: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int, bool]]]:
    """
    Lists of (start, stop, whether a document ends there), each list about PIECE bytes of the spans: several documents,
    or a part of a long one, cut after a line break. That depends on nothing but the text, and so do the tokens.
    """
    pieces, size = [], 0
    for start, end in spans:
        while start < end:
            stop = end
            if end - start > PIECE:
                stop = text.rfind(b"\n", start, start + PIECE) + 1
                if not stop:
                    stop = start + PIECE
                    while text[stop] & 0xC0 == 0x80:  # inside a UTF-8 character
                        stop -= 1
            pieces.append((start, stop, stop == end))
            size += stop - start
            start = stop
            if size >= PIECE:
                yield pieces
                pieces, size = [], 0
    if pieces:
        yield pieces


def train_bpe(texts: Iterator[str], spec: str, folder: Path) -> None:
    """Learn the merges of "bpe:N", and write tokenizer.tiktoken: on each line a token in base64, a space, its rank."""
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


def prepare(
    sources: list[str],
    name: str | None = None,
    tokenizer: str = "bytes",
    data_dir: Path | str = "data",
    site_packages: bool = False,
    overwrite: bool = False,
) -> Path:
    """
    Read `sources` ("python", "shakespeare", files, folders), write the data set data_dir/name, and return that folder.
    It appears there complete, or not at all. Raises ValueError or OSError with one line that says what to change.
    """
    builtin = {"python": "site-packages" if site_packages else "python", "shakespeare": "shakespeare"}
    if name is None:
        if len(sources) != 1 or sources[0] not in builtin:
            raise ValueError("give the data set a name, such as --name=mine")
        name = builtin[sources[0]]
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"--name={name} is not a plain folder name; use letters, digits, _, - and dots")
    if site_packages and "python" not in sources:
        raise ValueError("--site-packages goes with the source python: python prepare.py python --site-packages")
    for source in sources:
        if source not in builtin and not Path(source).exists():
            raise FileNotFoundError(f"no file or folder {source!r}; give one that exists, or python or shakespeare")
    data_dir = Path(data_dir)
    folder = data_dir / name
    if folder.exists() and not {path.name for path in folder.iterdir()} <= OUTPUTS:
        raise FileExistsError(f"{folder} holds other files than a data set's; pass another --name")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; pass --overwrite to replace it, or another --name")
    if tokenizer.startswith("bpe:"):
        bpe_size(tokenizer)
        if not importlib.util.find_spec("tokenizers"):
            raise ValueError(f"--tokenizer={tokenizer} needs a package that is missing: pip install tokenizers")
    else:
        load_tokenizer(tokenizer, folder)  # unknown or cannot be downloaded: say so before reading anything
    files, n_hidden = find_files([s for s in sources if s != "shakespeare"], site_packages, data_dir.resolve())
    if any(path.suffix.lower() == ".parquet" for path, _ in files) and not importlib.util.find_spec("pyarrow"):
        raise ValueError("reading .parquet needs a package that is missing: pip install pyarrow")
    download = b""
    if "shakespeare" in sources:
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=20) as response:
                download = response.read()
        except (OSError, http.client.HTTPException):
            pass  # the checksum of nothing is wrong, too
        if hashlib.sha256(download).hexdigest() != SHAKESPEARE_SHA256:
            raise ConnectionError(
                f"cannot download {SHAKESPEARE} (no network?); if you have the file, run: "
                "python prepare.py path/to/input.txt --name=shakespeare"
            )

    temporary, replaced = data_dir / f"{name}.tmp-{os.getpid()}", data_dir / f"{name}.old-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # containers give every run the same id, a crashed one's too
    temporary.mkdir(parents=True)
    try:
        if download:
            (temporary / "shakespeare.txt").write_bytes(download)
            files.append((temporary / "shakespeare.txt", True))
        # Room for the text once, and two bytes for each of its bytes: bpe needs less. Parquet is compressed.
        size = sum(path.stat().st_size * (4 if path.suffix.lower() == ".parquet" else 1) for path, _ in files)
        free = shutil.disk_usage(temporary).free
        if 3 * size > free:
            raise OSError(
                f"{data_dir} has {free / 1e6:,.0f} MB free and this needs about {3 * size / 1e6:,.0f} MB; "
                "make room or choose another --data_dir"
            )

        # 1. All documents that differ, one after the other, in one file. A document that is dropped is overwritten by
        # the next, and what comes after the last end is never read.
        ends, keys, seen, n_duplicates, n_skipped = array("q", [0]), array("Q"), set(), 0, 0
        with (
            open(temporary / "text", "wb") as f,
            tqdm.tqdm(total=size, desc="reading", unit="B", unit_scale=True) as bar,
        ):
            for path, named in files:
                try:
                    for blocks in read_documents(path):
                        f.seek(ends[-1])
                        sha256 = hashlib.sha256()
                        for block in blocks:
                            f.write(block)
                            sha256.update(block)
                            bar.update(len(block))
                        if f.tell() > ends[-1]:
                            key = sha256.digest()[:16]
                            if key in seen:
                                n_duplicates += 1
                            else:
                                seen.add(key)
                                ends.append(f.tell())
                                keys.append(int.from_bytes(key[:8], "big"))
                except (UnicodeDecodeError, PermissionError) as error:
                    if named:
                        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "not readable"
                        raise ValueError(f"{path} is {why}; leave it out or convert it") from None
                    n_skipped += 1
        if not keys:
            raise ValueError(f"found no text in {', '.join(sources)}; give UTF-8 text, .jsonl or .parquet files")
        del seen

        # 2. The split. Neighbours are often alike, so one of each group is fairer than the last part of the corpus.
        documents = np.stack([np.frombuffer(ends, np.int64)[:-1], np.frombuffer(ends, np.int64)[1:]], axis=1)
        with open(temporary / "text", "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if len(documents) >= GROUP:
                n_grouped = len(documents) // GROUP * GROUP
                smallest = np.frombuffer(keys, np.uint64)[:n_grouped].reshape(-1, GROUP).argmin(axis=1)
                is_val = np.zeros(len(documents), bool)
                is_val[smallest + np.arange(0, n_grouped, GROUP)] = True
                spans = {"train": documents[~is_val], "val": documents[is_val]}
            else:
                cuts = []  # after the last line break before the mark, or the first one after it, or nowhere
                for start, end in documents:
                    mark = start + (end - start) * (GROUP - 1) // GROUP
                    cuts.append(text.rfind(b"\n", start, mark) + 1 or text.find(b"\n", mark, end) + 1 or end)
                val = np.stack([cuts, documents[:, 1]], axis=1)
                spans = {"train": np.stack([documents[:, 0], cuts], axis=1), "val": val[val[:, 0] < val[:, 1]]}
            if not len(spans["val"]):
                raise ValueError(f"no text for validation: give {GROUP} documents or more, or one with several lines")

            # 3. Tokens. tiktoken and numpy let go of Python's lock while they work, so threads use all cores; unlike
            # processes they start at once, whatever the program that called this function has imported.
            if tokenizer.startswith("bpe:"):
                jobs = cut_pieces(text, spans["train"])
                train_bpe((text[start:stop].decode() for job in jobs for start, stop, _ in job), tokenizer, temporary)
            encoding = load_tokenizer(tokenizer, temporary)
            dtype = "uint16" if encoding.n_vocab <= 2**16 else "uint32"

            def encode(job):
                tokens = []
                for start, stop, is_end in job:
                    if tokenizer == "bytes":
                        tokens.append(np.frombuffer(text[start:stop], np.uint8))
                    else:
                        tokens.append(encoding.encode_to_numpy(text[start:stop].decode(), disallowed_special=()))
                    if is_end:
                        tokens.append([encoding.eot_token])
                return np.concatenate(tokens, dtype="<u2" if dtype == "uint16" else "<u4", casting="unsafe")

            meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, "dtype": dtype}
            labels = {"python": f"Python {platform.python_version()} standard library", "shakespeare": SHAKESPEARE}
            if site_packages:
                labels["python"] += " and installed packages"
            meta["source"] = [labels.get(source, source) for source in sources]
            n_threads = os.cpu_count() or 1
            with ThreadPoolExecutor(n_threads) as pool:
                for split in ("train", "val"):
                    jobs, sha256, n_tokens = cut_pieces(text, spans[split]), hashlib.sha256(), 0
                    n_bytes = int((spans[split][:, 1] - spans[split][:, 0]).sum())
                    with (
                        open(temporary / f"{split}.bin", "wb") as f,
                        tqdm.tqdm(total=n_bytes, desc=f"{split}.bin", unit="B", unit_scale=True) as bar,
                    ):
                        while batch := list(islice(jobs, 8 * n_threads)):
                            for job, tokens in zip(batch, pool.map(encode, batch), strict=True):  # in order
                                f.write(tokens)
                                sha256.update(tokens)
                                n_tokens += len(tokens)
                                bar.update(sum(int(stop - start) for start, stop, _ in job))
                    meta[split] = {"tokens": n_tokens, "bytes": n_bytes, "documents": len(spans[split])}
                    meta[split]["sha256"] = sha256.hexdigest()
        meta["duplicates"] = n_duplicates

        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        (temporary / "text").unlink()
        (temporary / "shakespeare.txt").unlink(missing_ok=True)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)

    for split in ("train", "val"):
        n = meta[split]
        print(f"{folder / split}.bin: {n['documents']:,} documents, {n['bytes']:,} bytes, {n['tokens']:,} tokens")
    print(f"left out: {n_duplicates:,} duplicates, {n_skipped:,} files that are not UTF-8, {n_hidden:,} hidden ones")
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sources", nargs="+", help="python, shakespeare, or files and folders")
    parser.add_argument("--name", help="the data set's folder; files and folders need one")
    parser.add_argument("--tokenizer", default="bytes", help="bytes (default), bpe:N, or a name that tiktoken knows")
    parser.add_argument("--data_dir", default="data", help="where data sets live (default: data)")
    parser.add_argument(
        "--site-packages", "--site_packages", action="store_true", help="with python: installed packages too"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the data set if it exists")
    parser.error = lambda message: parser.exit(2, f"prepare.py: {message}; see python prepare.py --help\n")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill cleans up as Ctrl-C does
    try:
        prepare(**vars(args))
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        print("prepare.py: interrupted, nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
