"""Files: read with suspicion, written whole."""

import os
import stat
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import files


def test_checks_name_file_and_key(tmp_path):
    file, needs = tmp_path / "x.json", {"a": int, "b": {"c": float}}
    for text, message in [
        ('{"a": 1, "b": {"c": 2}}', None),
        ('\ufeff{"a": 1, "b": {"c": 2.5}, "other": []}', None),
        ('{"a": true, "b": {"c": 2}}', "x.json: a=True must be int"),
        ('{"a": 1.0, "b": {"c": 2}}', "x.json: a=1.0 must be int"),
        ('{"a": 1, "b": {"c": null}}', "x.json: 'b': c=None must be float"),
        ('{"a": 1, "b": []}', "x.json: 'b' is not an object but []"),
        ('{"a": 1}', "x.json has no 'b'"),
        ('{"a": Infinity}', "x.json: a={'__float__': 'Infinity'} must be int"),
        ('{"a": 1, "b": {"c": NaN}}', "x.json is corrupt: NaN is not a finite number"),
        ('{"a": 1, "b": {"c": 1e999}}', "x.json is corrupt: 1e999 is not a finite number"),
        ('{"a": 1, "b": {"c": "' + "h" * 999 + '"}}', "x.json: 'b': c='" + "h" * 56 + "... must be float"),
        ("[" * 100000, "x.json is corrupt: "),
        ("{", "x.json is corrupt: "),
        ("[]", "x.json is not an object but []"),
    ]:
        file.write_text(text, encoding="utf-8")
        if message is None:
            assert files.read_json(file, needs)["a"] == 1
            continue
        with pytest.raises(ValueError) as e:
            files.read_json(file, needs)
        assert message in str(e.value)
    file.write_text('{"a": 1, "b": {"c": 2}, "maybe": "no"}')
    with pytest.raises(ValueError, match="x.json: maybe='no' must be int or bool"):
        files.read_json(file, needs, {"maybe": int | bool, "other": str})
    os.truncate(file, 2**27 + 1)
    with pytest.raises(ValueError, match="no file of its kind has 134,217,729 bytes"):
        files.read_json(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_one_flipped_bit_of_tensors_is_found(dtype, tmp_path):
    file, tensors = (
        tmp_path / "x.safetensors",
        {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.ones((), dtype=dtype)},
    )
    files.write_tensors(tensors, file)
    again = files.read_tensors(file)
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], v) for k, v in tensors.items())
    data = file.read_bytes()
    for bit in range(8 * (len(data) - 7 * dtype.itemsize), 8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match="x.safetensors is corrupt: its checksum is another"):
            files.read_tensors(file)
    files.write_tensors(tensors, file, sign=False)
    assert b"sha256" not in file.read_bytes() and files.read_tensors(file).keys() == tensors.keys()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_modes_are_as_the_user_wants_them(tmp_path):
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            files.write_tensors({"a": torch.ones(1)}, tmp_path / "x.safetensors")
        finally:
            assert os.umask(before) == mask
        assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_lock_is_held_once(tmp_path):
    with files.locked(tmp_path / "lock", "no"):
        with pytest.raises(ValueError, match="busy"), files.locked(tmp_path / "lock", "busy"):
            pass
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
    (tmp_path / "lock").touch()  # of a process that was killed
    with files.locked(tmp_path / "lock", "busy"):
        pass


def test_a_lock_ends_with_its_block(tmp_path, monkeypatch):
    """Also where Ctrl-C comes while its file is removed, and the traceback is kept."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(Path, "unlink", Mock(side_effect=KeyboardInterrupt))
        with files.locked(tmp_path / "lock", "busy"):
            pass
    with files.locked(tmp_path / "lock", "busy"):
        pass
    assert kept.tb


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "x"
    for text in ("first", "second"):
        with files.replacing(folder) as new:
            (new / "text").write_text(text)
        assert [f.name for f in tmp_path.iterdir()] == ["x"] and (folder / "text").read_text() == text
    with pytest.raises(KeyboardInterrupt), files.replacing(folder) as new:
        (new / "text").write_text("half")
        raise KeyboardInterrupt
    assert [f.name for f in tmp_path.iterdir()] == ["x"] and (folder / "text").read_text() == "second"
    folder.rename(tmp_path / "x.old")  # killed between two renames
    (tmp_path / "x.new").mkdir()
    files.recover(folder)
    assert [f.name for f in tmp_path.iterdir()] == ["x"] and (folder / "text").read_text() == "second"


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(KeyError), files.writing_file(file) as new:
        new.write_text("half")
        raise KeyError
    with pytest.raises(OSError, match="a.json"), files.writing_file(file):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and file.read_text() == "old"
    with files.writing_file(file) as new:
        assert new.suffix == ".json"  # which says to some writers what to write
        new.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and file.read_text() == "new"
