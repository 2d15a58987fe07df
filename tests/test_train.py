"""Training: to the bit across kills, across processes, and every error before time is spent."""

import json
import math
import os
import shutil
import signal
import types

import numpy as np
import pytest
import torch
from runs import ROOT, TINY, losses, prepare_bpe, run_train, train_here, wait_for

import files
import ops
import prepare
import train
from flags import TrainConfig, parse
from model import Hymba, HymbaConfig


def test_kill_and_resume_to_the_bit(corpus, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_here(corpus, f"--out_dir={whole}", "--prompt=alpha", "--sample_tokens=5")
    assert "alpha" in capsys.readouterr().out.splitlines()[-1]
    assert sorted(losses(whole)) == list(range(1, 25))
    # SIGKILL just after a checkpoint: what is on disk is whole, and the run continues from it
    process = run_train(corpus, f"--out_dir={cut}", wait=False)
    wait_for(lambda: (cut / "last/config.json").exists(), process)
    process.kill()
    process.communicate()
    # SIGTERM in the middle: saves, says so, exits with 0
    process = run_train(corpus, f"--out_dir={cut}", "--resume", "--max_steps=24", wait=False)
    wait_for(lambda: len(losses(cut)) >= 12, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume continues from" in out, err
    stopped = json.loads((cut / "last/config.json").read_text())["step"]
    if stopped < 24:
        train_here(corpus, f"--out_dir={cut}", "--resume")
    assert losses(cut) == losses(whole) and losses(cut, "val_loss") == losses(whole, "val_loss")
    meta = json.loads((corpus / "data/words/meta.json").read_text())["val"]
    for step, loss in losses(whole, "val_loss").items():
        bits = loss * meta["tokens"] / (meta["bytes"] * math.log(2))
        assert abs(losses(whole, "val_bpb")[step] - bits) < 1e-9
    best = min(losses(cut, "val_loss").items(), key=lambda item: item[1])
    saved = json.loads((cut / "best/config.json").read_text())
    assert (saved["step"], saved["best_val_loss"]) == best
    a, b = (Hymba.from_pretrained(folder / "last").state_dict() for folder in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_mamba2_trains_and_resumes_to_the_bit(corpus, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--pattern=MhM", "--ssm=mamba2", "--ssm_head=16", "--d_state=8", "--decay_steps=0"]
    train_here(corpus, f"--out_dir={whole}", "--max_steps=50", *flags)
    train_here(corpus, f"--out_dir={cut}", "--max_steps=24", *flags)
    train_here(corpus, f"--out_dir={cut}", "--max_steps=50", *flags, "--resume")
    assert losses(cut) == losses(whole) and losses(whole)[50] < 0.8 * losses(whole)[1]
    a, b = (Hymba.from_pretrained(folder / "last").state_dict() for folder in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_errors_and_other_flags(corpus, tmp_path, capsys):
    train_here(corpus, *(run := [f"--out_dir={tmp_path}", "--max_steps=16"]))
    saved = json.loads((tmp_path / "best/config.json").read_text())
    with pytest.raises(ValueError, match="raise --max_steps"):
        train_here(corpus, *run, "--resume")
    with pytest.raises(ValueError, match="--resume continues it"):
        train_here(corpus, *run)
    shutil.copytree(corpus / "data", tmp_path / "data")
    meta_file = tmp_path / "data/words/meta.json"
    meta_file.write_text(meta_file.read_text().replace('"bytes",', '"cl100k_base",', 1))
    with pytest.raises(ValueError, match=r"was trained with another tokenizer \('bytes'\)"):
        train_here(corpus, *run, "--resume", "--max_steps=30", f"--data_dir={tmp_path / 'data'}")
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 13, "lo')  # as a crash leaves it
    config = json.loads((tmp_path / "last/config.json").read_text())
    config["best_val_loss"] = 1e-3  # never to be reached again
    (tmp_path / "last/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    with pytest.raises(
        ValueError, match="would not go on exactly: max_steps is 17 and was 16, grad_clip is 0.1 and was"
    ):
        train_here(corpus, *run, "--resume", "--max_steps=17", "--grad_clip=0.1")
    train_here(corpus, *run, "--resume=anyway", "--max_steps=17", "--grad_clip=0.1")
    assert json.loads((tmp_path / "best/config.json").read_text()) == saved  # so the best one stays
    assert "with other values: max_steps is 17 and was 16, grad_clip is 0.1 and was 1.0" in capsys.readouterr().out
    assert sorted(losses(tmp_path)) == list(range(1, 18))
    weights = (tmp_path / "last/model.safetensors").read_bytes()
    (tmp_path / "last/model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="model.safetensors is corrupt") as e:
        train_here(corpus, *run, "--resume", "--max_steps=30")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="another architecture: n_hidden=32 there and 48 here"):
        train_here(corpus, *run, "--resume", "--max_steps=30", "--n_hidden=48")


def test_resume_from_an_older_version(tmp_path):
    """From the weights and moments that commit be2855b left, the losses are those that it logged when it went on."""
    theirs, squares = ROOT / "tests/be2855b", tmp_path / "squares.txt"
    squares.write_text("".join(f"{i} squared is {i * i}\n" for i in range(300)))
    prepare.prepare([str(squares)], name="squares", data_dir=tmp_path / "data")
    shutil.copytree(theirs / "last", tmp_path / "last")
    flags = "--device=cpu --dataset=squares --vocab_size=257 --pattern=HhhM --n_embd=8 --n_head=2 --n_kv_head=1"
    flags += " --n_hidden=8 --d_state=2 --n_meta=3 --window=6 --block_size=12 --batch_size=2 --warmup_steps=2"
    flags += " --decay_steps=4 --eval_interval=8 --eval_windows=4 --log_interval=4 --prompt= --max_steps=12 --resume"
    train.main([*flags.split(), f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path}"])
    for key, steps in (("loss", [9, 10, 11, 12]), ("grad_norm", [9, 10, 11, 12]), ("val_loss", [12])):
        new, recorded = losses(tmp_path, key), losses(theirs, key)
        assert list(new) == steps and all(abs(new[k] / recorded[k] - 1) < 1e-5 for k in steps)


def test_resume_continues_exactly_or_not_at_all(corpus, tmp_path, capsys):
    """Each difference that matters is named: flags, the data, the number of processes. --resume=anyway goes on."""
    out, other = tmp_path / "out", tmp_path / "data"
    train_here(corpus, f"--out_dir={out}", "--max_steps=8")
    shutil.copytree(corpus / "data", other)
    shutil.rmtree(other / "words")
    prepare.prepare([str(corpus / "other")], name="words", data_dir=other)
    more = [f"--out_dir={out}", "--max_steps=9", "--resume"]
    saved = json.loads((out / "last/config.json").read_text())
    assert saved["processes"] == 1 and saved["device"] == "cpu" and saved["data"].keys() == {"train", "val"}
    for flags, message in [
        (["--learning_rate=0.5"], "learning_rate is 0.5 and was 0.003"),
        (["--seed=1", "--batch_size=4"], "batch_size is 4 and was 2, .*seed is 1 and was 1337"),
        (["--block_size=16"], "block_size is 16 and was 24"),
        ([f"--data_dir={other}"], "the train data is '.*' and was '.*', the val data is"),
    ]:
        with pytest.raises(ValueError, match=f"last would not go on exactly: .*{message}.*or --resume=anyway"):
            train_here(corpus, *more, *flags)
    (out / "last/config.json").write_text(json.dumps(saved | {"processes": 4, "device": "cuda"}))
    with pytest.raises(ValueError, match="processes is 1 and was 4, device is 'cpu' and was 'cuda'"):
        train_here(corpus, *more)
    (out / "last/config.json").write_text(json.dumps(saved | {"train": saved["train"] | {"dropout": 1}}))
    with pytest.raises(ValueError, match=r"another version wrote it: unknown keys \['dropout'\]"):
        train_here(corpus, *more)
    (out / "last/config.json").write_text(json.dumps(saved | {"data": {}}))
    with pytest.raises(ValueError, match="the train data is '.*' and was 'None'"):
        train_here(corpus, *more)
    (out / "last/config.json").write_text(json.dumps(saved | {"train": saved["train"] | {"min_lr": None}}))
    with pytest.raises(ValueError, match="min_lr is .* and was None"):
        train_here(corpus, *more)
    (out / "last/config.json").write_text(json.dumps(saved))
    capsys.readouterr()
    train_here(
        corpus, *more[:2], "--resume=anyway", "--seed=1", "--prompt=other", "--log_interval=1", "--kernels=False"
    )
    assert "with other values: max_steps is 9 and was 8, seed is 1 and was 1337\n" in capsys.readouterr().out


def test_a_folder_that_another_process_trains_in(corpus, tmp_path):
    out = tmp_path / "out"
    process = run_train(corpus, f"--out_dir={out}", "--max_steps=100000", wait=False)
    wait_for(lambda: (out / "lock").exists(), process)
    with pytest.raises(ValueError, match="another train.py is training in .*out: wait for it, or pass another"):
        train_here(corpus, f"--out_dir={out}", "--overwrite")
    wait_for(lambda: (out / "last/config.json").exists(), process)
    with pytest.raises(ValueError, match="another train.py is training"):
        train_here(corpus, f"--out_dir={out}", "--resume", "--max_steps=100000")
    process.kill()
    process.communicate()
    with files.locked(out / "lock", "it is free"):  # under torchrun, too, in one line
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        code, _, err = run_train(corpus, f"--out_dir={out}", "--overwrite", launcher=launcher)
        assert code == 1 and err.count("train.py: another train.py is training in") == err.count("train.py: ") == 1
        assert "[rank1]" not in err
    train_here(corpus, f"--out_dir={out}", "--overwrite")


def test_overwriting_keeps_the_old_run_until_the_first_checkpoint(corpus, tmp_path, monkeypatch):
    train_here(corpus, f"--out_dir={tmp_path}", "--max_steps=8")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    save, seen = train.save, []

    def saving(run, name):
        if not seen:
            assert {f: f.read_bytes() for f in before} == before and run.step == 8
        seen.append(name)
        save(run, name)

    monkeypatch.setattr(train, "save", saving)
    train_here(corpus, f"--out_dir={tmp_path}", "--overwrite", "--seed=7")
    assert {f.name for f in tmp_path.iterdir()} - {"loss.png"} == {"best", "last", "metrics.jsonl"}
    assert json.loads((tmp_path / "last/config.json").read_text())["train"]["seed"] == 7
    assert sorted(losses(tmp_path)) == list(range(1, 25)) and seen[:2] == ["last", "best"]


def test_what_the_end_needs_is_there_at_the_beginning(corpus, tmp_path, monkeypatch):
    """The tokenizer, whole, before the first step; and every checkpoint has it, whatever becomes of the data set."""
    data, file = tmp_path / "data", tmp_path / "data/words/tokenizer.tiktoken"
    prepare_bpe(corpus / "words", "words", data)
    flags, whole = [f"--data_dir={data}", "--max_steps=2"], file.read_bytes()
    first, second, *rest = whole.splitlines()
    for broken in (None, whole[:-9], b"\n".join([first.split()[0] + b" 1", second.split()[0] + b" 0", *rest])):
        file.unlink() if broken is None else file.write_bytes(broken)
        with pytest.raises((ValueError, FileNotFoundError), match="tokenizer.tiktoken"):
            train_here(corpus, f"--out_dir={tmp_path / 'x'}", *flags)
        assert not (tmp_path / "x").exists()
    file.write_bytes(whole)
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run, i: (file.unlink(missing_ok=True), step(run, i))[1])
    train_here(corpus, f"--out_dir={tmp_path / 'x'}", *flags, "--sample_tokens=3", "--prompt=gamma")
    for name in ("last", "best"):
        assert (tmp_path / "x" / name / "tokenizer.tiktoken").read_bytes() == whole


@pytest.mark.parametrize("rank, world", [("1", "1"), ("x", "2"), ("0", "0"), ("-1", "2")])
def test_an_environment_that_torchrun_did_not_make(rank, world, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"RANK={rank}, WORLD_SIZE={world} in the environment: unset both"):
        train.start_process(TrainConfig())


def test_config_names_the_command_of_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "python prepare.py python --site-packages --tokenizer=bpe:32000 --name=source"
    with pytest.raises(FileNotFoundError, match=f"no data set at data/source; prepare it with: {command}$"):
        train.main([str(ROOT / "config/hymba_125m.py"), "--device=cpu"])
    with pytest.raises(FileNotFoundError, match="prepare it with: python prepare.py FILES... --name=mine$"):
        train.main([str(ROOT / "config/hymba_125m.py"), "--device=cpu", "--dataset=mine"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_signals_under_torchrun(corpus, tmp_path):
    """Ctrl-C in the terminal of torchrun reaches every process, and torchrun sends SIGTERM besides: one line, saved."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    out = tmp_path / "out"
    process = run_train(corpus, f"--out_dir={out}", "--max_steps=100000", launcher=launcher, wait=False)
    wait_for(lambda: (out / "last/config.json").exists(), process)
    os.killpg(process.pid, signal.SIGINT)
    stdout, _ = process.communicate(timeout=90)
    step = json.loads((out / "last/config.json").read_text())["step"]
    assert stdout.count(f"stopped after step {step}: --resume continues from") == 1 == stdout.count("stopped after")
    code, _, err = run_train(corpus, f"--out_dir={out}", "--max_steps=100000", launcher=launcher)
    assert code == 1 and err.count("train.py: ") == 1 and "holds a run: --resume continues it" in err


def test_two_processes_equal_one_with_twice_the_batch(corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train_here(corpus, f"--out_dir={one}", "--batch_size=4", "--max_steps=8", "--grad_accum=2")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    flags = ("--batch_size=2", "--max_steps=8", "--grad_accum=2")
    code, _, err = run_train(corpus, f"--out_dir={two}", *flags, launcher=launcher)
    assert code == 0, err
    a, b = losses(one), losses(two)
    assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-4 for k in a)


def test_annealing_and_length_curriculum(corpus, tmp_path):
    flags = ["--anneal_dataset=other", "--anneal_mix=1.0", "--length_stages=24:16,48:8", "--rope_orig=24"]
    train_here(corpus, f"--out_dir={tmp_path}", *flags, "--compile=False")
    assert Hymba.from_pretrained(tmp_path / "last").config.block_size == 48
    train_here(corpus, f"--out_dir={tmp_path / 'plain'}", *flags[2:])
    with_anneal, plain = losses(tmp_path), losses(tmp_path / "plain")
    assert all((with_anneal[k] == plain[k]) == (k <= 18) for k in range(1, 25))  # the last six steps decay
    shutil.copytree(corpus / "data", tmp_path / "data")
    (tmp_path / "data/other/tokenizer.tiktoken").write_text("IQ== 0")
    with pytest.raises(ValueError, match="words and other have different tokenizers"):
        train_here(corpus, f"--out_dir={tmp_path / 'x'}", f"--data_dir={tmp_path / 'data'}", *flags[:2])
    cfg, _ = parse(["--length_stages=24:16,48:8", "--max_steps=24", "--batch_size=2"])
    assert train.parse_stages(cfg, 24) == [(0, 24), (16, 48)]
    wrong = {"24:16,48:9": "is 25 steps, but max_steps=24", "24:16,36:8": "do not divide", "x": "write"}
    for stages, message in wrong.items():
        cfg.length_stages = stages
        with pytest.raises(ValueError, match=message):
            train.parse_stages(cfg, 24)


def test_no_more_validation_sequences_than_there_are(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg, args = parse([*TINY, f"--data_dir={corpus / 'data'}", "--eval_windows=16777216", "--max_steps=1"])
    data = train.open_data(cfg, 0, 1)
    config, stages = train.configure(cfg, args, data)
    data.val = data.val[:30]  # six sequences of 24 + 1
    run = train.start(cfg, config, stages, data, torch.device("cpu"), 0, 1)
    run.step, seen = 1, []
    monkeypatch.setattr(
        train, "mean_loss", lambda model, idx, _: seen.extend(map(bytes, idx.numpy())) or torch.zeros(())
    )
    train.evaluate(run)
    assert len(seen) == len(set(seen)) == 6


def test_nan_stops_and_keeps_the_last_good_checkpoint(corpus, tmp_path):
    flags = (f"--out_dir={tmp_path}", "--learning_rate=1e6", "--min_lr=0", "--warmup_steps=14", "--grad_clip=0")
    code, _, err = run_train(corpus, *flags)
    assert code == 1 and " at step " in err and "try a lower learning_rate" in err
    assert len(err.splitlines()) == 1
    if (tmp_path / "last").exists():
        assert all(p.isfinite().all() for p in Hymba.from_pretrained(tmp_path / "last").parameters())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--btach_size=3"], "unknown flag 'btach_size': did you mean batch_size?"),
        (["--batch_size=three"], "batch_size='three': must be int"),
        (["--learning_rate=fast"], "learning_rate='fast': must be float"),
        (["--resume=maybe"], "resume='maybe': write --resume or --resume=anyway"),
        (["config/nothing.py"], "no config file config/nothing.py"),
        (["--pattern=HxH"], "unknown letter 'x'"),
        (["--n_head=4", "--n_kv_head=3"], "n_head=4 is not a multiple of n_kv_head=3"),
        (["--schedule=linear"], "schedule='linear': use wsd or cosine"),
        (["--batch_size=0"], "batch_size=0: must be 1 or more"),
        (["--min_lr=1"], "min_lr=1.0 must lie between 0 and learning_rate"),
        (["--dataset=nothing"], "python prepare.py"),
        (["--vocab_size=100"], "vocab_size=100 is too small for data set words"),
        (["--block_size=100000"], "too few for sequences of 100000"),
        (["--resume"], "nothing to resume"),
        (["--device=cuda:99"], "device=cuda:99: there is none here"),
        (["--batch=3"], "unknown flag 'batch'"),
        (["--grad_clip=-1"], "grad_clip=-1.0: must be 0 or more"),
        (["--seed=-1"], "seed=-1: must be 0 or more"),
    ],
)
def test_training_errors(corpus, tmp_path, flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        train.main([*TINY, f"--data_dir={corpus / 'data'}", f"--out_dir={tmp_path / 'out'}", *flags])
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("out/*"))


def test_training_errors_of_data_and_disk(corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus / "data", tmp_path / "data")
    flags = [*TINY, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="0 MB free, but checkpoints need"):
        train.main(flags)
    file = tmp_path / "data/words/train.bin"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="train.bin"):
        train.main(flags)
    file.write_bytes(data[:-7])
    with pytest.raises(ValueError, match="train.bin"):
        train.main(flags)


def test_config_file_and_command_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('"""doc"""\nn_layer = 4\nlearning_rate = 1\nbatch_size = 3\n')
    cfg, args = parse([str(file), "--batch_size=5", "--pattern=HhhhHhhhH", "--resume"])
    assert (cfg.learning_rate, cfg.batch_size, cfg.out_dir, cfg.resume) == (1.0, 5, "out/mine", "True")
    assert HymbaConfig(**args).pattern == "HhhhHhhhH"  # a pattern on the command line replaces the file's n_layer
    assert HymbaConfig(**parse([str(file)])[1]).pattern == "HHhH"
    file.write_text("n_layers = 4\n")
    with pytest.raises(ValueError, match="unknown flag 'n_layers': did you mean n_layer?"):
        parse([str(file)])
    file.write_text("n_layer = 4.5\n")
    with pytest.raises(ValueError, match="n_layer=4.5: must be int"):
        parse([str(file)])


def test_kernels_are_a_flag(kernels_on):
    train.start_process(TrainConfig(device="cpu"))
    assert ops.KERNELS == ops.ALL_KERNELS
    train.start_process(TrainConfig(device="cpu", kernels=False))
    assert not ops.KERNELS


def test_one_thread_where_threads_wait_for_each_other(monkeypatch):
    """By a clock that each forward pass moves on: two threads take long on a busy machine, one on a quiet one."""
    clock, threads = [0.0], torch.get_num_threads()
    optimizer = types.SimpleNamespace(zero_grad=lambda set_to_none: None)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    data = types.SimpleNamespace(train=[np.arange(100)])
    for seconds, best in (({1: 2.0, 2: 9.0}, 1), ({1: 2.0, 2: 1.5}, 2), ({1: 2.0}, 1)):
        passes = []

        def loss(model, idx, targets, seconds=seconds, passes=passes):
            passes.append(torch.get_num_threads())
            clock[0] += seconds[passes[-1]]
            return torch.zeros((), requires_grad=True)

        torch.set_num_threads(max(seconds))
        monkeypatch.setattr(train, "mean_loss", loss)
        given = dict(step=0, data=data, model=None, device=torch.device("cpu"), optimizer=optimizer)
        run = types.SimpleNamespace(batch=lambda step: (8, 2, 2), **given)
        assert train.faster_threads(run) == best
        assert sorted(set(passes)) == (list(seconds) if len(seconds) > 1 else [])
    torch.set_num_threads(threads)


def test_threads_are_kept_in_the_checkpoint(corpus, tmp_path, monkeypatch):
    """A resumed run takes as many as before, whatever is faster now; a flag says otherwise."""
    chosen, threads = [], torch.get_num_threads()
    monkeypatch.setattr(train, "faster_threads", lambda run: chosen.append(1) or 2)
    flags = [*TINY, f"--data_dir={corpus / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    for more, used, asked in (([], 2, 1), (["--resume"], 2, 1), (["--resume", "--threads=1"], 1, 1)):
        steps = f"--max_steps={24 + 8 * len(more) if more else 8}"
        train.main([*flags, *more, steps])
        assert json.loads((tmp_path / "out/last/config.json").read_text())["threads"] == used and len(chosen) == asked
    torch.set_num_threads(threads)
