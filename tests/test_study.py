"""The study: what is to be run and in which order, sizes that match, tables, pictures, and what pages say of them."""

import itertools
import json
import math
import statistics

import pytest
from runs import ROOT

import cost
import figures
import study
from model import HymbaConfig


def made_up(plan: study.Plan, loss: float) -> dict:
    row = {"scale": plan.scale, "system": plan.system, "stage": plan.stage, "tokens": plan.tokens, "seed": plan.seed}
    row |= {"learning_rate": plan.learning_rate, "flags": plan.flags(), "val_loss": loss, "val_bpb": loss / 2}
    row |= {"device": "NVIDIA H100 80GB HBM3"}
    row |= {"tokens_per_s": 1e6, "curve": [(i, loss + 1 / i) for i in range(1, 200)]}
    if plan.stage == "recall":
        return row | {"accuracy": 0.5, "pairs": {"4": {"accuracy": 0.9}, "8": {"accuracy": 0.1}}, "cache_bytes": 1000}
    length = row["flags"]["block_size"]
    edges = [1, 100, 250 * length // 1024, 300 * length // 1024, length + 1, 8 * length + 1]
    position = {"study": {"edges": edges, "by_position": [3.0, 2.0, 9.0, 1.0, 9.0]}}
    needle = {"lengths": [length // 4, length], "choice": [[0.5, 0.25], [0.5, 0.75]]}
    row |= {"position": position, "needle": needle}
    if plan.stage != "long":
        return row | {"decode_tokens_per_s": 1e4}
    letters = plan.flags()["pattern"]
    without = {"attn": "M", "ssm": "Tt"}  # blocks of these letters
    row["heads"] = {kind: [None if letter in no else 0.5 for letter in letters] for kind, no in without.items()}
    block = {"share": dict.fromkeys(("meta", "first", "self", "others"), 0.25), "meta": [0.125, 0.125]}
    block |= {"memory": {"10%": 1.0, "50%": 2.0, "90%": 3.0}}
    block |= dict.fromkeys(("attn", "ssm", "attn_branch_norm", "ssm_branch_norm"), 1.0)
    return row | {"attention": [block] * len(letters)}


def test_the_study_ends_and_repeats_nothing():
    """Each run is planned once: trials, with the neighbours of a best rate at the edge, then epochs at the two best
    rates, of a variant at those of its system, and all else at the better of the two."""
    optimum, done, order = {"mamba": 16e-3} | dict.fromkeys(("transformer", "transformer-experts"), 0.25e-3), {}, []
    next_best = ("hymba-diff", "hymba-group", "inter-middle", "hymba-experts")
    while plan := next((p for p in study.plans(done) if p.learning_rate and p.key not in done), None):
        far = abs(math.log2(plan.learning_rate / optimum.get(plan.system, 2e-3)))
        if plan.stage != "rate" and plan.system == "hymba-no-meta":
            far = -10 * (plan.learning_rate == 1e-3)  # the best of all is no main system, and at its other rate
        far -= 5 * (plan.system in next_best)
        done[plan.key] = {"val_loss": 1.5 + far / 10, "tokens_per_s": 1e6} | plan.__dict__
        order.append(plan)
    assert all(p.key in done for p in study.plans(done)) and len({p.name for p in order}) == len(order)
    assert [p.stage for p in order[:4]] == ["rate"] * 4 and order[0].system == "transformer"
    stages = list(dict.fromkeys((p.scale, p.stage, p.seed, p.system in study.MAIN) for p in order))
    epochs = [("small", "epoch", 1, True), ("small", "epoch", 2, True), ("small", "epoch", 1, False)]
    epochs += [("small", "epoch", 2, False), ("small", "epoch", 3, True), ("small", "epoch", 3, False)]
    assert [stage for stage in stages if stage[:2] == ("small", "epoch")] == epochs
    small = [p for p in order if p.scale == "small"]
    assert ("small", "rate", 1, False) not in stages and small[-7].seed == 2 and small[-7].system not in study.THIRD
    for system in study.SYSTEMS:
        found = [[p.learning_rate for p in small if p.key[1:3] + p.key[4:] == (system, "epoch", n)] for n in (1, 2, 3)]
        best = optimum.get(system, 2e-3)
        assert found[0] == ([best, best / 2] if best != 0.25e-3 else [best, 2 * best]), system
        assert found[1] == ([best / 2, best] if system == "hymba-no-meta" else [best])  # of this one, at both rates
        assert found[2] == (found[1] if system in study.THIRD else [])
    long, flops = ({p.system: p.learning_rate for p in order if key in p.key} for key in ("long", "flops"))
    some = dict.fromkeys(("hymba", "inter", "intra", "hymba-full-second"), 2e-3)
    some |= {"transformer": 0.25e-3, "hymba-no-meta": 1e-3}
    assert long == some | dict.fromkeys(next_best, 2e-3)
    seeds = [(p.system, p.seed) for p in order if p.stage == "long"]
    assert sorted(seeds[:-4]) == sorted((system, seed) for system in some for seed in (1, 2))
    assert sorted(seeds[-4:]) == sorted((system, 1) for system in next_best) and order[-4].stage == "long"
    assert flops == {"transformer": 0.25e-3, "mamba": 16e-3, "inter": 2e-3}
    # Half the rates, the better first; second seeds at the rate at which the first one ended lower there
    large = [(p.system, p.learning_rate, p.seed) for p in order if p.scale == "large"]
    better = {"hymba-no-meta": 0.5e-3, "hymba": 1e-3, "transformer": 0.125e-3, "inter": 1e-3, "mamba": 8e-3}
    worse = {"hymba-no-meta": 1e-3, "hymba": 0.5e-3, "transformer": 0.25e-3, "inter": 0.5e-3, "mamba": 4e-3}
    first = [*better.items(), *worse.items(), ("hymba-full-second", 1e-3), ("hymba-full-second", 0.5e-3)]
    ended = {"hymba-no-meta": 1e-3, "hymba": 1e-3, "transformer": 0.25e-3, "inter": 1e-3, "mamba": 8e-3}
    second = [*ended.items(), ("hymba-full-second", 1e-3)]
    assert large == [(*pair, 1) for pair in first] + [(*pair, 2) for pair in second]
    # Then the variants' recall, four epochs again, and a third seed of recall
    after = order[max(i for i, p in enumerate(order) if p.scale == "large") + 1 :]
    assert {(p.stage, p.system in study.MAIN and p.seed < 3) for p in after if p.stage != "long"} == {("recall", False)}
    for value in (0.1, 0.8):  # also if this one is the best of all, or the second
        won = {key: row | {"val_loss": value} for key, row in done.items() if key[1] == "hymba-full-second"}
        names = [plan.name for plan in study.plans(done | won)]
        assert len(set(names)) == len(names)
    won = {key: row | {"val_loss": 0.1} for key, row in done.items() if key[1] == "hymba-mamba-first"}
    assert "hymba-mamba-first" not in {plan.system for plan in study.plans(done | won) if plan.stage == "recall"}
    for system in study.SYSTEMS:
        found = {(p.learning_rate, p.seed) for p in order if p.key[:2] == ("recall", system)}
        wanted = {(3e-3, 1), (3e-3, 2)} | ({(6e-3, 1)} if system in study.MAIN else set())
        wanted |= {(3e-3, 3)} if system in some and system != "hymba-full-second" else set()
        assert found == (set() if system in (*study.ALIKE, "transformer-experts") else wanted), system
    for rate in (2e-3, 1e-3):  # both epochs of a system that is not among these
        done["small", "hymba-group", "epoch", rate, 1]["val_loss"] = None
    assert "hymba-group" not in study.ranking(done) and all(p.key in done for p in study.plans(done) if p.learning_rate)
    diverged = {k: r | {"val_loss": None if k[3] == 2e-3 else r["val_loss"]} for k, r in done.items()}
    assert 2e-3 not in study.trials(diverged, "hymba")[1]
    del done["small", "hymba", "epoch", 1e-3, 1]  # while it runs, the better rate is not known
    seeds = [p.learning_rate for p in study.plans(done) if p.key[:3] + p.key[4:] == ("small", "hymba", "epoch", 2)]
    assert seeds == [0]
    long = {p.system for p in study.plans(done) if p.stage == "long"}
    assert long == {"hymba", "transformer", "inter", "intra", "hymba-full-second"}
    del done["large", "inter", "epoch", 1e-3, 1]
    done["large", "mamba", "epoch", 8e-3, 1]["val_loss"] = None  # the other rate is the better one
    wide = {p.system: p.learning_rate for p in study.plans(done) if (p.scale, p.seed) == ("large", 2)}
    assert (wide["inter"], wide["mamba"], wide["transformer"]) == (0, 4e-3, 0.25e-3)


@pytest.mark.parametrize("scale", study.SCALES)
def test_sizes_match(scale):
    """All systems have as many active parameters within 1%, or, matched in FLOPs, need as many of them as Hymba."""
    recalling = [system for system in study.SYSTEMS if system != "transformer-experts"]
    for system in recalling if scale == "recall" else study.SYSTEMS:
        model = cost.meta_model(study.config_fields(study.settings(system, study.SCALES[scale])))
        n = cost.active_params(model) - model.embed.weight.numel()
        assert n == pytest.approx(study.SCALES[scale].parameters, rel=0.01), system
    flops = lambda *args: cost.flops_per_token(cost.meta_model(study.config_fields(study.settings(*args))))  # noqa: E731
    for system in ("transformer", "mamba", "inter"):
        like = flops("hymba", study.SCALES[scale])
        assert flops(system, study.SCALES[scale], "flops") == pytest.approx(like, rel=0.01)


def test_tables_and_pictures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    results = tmp_path / "runs.jsonl"
    done = {}
    for plan in (p for system in study.MAIN[:5] for p in plans_of(system)):
        done[plan.key] = made_up(plan, 1.5 + abs(plan.learning_rate - 1e-3) + plan.seed / 100)
    plan = study.Plan("hymba", "small", "long", 4 * study.EPOCH, 1e-3)
    done[plan.key] = made_up(plan, 1.4)
    plan = study.Plan("hymba-concat", "small", "long", 4 * study.EPOCH, 1e-3)
    done[plan.key] = made_up(plan, 1.4)  # a variant, whose insides are not shown
    inside, draw = [], figures.pictures.draw_attention
    monkeypatch.setattr(figures.pictures, "draw_attention", lambda plt, of: inside.extend(of) or draw(plt, of))
    other = [row | {"seed": 3, "study_data": "other"} for row in done.values() if row["stage"] == "epoch"]
    results.write_text("".join(json.dumps(row) + "\n" for row in [*other, *done.values()]))
    assert list(study.read(results)) == list(done)  # on the data of the last line
    study.main(["--list", "--figures", f"--results={tmp_path}"])
    out = capsys.readouterr().out
    within = (99 * 3.0 + 150 * 2.0) / 249  # positions 1 to 249
    row = f"| hymba | `HhhhhHhhhhhH` | 2 | 1.515 | 0.013 | 0.758 | 0.001 |  | {within:.3f} | 1.000 | 0.50 | 0.50, 0.50 "
    assert "| system | pattern | 4 pairs | 8 pairs | mean |" in out and "| what | system | rate |" in out
    assert row + "| 1,000,000 | 10,000 | 2" in out and "training, tokens/s (H100) | decoding" in out
    pictures = [*figures.PICTURES, "attention"]
    assert ", attention.png in" in out and inside == ["Hymba"]
    assert "hours on one GPU" in out and all((tmp_path / f"{name}.png").stat().st_size for name in pictures)
    wrong = {
        "nothing to do": [],
        "=nan: must": ["--minutes=nan"],
        "more than 0": ["--minutes=-1"],
        "10,000 or less": ["--minutes=1e5"],
    }
    (tmp_path / "a").mkdir()
    for name in ("x.txt", "a/x.txt"):
        (tmp_path / name).touch()
    wrong["two have the same"] = ["--minutes=1", *(f"--text={tmp_path / name}" for name in ("x.txt", "a/x.txt"))]
    for message, args in (wrong | {"no file or folder none": ["--minutes=1", "--text=none"]}).items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            study.main([*args, f"--results={tmp_path}"])
    results.write_text("")
    with pytest.raises(FileNotFoundError, match="no results in"):
        study.main(["--figures", f"--results={tmp_path}"])
    results.write_text('{"scale": 3}\n')
    with pytest.raises(ValueError, match="runs.jsonl, line 1"):
        study.main(["--list", f"--results={tmp_path}"])


def test_what_came_after_the_small_epochs():
    """A line and a point for each system, the lowest loss first, beside the mean of its epochs; what diverged has none.
    Speeds only of runs that had a GPU to themselves."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plans = [plan for system in ("transformer", "hymba") for plan in plans_of(system)]
    done = {p.key: made_up(p, 1.5 + abs(p.learning_rate - 1e-3) + p.seed / 100) for p in plans}
    runs = [("hymba", "small", "long", 1.31), ("transformer", "small", "long", 1.3), ("mamba", "small", "flops", None)]
    runs += [("transformer", "small", "flops", 1.6)]
    for system, scale, stage, loss in runs:
        plan = study.Plan(system, scale, stage, 4e8, 1e-3)
        done[plan.key] = made_up(plan, loss) if loss else made_up(plan, 9.0) | {"val_loss": None}
    worse = study.Plan("transformer", "small", "long", 4e8, 2e-3)
    done[worse.key] = made_up(worse, 1.4)  # of two runs, the better one counts
    one, other = study.epoch_rates(done, "hymba", "large")
    for rate, seed, loss in ((one, 1, 1.24), (other, 1, 1.26), (one, 2, 1.26), (other, 2, 1.0), (8e-3, 1, 1.0)):
        plan = study.Plan("hymba", "large", "epoch", 4e8, rate, seed)  # first seeds at the two rates decide
        done[plan.key] = made_up(plan, loss) | {"tokens_per_s": 5e5}
    done["large", "hymba", "epoch", one, 1] |= {"device": "NVIDIA H200", "tokens_per_s": 2e6}
    plan = study.Plan("transformer", "large", "epoch", 4e8, one)
    done[plan.key] = made_up(plan, 1.3)
    lines = [line.split(" | ") for line in figures.later_table(done).splitlines()]
    assert [line[1] for line in lines[2:]] == ["transformer", "transformer", "hymba", "hymba", "transformer"]
    assert lines[3][:7] == ["| four epochs", "transformer", "0.001", "1", "1.300", "", "1.515"]
    assert lines[2][10:] == ["0.50", "14.53", "0.131", "H100", "1,000,000", "10,000 |"]
    assert lines[3][13:] == ["", "", " |"] and lines[5][:5] == ["| large", "hymba", f"{one:g}", "2", "1.250"]
    assert float(lines[5][11]) == pytest.approx(56, rel=0.01)
    assert lines[5][13:15] == ["H100", "500,000"]  # of its two devices, that on which more systems were timed
    alone = {key: row for key, row in done.items() if key != plan.key}  # without the transformer, one on each
    assert figures.device_of(figures.timed(alone, "large")) == "H200"
    for row in done.values():
        row.pop("decode_tokens_per_s", None)
    assert all(line.endswith("|  |  |  |") for line in figures.later_table(done).splitlines()[2:])  # not on a GPU
    figures.draw_later(axes := plt.figure().add_subplot(), done)
    assert axes.get_legend_handles_labels()[1] == ["same operations", "four epochs", "large (longer context)"]
    lines = [line for line in axes.lines if len(line.get_xydata())]
    assert [line.get_linestyle() for line in lines] == [":", "-", "-", "None", "None"]  # the large scale is by itself
    lines = [line.get_xydata() for line in lines]
    ends = [(text.get_text(), *text.xy, *line[0]) for text, line in zip(axes.texts, lines, strict=True)]
    names, x, y, _, start = zip(*ends, strict=True)
    assert [(name, round(loss, 3)) for name, loss in zip(names, y, strict=True)] == [
        ("Transformer", 1.6), ("Transformer", 1.3), ("Hymba", 1.31), ("Hymba", 1.25), ("Transformer", 1.3),
    ]  # fmt: skip
    assert x[1] == pytest.approx(4e8 * 0.1281e9, rel=1e-3)  # 4e8 tokens
    assert start == pytest.approx([1.515] * 5)
    for system in ("hymba-concat", "hymba-experts"):  # a variant, and one with more parameters
        plans = [study.Plan(system, "small", stage, 4e8, 1e-3) for stage in ("epoch", "long")]
        done |= {plan.key: made_up(plan, 1.5 if plan.stage == "long" else 1.7) for plan in plans}
    figures.draw_later(axes := plt.figure().add_subplot(), done)
    black, names = [line for line in axes.lines if line.get_color() == "k"], [text.get_text() for text in axes.texts]
    assert len(black) == 1 and "Hymba with experts" in names and "concat" not in names
    assert [line.get_xydata()[1, 1] for line in axes.lines if line.get_color() == "0.7"] == [1.5]
    assert {text.get_color() for text in axes.texts} == {"k", *(figures.COLORS[s] for s in ("transformer", "hymba"))}
    for kind, systems in (("attn", ["Transformer", "Hymba"]), ("ssm", ["Hymba"])):
        figures.draw_heads(axes := plt.figure().add_subplot(), done, kind)
        assert axes.get_legend_handles_labels()[1] == [*systems, "Hymba with experts"]
    rate, _ = study.epoch_rates(done, "hymba-concat", "large")
    large = study.Plan("hymba-concat", "large", "epoch", 4e8, rate)  # then it has a name
    for some, named in ((done, []), (done | {large.key: made_up(large, 1.2)}, ["concat"])):
        figures.draw_throughput(axes := plt.figure().add_subplot(), some)
        assert [text.get_text() for text in axes.texts] == [*named, "Hymba with experts"]
        assert len(axes.lines) == 2 and axes.get_legend_handles_labels()[1] == ([] if named else ["other variants"])
    plt.close("all")


def test_confidence_intervals():
    """The variance of seeds is pooled: five systems with seeds 0.01 apart, and one with one seed. A pair at the worse
    rate counts, too, and so does a third seed."""
    systems, done = study.MAIN[:6], {}
    for plan in (p for system in systems for p in plans_of(system)):
        if plan.stage != "epoch" or (plan.system, plan.seed) != (systems[5], 2):
            done[plan.key] = made_up(plan, 1.5 + abs(plan.learning_rate - 1e-3) + plan.seed / 100)
    t, sd = 2.571, 0.01 / math.sqrt(2)  # of a table, 5 degrees of freedom
    wanted = dict.fromkeys(systems[:5], t * sd / math.sqrt(2)) | {systems[5]: t * sd}
    assert figures.half_intervals(done) == pytest.approx(wanted, rel=0.01)
    for seed, loss in ((1, 1.9), (2, 1.93)):
        plan = study.Plan("hymba", "small", "epoch", study.EPOCH, 64e-3, seed)
        done[plan.key] = made_up(plan, loss)
    t, sd = 2.447, math.sqrt((5 * 0.01**2 + 0.03**2) / 2 / 6)
    assert figures.half_intervals(done)[systems[5]] == pytest.approx(t * sd, rel=0.01)
    third = study.Plan("hymba", "small", "epoch", study.EPOCH, 1e-3, 3)
    done[third.key] = made_up(third, 1.54)  # beside 1.51 and 1.52, whose mean it moves
    squares = 4 * 0.01**2 / 2 + 0.03**2 / 2 + sum((x - 4.57 / 3) ** 2 for x in (1.51, 1.52, 1.54))
    t, sd = 2.365, math.sqrt(squares / 7)
    assert figures.half_intervals(done)["hymba"] == pytest.approx(t * sd / math.sqrt(3), rel=0.01)
    assert "| 3 | 1.523 | 0.0" in figures.table(done)
    assert "+/- | small epoch" in figures.later_table(done)
    for system in systems[:5]:  # at the large scale, 0.02 apart
        for seed in (1, 2):
            rate = study.epoch_rates(done, system, "large")[0]
            plan = study.Plan(system, "large", "epoch", 2 * study.EPOCH, rate, seed)
            done[plan.key] = made_up(plan, 1.4 + seed / 50)
    halves = figures.half_intervals(done, "large")
    assert halves == pytest.approx(dict.fromkeys(systems[:5], 2.571 * 0.02 / 2), rel=0.01)
    for line in figures.later_table(done).splitlines()[2:]:
        cells = line.split(" | ")
        assert cells[3:6] + cells[7:8] == ["2", "1.430", f"{halves[cells[1]]:.3f}", "0.715"]
    for seed, loss in ((1, 1.3), (2, 1.2)):
        plan = study.Plan("hymba", "small", "long", 4 * study.EPOCH, 1e-3, seed)
        done[plan.key] = made_up(plan, loss)
    assert "| four epochs | hymba | 0.001 | 2 | 1.250 |  | 1.523 | 0.625 |" in figures.later_table(done)
    for system in systems[:5]:  # 0.1 apart
        for seed, loss in ((1, 1.3), (2, 1.2)):
            plan = study.Plan(system, "small", "long", 4 * study.EPOCH, study.epoch_rates(done, system)[0], seed)
            done[plan.key] = made_up(plan, loss)
    halves = figures.half_intervals(done, "small", "long")
    assert halves == pytest.approx(dict.fromkeys(systems[:5], 2.571 * 0.1 / 2), rel=0.01)
    assert f"| four epochs | hymba | 0.001 | 2 | 1.250 | {halves['hymba']:.3f} | 1.523 |" in figures.later_table(done)
    one = {key: row for key, row in done.items() if key[4] == 1}
    assert figures.half_intervals(one) == {} and "| 1 | 1.510 |  | 0.755 |" in figures.table(one)


def test_which_rows_are_shown():
    """Epochs at the better rate; recall at one, of all that are the same model, and the best first in its table."""
    loss = lambda plan: 1.5 + abs(plan.learning_rate - 1e-3)  # noqa: E731
    done = {p.key: made_up(p, loss(p)) for system in study.MAIN[:4] for p in plans_of(system)}
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA GeForce RTX 4090": "GeForce RTX 4090", "cpu": "cpu"}
    assert {name: figures.device({"device": name}) for name in names} == names and figures.device({}) == "?"
    low, high = study.RECALL_RATES
    for rate, seed, accuracy in ((low, 1, 0.2), (low, 2, 0.6), (high, 1, 0.3)):
        plan = study.Plan("hymba", "recall", "recall", study.RECALL, rate, seed)
        done[plan.key] = made_up(plan, 1.0) | {"accuracy": accuracy}
    assert figures.mean_recall(figures.recalled(done, "hymba")) == pytest.approx(0.4)  # at the rate that all have
    plan = study.Plan("hymba-no-sharing", "recall", "recall", study.RECALL, low, 1)  # the same model there
    done[plan.key] = made_up(plan, 1.0) | {"accuracy": 0.8}
    plan = study.Plan("hymba-diff", "recall", "recall", study.RECALL, low, 1)
    done[plan.key] = {k: v for k, v in made_up(plan, 1.0).items() if k not in ("accuracy", "pairs")}  # diverged
    for system, found in (("hymba", [0.2, 0.6, 0.8]), ("hymba-no-sharing", [0.2, 0.6, 0.8]), ("hymba-diff", [])):
        assert [row["accuracy"] for row in figures.recalled(done, system)] == found
    lines = [line.split(" | ") for line in figures.recall_table(done).splitlines()]
    assert [line[0] for line in lines[2:]] == ["| hymba", "| transformer", "| mamba", "| inter"]
    assert lines[0][2:5] == ["4 pairs", "8 pairs", "mean"]
    assert lines[2][1:] == ["`HHhH`", "0.90", "0.10", "0.53", "0.20, 0.60, 0.80", "0.30", "1 |"]
    variant = "hymba-no-meta"
    new = lambda rate, loss: made_up(study.Plan(variant, "small", "epoch", study.EPOCH, rate), loss)  # noqa: E731
    one, other = study.epoch_rates(done, "hymba")
    assert study.epoch_rates(done, variant) == [one, other] and study.epoch_rates({}, variant) == [0, 0]
    done |= {("small", variant, "epoch", rate, 1): new(rate, 1.0) for rate in (one, 64e-3)}
    assert [r["learning_rate"] for r in study.ranking(done)[variant]] == [one]  # not one that is not planned
    done["small", variant, "epoch", other, 1] = new(other, 0.9)
    done["small", variant, "epoch", one, 2] = new(one, 0.1)
    assert [r["learning_rate"] for r in study.ranking(done)[variant]] == [other]  # first seeds decide
    assert f"| {other:g} | 1.000 at {one:g} |" in figures.table(done)


DONE = study.read(ROOT / "results" / "runs.jsonl")
PAGE = (ROOT / "docs" / "results.md").read_text().splitlines()
RECALL = (
    "| system | blocks | 16 pairs | 64 | 128 | 256 | mean of 4 to 256 | each run, at 0.003 | at 0.006 | cache, KB |"
)


def test_alike_in_four_blocks():
    """Recall has each model once: two are the same by their flags, and by the keys and values that blocks own."""
    models = {}
    for system in study.SYSTEMS:
        flags = study.settings(system, study.SCALES["recall"])
        models[system] = flags | {"kv_share": HymbaConfig(**study.config_fields(flags)).kv_owner}
    planned = lambda name: study.ALIKE.get(name, name)  # noqa: E731
    for one, other in itertools.combinations(study.SYSTEMS, 2):
        assert (models[one] == models[other]) == (planned(one) == planned(other)), (one, other)
    assert not {*study.ALIKE} & {*study.MAIN}  # these are planned in any case


def test_the_page_says_what_the_runs_say():
    """Lines of a system in docs/results.md, found by its name or blocks, have its numbers, speeds, too, and those of a
    variant of Hymba the loss and the needle of each seed."""
    speeds = figures.timed(DONE)
    for system, (first, *others) in study.ranking(DONE).items():
        blocks = f"| `{first['flags']['pattern']}` |" if system.startswith(("intra-", "inter-")) else "no blocks"
        variant = f"| `{system.removeprefix('hymba-')}`: "
        found = [line for line in PAGE if any(name in line for name in (f"| `{system}` |", variant, blocks))]
        assert found, system
        rows = [first, *others]
        loss, needle = f"{study.mean_loss(rows):.3f}", f"{figures.needle(first):.2f}"
        seeds = ", ".join(f"{row['val_loss']:.3f}" for row in rows)
        counted = [f"{figures.needle(row):.2f}" if "needle" in row else "-" for row in rows]
        for line in found:
            here = [loss, needle]
            if line.startswith(variant):
                here = [f"{loss} ({seeds})" if others else loss, ", ".join(counted)]
            speed, decoding = (speeds[system][key] for key in ("tokens_per_s", "decode_tokens_per_s"))
            cost = f"{round(speed, -3):,.0f} | {round(decoding, -2):,.0f} | {figures.cache_mb(first):.1f}"
            numbers = [*(f"{x:.3f}" for x in figures.reach(first)), cost]
            for number in here + numbers:
                assert f"| {number} |" in line.replace("* |", " |"), (system, number)


def test_the_page_s_large_table():
    """Of each system the better rate and the other one."""
    names = {figures.name(system): system for system in study.ranking(DONE, "large")}
    start = next(i for i, line in enumerate(PAGE) if line.startswith("| | rate | loss | bits per byte"))
    speeds, wide = figures.timed(DONE, "large"), study.ranking(DONE, "large")
    for better, other in zip(PAGE[start + 2 :: 2], PAGE[start + 3 :: 2], strict=False):
        if not better.startswith("| "):
            break
        system = names.pop(better.split(" | ")[0].strip("| `"))
        first, second = study.epochs(DONE, system, "large")
        for line, seeds in ((better, wide[system]), (other, [second])):
            row, found = seeds[0], figures.needles(seeds[0])
            cells = [f"{row['learning_rate']:g}", f"{study.mean_loss(seeds):.3f}"]
            cells += [f"{x:.3f}" for x in (statistics.mean(r["val_bpb"] for r in seeds), *figures.reach(row))]
            cells += [f"{found[length]:.2f}" for length in (1024, 2048, 4096)]
            cells += [f"{row['texts'][name]['loss']:.2f}" for name in ("wikitext2_test.txt", "tinyshakespeare.txt")]
            if line == better:
                cells += [f"{round(speeds[system]['tokens_per_s'], -3):,.0f}"]
                cells += [f"{round(speeds[system]['decode_tokens_per_s'], -2):,.0f}", f"{figures.cache_mb(first):.1f}"]
            assert line.strip("| ").split(" | ")[1 : len(cells) + 1] == cells, line
    assert not names


def test_the_page_s_recall_and_four_epochs():
    """Each line that is printed is there, in this order, and no other."""
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]  # noqa: E731
    start, printed = PAGE.index(RECALL) + 2, figures.recall_table(DONE).splitlines()[2:]
    for line, (system, blocks, *rest) in zip(PAGE[start:], map(cells, printed), strict=False):
        accuracies, others = rest[:7], rest[7:]  # of 4, 8, 16, 32, 64, 128 and 256 pairs
        name, *numbers = cells(line)
        assert numbers == [blocks, accuracies[2], *accuracies[4:], *others]
        assert name.strip("`") == figures.name(system)
    assert PAGE[start + len(printed)] == ""
    later, ranked = figures.later(DONE)["four epochs"], study.ranking(DONE)
    start = next(i for i, line in enumerate(PAGE) if line.startswith("| | one epoch | four epochs"))
    for line, (system, rows) in zip(PAGE[start + 2 :], later.items(), strict=False):
        name, found = figures.name(system), figures.needles(rows[0])
        loss, seeds = f"{study.mean_loss(rows):.3f}", ", ".join(f"{row['val_loss']:.3f}" for row in rows)
        wanted = [f"{study.mean_loss(ranked[system]):.3f}", f"{loss} ({seeds})" if len(rows) > 1 else loss]
        wanted += [f"{x:.3f}" for x in (statistics.mean(r["val_bpb"] for r in rows), *figures.reach(rows[0]))]
        assert cells(line.replace("`", "")) == [name, *wanted, *(f"{found[n]:.2f}" for n in (1024, 2048, 4096))]
    assert PAGE[start + 2 + len(later)] == ""


def test_the_page_s_losses_beyond_the_training_length():
    """At its end and at the end of 8 times that, of each seed that has them."""
    start = next(i for i, line in enumerate(PAGE) if line.startswith("| | one epoch, at 1,024 | at 8,192"))
    shown = [*figures.DRAWN, "hymba-full-second", "hymba-no-ssm"]
    names = {figures.name(system): system for system in shown}
    for line in PAGE[start + 2 : start + 2 + len(shown)]:
        name, *cells = (cell.strip() for cell in line.replace("`", "").strip("|").split("|"))
        system, wanted = names.pop(name), []
        for where in (("small", "epoch"), ("small", "long"), ("large", "epoch")):
            rows = [row for row in study.ranking(DONE, *where).get(system, []) if "position" in row]
            found = [(row["flags"]["block_size"], *row["position"].values()) for row in rows]
            ends = [f"{x['by_position'][x['edges'].index(n + 1) - 1]:.2f}" for n, x in found]
            wanted += [", ".join(ends), ", ".join(f"{x['by_position'][-1]:.2f}" for _, x in found)]
            assert all(x["edges"][-1] == 8 * n + 1 for n, x in found)
        assert cells == wanted, line
    assert not names


def test_the_page_s_thresholds():
    """Differences of means that are significant: by all cases, and without the three that deviate most, of whose seeds
    one finds few needles and another nearly all; at the larger size and after four epochs by their own."""
    outliers = ("hymba-no-meta", 2e-3), ("hymba-no-meta", 4e-3), ("hymba-mamba-first", 4e-3)
    found = {}
    for (scale, system, stage, rate, _), row in DONE.items():
        if (scale, stage) == ("small", "epoch") and "needle" in row:
            found.setdefault((system, rate), []).append(figures.needle(row))
    assert {case for case, needles in found.items() if min(needles) <= 0.5 and max(needles) >= 0.98} == {*outliers}
    without = {k: r for k, r in DONE.items() if (k[1], k[3]) not in outliers}
    for name, scale, stage, rows in (
        ("*significant* from", "small", "epoch", DONE),
        ("*weak* from", "small", "epoch", without),
        ("*weak* at the larger size from", "large", "epoch", DONE),
        ("*weak* after four epochs from", "small", "long", DONE),
    ):
        one = figures.half_intervals(rows, scale, stage)["inter"] * 2**0.5  # of one seed: inter has two
        (line,) = (line for line in PAGE if line.startswith(f"| {name} |"))
        seeds, cells = [(3, 3), (2, 3), (2, 2), (1, 3), (1, 2), (1, 1)], line.strip("|").split("|")[1:]
        wanted = [f"{one * (1 / a + 1 / b) ** 0.5:.3f}" for a, b in seeds]
        if (scale, stage) != ("small", "epoch"):  # where none has three
            wanted = [number if 3 not in pair else "" for number, pair in zip(wanted, seeds, strict=True)]
        assert [cell.strip() for cell in cells] == wanted


def test_readme_says_what_the_runs_say():
    """Its table has each system's losses and needle."""
    shown = [*figures.DRAWN, "hymba-full-second"]
    rows = {figures.name(system): system for system in shown}
    front = (ROOT / "README.md").read_text().partition("| system | blocks |")[2].partition("\n\n")[0].splitlines()[2:]
    later, ranked = figures.later(DONE), study.ranking(DONE)
    for line in front:
        name, _, *cells = (cell.strip(" |*`") for cell in line.strip("| ").split(" | "))
        runs = ranked[system := rows.pop(name)]
        after = [later[what].get(system) for what in ("four epochs", "large")]
        expected = [f"{study.mean_loss(seeds):.3f}" if seeds else "" for seeds in [runs, *after]]
        assert cells[:4] == [*expected, f"{figures.needle(runs[0]):.2f}"], line
    assert not rows


def test_speeds_are_those_on_one_device():
    """The device on which most systems were timed, at whichever rate; one that was not timed there has no speed."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plans = [plan for system in ("transformer", "hymba", "inter", "mamba") for plan in plans_of(system)]
    done = {plan.key: made_up(plan, 1.5 + abs(plan.learning_rate - 1e-3)) for plan in plans}
    assert len(figures.timed(done)) == 4
    done["small", "mamba", "epoch", 1e-3, 1] |= {"device": "NVIDIA H200", "tokens_per_s": 3e6, "val_loss": 1.4}
    assert set(figures.timed(done)) == {"transformer", "inter", "hymba"}
    assert "(H100)" in figures.table(done) and "3,000,000" not in figures.table(done)
    variant = study.Plan("hymba-no-meta", "small", "epoch", study.EPOCH, 1e-3)  # has no name
    figures.draw_throughput(axes := plt.figure().add_subplot(), done | {variant.key: made_up(variant, 1.0)})
    assert axes.lines[0].get_xydata().tolist() == [[1e4, 1.0]] and "on one H100" in axes.get_xlabel()
    assert sorted(text.get_text() for text in axes.texts) == ["Hymba", "Transformer", "inter-layer"]
    assert len(axes.lines) == 4
    wide = study.Plan(variant.system, "large", "epoch", 2 * study.EPOCH, 0.5e-3)  # now the small one has a name
    more = done | {p.key: made_up(p, 1 + abs(p.learning_rate - 1e-3)) for p in (variant, wide, *plans_of("intra"))}
    for system in ("hymba-experts", "intra-scattered", "intra-sandwich"):  # of these, the last one has no name
        plan = study.Plan(system, "small", "epoch", study.EPOCH, 1e-3)
        more[plan.key] = made_up(plan, 1.0)
    figures.draw_throughput(axes := plt.figure().add_subplot(), more)
    named = ["Hymba", "Hymba with experts", "Transformer", "hybrid heads throughout", "inter-layer", "intra-layer"]
    assert sorted(text.get_text() for text in axes.texts) == [*named, "no-meta"]
    assert len(axes.lines) == 8
    figures.draw_curves(axes := plt.figure().add_subplot(), done, seconds=True)
    assert len(axes.lines) == 3 and "on one H100" in axes.get_xlabel()
    figures.draw_curves(axes := plt.figure().add_subplot(), done, seconds=False)
    assert len(axes.lines) == 4
    worse = study.Plan("mamba", "small", "epoch", study.EPOCH, study.epoch_rates(done, "mamba")[1])
    done[worse.key] = made_up(worse, 2.0) | {"tokens_per_s": 2e6}  # at the other rate, on the device of most
    assert figures.timed(done)["mamba"] == done[worse.key] and "| 2,000,000 |" in figures.table(done)
    figures.draw_reach(axes := plt.figure().add_subplot(), done)
    assert sorted(len(points.get_offsets()) for points in axes.collections) == [1, 1, 1, 2]
    found = made_up(variant, 3.0) | {"needle": {"lengths": [1024], "choice": [[1.0]]}}  # the worst, and finds all
    figures.draw_reach(axes := plt.figure().add_subplot(), done | {variant.key: found})
    assert len(axes.collections) == 5 and sorted(text.get_text() for text in axes.texts) == sorted(
        map(figures.name, figures.timed(done))
    )
    plt.close("all")


def test_names_in_pictures_are_not_in_the_way():
    """Nor outside of the axes: points close together, one at each edge, one that has another to its right, and one
    that has one of another kind."""
    plt = pytest.importorskip("matplotlib.pyplot")
    axes = plt.figure().add_subplot()
    points = [(1, 1), (1.02, 1.01), (1.04, 1), (10, 1), (0.1, 3), (0.13, 3), (1, 2)]
    axes.scatter([1.3], [2])
    figures.draw_against(axes, points := dict(zip(study.SYSTEMS, points, strict=False)), "x", "y")
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [figures.name(system) for system in points]
    assert not any(box.count_overlaps([other for other in boxes if other is not box]) for box in boxes)
    for box in boxes:
        assert not any(box.contains(*axes.transData.transform(point)) for point in [*points.values(), (1.3, 2)])
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
    for style, wanted in (("o", (6, 0)), ("-", (6, 8))):  # points without a line, and a line, to the right of a point
        axes = plt.figure().add_subplot()
        axes.plot([1, 9], [1, 1], style)
        figures.draw_against(axes, {"hymba": (1, 1)}, "x", "y")
        assert axes.texts[0].get_position() == wanted
    plt.close("all")


def test_pictures_of_the_study():
    """Which systems they have, at which points, and what their axes show."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plans = [plan for system in ("transformer", "mamba", "intra") for plan in plans_of(system)]
    done = {plan.key: made_up(plan, 1.5 + abs(plan.learning_rate - 1e-3)) for plan in plans}
    for i, system in enumerate(("intra-scattered", "intra-sandwich")):
        plan = study.Plan(system, "small", "epoch", study.EPOCH, 1e-3)
        done[plan.key] = made_up(plan, 1.6 + i)
        plan = study.Plan(system, "recall", "recall", study.RECALL, study.RECALL_RATES[0])
        done[plan.key] = made_up(plan, 1.6)
    drawn = ["Transformer", "Mamba", "hybrid heads throughout", "intra-layer"]  # one variant, and no other
    figures.draw_pairs(axes := plt.figure().add_subplot(), done)
    assert axes.get_legend_handles_labels()[1] == drawn
    again = study.Plan("mamba", "recall", "recall", study.RECALL, study.RECALL_RATES[0], 2)
    figures.draw_recall(axes := plt.figure().add_subplot(), done | {again.key: made_up(again, 1.6) | {"accuracy": 0.3}})
    assert [text.get_text() for text in axes.texts] == drawn
    runs, mean = (axes.lines[i + 1].get_xydata().tolist() for i in (0, len(drawn)))  # mamba's
    assert runs == [[1.0, 0.5], [1.0, 0.3]] and mean == [[1.0, 0.4]]
    for draw in (figures.draw_positions, figures.draw_needle):
        draw(axes := plt.figure().add_subplot(), done)
        assert axes.get_legend_handles_labels()[1] == drawn
        assert [1024, 1024] in [[*line.get_xdata()] for line in axes.lines]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["256", "1,024"] and axes.get_xscale() == "log"
    figures.draw_positions(axes := plt.figure().add_subplot(), done)
    assert axes.get_xlim() == (102.4, 8192) and axes.get_ylim() == (0.9, 2)  # the lowest loss is 1
    assert [text.get_text() for text in axes.get_xticklabels()][0] == "128" and not axes.get_xticks(minor=True).size
    figures.draw_ladder(axes := plt.figure().add_subplot(), done)
    general, recall = (points.get_offsets().tolist() for points in axes.collections)
    paper = {system: figures.PAPER[system] for system in ("transformer", "mamba", "intra")}
    assert sorted(general) == sorted([1.5, accuracy] for accuracy, _ in paper.values())
    assert {text.get_text(): list(text.xy) for text in axes.texts} == {
        figures.name(system): [1.5, recall] for system, (_, recall) in paper.items()
    }
    assert sorted(recall) == sorted([1.5, accuracy] for _, accuracy in paper.values())
    for draw in figures.PICTURES.values():
        draw(plt.figure().add_subplot(), {})
    plt.close("all")


def plans_of(system: str) -> list[study.Plan]:
    rates = [study.Plan(system, "small", "rate", study.TRIAL, rate) for rate in (0.5e-3, 1e-3, *study.RATES)]
    epochs = [study.Plan(system, "small", "epoch", study.EPOCH, 1e-3, seed) for seed in (1, 2)]
    return rates + epochs + [study.Plan(system, "recall", "recall", study.RECALL, study.RECALL_RATES[0])]
