"""The data set of recall, and training on records of which only the answers are predicted."""

import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import ROOT, losses, train_here

import flags
import prepare
import recall
import train
import training
from conftest import small
from model import Hymba, HymbaConfig

FLAGS = ["--dataset=recall", "--block_size=16", "--n_meta=0", "--vocab_size=32"]


@pytest.mark.parametrize("n_pairs, episodes", [(2, 6), (3, 4), (5, 2), (12, 1)])
def test_every_answer_follows_its_key_and_nothing_else_is_predicted(n_pairs, episodes):
    records = recall.draw(np.random.default_rng(0), n_pairs, 50, 48, 96)
    assert records.shape == (50, 49)
    orders, keys = set(), []
    for record in records:
        for episode in record[: 4 * n_pairs * episodes].reshape(episodes, 2, n_pairs, 2):
            told, (keys_asked, answers) = ~episode[0], episode[1].T
            pairs = dict(told)
            assert len(pairs) == n_pairs and max(pairs) < 48 <= min(pairs.values()) and max(pairs.values()) < 96
            assert dict(zip(~keys_asked, answers, strict=True)) == pairs
            orders.add(tuple(list(pairs).index(~key) for key in keys_asked))
            keys += pairs
        assert len(set(keys[-n_pairs * episodes :])) == n_pairs * episodes  # none in two episodes
        assert (~record[4 * n_pairs * episodes :] >= 48).all()  # no key, so no question without an answer
    assert len(orders) >= min(math.factorial(n_pairs), 45) and set(keys) == set(range(48))


def test_the_data_set(tmp_path):
    """The same files every time; all numbers of pairs alike; whole or not at all."""
    folder = recall.prepare_recall([4, 2], 1500, data_dir=tmp_path)
    tokens, meta = prepare.open_split(folder, "train")
    assert meta["record"] == 17 and meta["vocab_size"] == 32 and len(tokens) == 1500 * 17
    pairs = lambda tokens: (tokens.reshape(-1, 17) >= 0).argmax(1) // 2  # noqa: E731  the first answer is behind them
    assert set(pairs(tokens)) == {2, 4} and 940 < (pairs(tokens) == 2).sum() < 1060  # 1 / 2 to 1 / 4
    val, _ = prepare.open_split(folder, "val")
    assert np.sort(pairs(val).reshape(-1, 2)).tolist() == [[2, 4]] * 64 and 16 < (pairs(val)[::2] == 2).sum() < 48
    both = {row.tobytes() for row in np.concatenate([tokens, val]).reshape(-1, 17)}
    assert len(both) == 1500 + 128  # none twice
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        recall.main(["--pairs=2,4", "--records=1500", f"--data_dir={tmp_path}"])
    recall.main(["--pairs=2,4", "--records=1500", f"--data_dir={tmp_path}", "--overwrite"])
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    for flag, message in [
        ("--pairs=x", "write numbers with commas"),
        ("--pairs=0", "numbers from 1 to 4095"),
        ("--pairs=4096", "numbers from 1 to 4095"),
        ("--records=1", "at least as many"),
        ("--name=a/b", "plain folder name"),
    ]:
        with pytest.raises(ValueError, match=message):
            recall.main([f"--data_dir={tmp_path}", flag])
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"record": 18}))
    with pytest.raises(ValueError, match="is corrupt: .*python recall.py --data_dir=.* --overwrite$"):
        prepare.open_split(folder, "val", "python recall.py")


def test_windows_are_records():
    data = np.arange(50)
    windows = training.draw_windows([data], 0.0, (0, 1), 500, 9, record=10)
    assert set(windows[:, 0].tolist()) == {0, 10, 20, 30, 40} and (windows - windows[:, :1] == np.arange(10)).all()
    assert training.even_starts(50, 9, 3, 10).tolist() == [0, 20, 40]
    assert training.even_starts(50, 9, 99, 10).tolist() == [0, 10, 20, 30, 40]
    assert training.even_starts(50, 9, 3).tolist() == [0, 20, 40] and len(training.even_starts(50, 9, 99)) == 41


def test_only_answers_count():
    """The loss of a window is the mean of the losses of the tokens that are not marked."""
    model, tokens = small("hM"), np.random.default_rng(0).integers(0, 61, (3, 12))
    marked = np.where(np.random.default_rng(1).random(tokens.shape) < 0.7, ~tokens, tokens)
    idx, targets = training.to_device(marked, torch.device("cpu"))
    assert (idx.numpy() == tokens[:, :-1]).all()
    every = F.cross_entropy(model(idx).flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten(), reduction="none")
    expected = every[torch.tensor(marked[:, 1:] >= 0).flatten()].mean()
    torch.testing.assert_close(model(idx, targets), expected)


def test_training_on_records(tmp_path, monkeypatch):
    """It reads whole records. A run that was stopped goes on to the bit. Other lengths and a sample are refused."""
    folder = recall.prepare_recall([2, 4], 1000, data_dir=tmp_path / "data")
    seen, step, to_device = [], train.train_step, train.to_device
    with monkeypatch.context() as patch:
        patch.setattr(train, "to_device", lambda windows, device: (seen.extend(windows), to_device(windows, device))[1])
        train_here(tmp_path, *FLAGS, f"--out_dir={tmp_path / 'a'}")
    records = np.concatenate([prepare.open_split(folder, split)[0] for split in ("train", "val")]).reshape(-1, 17)
    assert {row.tobytes() for row in seen} < {row.astype(np.int64).tobytes() for row in records} and len(seen) > 48
    with monkeypatch.context() as patch:
        stop = lambda run, i: (i == 8 and signal.raise_signal(signal.SIGINT), step(run, i))[1]  # noqa: E731
        patch.setattr(train, "train_step", stop)
        train_here(tmp_path, *FLAGS, f"--out_dir={tmp_path / 'b'}")
    assert max(losses(tmp_path / "b")) == 9
    train_here(tmp_path, *FLAGS, f"--out_dir={tmp_path / 'b'}", "--resume")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a", "val_loss") == losses(tmp_path / "b", "val_loss")
    with pytest.raises(ValueError, match="records of data set recall need block_size=16, at all stages"):
        train_here(tmp_path, *FLAGS, f"--out_dir={tmp_path / 'c'}", "--block_size=8")
    with pytest.raises(ValueError, match="stand for no text .*--sample_tokens=0"):
        train_here(tmp_path, *FLAGS, f"--out_dir={tmp_path / 'c'}", "--sample_tokens=5")


def test_systems_of_the_same_size():
    """config/recall: as many parameters within 0.1%, on the data set that recall.py makes unasked."""
    sizes = {}
    for file in sorted((ROOT / "config/recall").glob("*.py")):
        cfg, model_args = flags.parse([str(file)])
        assert (cfg.dataset, model_args["block_size"], cfg.sample_tokens) == ("recall", 4 * 256, 0)
        with torch.device("meta"):
            sizes[file.stem] = Hymba(HymbaConfig(vocab_size=8 * 256, **model_args)).num_params()
    assert len(sizes) == 5 and max(sizes.values()) / min(sizes.values()) < 1.002, sizes
    assert round(sizes["hymba"] / 1e6, 2) == 1.36
