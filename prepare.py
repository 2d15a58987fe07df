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

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages are imported ends without a traceback

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
import site
import sys
import sysconfig
import urllib.request
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
import tqdm

from files import check_folders, locked, parse_json, read_json, recover, replacing
from flags import Parser, run
from tokenizer import bpe_size, load_tokenizer, train_bpe

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
GROUP = 20  # documents of which one is for validation
OUTPUTS = {"train.bin", "val.bin", "meta.json", "tokenizer.tiktoken"}  # the only files that --overwrite removes
PIECE = 2**18  # bytes tokenized in one go; tiktoken's regex gives up on runs of about 2**20 spaces
# Of tokens on disk, by the name in meta.json. With a sign, ~t (negative) is a token t that is not to be predicted.
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "int16": np.dtype("<i2")}


META = {"tokenizer": str, "vocab_size": int, "eot": int, "dtype": str}  # of meta.json, with these of each split:
META |= {split: {"tokens": int, "bytes": int, "documents": int, "sha256": str} for split in ("train", "val")}


def open_split(folder: Path | str, split: str, command: str = "") -> tuple[np.memmap, dict]:
    """
    The tokens of a split ("train" or "val") and the settings in meta.json. The tokens are (n,) of one of DTYPES, mapped
    from disk and read-only. Raises FileNotFoundError if there is no data set, naming the command that makes it. Raises
    ValueError if meta.json is corrupt, or if a file's size is not the one there, or, up to 1 GiB, its checksum: larger
    files would delay each start of training by seconds.
    """
    folder = Path(folder)
    sources = {"python": "python", "site-packages": "python --site-packages", "shakespeare": "shakespeare"}
    command = command or f"python prepare.py {sources.get(folder.name, f'FILES... --name={folder.name}')}"
    if folder.parent != Path("data"):
        command += f" --data_dir={folder.parent}"
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}; use train or val")
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set at {folder}; prepare it with: {command}")
    again = f"rebuild it with: {command} --overwrite"
    try:
        meta = read_json(folder / "meta.json", META, {"record": int})
        dtype, record = DTYPES.get(meta["dtype"]), meta.get("record", 1)  # every window begins at a multiple
        good = 0 <= meta["eot"] < meta["vocab_size"] <= 2**24 and meta[split]["bytes"] >= 1 and record >= 1
        if not (dtype and good) or meta[split]["tokens"] % record:
            raise ValueError(f"{folder / 'meta.json'} is corrupt: its sizes or its dtype cannot be")
    except FileNotFoundError:
        raise ValueError(f"{folder} has no meta.json; {again}") from None
    except ValueError as e:
        raise ValueError(f"{e}; {again}") from None
    if meta["tokenizer"] not in ("bytes", "none") and "--tokenizer" not in again:
        again += f" --tokenizer={meta['tokenizer']}"
    path, n_bytes = folder / f"{split}.bin", meta[split]["tokens"] * dtype.itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != n_bytes:
        raise ValueError(f"{path} is truncated: {size:,} bytes where meta.json says {n_bytes:,}; {again}")
    tokens = np.memmap(path, dtype, mode="r")
    if size <= 2**30 and hashlib.sha256(tokens).hexdigest() != meta[split]["sha256"]:
        raise ValueError(f"{path} is corrupt: its checksum is not the one in meta.json; {again}")
    return tokens, meta


def check_arguments(
    sources: list[str], name: str | None, tokenizer: str, data_dir: Path, site_packages: bool, overwrite: bool
) -> Path:
    """The folder of the new data set. Raises what `prepare` raises, before anything is read or written."""
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
    folder = data_dir / name
    check_folders(folder)
    if folder.exists() and not {path.name for path in folder.iterdir()} <= OUTPUTS:
        raise FileExistsError(f"{folder} holds other files than a data set's; pass another --name")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; pass --overwrite to replace it, or another --name")
    if tokenizer.startswith("bpe:"):
        bpe_size(tokenizer)
        if not importlib.util.find_spec("tokenizers"):
            raise ValueError(f"--tokenizer={tokenizer} needs a package that is missing: pip install tokenizers")
    else:
        load_tokenizer(tokenizer, folder)  # raises if it is unknown or cannot be downloaded
    return folder


def python_folders(site_packages: bool) -> list[Path]:
    """Where this machine's Python source lies: the standard library, with installed packages if asked for."""
    library = Path(sysconfig.get_path("stdlib"))
    if not site_packages:
        return [library]
    here = {Path(__file__).resolve().parent, Path.cwd()}  # on sys.path as well, but not installed
    folders = [folder for folder in sys.path if Path(folder).resolve() not in here]
    folders += [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")]
    folders = {Path(folder).resolve() for folder in [library, *folders]}
    return sorted(folder for folder in folders if not folders & set(folder.parents))  # no nested ones


def find_files(sources: list[str], site_packages: bool, data_dir: Path) -> tuple[list[tuple[Path, bool]], int]:
    """
    All files in corpus order, each with whether the user named it, and the number of hidden ones left out.
    Raises ValueError if one of them is .parquet and the package that reads it is missing.
    """
    files, n_hidden = [], 0
    for source in sources:
        folders, suffix, excluded = [Path(source)], "", set()
        if source == "python":
            folders, suffix = python_folders(site_packages), ".py"
            excluded = set() if site_packages else {"site-packages", "dist-packages"}
        elif Path(source).is_file():
            files.append((Path(source), True))
            continue
        for folder in folders:
            for parent, subfolders, names in os.walk(folder):
                n_hidden += sum(name.startswith(".") for name in subfolders + names)
                subfolders[:] = sorted(
                    name
                    for name in subfolders
                    # data_dir may be inside the folder, and data sets made before are not text.
                    if not name.startswith(".") and name not in excluded and Path(parent, name).resolve() != data_dir
                )
                names = sorted(name for name in names if not name.startswith(".") and name.endswith(suffix))
                files += [(path, False) for name in names if (path := Path(parent, name)).is_file()]
    if any(path.suffix.lower() == ".parquet" for path, _ in files) and not importlib.util.find_spec("pyarrow"):
        raise ValueError("reading .parquet needs a package that is missing: pip install pyarrow")
    return files, n_hidden


def download_shakespeare() -> bytes:
    """The text of tinyshakespeare. Raises ConnectionError if the download fails or is another text."""
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=20) as response:
            text = response.read()
    except (OSError, http.client.HTTPException):
        text = b""  # its checksum is wrong, too
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise ConnectionError(
            f"cannot download {SHAKESPEARE} (no network?); if you have the file, run: "
            "python prepare.py path/to/input.txt --name=shakespeare"
        )
    return text


def text_size(files: list[tuple[Path, bool]], data_dir: Path) -> int:
    """The bytes of text in files, about: .parquet is compressed. Raises OSError if data_dir has no room for them."""
    size = sum(path.stat().st_size * (4 if path.suffix.lower() == ".parquet" else 1) for path, _ in files)
    free = shutil.disk_usage(data_dir).free
    if 3 * size > free:  # the text once, and two bytes of tokens for each byte of text: bpe needs less
        raise OSError(
            f"{data_dir} has {free / 1e6:,.1f} MB free and this needs about {3 * size / 1e6:,.1f} MB; "
            "make room or choose another --data_dir"
        )
    return size


def read_documents(path: Path) -> Iterator[Iterable[bytes]]:
    """
    Each document of a file as blocks of UTF-8 bytes, so that no text file has to fit in memory.
    Raises UnicodeDecodeError if a text file is not UTF-8, and ValueError if a .jsonl or .parquet file has no texts.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    text = parse_json(line, "it", {"text": str})["text"]
                except ValueError as e:
                    example = '{"text": "..."}'
                    raise ValueError(f"{path}, line {number}: expected a JSON object such as {example}: {e}") from None
                yield [text.encode("utf-8", "replace")]  # half a surrogate pair becomes ?
    elif suffix == ".parquet":
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as f:
                for batch in f.iter_batches(batch_size=1024, columns=["text"]):
                    for text in batch.column("text").to_pylist():
                        yield [b"" if text is None else text.encode()]
        except (pyarrow.ArrowException, KeyError, AttributeError, OSError) as e:
            if getattr(e, "errno", None):  # of the disk; pyarrow's own have no number, nor the name of the file
                raise
            raise ValueError(f"{path} is not a parquet file with a column `text` of strings") from None
    else:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(path, "rb") as f:

            def blocks():
                f.seek(len(codecs.BOM_UTF8) if f.read(3) == codecs.BOM_UTF8 else 0)
                while block := f.read(2**20):
                    decoder.decode(block)  # raises UnicodeDecodeError
                    yield block
                decoder.decode(b"", final=True)

            yield blocks()


def read_all(files: list[tuple[Path, bool]], path: Path, size: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """
    Write all documents that differ into the file `path`, one after the other. `size` is their bytes, about.
    Returns the documents (n, 2) int64, the bytes at which each begins and ends; their keys (n,) uint64, the beginning
    of each SHA-256; the number of duplicates left out; the number of files left out because they cannot be read.
    Bytes behind the last document belong to none. Raises ValueError if a file that the user named cannot be read.
    """
    ends, keys, seen, n_duplicates, n_skipped = array("q", [0]), array("Q"), set(), 0, 0
    with open(path, "wb") as f, tqdm.tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=None) as bar:
        for source, named in files:
            try:
                for blocks in read_documents(source):
                    f.seek(ends[-1])  # a document that was dropped is overwritten
                    sha256 = hashlib.sha256()
                    for block in blocks:
                        f.write(block)
                        sha256.update(block)
                        bar.update(len(block))
                    key = sha256.digest()[:16]
                    if key in seen:
                        n_duplicates += 1
                    elif f.tell() > ends[-1]:  # the document is not empty
                        seen.add(key)
                        ends.append(f.tell())
                        keys.append(int.from_bytes(key[:8], "big"))
            except (UnicodeDecodeError, PermissionError) as error:
                if named:
                    why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "not readable"
                    raise ValueError(f"{source} is {why}; leave it out or convert it") from None
                n_skipped += 1
    ends = np.frombuffer(ends, np.int64)
    return np.stack([ends[:-1], ends[1:]], axis=1), np.frombuffer(keys, np.uint64), n_duplicates, n_skipped


def split_documents(text: mmap.mmap, documents: np.ndarray, keys: np.ndarray) -> dict[str, np.ndarray]:
    """
    The spans of "train" and "val", (spans, 2) bytes each. Of each group of documents, the one with the smallest key is
    for validation: neighbours are often alike, so this is fairer than the last part of the corpus. Where the documents
    are fewer than a group, each gives its end. Raises ValueError if nothing is left for validation.
    """
    if len(documents) >= GROUP:
        n_grouped = len(documents) // GROUP * GROUP
        smallest = keys[:n_grouped].reshape(-1, GROUP).argmin(axis=1)
        is_val = np.zeros(len(documents), bool)
        is_val[smallest + np.arange(0, n_grouped, GROUP)] = True
        return {"train": documents[~is_val], "val": documents[is_val]}
    cuts = []  # after the last line break before the mark, or the first one after it, or nowhere
    for start, end in documents:
        mark = start + (end - start) * (GROUP - 1) // GROUP
        cuts.append(text.rfind(b"\n", start, mark) + 1 or text.find(b"\n", mark, end) + 1 or end)
    train, val = np.stack([documents[:, 0], cuts], axis=1), np.stack([cuts, documents[:, 1]], axis=1)
    val = val[val[:, 0] < val[:, 1]]
    if not len(val):
        raise ValueError(f"no text for validation: give {GROUP} documents or more, or one with several lines")
    return {"train": train, "val": val}


def cut_pieces(text: mmap.mmap, spans: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int, bool]]]:
    """
    Lists of (start, stop, whether a document ends there), each list about PIECE bytes of the spans: several documents,
    or a part of a long one, cut after a line break. The cuts depend on nothing but the text, and so do the tokens.
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


def write_tokens(
    text: mmap.mmap, spans: np.ndarray, encoding: tiktoken.Encoding, dtype: np.dtype, path: Path
) -> dict[str, int | str]:
    """
    Write the tokens of the spans, (spans, 2) bytes, into the file `path`, and return its entry of meta.json.
    tiktoken and numpy let go of Python's lock while they work, so threads use all cores. Unlike processes, threads
    start at once, whatever the program that called `prepare` has imported.
    """

    def encode(pieces: list[tuple[int, int, bool]]) -> np.ndarray:
        tokens = []
        for start, stop, is_end in pieces:
            if encoding.name == "bytes":
                tokens.append(np.frombuffer(text[start:stop], np.uint8))
            else:
                tokens.append(encoding.encode_to_numpy(text[start:stop].decode(), disallowed_special=()))
            if is_end:
                tokens.append([encoding.eot_token])
        return np.concatenate(tokens, dtype=dtype, casting="unsafe")

    n_bytes, n_threads = int((spans[:, 1] - spans[:, 0]).sum()), os.cpu_count() or 1
    jobs, sha256, n_tokens = cut_pieces(text, spans), hashlib.sha256(), 0
    with (
        ThreadPoolExecutor(n_threads) as pool,
        open(path, "wb") as f,
        tqdm.tqdm(total=n_bytes, desc=path.name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while batch := list(islice(jobs, 8 * n_threads)):  # a few at a time, so that memory is bounded
            for job, tokens in zip(batch, pool.map(encode, batch), strict=True):  # in order
                f.write(tokens)
                sha256.update(tokens)
                n_tokens += len(tokens)
                bar.update(sum(int(stop - start) for start, stop, _ in job))
    return {"tokens": n_tokens, "bytes": n_bytes, "documents": len(spans), "sha256": sha256.hexdigest()}


def writing(folder: Path) -> AbstractContextManager[None]:
    """A lock on a data set. Raises ValueError if another process writes it."""
    return locked(folder.with_name(f".{folder.name}.lock"), f"another prepare.py is writing {folder}: wait for it")


def clean_up(data_dir: Path) -> None:
    """Remove what killed runs left, and put back a data set that one was about to replace."""
    for name in sorted({path.name[:-4] for kind in ("new", "old") for path in data_dir.glob(f"*~{kind}")}):
        with suppress(ValueError), writing(data_dir / name):
            recover(data_dir / name, "~")
            print(f"removed what a run that was killed left of {data_dir / name}")
    for leftover in data_dir.glob("*.tmp-[0-9]*"):
        print(f"{leftover} may have been left by a run that was killed: remove it if nothing writes there")


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
    data_dir = Path(data_dir)
    clean_up(data_dir)
    folder = check_arguments(sources, name, tokenizer, data_dir, site_packages, overwrite)
    files, n_hidden = find_files([s for s in sources if s != "shakespeare"], site_packages, data_dir.resolve())
    shakespeare = download_shakespeare() if "shakespeare" in sources else None
    with writing(folder), replacing(folder, "~") as new:
        if shakespeare:
            (new / "shakespeare.txt").write_bytes(shakespeare)
            files.append((new / "shakespeare.txt", True))
        size = text_size(files, data_dir)
        documents, keys, n_duplicates, n_skipped = read_all(files, new / "text", size)
        if not len(documents):
            raise ValueError(f"found no text in {', '.join(sources)}; give UTF-8 text, .jsonl or .parquet files")
        with open(new / "text", "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
            spans = split_documents(text, documents, keys)
            if tokenizer.startswith("bpe:"):
                jobs = cut_pieces(text, spans["train"])
                train_bpe((text[start:stop].decode() for job in jobs for start, stop, _ in job), tokenizer, new)
            encoding = load_tokenizer(tokenizer, new)
            dtype = "uint16" if encoding.n_vocab <= 2**16 else "uint32"
            meta = {"tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, "dtype": dtype}
            labels = {"python": f"Python {platform.python_version()} standard library", "shakespeare": SHAKESPEARE}
            if site_packages:
                labels["python"] += " and installed packages"
            meta["source"] = [labels.get(source, source) for source in sources]
            if tokenizer.startswith("bpe:"):
                meta["tokenizer_sha256"] = hashlib.sha256((new / "tokenizer.tiktoken").read_bytes()).hexdigest()
            for split in ("train", "val"):
                meta[split] = write_tokens(text, spans[split], encoding, DTYPES[dtype], new / f"{split}.bin")
        meta["duplicates"] = n_duplicates
        (new / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        (new / "text").unlink()
        (new / "shakespeare.txt").unlink(missing_ok=True)

    for split in ("train", "val"):
        n = meta[split]
        print(f"{folder / split}.bin: {n['documents']:,} documents, {n['bytes']:,} bytes, {n['tokens']:,} tokens")
    print(f"left out: {n_duplicates:,} duplicates, {n_skipped:,} files that are not UTF-8, {n_hidden:,} hidden ones")
    return folder


def main(argv: list[str]) -> None:
    """The command line."""
    parser = Parser("prepare.py", __doc__)
    parser.add_argument("sources", nargs="+", help="python, shakespeare, or files and folders")
    parser.add_argument("--name", help="the data set's folder; files and folders need one")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, bpe:N, or a name that tiktoken knows [bytes]")
    parser.add_argument("--data_dir", default="data", help="where data sets live [data]")
    parser.add_argument(
        "--site-packages", "--site_packages", action="store_true", help="with python: installed packages too"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the data set if it exists")
    args = parser.parse_args(argv)
    if not args.data_dir:
        raise ValueError("--data_dir= is empty: give a folder, or leave it out")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill cleans up as Ctrl-C does
    try:
        prepare(**vars(args))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None


if __name__ == "__main__":
    run("prepare.py", main)
