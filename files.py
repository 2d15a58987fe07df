"""
Files, read with suspicion and written whole: JSON and tensors that say what is wrong with them, folders that replace
others in one move, and locks. What cannot be read raises a ValueError that names the file.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_args

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def brief(value) -> str:
    """A value as an error shows it, in 60 characters at most."""
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ----------------------------------------------------------------------------------------------------------------------
# JSON


def of_type(value, kind) -> bool:
    """Whether value is of a type, or of one of a union's. A whole number is a float, too, and True is no number."""
    kinds = get_args(kind) or (kind,)
    return type(value) in kinds or (type(value) is int and float in kinds and abs(value) < 2**63)


def check_keys(values, where: str, needs: dict, may: dict | None = None) -> None:
    """Raise ValueError unless values is a dict that has all keys of needs, each of its type. A dict as the type says so
    of the keys inside. Keys of may can be missing, or null; other keys are nobody's business."""
    if type(values) is not dict:
        raise ValueError(f"{where} is not an object but {brief(values)}")
    for key, kind in (needs | (may or {})).items():
        if values.get(key) is None and key not in needs:
            continue
        if key not in values:
            raise ValueError(f"{where} has no {key!r}")
        if isinstance(kind, dict):
            check_keys(values[key], f"{where}: {key!r}", kind)
        elif not of_type(values[key], kind):
            names = " or ".join(k.__name__ for k in get_args(kind) or (kind,))
            raise ValueError(f"{where}: {key}={brief(values[key])} must be {names}")


INFINITY = {"__float__": "Infinity"}  # what transformers 5 writes for it, before: Infinity. No number where one must be


def parse_json(text: str | bytes, where: str, needs: dict | None = None, may: dict | None = None) -> dict:
    """The object that a JSON text is, its keys checked (check_keys). Raises ValueError, naming `where` it stands."""

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is not a finite number")
        return value

    def constant(name: str) -> dict | float:
        return INFINITY if name == "Infinity" else finite(name)

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        values = json.loads(text, parse_float=finite, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"{where} is corrupt: it is nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"{where} is corrupt: {e}") from None
    check_keys(values, where, needs or {}, may)
    return values


def read_json(file: Path, needs: dict | None = None, may: dict | None = None) -> dict:
    """The object in a JSON file, its keys checked (check_keys). Raises OSError or ValueError, naming the file."""
    if file.stat().st_size > 2**27:
        raise ValueError(f"{file} is corrupt: no file of its kind has {file.stat().st_size:,} bytes")
    return parse_json(file.read_bytes(), str(file), needs, may)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    sha256 = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sha256.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        sha256.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def write_tensors(tensors: dict[str, torch.Tensor], file: Path, sign: bool = True) -> None:
    """Write a safetensors file, with its checksum among the metadata if it is to be signed. Raises OSError."""
    metadata = {"format": "pt"} | ({"sha256": checksum(tensors)} if sign else {})  # transformers wants the format
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as e:  # a full disk, say
        raise OSError(f"cannot write {file}: {e}") from None
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)  # safetensors leaves it to the owner alone


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, mapped: nothing is read before it is used, but for a checksum if there is one.

    Raises FileNotFoundError, and ValueError for a corrupt file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is not a whole checkpoint: it has no {file.name}")
    try:
        with safe_open(file, "pt") as f:
            tensors, sha256 = {name: f.get_tensor(name) for name in f.keys()}, (f.metadata() or {}).get("sha256")
    except (SafetensorError, RuntimeError, ValueError, TypeError) as e:
        raise ValueError(f"{file} is corrupt: {' '.join(str(e).split())}") from None
    if sha256 and checksum(tensors) != sha256:
        raise ValueError(f"{file} is corrupt: its checksum is another; take an older checkpoint or train again")
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def check_folders(folder: Path) -> None:
    """Raise ValueError if folder, or one that it is in, is something else."""
    if others := [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]:
        raise ValueError(f"{folder} cannot be a folder, as {others[0]} is none: give another name")


@contextmanager
def locked(file: Path, message: str) -> Iterator[None]:
    """Hold a lock for the with block. Raises ValueError(message) if another process does. The lock of a process that
    has died is free."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(message) from None
    try:
        yield
    finally:
        try:
            with suppress(OSError):  # Windows removes no open file
                file.unlink()
        finally:
            lock.release()


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """What goes wrong in the with block while something is written (a full disk, say) names the file."""
    try:
        yield
    except OSError as e:
        if e.filename or not e.errno or isinstance(e, BrokenPipeError):
            raise
        raise OSError(e.errno, e.strerror, str(file)) from None


@contextmanager
def writing_file(file: Path) -> Iterator[Path]:
    """A name beside `file` for the with block to write, which then takes its place. What goes wrong names the file, and
    leaves it as it was."""
    new = file.with_name(f"{file.stem}.new{file.suffix}")
    try:
        with naming(file):
            yield new
            new.replace(file)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path, mark: str = ".") -> Iterator[Path]:
    """
    A new folder for the with block to fill, folder.new. After the block it takes the place of `folder`. If the block
    fails, the new folder is removed and `folder` is as before. If it is killed, `recover` finds a whole one.
    """
    recover(folder, mark)
    new = folder.with_name(f"{folder.name}{mark}new")
    new.mkdir(parents=True)
    try:
        with naming(new):
            yield new
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}{mark}old"))
        new.rename(folder)
    finally:
        recover(folder, mark)


def recover(folder: Path, mark: str = ".") -> None:
    """Clean up after a `replacing` that was killed: a folder that was on its way out is back, and no other is left."""
    new, old = (folder.with_name(f"{folder.name}{mark}{kind}") for kind in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def memory(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 2**63
