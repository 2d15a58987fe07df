"""
Every wrong turn, generated: each file that is read, with bytes and values changed; each flag, with values that it
cannot have; saving, stopped at each step; processes, killed. The property: one line that names what is wrong, or the
right result, within 20 seconds, and nothing lost. HYMBA_CASES=10 tries ten times as many changed files.

`python tests/test_doors.py` prints the table of docs/robustness.md: how many cases of each class there were, and how
they ended.
"""

import collections
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for python tests/test_doors.py
from released import RELEASED, write_chat_model, write_released
from runs import ROOT, prepare_bpe, run_train, wait_for

import bench
import checkpoint
import cost
import evaluate
import files
import flags
import prepare
import recall
import sample
import study
import tokenizer
import train
from model import HymbaConfig

SECONDS = 20
SIZES = "--pattern=hM --n_embd=16 --n_head=2 --n_kv_head=1 --n_hidden=16 --d_state=2 --n_meta=2 --window=4"
TRAIN = f"{SIZES} --block_size=8 --batch_size=2 --warmup_steps=1 --decay_steps=1 --eval_windows=2 --sample_tokens=0"
TRAIN += " --dataset=words --device=cpu --threads=1 --log_interval=1"
ENDS = collections.Counter()  # (class, how it ended) -> cases


def cases(kind: str, n: int):
    """A random generator for each case, the same in every run."""
    for i in range(n * int(os.environ.get("HYMBA_CASES", 1))):
        yield random.Random(f"{kind}, {i}")


@pytest.fixture(autouse=True)
def _few_bytes_of_disk(tmp_path):
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


def attempt(kind: str, script: str, main, argv: list[str], names=(), may_end_well: bool = True) -> bool:
    """Run a script's main in this process. Returns whether it ended well, else checks the line that it printed."""

    def too_long(*_):
        raise AssertionError(f"{script} {argv} took more than {SECONDS} seconds")

    kept = sys.argv, sys.stdin, sys.stdout, sys.stderr
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    sys.argv, sys.stdin, sys.stdout, sys.stderr = [script, *argv], io.TextIOWrapper(io.BytesIO(b"")), out, err
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        flags.run(script, main, "something")
        code = 0
    except SystemExit as e:
        code = e.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv, sys.stdin, sys.stdout, sys.stderr = kept
        err.flush()
        lines = err.buffer.getvalue().decode().splitlines()
    lines = [line for line in lines if line.startswith(f"{script}: ")]
    if code:
        assert code in (1, 2) and len(lines) == 1, (argv, code, lines)
        assert len(lines[0]) < 2000 and (not names or any(name in lines[0] for name in names)), (argv, lines)
    else:
        assert may_end_well and not lines, (argv, "it ended well")
    ENDS[kind, "one line" if code else "ended well"] += 1
    return not code


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# What a case changes

VALUES = [None, True, -1, 0, 1, 7, 2**31, 10**12, 10**30, 0.5, -1e300, 1e-300, "", "x", "h" * 10**5, "../x", "\x00"]
VALUES += [[], [[1, 2]], {}, {"a": 1}]
RAW = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 10**5, b'{"a": NaN}', b'{"a": 1e999}', b"{}", b"\x00" * 9]


def every_key(values: dict, path=()) -> list[tuple]:
    """The way to each value in nested objects."""
    ways = []
    for key, value in values.items():
        ways += [(*path, key)] + (every_key(value, (*path, key)) if isinstance(value, dict) else [])
    return ways


def changed_json(rng: random.Random, text: bytes) -> bytes:
    """A JSON object with one value changed or removed, or bytes that are no JSON object."""
    if rng.random() < 0.2:
        return rng.choice([*RAW, text[: len(text) // 2], changed_bytes(rng, text)])
    values = json.loads(text)
    *path, key = rng.choice(every_key(values))
    inner = values
    for part in path:
        inner = inner[part]
    if rng.random() < 0.2:
        del inner[key]
    else:
        inner[key] = rng.choice(VALUES)
    return json.dumps(values).encode()


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """One bit flipped, or bytes missing, or more of them."""
    at = rng.randrange(len(data))
    flipped = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    return rng.choice([flipped, flipped, flipped, data[:at], data + b"more", b""])


def same_tensors(a: bytes, b: bytes) -> bool:
    """Whether two safetensors files have the same tensors: a bit may have changed among their metadata."""
    try:
        a, b = safetensors.torch.load(a), safetensors.torch.load(b)
    except safetensors.SafetensorError:
        return False
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# A run to spoil


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a data set of each tokenizer, and a finished run, as arguments of train.py."""
    root = tmp_path_factory.mktemp("doors")
    rng = random.Random(0)
    text = "".join(" ".join(rng.choices(["alpha", "beta", "gamma", "delta"], k=9)) + "\n" for _ in range(300))
    (root / "words.txt").write_text(text)
    prepare.prepare([str(root / "words.txt")], "words", data_dir=root / "data")
    prepare_bpe(root / "words.txt", "bpe", root / "data")
    argv = [*TRAIN.split(), f"--data_dir={root / 'data'}", f"--out_dir={root / 'out'}"]
    train.main([*argv, "--max_steps=2", "--dataset=bpe", "--vocab_size=320"])
    return root, argv


def spoil(kind: str, file: Path, data: bytes, script: str, main, argv: list[str], **options) -> bool:
    """Attempt something with a file changed, and put it back. What fails has lost nothing."""
    folder, whole = file.parent, file.read_bytes()
    before = contents(folder)
    file.write_bytes(data)
    try:
        well = attempt(kind, script, main, argv, **options)
        assert well or contents(folder) == before | {file.name: data}
        return well
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.tiktoken"])
def test_checkpoints_that_are_read(run, name, tmp_path):
    """A bit of weights or of the tokenizer that changed is found. A value of config.json may be a right one."""
    last = shutil.copytree(run[0] / "out/last", tmp_path / "last")
    argv = [f"--init_from={last}", "--max_new_tokens=2", "--device=cpu", "--prompt=a"]
    whole = (last / name).read_bytes()
    for rng in cases(kind := f"checkpoint: {name}", 60):
        data = changed_json(rng, whole) if name == "config.json" else changed_bytes(rng, whole)
        right = name == "config.json" or data == whole or same_tensors(data, whole)
        options = dict(names=[name, str(last), "tokenizer"], may_end_well=right)
        spoil(kind, last / name, data, "sample.py", sample.main, argv, **options)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors", "metrics.jsonl"])
def test_checkpoints_that_are_resumed(run, name, tmp_path):
    (root, argv), out = run, tmp_path / "out"
    where = Path(name) if name == "metrics.jsonl" else Path("last") / name
    whole = (root / "out" / where).read_bytes()
    line, _, rest = whole.partition(b"\n")
    argv = [*argv, "--resume", "--max_steps=3", "--dataset=bpe", "--vocab_size=320", f"--out_dir={out}"]
    for rng in cases(kind := f"resume: {name}", 30):
        data = changed_json(rng, whole) if name == "config.json" else changed_bytes(rng, whole)
        data = changed_json(rng, line) + b"\n" + rest if name == "metrics.jsonl" else data
        right = not name.endswith("safetensors") or data == whole or same_tensors(data, whole)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(root / "out", out)
        (out / where).write_bytes(data)
        before = contents(out)
        well = attempt(kind, "train.py", train.main, argv, [name, "last"], right)
        assert well or contents(out) == before


@pytest.mark.parametrize("name", ["meta.json", "train.bin", "val.bin", "tokenizer.tiktoken"])
def test_data_sets(run, name, tmp_path):
    data = shutil.copytree(run[0] / "data/bpe", tmp_path / "data/bpe")
    whole = (data / name).read_bytes()
    argv = [*run[1], f"--data_dir={tmp_path / 'data'}", "--dataset=bpe", f"--out_dir={tmp_path / 'x'}", "--max_steps=1"]
    for rng in cases(kind := f"data set: {name}", 40):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        changed = changed_json(rng, whole) if name == "meta.json" else changed_bytes(rng, whole)
        options = dict(names=[name, "meta.json", str(data)], may_end_well=name == "meta.json" or changed == whole)
        spoil(kind, data / name, changed, "train.py", train.main, argv, **options)


@pytest.mark.parametrize("kind", RELEASED)
def test_released_checkpoints(kind, tmp_path):
    """Config, and the index of shards."""
    write_released(tmp_path, RELEASED[kind], shards=2)

    def load(argv):
        assert all(p.shape for p in checkpoint.load(tmp_path).parameters())

    for name, n in (("config.json", 40), ("model.safetensors.index.json", 15)):
        whole = (tmp_path / name).read_bytes()
        for rng in cases(f"{kind}: {name}", n):
            data = changed_json(rng, whole)
            spoil(f"released: {name}", tmp_path / name, data, "load", load, [], names=[name, str(tmp_path)])


def test_released_tokenizers(tmp_path, capfd):
    pytest.importorskip("tokenizers", reason="pip install -r requirements-dev.txt")
    pytest.importorskip("jinja2", reason="pip install -r requirements-dev.txt")
    folder = write_chat_model(tmp_path)

    def load(argv):
        cut = tokenizer.tokenizer_of(folder)
        assert isinstance(cut.decode(cut.encode("hello")), str)
        tokenizer.special_tokens(folder)

    for name, n in (("tokenizer.json", 40), ("tokenizer_config.json", 20), ("generation_config.json", 20)):
        whole = (folder / name).read_bytes()
        for rng in cases(kind := f"released: {name}", n):
            data = changed_json(rng, whole)
            spoil(kind, folder / name, data, "load", load, [], names=[name, str(folder)])
    assert "panicked" not in capfd.readouterr().err  # Rust would say so besides


TEMPLATES = [
    "{{", "{% if %}", "{% include 'x' %}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ messages[99].role }}",
    "{% for m in messages %}{{ m.nothing.more }}{% endfor %}", "{{ raise_exception(1) }}", "{{ ''.__class__.mro() }}",
    "{{ 'a'.join(range(9)) }}", "{{ messages | tojson | int(0) + 'x' }}", "{{ 'x' * 10**6 }}", "{{ 'a' * 10**10 }}",
    "{{ '%*d' % (10**10, 1) }}", "{{ range(10**9) | list | length }}", "{% set x = 9 ** (9 ** 9) %}{{ x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates(source, tmp_path, monkeypatch):
    pytest.importorskip("jinja2", reason="pip install -r requirements-dev.txt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    monkeypatch.setattr(tokenizer.template, "SECONDS", 3)
    begin = time.monotonic()
    attempt("chat templates", "chat", lambda argv: tokenizer.chat_template(tmp_path), [], [str(tmp_path)], False)
    assert time.monotonic() - begin < SECONDS


# ----------------------------------------------------------------------------------------------------------------------
# Flags and config files

NUMBERS = ["nan", "inf", "-inf", "-1", "-1e-9", "1e400", "9" * 30, "0", "1e-400", "", "x", "1.5", "True", "0x10", " 3"]


@pytest.mark.parametrize("name", [f.name for f in flags.FLAGS.values() if f.type in (int, float, bool)])
def test_flags_of_train(run, name, tmp_path):
    """Each number and each switch, with values it cannot have. What ends well has finite losses."""
    argv = [*run[1], "--max_steps=1", f"--out_dir={tmp_path / 'x'}"]

    for rng in cases(name, 5):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        given = f"--{name}={rng.choice(NUMBERS)}"
        if attempt("flags of train.py", "train.py", train.main, [*argv, given], [name, "n_", "learning"]):
            lines = [json.loads(line) for line in (tmp_path / "x/metrics.jsonl").read_text().splitlines()]
            assert lines and all(math.isfinite(line.get("loss", 0)) for line in lines)


WORDS = [
    "batch_size=3", "-batch_size=3", "--batch=3", "--batch-size=3", "--Batch_size=3", "--batch_size", "--=3", "--", "-",
    "-x", "x.py", "config", "--help=3", "-h=1", "--no-compile", "--resume", "--resume=maybe", "--overwrite=2",
    "--resume --overwrite", "--pattern=HxH", "--pattern=" + "h" * 10**6, "--fusion=", "--schedule=" + "x" * 999,
    "--device=gpu9", "--device=cuda:-1", "--device=meta", "--learning_rate=1e38", "--n_layer=1001", "--window=9999999",
    "--n_embd=16777216", "--window=-1", "--seed=" + "9" * 40, "--length_stages=1:1,", "--length_stages=8:-1,8:2",
    "--length_stages=" + "9" * 5000 + ":1", "--dataset=", "--dataset=\x00", "--dataset=../..", "--anneal_dataset=none",
    "--data_dir=", "--data_dir=/dev/null", "--out_dir=/dev/null", "--out_dir=/dev/null/x", "--out_dir=" + "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_arguments_that_are_not_understood(run, word, tmp_path):
    argv = [*run[1], "--max_steps=1", f"--out_dir={tmp_path / 'x'}", *word.split(" ")]
    attempt("arguments", "train.py", train.main, argv, may_end_well=False)
    assert not (tmp_path / "x").exists()


OTHERS = {
    ("sample.py", sample.main): [
        "x", "--n=3", "--n_samples=0", "--n_samples=x", "--top_k=0", "--top_p=2", "--top_p=nan", "--temperature=nan",
        "--temperature=-1", "--temperature=x", "--max_new_tokens=-1", "--max_new_tokens=1e9", "--seed=-1",
        "--seed=" + "9" * 40, "--device=x", "--device=meta", "--dtype=int8", "--chat", "--file=/nowhere",
        "--file=/dev/null", "--init_from=out/none", "--init_from=.", "--init_from=/", "--init_from=~nobody_here/x",
        "--init_from=" + "x" * 300, "--kernels=2",
    ],
    ("prepare.py", prepare.main): [
        "--name=../x", "--name=", "--name=x y", "--tokenizer=", "--tokenizer=bpe:1", "--tokenizer=bpe:99999999999",
        "--tokenizer=gpt9", "nowhere.txt", "--nam=x", "--overwrite=2", "--site-packages", "--data_dir=",
        "--data_dir=/dev/null/x", "/dev/null", "name=x",
    ],
    ("bench.py", bench.main): [
        "x", "plot nowhere.json", "plot /dev/null", "scan --repeats=0", "scan --tokens=x", "scan --tokens=-1",
        "scan --repeats=x", "attention", "decode --batches=0", "scan --nothing",
    ],
    ("cost.py", cost.main): ["x", "--sizes=", "--sizes=3b", "--sizes=1b,", "--match=x", "--size=1b"],
    ("study.py", study.main): [
        "--list=x", "--minutes=x", "--minutes=0", "--minutes=-1", "--minutes=nan", "--minutes=1e9", "x",
        "--figures --results=.", "--list --results=/dev/null", "--minutes=1 --results=/dev/null/x", "--minute=9",
    ],
    ("evaluate.py", evaluate.main): [
        "x", "loss --tokens=-1", "loss --tokens=x", "loss --length=99999999", "loss --length=-1", "loss --text=/none",
        "loss --text=/dev/null", "loss --dataset=../none", "loss --dataset=/", "loss --data_dir=/dev/null", "loss .",
        "loss --out=/dev/null/x.json", "loss --out=/", "loss --out=x", "loss /nowhere", "loss --device=meta", "recall",
        "loss --dtype=int8", "loss --nothing", "needle --trials=0", "needle --trials=99999999", "needle --needle=",
        "needle --needle={}", "needle --lengths=-1", "needle --lengths=9", "needle --lengths=,", "harness",
        "needle --lengths=999999999", "harness --limit=0", "heads --kernels=2",
    ],
    ("recall.py", recall.main): [
        "x", "--pairs=", "--pairs=0", "--pairs=1,,2", "--pairs=-1", "--pairs=99999", "--records=0", "--records=-1",
        "--records=1e9", "--name=../x", "--name=", "--data_dir=/dev/null/x", "--overwrite=2", "--records=99999999999",
    ],
}  # fmt: skip


@pytest.mark.parametrize("script, word", [(script, word) for script, words in OTHERS.items() for word in words])
def test_flags_of_the_others(run, script, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = {"sample.py": [f"--init_from={run[0] / 'out'}", "--device=cpu"], "prepare.py": [str(run[0] / "words.txt")]}
    argv["evaluate.py"] = argv["sample.py"]
    argv = argv.get(script[0], []) + (["--name=x"] if script[0] == "prepare.py" and "--name" not in word else [])
    attempt(f"flags of {script[0]}", *script, [*argv, *word.split(" ", 1)], may_end_well=False)


CONFIGS = [
    "n_layer = ", "n_layer = 'x'", "n_layer = 4.0", "n_layers = 3", "n_embd = 10**400", "pattern = 'h' * 10**8",
    "learning_rate = 1j", "learning_rate = float('nan')", "resume = 'x'", "resume = 1", "dropout = 0.1", "é = 1",
    "def helper(): pass", "from math import *", "import nothing_there", "open('/nowhere')", "1 / 0", "assert False",
    "raise SystemExit(3)", "raise ValueError('x\\n' * 10**6)", "def f(): return f()\nf()", "x = [0] * 10**12",
    "\tn_layer = 2", "\x00",
]  # fmt: skip


@pytest.mark.parametrize("text", CONFIGS)
def test_config_files(text, run, tmp_path):
    (tmp_path / "mine.py").write_text(f"max_steps = 1\n{text}\n")
    names = ["mine.py", *text.split(" ")[:1]]
    argv = [str(tmp_path / "mine.py"), "--dataset=words", "--data_dir=" + str(run[0] / "data")]
    attempt("config files", "train.py", train.main, argv, names, may_end_well=False)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_text_files(suffix, tmp_path):
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pip install -r requirements-dev.txt")
        pytest.importorskip("pyarrow.parquet")
    row = b'{"text": "some text, and more of it\\n' + b'and a line\\n" }\n'
    file = tmp_path / f"in{suffix}"
    argv = [str(file), "--name=x", f"--data_dir={tmp_path / 'data'}"]
    if suffix == ".parquet":
        rows = pyarrow.table({"text": ["some text, and more of it\nand a line\n", None, "short\n"] * 30})
        pyarrow.parquet.write_table(rows, file)
    else:
        file.write_bytes({".txt": b"some text\nand more\n" * 9, ".jsonl": row * 30}[suffix])
    whole = file.read_bytes()

    for rng in cases(kind := f"text: {suffix}", 30):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        file.write_bytes(changed_bytes(rng, whole))
        if attempt(kind, "prepare.py", prepare.main, argv, [file.name, "no text"]):
            tokens, meta = prepare.open_split(tmp_path / "data/x", "train")
            assert len(tokens) == meta["train"]["tokens"]
        else:
            assert not (tmp_path / "data/x").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Crash points and kills


class Crash(BaseException):
    """The machine stops: nothing of what comes after is done, cleaning up included."""


def crash_at(monkeypatch, n: int) -> None:
    """From the n-th change to the disk on, none is made any more."""
    left = [n]

    def until_then(f):
        def g(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                raise Crash
            return f(*args, **kwargs)

        return g

    for name in ("rename", "replace", "unlink", "mkdir", "write_text", "write_bytes"):
        monkeypatch.setattr(Path, name, until_then(getattr(Path, name)))
    monkeypatch.setattr(files, "save_file", until_then(files.save_file))
    monkeypatch.setattr(shutil, "rmtree", until_then(shutil.rmtree))


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_crash_points_of_training(run, flag, tmp_path, capsys):
    """Wherever the machine stops, what is there goes on: the old run from its last step, or the new one from its."""
    root, argv = run
    more = ["--dataset=bpe", "--vocab_size=320", "--eval_interval=1", f"--out_dir={tmp_path / 'out'}"]
    whole = {}
    for steps in (2, 3):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        train.main([*argv, *more, f"--max_steps={steps}"])
        whole[steps] = checkpoint.load(tmp_path / "out/last").state_dict()
        shutil.copytree(tmp_path / "out", tmp_path / str(steps))
    for n in range(1, 200):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "2", tmp_path / "out")
        steps = 3 if flag == "--resume" else 2
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, n)
            try:
                train.main([*argv, *more, flag, f"--max_steps={steps}"])
                break
            except Crash:
                pass
        where = tmp_path / "out"
        found = checkpoint.load(where).state_dict()  # what sample.py would take
        assert all(p.isfinite().all() for p in found.values())
        with pytest.raises(ValueError, match="holds a run|is at step"):
            train.main([*argv, *more, "--max_steps=2"])
        with pytest.MonkeyPatch.context():
            train.main([*argv, *more, "--resume=anyway", "--max_steps=4"])
        lines = [json.loads(line)["step"] for line in (where / "metrics.jsonl").read_text().splitlines()]
        assert sorted(set(lines)) == [1, 2, 3, 4], lines
        assert sorted(f.name for f in where.iterdir()) in (["best", "last", "loss.png", "metrics.jsonl"],
            ["best", "last", "metrics.jsonl"])  # fmt: skip
        ENDS[f"crash points: train.py {flag}", "went on"] += 1
    assert 9 < n < 199


def test_crash_points_of_prepare(tmp_path):
    """The old data set or the new one is there, whole, after the next command."""
    sets = {}
    for name in ("old", "new"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text\nand more\n" * 9)
        prepare.prepare([str(tmp_path / f"{name}.txt")], "x", data_dir=tmp_path / name)
        sets[name] = (tmp_path / name / "x/train.bin").read_bytes()
    for n in range(1, 99):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "data")
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, n)
            try:
                prepare.prepare([str(tmp_path / "new.txt")], "x", data_dir=tmp_path / "data", overwrite=True)
                break
            except Crash:
                pass
        prepare.clean_up(tmp_path / "data")
        prepare.open_split(tmp_path / "data/x", "train")
        assert (tmp_path / "data/x/train.bin").read_bytes() in sets.values()
        assert [f.name for f in (tmp_path / "data").iterdir() if not f.name.startswith(".")] == ["x"]
        ENDS["crash points: prepare.py", "went on"] += 1
    assert 4 < n < 98


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_kills(corpus, tmp_path):
    """SIGKILL at any time: the run goes on from what is there, and the lock of the dead process is not in the way."""
    rng, out = random.Random(0), tmp_path / "out"
    for step in range(4):
        more = ["--resume"] if (out / "last").exists() else []
        process = run_train(corpus, f"--out_dir={out}", "--max_steps=100000", "--eval_interval=2", *more, wait=False)
        wait_for(lambda: (out / "lock").exists(), process)
        if step:
            wait_for(lambda: (out / "last/config.json").exists(), process)
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        ENDS["kills: train.py", "went on"] += 1
    model = checkpoint.load(out)
    assert isinstance(model.config, HymbaConfig) and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_kills_of_prepare(tmp_path):
    """SIGKILL at any time: the old data set or the new one is there, whole, after the next command."""
    rng, sets = random.Random(0), []
    for name, lines in (("old", 20_000), ("new", 400_000)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {i}\n" for i in range(lines)))
        prepare.prepare([str(tmp_path / f"{name}.txt")], "x", data_dir=tmp_path / name)
        sets.append((tmp_path / name / "x/train.bin").read_bytes())
    shutil.copytree(tmp_path / "old", data := tmp_path / "data")
    command = [sys.executable, str(ROOT / "prepare.py"), str(tmp_path / "new.txt"), "--name=x", "--overwrite"]
    for _ in range(4):
        process = subprocess.Popen([*command, f"--data_dir={data}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for(lambda process=process: (data / "x~new").exists() or process.poll() is not None, process)
        time.sleep(rng.random() / 4)
        process.kill()
        process.communicate()
        prepare.clean_up(data)
        assert [f.name for f in data.iterdir() if not f.name.startswith(".")] == ["x"]
        prepare.open_split(data / "x", "val")
        assert (data / "x/train.bin").read_bytes() in sets
        ENDS["kills: prepare.py", "went on"] += 1


@pytest.fixture
def disk():
    """A function after which no file grows larger than n bytes, as if the disk were full."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_full_disks(run, flag, disk, tmp_path):
    """Whatever does not fit is named, and the old run is as good as before."""
    (root, argv), out = run, tmp_path / "out"
    argv = [*argv, "--dataset=bpe", "--vocab_size=320", f"--out_dir={out}", "--max_steps=3", "--eval_interval=1"]
    for room in (0, 100, 2_000, 30_000, 60_000):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(root / "out", out)
        before = contents(out)
        disk(room)
        kind = f"full disks: train.py {flag}"
        attempt(kind, "train.py", train.main, [*argv, flag], ["metrics", "last", "lock"], may_end_well=False)
        disk(2**40)
        after = contents(out)
        assert all(after[name] == data for name, data in before.items() if not name.startswith("metrics"))
        attempt(kind, "train.py", train.main, [*argv, "--resume"])
        assert json.loads((out / "last/config.json").read_text())["step"] == 3


def test_tensors_that_do_not_fit(run, tmp_path):
    """Whole files, with the right checksums, of other tensors than config.json says."""
    last = shutil.copytree(run[0] / "out/last", tmp_path / "out/last")
    weights, state = (files.read_tensors(last / f"{name}.safetensors") for name in ("model", "optimizer"))
    name = next(name for name in weights if name.endswith("in_proj.weight"))
    changes = {
        "numbers": lambda t: t * math.nan, "large": lambda t: torch.full_like(t, 1e38), "shape": lambda t: t.mT,
        "bytes": lambda t: t.to(torch.uint8), "float8": lambda t: t.to(torch.float8_e4m3fn),
        "half": lambda t: t.half(), "more": lambda t: torch.cat([t, t]),
    }  # fmt: skip
    for change in changes.values():
        new = {k: (change(v) if k == name else v).clone().contiguous() for k, v in weights.items()}
        argv = [f"--init_from={last}", "--max_new_tokens=2", "--device=cpu"]
        files.write_tensors(new, last / "model.safetensors")
        attempt("tensors that do not fit", "sample.py", sample.main, argv, [str(last)], may_end_well=False)
    files.write_tensors(weights, last / "model.safetensors")
    argv = [*run[1], "--dataset=bpe", "--vocab_size=320", f"--out_dir={last.parent}", "--resume", "--max_steps=3"]
    for kind, change in [
        ("step", lambda t: t - 1), ("step", lambda t: t * math.nan), ("exp_avg", lambda t: t.int()),
        ("exp_avg", lambda t: t.double()), ("exp_avg_sq", lambda t: t[None]), ("exp_avg", lambda t: t * math.nan),
    ]:  # fmt: skip
        new = {k: (change(v) if k.endswith(kind) else v).clone().contiguous() for k, v in state.items()}
        files.write_tensors(new, last / "optimizer.safetensors")
        attempt("tensors that do not fit", "train.py", train.main, argv, [str(last)], may_end_well=False)


def test_metrics_that_cannot_be(run, tmp_path):
    """They would be in no picture at the end."""
    out = shutil.copytree(run[0] / "out", tmp_path / "out")
    argv = [*run[1], "--dataset=bpe", "--vocab_size=320", f"--out_dir={out}", "--resume", "--max_steps=3"]
    for line in ('"step": -1', f'"step": -{"9" * 400}', '"step": 1, "loss": 1e308', f'"step": 1, "loss": {"9" * 400}'):
        (out / "metrics.jsonl").write_text(f"{{{line}}}\n")
        attempt("resume: metrics.jsonl", "train.py", train.main, argv, ["metrics.jsonl, line 1"], may_end_well=False)


def test_enough_cases(request):
    """Last in this file. Where some of its tests were not asked for, or run elsewhere, there are fewer."""
    asked = {item.originalname for item in request.session.items if item.path == Path(__file__)}
    if asked < {name for name in globals() if name.startswith("test_")} or hasattr(request.config, "workerinput"):
        pytest.skip("not all of this file is run here")
    print(table())
    assert sum(ENDS.values()) >= 500


def table() -> str:
    rows = ["| class | cases | one line | the right result, or went on |", "| --- | --- | --- | --- |"]
    for kind in sorted({kind for kind, _ in ENDS}):
        ends = {end: n for (k, end), n in ENDS.items() if k == kind}
        line = ends.pop("one line", 0)
        rows.append(f"| {kind} | {line + sum(ends.values())} | {line} | {sum(ends.values())} |")
    lines = sum(n for (_, end), n in ENDS.items() if end == "one line")
    total = sum(ENDS.values())
    return "\n".join([*rows, f"| all | {total} | {lines} | {total - lines} |"])


if __name__ == "__main__":
    command = [sys.executable, "-m", "pytest", "-q", "-s", __file__]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    rows = "\n".join(re.findall(r"^\.?(\|.*)$", done.stdout, re.M))
    print(rows if not done.returncode else done.stdout)
    sys.exit(done.returncode)
