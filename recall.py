"""
The task of recall as a data set: multi-query associative recall (Arora et al. 2023, Zoology,
https://arxiv.org/abs/2312.04927).

    python recall.py                                    data/recall: 4, 8, ... 256 pairs
    python train.py config/recall/hymba.py
    python evaluate.py recall --init_from=out/recall_hymba out/recall_mamba

A record is a row of episodes. An episode gives n pairs of a key and a value, and then asks for each key, in any order:

    k1 v1 k2 v2 ... kn vn  k7 v7 k2 v2 ... k1 v1                 the values in the second half are what is predicted

All records are as long as one episode of the largest n, so all are read with the same cache and have as many answers.
A smaller n makes more episodes, and n is what has to be remembered at a time. No key comes in two episodes of a record.
Of the vocabulary, the lower half are keys and the upper half are values.

What is learned first are few pairs, so training has n pairs in a share of its records that goes with 1 / n. (Zoology's
records of few pairs are short, which does the same.) From as many records of each n, of one episode with random values
behind it, a Transformer learned next to nothing in 4,000 steps.

Only the answers count in the loss: a token t that is not to be predicted is written as ~t, which is negative. Windows
of train.py begin where a record begins, as "record" in meta.json has its length.
"""

import hashlib
import json
import re
import signal
from pathlib import Path

import numpy as np
from tqdm import tqdm

import prepare
from files import check_folders, replacing
from flags import Parser, run


def draw(rng: np.random.Generator, n_pairs: int, n: int, length: int, vocab: int) -> np.ndarray:
    """n records (n, length + 1) of episodes of n_pairs pairs: tokens, ~token where it is not to be predicted."""
    half, episodes = vocab // 2, length // (4 * n_pairs)
    shape, tokens = (n, episodes, n_pairs), 4 * n_pairs * episodes
    keys = rng.permuted(np.tile(np.arange(half), (n, 1)), axis=1)[:, : episodes * n_pairs].reshape(shape)
    pairs = np.stack([keys, rng.integers(half, vocab, shape)], axis=-1)  # (n, episodes, n_pairs, 2)
    order = rng.permuted(np.broadcast_to(np.arange(n_pairs), shape), axis=2)
    questions = np.take_along_axis(pairs, order[..., None], axis=2)
    questions[..., 0] = ~questions[..., 0]
    records = ~rng.integers(half, vocab, (n, length + 1))  # what is left behind the last episode is not asked for
    records[:, :tokens] = np.concatenate([~pairs, questions], axis=2).reshape(n, tokens)
    return records


def write(path: Path, pairs: np.ndarray, seed: int, length: int, vocab: int) -> dict:
    """Write records of these numbers of pairs (n,), in their order, and return the split's entry of meta.json."""
    sha256 = hashlib.sha256()
    with open(path, "wb") as f, tqdm(total=len(pairs), desc=path.name, unit="record", disable=None) as bar:
        for first in range(0, len(pairs), 2048):  # some at a time: memory is bounded
            rng, some = np.random.default_rng((seed, first)), pairs[first : first + 2048]
            records = np.empty((len(some), length + 1), prepare.DTYPES["int16"])
            for n_pairs in np.unique(some):
                records[some == n_pairs] = draw(rng, n_pairs, (some == n_pairs).sum(), length, vocab)
            f.write(records)
            sha256.update(records)
            bar.update(len(some))
    tokens = len(pairs) * (length + 1)
    return {"tokens": tokens, "bytes": tokens, "documents": len(pairs), "sha256": sha256.hexdigest()}


def prepare_recall(
    pairs: list[int], records: int = 50_000, name: str = "recall", data_dir: Path | str = "data", overwrite=False
) -> Path:
    """Write the data set data_dir/name with so many records for training, n pairs with a share of 1 / n, and return its
    folder. Validation has a twentieth, and as many of each n, 64 at least. Raises ValueError for numbers that do not
    fit, or OSError."""
    folder, pairs = Path(data_dir) / name, sorted(set(pairs))
    if not pairs or not 1 <= pairs[0] <= pairs[-1] <= 4095:  # tokens fit 16 bits, with a sign
        raise ValueError("--pairs: give numbers from 1 to 4095, such as --pairs=4,8,16")
    if not len(pairs) <= records <= 10**8:
        raise ValueError(f"--records={records}: must be at least as many as the numbers of pairs, and at most 10**8")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"--name={name} is not a plain folder name; use letters, digits, _, - and dots")
    check_folders(folder)
    if folder.exists() and not (overwrite and {path.name for path in folder.iterdir()} <= prepare.OUTPUTS):
        raise FileExistsError(f"{folder} exists; pass --overwrite to replace a data set, or another --name")
    length, vocab = 4 * pairs[-1], 8 * pairs[-1]
    rng, share = np.random.default_rng(0), 1 / np.array(pairs)
    numbers = {"train": rng.choice(pairs, records, p=share / share.sum())}
    numbers["val"] = rng.permuted([pairs] * max(64, records // 20 // len(pairs)), axis=1).flatten()  # evenly spaced
    with prepare.writing(folder), replacing(folder, "~") as new:
        meta = {"tokenizer": "none", "vocab_size": vocab, "eot": 0, "dtype": "int16", "record": length + 1}
        meta["source"] = ["recall of " + ", ".join(map(str, pairs)) + " pairs"]
        for seed, (split, pairs_of) in enumerate(numbers.items()):
            meta[split] = write(new / f"{split}.bin", pairs_of, seed, length, vocab)
        (new / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    print(
        f"{folder}: {records:,} records for training and {len(numbers['val']):,} for validation, of {length:,} tokens"
    )
    return folder


def main(argv: list[str]) -> None:
    parser = Parser("recall.py", __doc__)
    parser.add_argument("--pairs", default="4,8,16,32,64,128,256", help="numbers of pairs [4,8,16,32,64,128,256]")
    parser.add_argument("--records", type=int, default=50_000, help="for training [50000]")
    parser.add_argument("--name", default="recall", help="the data set's folder [recall]")
    parser.add_argument("--data_dir", default="data", help="where data sets live [data]")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set if it exists")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", args.pairs):
        raise ValueError(f"--pairs={args.pairs}: write numbers with commas between them, such as --pairs=4,8,16")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill cleans up as Ctrl-C does
    prepare_recall([int(p) for p in args.pairs.split(",")], args.records, args.name, args.data_dir, args.overwrite)


if __name__ == "__main__":
    run("recall.py", main)
