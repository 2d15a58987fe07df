"""Every command of README and docs/ that needs neither a GPU nor a network, from the pages' own text, at toy size."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, prepare_bpe

import cost
import evaluate
import prepare
import recall
import sample
import study
import train

PAGES = ["README.md", "docs/data.md", "docs/weights.md", "docs/training.md", "docs/robustness.md", "docs/speed.md"]
PAGES += ["docs/systems.md", "docs/evaluation.md", "docs/results.md"]
TOY = "--n_embd=16 --n_head=2 --n_kv_head=1 --d_state=2 --n_meta=2 --window=8 --block_size=16 --batch_size=2"
TOY += " --max_steps=2 --grad_accum=1 --eval_windows=2 --sample_tokens=3 --threads=1 --device=cpu"
# Network, GPU, or minutes
ELSEWHERE = r"pip |pytest|bench\.py|nvidia/|shakespeare|evaluate\.py harness|study\.py --(minutes|figures)"


def commands(page: str) -> list[str]:
    """The commands of a page in their order: lines of indented blocks, and what stands between backticks."""
    found, text = [], (ROOT / page).read_text()
    for line, span in re.findall(r"^    (.+)$|`([^`]+)`", text, re.M):
        line = re.sub(r"\s+#.*", "", line or " ".join(span.split()))
        found += [part.strip() for part in line.split("&&")]
    return [c for c in found if re.match(r"python \w+\.py|torchrun |printf ", c)]


def test_pages_name_commands():
    assert {"python train.py config/tiny.py --dataset=mine --out_dir=out/mine"} < set(commands("README.md"))
    assert [c for page in PAGES for c in commands(page) if c.startswith("torchrun")]


@pytest.fixture
def small_sources(tmp_path, monkeypatch):
    """A checkout, and little Python source on the machine."""
    monkeypatch.chdir(tmp_path)
    for name in ("config", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "library").mkdir()
    for file in sorted(ROOT.glob("*.py")):
        (tmp_path / "library" / file.name).write_text(file.read_text()[:6000])
    monkeypatch.setattr(prepare, "python_folders", lambda site_packages: [tmp_path / "library"])
    return tmp_path


def test_every_command(small_sources):
    """In their order, in one folder. A command that stands twice is run once."""
    threads, done = torch.get_num_threads(), []
    for command in dict.fromkeys(c for page in PAGES for c in commands(page)):
        if re.search(ELSEWHERE, command):
            continue
        done.append(command)
        line, _, target = command.replace("NAME.py", "tiny.py").partition(" > ")
        words = shlex.split(line)
        if words[0] == "printf":
            subprocess.run(command, shell=True, check=True)
        elif words[0] == "torchrun":
            toy = ["--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), *words[3:], *TOY.split()]
            env = os.environ | {"TRITON_INTERPRET": "0"}
            subprocess.run([sys.executable, "-m", "torch.distributed.run", *toy], check=True, timeout=120, env=env)
        else:
            with open(target or "printed.txt", "w") as file, contextlib.redirect_stdout(file):
                run(words[1], words[2:])
    torch.set_num_threads(threads)
    assert len(done) > 15, done
    assert Path("texts.jsonl").read_text().count("\n") == 2


def run(script: str, argv: list[str]) -> None:
    scripts = {"train.py": train, "sample.py": sample, "prepare.py": prepare, "recall.py": recall}
    main = (scripts | {"evaluate.py": evaluate, "cost.py": cost, "study.py": study})[script].main
    if "--help" in argv:
        with contextlib.suppress(SystemExit):
            main(argv)
    elif script == "train.py":
        main([*argv, *TOY.split(), "--n_hidden=16", *["--sample_tokens=0"] * ("recall" in "".join(argv))])
    elif script == "evaluate.py":
        main([*argv, "--trials=1" if argv[0] == "needle" else "--tokens=200", "--device=cpu"])
    elif script == "recall.py":
        main([*argv, "--pairs=2,4", "--records=50"])
    elif script == "sample.py":
        main([*argv, "--max_new_tokens=3", "--device=cpu"])
    elif any("bpe:" in word for word in argv):
        (name,) = [word.removeprefix("--name=") for word in argv if word.startswith("--name=")]
        prepare_bpe(Path("library" if "python" in argv else "docs"), name, Path("data"))
    else:
        main(argv)


def test_python_of_the_pages(small_sources):
    """The lines in docs/weights.md that use the engine, and the ones in docs/evaluation.md that measure."""
    train.main(TOY.split())
    for page, line in (("weights", "from engine import"), ("evaluation", "import evaluate\n")):
        blocks = re.findall(r"(?:^(?:    .*)?\n)+", (ROOT / f"docs/{page}.md").read_text(), re.M)
        (block,) = [b for b in blocks if line in b]
        exec(re.sub("^    ", "", block, flags=re.M), {"print": lambda *_: None})
