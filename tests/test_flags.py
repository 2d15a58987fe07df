"""Command lines: what is understood, what is said of the rest, and how scripts end."""

import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from runs import ROOT

import flags
from model import HymbaConfig


def script(name: str, *args: str, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    env = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / name), *args]
    return subprocess.run(command, cwd=cwd, env=env, text=True, timeout=60, **({"capture_output": True} | options))


def test_flags_in_every_spelling(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import math\nbatch_size = 2 * 2\nresume = True\ndata_command = 'make data'\nout_dir = ''\nprompt = 'def '\n"
    )
    cfg, _ = flags.parse([str(file)])
    assert (cfg.batch_size, cfg.resume, cfg.data_command, cfg.out_dir) == (4, "True", "make data", "out/mine")
    argv = ["--batch_size", "3", "--overwrite", str(file), "--resume", "False", "--compile=False", "--dataset=other"]
    cfg, args = flags.parse([*argv, "--out_dir="])
    assert (cfg.batch_size, cfg.overwrite, cfg.resume, cfg.compile) == (3, True, "", False)
    assert cfg.data_command == cfg.prompt == "" and args == {} and cfg.out_dir == "out/mine"  # for the file's data
    assert flags.parse(["--resume", str(file)])[0].resume == "True"  # a switch takes no path for its value
    assert flags.parse(["--resume=anyway"])[0].resume == "anyway"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["batch_size=3"], "argument 'batch_size=3' is not understood: did you mean --batch_size=3?"),
        (["-batch_size=3"], "argument '-batch_size=3' is not understood: did you mean --batch_size=3?"),
        (["--bacth_size=3"], "unknown flag 'bacth_size': did you mean batch_size?"),
        (["--batch_size"], "--batch_size needs a value: --batch_size=..."),
        (["--batch_size", "--resume"], "--batch_size needs a value: --batch_size=..."),
        (["config/tiny.py", "README.md"], "two config files, config/tiny.py and README.md: give one"),
        (["--hybrid=inter:1:5:spread", "--pattern=MT"], "--hybrid makes the pattern: leave --pattern out, or --hybrid"),
        (["--zzz"], "unknown flag 'zzz'; see python train.py --help"),
    ],
)  # fmt: skip
def test_what_is_not_understood(argv, message):
    with pytest.raises(flags.UsageError) as e:
        flags.parse(argv)
    assert str(e.value) == message


@pytest.mark.parametrize(
    "text, message",
    [
        ("n_layer = 4\nbatch_size = (3\n", "line 2: '(' was never closed"),
        ("import math\n\nimport no_such_package\n", "line 3: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f():\n    return 1 / 0\nbatch_size = f()\n", "line 2: ZeroDivisionError: division by zero"),
        ("batch_size = 3\nraise SystemExit('enough')\n", "line 2: SystemExit: enough"),
        ("batch_sizes = 3\n", "unknown flag 'batch_sizes': did you mean batch_size?"),
        ("batch_size = '3'\n", "batch_size='3': must be int"),
    ],
)
def test_config_files_that_are_wrong(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError) as e:
        flags.parse([str(tmp_path / "mine.py")])
    assert str(e.value).startswith(f"{tmp_path / 'mine.py'}") and str(e.value).endswith(message)


def test_help_explains_every_flag():
    """With the comment beside it and the config's own value."""
    text = script("train.py", "config/hymba_125m.py", "--help").stdout
    rows = dict(re.findall(r"^  --(\w+) \(\w+\) +(.*)$", text, re.M))
    assert rows.keys() == {f.name for c in (flags.TrainConfig, HymbaConfig) for f in fields(c)}
    assert rows["n_hidden"].endswith("0 leaves it out, as pure Mamba does [1664]") and rows["max_steps"].endswith(
        "[10000]"
    )
    assert not [name for name, row in rows.items() if row.startswith("[")], "flags without a word"
    assert [line for line in text.splitlines() if line.endswith(":") and line[:-1].istitle()][:1] == ["Files:"]
    for name in ("sample.py", "prepare.py", "bench.py", "evaluate.py", "recall.py"):
        assert script(name, "--help").returncode == 0


@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare.py", "bench.py", "evaluate.py", "recall.py"])
def test_usage_errors_have_one_style(name):
    done = script(name, "--zzz")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{name}: ") and done.stderr.endswith(f"; see python {name} --help\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("name", ["train.py", "sample.py"])
@pytest.mark.parametrize("module", ["numpy", "torch", "torch.nn", "tqdm", "flags"])
def test_ctrl_c_while_a_script_starts(name, module):
    """It comes as a module is about to be imported."""
    code = f"""if True:
        import runpy, signal, sys
        class Finder:
            def find_spec(name, *args):
                if name == {module!r}:
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Finder)
        runpy.run_path({name!r}, run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout == done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_ctrl_c_while_python_ends():
    late = "import atexit, signal, flags; atexit.register(signal.raise_signal, 2); flags.run('x', lambda argv: None)"
    done = subprocess.run([sys.executable, "-c", late], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="there is no such shell")
@pytest.mark.parametrize("name", ["train", "sample"])
def test_scripts_start_without_the_compiler(name):
    """Loading it takes 1.5 s, and only compiling needs it."""
    code = f"import sys, {name}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_closed_streams(tmp_path):
    for closed in ("<&-", ">&-", "<&- >&- 2>&-"):
        for name in ("sample.py", "train.py"):
            command = f"{sys.executable} {ROOT / name} --help {closed}"
            done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=60)
            assert done.returncode == 0 and "Traceback" not in done.stderr
    command = f"{sys.executable} {ROOT / 'train.py'} --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_out_of_memory_says_what_to_lower(error, capfd, monkeypatch):
    def main(argv):
        raise error

    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, f"__{stream}__"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # xdist has read from the real one
    with pytest.raises(SystemExit) as e:
        flags.run("train.py", main, "--batch_size")
    assert e.value.code == 1 and "train.py: out of memory: lower --batch_size" in capfd.readouterr().err
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="of ours"):
        flags.run("train.py", main, "--batch_size")
