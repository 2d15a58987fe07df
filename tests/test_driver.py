"""What runs the study: how long it takes, two runs at a time, runs that are cut off, fail or diverge, and measuring."""

import contextlib
import json
import os
import threading
import time
from concurrent import futures
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT

import driver
import recall
import study


def test_how_long_a_run_takes():
    """At the speed of runs that had a GPU to themselves, or else of the slowest, or else of another scale. Then comes
    what is to be measured."""
    new = lambda *args, **options: study.Plan("hymba", "small", *args, 1e-3, **options)  # noqa: E731
    speeds = lambda *plans: {plan.key: {"tokens_per_s": speed} for plan, speed in plans}  # noqa: E731
    rate, epoch, second = new("rate", 1e6), new("epoch", 1e6), new("epoch", 1e6, seed=2)
    start, measuring, beside = driver.START, driver.MEASURING, driver.BESIDE
    assert driver.seconds(rate, {}) == start + 1e6 / driver.SPEED / beside
    known = speeds((rate, 1000), (second, 2000))
    assert driver.seconds(epoch, known) == start + 1000 + measuring
    assert driver.seconds(second, known) == start + 1000 + measuring
    known |= speeds((epoch, 1600))
    assert driver.seconds(new("flops", 1e6), known) == start + 625 + measuring
    assert driver.seconds(new("long", 1e6), known) == start + 625 / beside + 2 * measuring
    assert driver.seconds(rate, known) == start + 625 / beside
    large = study.Plan("hymba", "large", "epoch", 1e6, 1e-3)
    assert driver.seconds(large, {}) == start + 4e6 / driver.SPEED + measuring
    assert driver.seconds(large, known) == start + 4 * 625 + measuring
    assert driver.seconds(large, known | speeds((large, 500))) == start + 2000 + measuring
    recall = study.Plan("hymba", "recall", "recall", 1e6, 1e-3, seed=2)
    assert driver.seconds(recall, {}) == start + 1e6 / driver.FASTEST / beside + measuring


@pytest.fixture
def toy(corpus, tmp_path, monkeypatch):
    """The study at toy size, on data of its own: a driver."""
    (tmp_path / "data").symlink_to(corpus / "data")
    for name in ("train.py", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    sizes = dict(n_layer=3, n_embd=16, n_head=2, n_kv_head=1, block_size=16, window=8, batch_size=2)
    flags = study.SHARED | sizes | dict(dataset="words", vocab_size=320, eval_windows=4, data_command="", device="cpu")
    scale = study.Scale(30_000, flags | {"threads": 1})
    monkeypatch.setattr(study, "SCALES", dict.fromkeys(study.SCALES, scale))
    monkeypatch.setattr(study, "SYSTEMS", {s: study.SYSTEMS[s] for s in ("transformer", "hymba")})
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return lambda seconds: driver.Driver(tmp_path / "runs.jsonl", time.monotonic() + seconds, "abc", [])


def test_a_run_is_recorded_and_goes_on(toy, tmp_path, monkeypatch):
    plan = study.Plan("hymba", "small", "rate", 64 * 32, 1e-3)
    monkeypatch.setattr(study, "plans", lambda done: [plan])
    monkeypatch.setattr(driver, "seconds", lambda plan, done: 1)
    toy(0).work(None)  # no time: nothing is begun
    assert not (tmp_path / "runs.jsonl").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr(driver, "START", 40)
    took, other = {plan: 300}, study.Plan("transformer", "small", "rate", 64 * 32, 1e-3)
    monkeypatch.setattr(driver, "seconds", lambda plan, done: took[plan])
    (running := toy(600)).deadline -= 400
    assert running.pick([plan], {}) == plan  # it does not end in time, but goes on the next time
    took[other] = 100
    assert running.pick([plan, other], {}) == other  # this one ends
    took[other] = 190  # of 200, the last of which are to save what has not ended
    assert running.pick([plan, other], {}) == plan
    running.whole = 200
    assert running.pick([plan, other], {}) == plan  # the next time, it does not end either
    running.deadline -= 150
    assert running.pick([plan, other], {}) is running.next(None) is None  # too little to get anywhere
    monkeypatch.setattr(driver, "seconds", lambda plan, done: 300)
    toy(600).work(None)
    (row,) = study.read(tmp_path / "runs.jsonl").values()
    assert row["val_loss"] > 0 and row["commit"] == "abc" and row["device"] == "cpu" and len(row["words_data"]) == 12
    assert row["flags"]["max_steps"] == 64 and row["curve"][-1][0] == 64
    toy(600).work(None)  # done: not run again
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1
    for stage in ("rate", "epoch"):  # on other data: only rates stand
        plan = study.Plan("hymba", "small", stage, 64 * 32, 1e-3)
        (tmp_path / "runs.jsonl").write_text(json.dumps(row | {"stage": stage, "words_data": "other"}) + "\n")
        assert toy(600).next(None) == (plan if stage == "epoch" else None)


def test_texts_are_read_before_anything_runs(toy, corpus, tmp_path):
    """Those that no model could be measured on, and one with more tokens than the context, which has 16."""
    texts = {"a few words of text " * 40: None, "a": "has 1 tokens, too few for windows of 16", b"\xff" * 99: "UTF-8"}
    for text, error in texts.items():
        (file := tmp_path / "text.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
            driver.Driver(tmp_path / "runs.jsonl", time.monotonic(), "abc", [file])


def test_timed_runs_have_the_gpu_for_themselves(toy, tmp_path, monkeypatch, capsys):
    """Two at a time where speed is not asked for, or no longer, in the order of the plans, each once; and a run that
    fails stops none of the others."""
    new = lambda stage, rate: study.Plan("hymba", "small", stage, 2048, rate)  # noqa: E731
    stages = ["rate", "rate", "epoch", "recall", "recall", "epoch", "epoch"]
    order = [new(stage, float(rate)) for rate, stage in enumerate(stages, 1)]
    at_once, most, lock, together = [], {}, threading.Lock(), threading.Barrier(2)
    begun, waiting = {rate: threading.Event() for rate in (4.0, 6.0, 7.0)}, threading.Event()

    def train(plan, env, deadline):
        assert env["CUDA_VISIBLE_DEVICES"] == "3"  # the first of those that the caller may use
        with lock:
            at_once.append(plan)
            for p in at_once:
                most[p] = max(most.get(p, 0), len(at_once))
        if plan.learning_rate in begun:
            begun[plan.learning_rate].set()
        if plan.stage == "epoch":
            return {"val_loss": 1.0, "tokens_per_s": 1e6}
        together.wait(60)
        if plan.learning_rate == 2.0:
            assert waiting.wait(20)  # the first of those that are timed, for this one
        with lock:
            at_once.remove(plan)
        if plan.learning_rate == 5.0:
            raise RuntimeError("hymba: out of memory")
        return {"val_loss": 1.0, "tokens_per_s": 1e6}

    def decode_speed(plan, env, deadline):
        assert deadline == running.deadline and not running.on(0, "measuring")
        time.sleep(0.3)  # another would begin beside it
        with lock:
            at_once.remove(plan)
        return 1e4

    def measure(plan, env, deadline, texts):
        assert deadline == running.deadline
        if follows := {3.0: 4.0, 4.0: 6.0, 6.0: 7.0}.get(plan.learning_rate):
            assert begun[follows].wait(20)  # it begins while this one is measured
            time.sleep(0.3)
        return {}

    for f in (train, decode_speed, measure):
        monkeypatch.setattr(driver, f.__name__, f)
    monkeypatch.setattr(study, "plans", lambda done: order)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    running = toy(600)
    wait = running.turn.wait
    monkeypatch.setattr(running.turn, "wait", lambda *args: (waiting.set(), wait(*args)))
    with futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(running.work, [0, 0]))
    assert running.failed == [order[4].name] and "failed: hymba: out of memory" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert sorted(row["learning_rate"] for row in rows) == [1.0, 2.0, 3.0, 4.0, 6.0, 7.0]  # 5.0 is not tried again
    assert [row["learning_rate"] for row in rows if row.get("decode_tokens_per_s")] == [3.0, 6.0, 7.0]
    assert [most[plan] for plan in order] == [2, 2, 1, 2, 2, 1, 1]


def test_two_at_a_time_on_large_gpus(toy, tmp_path, monkeypatch):
    """And what failed is an error, once all others are done."""
    plan, gpus = study.Plan("hymba", "small", "rate", 2048, 1e-3), []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = [SimpleNamespace(total_memory=size) for size in (80e9, 24e9)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: sizes[gpu])
    monkeypatch.setattr(driver.Driver, "work", lambda self, gpu: gpus.append(gpu))
    driver.run_missing(tmp_path / "runs.jsonl", time.monotonic() + 600, "abc", [])
    assert sorted(gpus) == [0, 0, 1]
    monkeypatch.setattr(driver.Driver, "work", lambda self, gpu: self.failed.append(plan.name))
    with pytest.raises(ValueError, match=plan.name):
        driver.run_missing(tmp_path / "runs.jsonl", time.monotonic() + 600, "abc", [])


def test_waiting_for_a_rate(toy, monkeypatch):
    """A run that may tell the rate of others is waited for, on other GPUs, too; a plan without a rate never begins."""
    trial, unknown, epoch = (
        study.Plan("hymba", "small", *args) for args in (("rate", 1, 1e-3), ("epoch", 1, 0.0), ("epoch", 1, 1e-3))
    )
    monkeypatch.setattr(study, "plans", lambda done: [trial, epoch if trial.key in done else unknown])
    monkeypatch.setattr(driver, "seconds", lambda plan, done: 1)
    running = toy(600)
    assert running.next(0) == trial
    with futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(running.next, 1)
        assert futures.wait([other], 0.3).not_done
        row = trial.__dict__ | {"flags": trial.flags(), "val_loss": 2.0, "tokens_per_s": 1e6}
        running.end(trial, 0, row | running.origin)
        assert other.result(60) == epoch
    running.end(epoch, 1, None)
    monkeypatch.setattr(study, "plans", lambda done: [unknown])
    assert running.next(0) is None


@pytest.mark.parametrize("steps", [0, 8])
def test_a_run_that_diverges(toy, tmp_path, steps):
    """It has no loss, neither its own nor that of an earlier run of the same name on other data. Its speed is that of
    the last quarter."""
    plan = study.Plan("hymba", "small", "epoch", 64 * 32, 1e-3)
    folder = tmp_path / "out/study" / plan.name
    (folder / "last").mkdir(parents=True)
    (folder / "last/config.json").write_text(json.dumps({"data": {"train": "other"}, "step": 64}))
    (folder / "metrics.jsonl").write_text('{"step": 64, "val_loss": 1.23}\n')
    rows = [json.dumps({"step": i, "loss": 3.0, "tokens_per_s": float(i)}) + "\n" for i in range(1, steps + 1)]
    (tmp_path / "train.py").unlink()
    (tmp_path / "train.py").write_text(
        f"import pathlib\nfolder = pathlib.Path({str(folder)!r})\nfolder.mkdir(parents=True)\n"
        f"(folder / 'metrics.jsonl').write_text({''.join(rows)!r})\n"
        "raise SystemExit('the loss is nan: try a lower learning_rate')\n"
    )
    row = driver.train(plan, os.environ, time.monotonic() + 60)
    assert row["val_loss"] is None and row["curve"] == [(i, 3.0) for i in range(1, steps + 1)]
    assert row["tokens_per_s"] == (7.5 if steps else 0)


def test_cut_off_runs_go_on(toy, tmp_path, monkeypatch):
    plan = study.Plan("transformer", "small", "rate", 2000 * 32, 1e-3)
    folder, timer = tmp_path / "out/study" / plan.name, threading.Timer

    asked = {}

    def once_it_trains(seconds: float, stop) -> threading.Timer:
        asked[stop.__name__] = seconds

        def wait():
            while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size:
                time.sleep(0.05)
            stop()

        return timer(0, wait) if stop.__name__ == "terminate" else timer(seconds, stop)

    whole = driver.seconds(plan, {}) - driver.START
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Timer", once_it_trains)
        assert driver.train(plan, os.environ, time.monotonic() + 600) is None
    assert (folder / "last").exists() and asked["kill"] - asked["terminate"] == pytest.approx(driver.SAVING)
    step = json.loads((folder / "last/config.json").read_text())["step"]
    assert driver.seconds(plan, {}) - driver.START == pytest.approx(whole * (1 - step / 2000))
    monkeypatch.setattr(study.Plan, "flags", shorter(study.Plan.flags, folder))
    (folder / "last").rename(folder / "last.old")  # as if it was killed while it saved
    (folder / "kept").touch()
    row = driver.train(plan, os.environ, time.monotonic() + 600)
    assert row["val_loss"] > 0 and row["curve"][0][0] == 1 and (folder / "kept").exists()
    assert driver.train(plan, os.environ, 0) == row  # trained: nothing is run
    config = json.loads((folder / "last/config.json").read_text())
    (folder / "last/config.json").write_text(json.dumps(config | {"step": 2000}))
    assert driver.seconds(plan, {}) == 0  # and of a trial, nothing is measured
    (folder / "last/config.json").write_text(json.dumps(config | {"data": {"train": "other"}}))
    assert driver.seconds(plan, {}) == driver.START + whole
    assert driver.train(plan, os.environ, 0) is None  # on other data: begun anew, and stopped


def test_training_ends_in_time(toy, tmp_path, monkeypatch):
    """Also where it does not heed SIGTERM. What something else kills, has failed."""
    (tmp_path / "train.py").unlink()
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen('deaf', 'w')\ntime.sleep(60)\n"
    (tmp_path / "train.py").write_text(code)
    plan = study.Plan("hymba", "small", "epoch", 64 * 32, 1e-3)
    monkeypatch.setattr(driver, "SAVING", 1)
    begin = time.monotonic()
    assert driver.train(plan, os.environ, begin + 5) is None and time.monotonic() < begin + 30
    assert (tmp_path / "deaf").exists()
    (tmp_path / "train.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(RuntimeError):
        driver.train(plan, os.environ, time.monotonic() + 600)


def test_measuring_ends_in_time(toy, tmp_path, monkeypatch):
    """What is not measured by the deadline is not recorded, and no failure."""
    plan = study.Plan("hymba", "small", "epoch", 64 * 32, 1e-3)
    (tmp_path / "evaluate.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(study, "plans", lambda done: [plan])
    running = toy(600)

    def train(*args):
        running.deadline = time.monotonic() + 1  # training took all the time but for a second
        return {"val_loss": 1.0}

    monkeypatch.setattr(driver, "train", train)
    running.work(None)
    assert not running.failed and not running.on(None, "measuring") and not (tmp_path / "runs.jsonl").exists()


def test_what_is_measured(toy, tmp_path, monkeypatch):
    """After an epoch, position, needle and other texts; after more, heads and attention, too; of recall, accuracy and
    what heads are worth; of trials, nothing."""
    for name in ("bench.py", "evaluate.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "text.txt").write_text("a few words of text " * 40)
    new = lambda *args, **options: study.Plan("hymba", *args, 8 * 32, 1e-3, **options)  # noqa: E731
    assert driver.measure(new("small", "rate"), os.environ, 0, []) == {}
    driver.train(plan := new("small", "epoch", seed=2), os.environ, time.monotonic() + 600)
    assert set(driver.measure(plan, os.environ, time.monotonic() + 600, [])) == {"position", "needle"}
    driver.train(plan := new("small", "long"), os.environ, time.monotonic() + 600)
    found = driver.measure(plan, os.environ, time.monotonic() + 600, [tmp_path / "text.txt"])
    assert set(found) == {"position", "needle", "heads", "attention", "texts"} and "text.txt" in found["texts"]
    assert len(found["heads"]["ssm"]) == len(found["attention"]) == 3
    words = (tmp_path / "data").resolve()
    (tmp_path / "data").unlink()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/words").symlink_to(words / "words")
    recall.prepare_recall([2, 4], 100, data_dir=tmp_path / "data")
    few = study.SCALES["recall"].flags | {"dataset": "recall", "vocab_size": 32}
    monkeypatch.setitem(study.SCALES, "recall", study.Scale(30_000, few))
    driver.Driver(tmp_path / "runs.jsonl", 0, "abc", [tmp_path / "text.txt"])  # which is no matter of recall's
    driver.train(plan := new("recall", "recall", seed=2), os.environ, time.monotonic() + 600)
    found = driver.measure(plan, os.environ, time.monotonic() + 600, [])
    assert set(found) == {"accuracy", "pairs", "cache_bytes", "heads"} and list(found["pairs"]) == ["2", "4"]
    assert len(found["heads"]["attn"]) == 3 and found["heads"]["whole"] == pytest.approx(found["accuracy"], abs=0.1)


def shorter(flags, folder):
    """A plan's flags, with an end just behind the checkpoint that there is."""
    steps = json.loads((folder / "last/config.json").read_text())["step"] + 10
    return lambda plan: flags(plan) | {"max_steps": steps, "eval_interval": steps, "decay_steps": 5}
