"""Checkpoints: ours, of training, and released ones, from their description alone and against transformers."""

import itertools
import json
import math
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from released import HYMBA_JSON, LLAMA_JSON, MAMBA_JSON, RELEASED, released_shapes, write_released
from safetensors.torch import load_file, save_file

import checkpoint
import files
import train
import training
from conftest import dense_attention, error, scan_loop, small, tokens
from engine import Engine
from flags import TrainConfig, parse
from model import Hymba, HymbaConfig

ROOT = Path(train.__file__).parent


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of each file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------------------
# Our own format


def test_pretrained_round_trip_and_errors(tmp_path):
    model = small("HhM")
    model.save_pretrained(tmp_path, step=3)
    again = Hymba.from_pretrained(tmp_path)
    assert asdict(again.config) == asdict(model.config)
    assert torch.equal(again(tokens(1, 9)), model(tokens(1, 9)))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["extra"] = tensors.pop("meta")
    tensors["norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing meta, unexpected extra, norm.weight of shape \(3,\), not \(32,\)$"):
        Hymba.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        Hymba.from_pretrained(tmp_path / "nowhere")


def test_cast_keeps_what_must_be_float32():
    model = checkpoint.cast(small("HhM"), torch.bfloat16)
    for name, p in model.named_parameters():
        kept = name.rpartition(".")[2] in ("conv_weight", "conv_bias", "dt_bias", "A_log", "D")
        assert p.dtype == (torch.float32 if kept else torch.bfloat16), name
    engine = Engine(model)
    cache = engine.new_cache(1, 9)
    assert {u.dtype for u in cache.kv[0]} == {torch.bfloat16} and cache.ssm[2][1].dtype == torch.float32
    with torch.no_grad():
        full, idx = model(tokens(1, 30)), tokens(1, 30)
        assert full.dtype == torch.bfloat16 and error(full, small("HhM")(idx)) < 0.05
        out = torch.cat([engine.logits(piece, cache) for piece in idx.split([17] + [1] * 13, dim=1)], 1)
    assert error(out, full) < 0.03


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = small("M")
    optimizer = training.optimizer_for(model, TrainConfig())
    model(tokens(1, 5), tokens(1, 5)).backward()
    optimizer.step()
    folder = tmp_path / "last"
    checkpoint.save_training(folder, model, optimizer, {"step": 1}, None)
    before = sorted((f.name, f.read_bytes()) for f in folder.iterdir())

    full = OSError(28, "No space left on device")
    as_safetensors_says_it = files.SafetensorError("I/O error: No space left on device")
    for name, reason in itertools.product(("model", "optimizer"), (full, as_safetensors_says_it)):

        def write(tensors, file, metadata=None, name=name, reason=reason):
            if file.name.startswith(name):
                raise reason
            save_file(tensors, file, metadata)

        monkeypatch.setattr(files, "save_file", write)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save_training(folder, model, optimizer, {"step": 2}, None)
    assert [f.name for f in tmp_path.iterdir()] == ["last"]
    assert sorted((f.name, f.read_bytes()) for f in folder.iterdir()) == before
    folder.rename(tmp_path / "last.old")  # as if it stopped between the two renames
    folder = tmp_path / "last"
    config = json.loads((tmp_path / "last.old/config.json").read_text()) | {"tokenizer": "bytes", "train": {}}
    del config["model"]["tied"]  # a flag younger than the checkpoint
    (tmp_path / "last.old/config.json").write_text(json.dumps(config))
    assert checkpoint.read_training(folder)["step"] == 1
    checkpoint.load_training(folder, model, optimizer, 1)


def test_checkpoints_of_an_older_version_load():
    """Commit be2855b wrote it, when parameters had other names and kernels were a field of the configuration."""
    folder = ROOT / "tests/be2855b/last"
    tensors, moments = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    model = checkpoint.load(folder)
    assert (model.config.pattern, model.config.vocab_size, model.config.rope_base) == ("HhhM", 257, 10000.0)
    assert "kernels" in json.loads((folder / "config.json").read_text())["model"]
    params = model.state_dict()
    assert {checkpoint.current_name(name) for name in tensors} == params.keys()
    assert all(torch.equal(params[checkpoint.current_name(name)], t) for name, t in tensors.items())
    states = {f"{name}.{key}" for name in params for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {checkpoint.current_name(name) for name in moments} == states
    assert torch.equal(model.blocks[1].mixer.ssm.A_log, tensors["blocks.1.mixer.A_log"])
    assert torch.equal(model.blocks[1].mixer.ssm.dt_norm.weight, tensors["blocks.1.mixer.dt_norm.weight"])
    assert torch.equal(model.blocks[1].mixer.attn_branch_norm.weight, tensors["blocks.1.mixer.attn_norm.weight"])
    assert torch.equal(model.blocks[1].mixer.ssm_branch_norm.weight, tensors["blocks.1.mixer.ssm_norm.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# Released weights


def released_hymba(w: dict, c: dict, idx: torch.Tensor) -> torch.Tensor:
    """Logits of a released Hymba checkpoint in float64, from the format's description: names, row order, mask, RoPE."""
    w = {name: t.double() for name, t in w.items()}
    rms = lambda u, scale: u / (u.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * scale  # noqa: E731
    C, H, G, M = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["num_memory_tokens"]
    D, E, F_, R, N = 2 * C, C // H, 2 * C // H, c["mamba_dt_rank"], c["mamba_d_state"]
    x = torch.cat([w["model.memory_tokens"].expand(len(idx), -1, -1), w["model.embed_tokens.weight"][idx]], 1)
    base = c["rope_theta"] * (2 * c["max_position_embeddings"] / c["orig_max_position_embeddings"] - 1) ** (E / (E - 2))
    angle = torch.arange(x.shape[1]).double()[:, None, None] * base ** (-torch.arange(0, E, 2).double() / E)

    def rotate(u):
        a, b = u.unflatten(-1, (-1, E)).chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    producer, kv = {i: group[0] for group in c["kv_reuse_group"] for i in group}, {}
    for i in range(c["num_hidden_layers"]):
        m = {name.removeprefix(f"model.layers.{i}."): t for name, t in w.items()}
        owns = producer.get(i, i) == i
        u = rms(x, m["input_layernorm.weight"]) @ m["mamba.in_proj.weight"].T
        q, *new, s, z = u.split([H * E] + [G * E, G * F_] * owns + [D, D], -1)
        if owns:
            kv[i] = rotate(new[0]), new[1].unflatten(-1, (G, F_))
        window = None if i in c["global_attn_idx"] else c["sliding_window"] + 1  # q - k <= sliding_window
        attn = dense_attention(rotate(q), *kv[producer.get(i, i)], window, M).flatten(2)
        s = F.conv1d(
            F.pad(s.mT, (c["mamba_d_conv"] - 1, 0)), m["mamba.conv1d.weight"], m["mamba.conv1d.bias"], groups=D
        ).mT
        dt, B, C_ = (F.silu(s) @ m["mamba.x_proj.0.weight"].T).split([R, N, N], -1)
        dt = rms(dt, m["mamba.dt_layernorm.weight"]) @ m["mamba.dt_proj.0.weight"].T
        B, C_ = rms(B, m["mamba.B_layernorm.weight"]), rms(C_, m["mamba.C_layernorm.weight"])
        A, bias = -m["mamba.A_log.0"].exp(), m["mamba.dt_proj.0.bias"]
        ssm, _ = scan_loop(F.silu(s), dt, A, B, C_, m["mamba.D.0"], z, bias)
        a, b = rms(attn, m["mamba.pre_avg_layernorm1.weight"]), rms(ssm, m["mamba.pre_avg_layernorm2.weight"])
        x = x + (a + b) / 2 @ m["mamba.out_proj.weight"].T
        h = rms(x, m["pre_moe_layernorm.weight"])
        gate, up, down = (m[f"moe.experts.0.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate) * (h @ up)) @ down
    return (rms(x, w["model.final_layernorm.weight"]) @ w["model.embed_tokens.weight"].T)[:, M:]


@pytest.mark.parametrize("groups", [[[1, 2], [4, 5, 6]], []])
def test_released_hymba_against_a_plain_forward(groups, tmp_path):
    tensors = write_released(tmp_path, c := HYMBA_JSON | {"kv_reuse_group": groups})
    model, idx = Hymba.from_pretrained(tmp_path), tokens(2, 30, vocab=67)
    assert model.config.pattern == "HhhHhhhH" and model.config.window == 7
    with torch.no_grad():
        assert error(model(idx), released_hymba(tensors, c, idx)) < 1e-5


def test_released_hymba_1_5b_has_exactly_the_published_tensors():
    groups = [[i, i + 1] for i in [*range(1, 14, 2), *range(19, 30, 2)]] + [[16, 17, 18]]
    c = dict(HYMBA_JSON, vocab_size=32001, hidden_size=1600, num_hidden_layers=32, num_attention_heads=25,
        num_key_value_heads=5, intermediate_size=5504, mamba_d_state=16, mamba_d_conv=4, mamba_dt_rank=100,
        num_memory_tokens=128, sliding_window=1024, global_attn_idx=[0, 15, 31], kv_reuse_group=sorted(groups),
        orig_max_position_embeddings=2048, max_position_embeddings=8192)  # fmt: skip
    config = HymbaConfig(**checkpoint.released_config(c))
    _, args = parse([str(ROOT / "config/hymba_1.5b.py")])
    expected = asdict(HymbaConfig(**args, vocab_size=32001)) | dict(window=1025, block_size=8192, rope_orig=2048)
    assert asdict(config) == expected
    with torch.device("meta"):
        layout = checkpoint.layout(Hymba(config), "hymba")
    assert {name: shape for theirs in layout.values() for name, shape in theirs.items()} == released_shapes(c)
    shapes = released_shapes(c)  # and the figures of the description themselves
    assert shapes["model.layers.1.mamba.in_proj.weight"] == (8960, 1600)
    assert shapes["model.layers.2.mamba.in_proj.weight"] == (8000, 1600)
    assert shapes["model.layers.0.mamba.x_proj.0.weight"] == (132, 3200)
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_522_797_824


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", RELEASED)
def test_released_round_trip(kind, shards, tmp_path):
    """bfloat16 files come back the same to the byte, although the model keeps A_log and a few others in float32."""
    c = RELEASED[kind] | {"architectures": ["what we know nothing of"]}
    tensors = write_released(tmp_path / "a", c, shards, torch.bfloat16)
    model, idx = Hymba.from_pretrained(tmp_path / "a"), tokens(1, 9)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name in model.state_dict()
                    if name.endswith(("A_log", "mixer.ssm.D", "dt_bias", "conv_weight", "conv_bias"))}  # fmt: skip
    assert {p.dtype for p in model.parameters()} <= {torch.float32, torch.bfloat16}
    logits, expected = model(idx), Hymba.from_pretrained(tmp_path / "a", torch.float32)(idx)
    assert logits.dtype == torch.bfloat16 and error(logits, expected) < 0.15
    model(idx, idx).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text()) == c
    again = load_file(tmp_path / "b/model.safetensors")
    assert again.keys() == tensors.keys() and all(again[n].dtype == t.dtype for n, t in tensors.items())
    assert all(torch.equal(again[n], t) for n, t in tensors.items())
    if shards == 1:
        raw = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
        assert raw[0] == raw[1]
    assert sorted(f.name for f in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of anonymous memory")
@pytest.mark.parametrize("kind", ["own", "llama"])
def test_weights_load_without_a_second_copy(kind, tmp_path):
    """41 MB of embedding (malloc keeps no such piece) stay in the mapped file, and nowhere else, when they are used."""
    c = LLAMA_JSON | dict(vocab_size=40_000, hidden_size=256, tie_word_embeddings=True)
    write_released(tmp_path, c)
    if kind == "own":
        config = HymbaConfig(**checkpoint.released_config(c))
        Hymba(config).save_pretrained(tmp_path)

    def anonymous() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    before = anonymous()
    model = Hymba.from_pretrained(tmp_path)
    assert torch.stack([p.detach().sum() for p in model.parameters()]).isfinite().all()
    assert anonymous() - before < 20e6


def test_from_pretrained_dtype_and_device(tmp_path):
    write_released(tmp_path, HYMBA_JSON)
    wide = Hymba.from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    half = Hymba.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.embed.weight.dtype == torch.float16 and half.blocks[0].mixer.ssm.A_log.dtype == torch.float32
    assert Hymba.from_pretrained(tmp_path, device="meta").meta.is_meta


def test_released_tied_head_in_the_file(tmp_path):
    """Some files hold the embedding twice: then both copies must be equal, and both are written again."""
    tensors = write_released(tmp_path, HYMBA_JSON)
    embed = tensors["model.embed_tokens.weight"]
    write_released(tmp_path, HYMBA_JSON, **{"lm_head.weight": embed.clone()})
    model = Hymba.from_pretrained(tmp_path)
    assert model.lm_head is None
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")["lm_head.weight"], embed)
    write_released(tmp_path, HYMBA_JSON, **{"lm_head.weight": embed + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        Hymba.from_pretrained(tmp_path)


Q_PROJ, CONV = "model.layers.1.self_attn.q_proj.weight", "backbone.layers.0.mixer.conv1d.weight"


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "kind, tensors, message",
    [
        ("llama", {Q_PROJ: None}, f"missing {Q_PROJ}$"),
        ("llama", {Q_PROJ: torch.ones(31, 32)}, rf"{Q_PROJ} of shape \(31, 32\), not \(32, 32\)$"),
        ("llama", {"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, "unexpected model.layers.2.mlp.up_proj."),
        ("llama", {"lm_head.weight": None}, "missing lm_head.weight$"),
        ("mamba", {CONV: torch.ones(64, 5)}, rf"{CONV} of shape \(64, 5\), not \(64, 1, 5\)$"),
        ("hymba", {"model.memory_tokens": None, "more": torch.ones(1)}, "missing model.memory_tokens, .* more$"),
        ("llama", {Q_PROJ: torch.ones(32, 32).to(torch.int8)}, f"{Q_PROJ} of torch.int8: quantised weights are not"),
    ],
)
def test_released_tensors_that_do_not_fit(kind, tensors, message, shards, tmp_path):
    write_released(tmp_path, RELEASED[kind], shards, **tensors)
    with pytest.raises(ValueError, match=message):
        Hymba.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("hymba", {"model_type": "gpt2"}, "model_type='gpt2' is not supported, only hymba, llama, mamba, mamba2"),
        ("hymba", {"model_type": None}, "model_type=None is not supported"),
        ("hymba", {"kv_reuse_group": [[1, 2], [4, 5]]}, r"kv_reuse_group=\[\[1, 2\], \[4, 5\]\] .* only .* \[4, 5, 6"),
        ("hymba", {"rope_type": "yarn"}, "rope_type='yarn' is not supported, only 'ntk'"),
        ("hymba", {"mlp_hidden_act": "relu2"}, "mlp_hidden_act='relu2' is not supported, only 'silu'"),
        ("hymba", {"sliding_window": None}, "sliding_window=None must be int"),
        ("hymba", {"rope": False}, "rope=False is not supported, only True"),
        ("hymba", {"memory_tokens_interspersed_every": 512}, "memory_tokens_interspersed_every=512 is not .*, only 0"),
        ("hymba", {"max_position_embeddings": 15}, "'ntk' with max_position_embeddings=15 is not .*ddings=16 or more"),
        ("hymba", {"max_position_embeddings": 9}, "'ntk' with max_position_embeddings=9 is not .*ddings=16 or more"),
        ("hymba", {"max_position_embeddings": 8}, "'ntk' with max_position_embeddings=8 is not .*ddings=16 or more"),
        ("hymba", {"max_position_embeddings": 4}, "'ntk' with max_position_embeddings=4 is not .*ddings=16 or more"),
        ("hymba", {"mamba_d_state": 0}, "d_state=0: must be 1 or more"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported, only False"),
        ("llama", {"head_dim": 16}, "head_dim=16 is not supported, only 8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ("llama", {"num_attention_heads": 5}, "n_head=5 is not a multiple of n_kv_head=2"),
        ("mamba2", {"n_groups": 8}, "n_groups=8 is not supported, only 1"),
        ("mamba2", {"num_heads": 8}, "num_heads=8 is not supported, only 4"),
        ("mamba2", {"time_step_limit": [0.1, 1.0]}, "time_step_limit=.* is not supported"),
        ("mamba2", {"head_dim": 0}, "num_heads=4 is not supported, only 64"),
        ("mamba", {"use_bias": True}, "use_bias=True is not supported, only False"),
        ("mamba", {"intermediate_size": 48}, "intermediate_size=48 is not supported, only 64"),
    ],
)  # fmt: skip
def test_released_configs_that_cannot_be_computed(kind, changes, message, tmp_path):
    write_released(tmp_path, RELEASED[kind])
    (tmp_path / "config.json").write_text(json.dumps({"head_dim": None} | RELEASED[kind] | changes))
    with pytest.raises(ValueError, match=message) as e:
        Hymba.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)
    for key in ("hidden_size", "num_hidden_layers"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in RELEASED[kind].items() if k != key}))
        with pytest.raises(ValueError, match=f"config.json has no '{key}'"):
            Hymba.from_pretrained(tmp_path)


def test_released_rope_types_that_stretch_nothing(tmp_path):
    """Without a type or with "default", RoPE is plain, whatever the lengths; "ntk" may keep the length."""
    for changes, rope_orig in [
        ({"rope_type": None}, 0),
        ({"rope_type": "default"}, 0),
        ({"rope_type": "default", "max_position_embeddings": 8}, 0),
        ({"max_position_embeddings": 16}, 16),
    ]:
        write_released(tmp_path, HYMBA_JSON | changes)
        assert Hymba.from_pretrained(tmp_path).config.rope_orig == rope_orig


def test_released_files_missing_or_corrupt(tmp_path):
    write_released(tmp_path, LLAMA_JSON, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="00002.safetensors is corrupt"):
        Hymba.from_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model-00001-of-00002.safetensors"), second)
    with pytest.raises(ValueError, match="00002.safetensors is corrupt: another file of .* has .*weight, too"):
        Hymba.from_pretrained(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="not a whole checkpoint: it has no model-00002-of-00002.safetensors"):
        Hymba.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="it has no model.safetensors"):
        Hymba.from_pretrained(tmp_path)
    for text in (b"{", b"[]", b"null", b"3", b"\xff"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match="config.json is"):
            Hymba.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        Hymba.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_corrupt_index_of_shards(text, tmp_path):
    small("M").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        Hymba.from_pretrained(tmp_path)


def test_released_names_on_the_hub(tmp_path, monkeypatch):
    write_released(tmp_path, MAMBA_JSON)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, "model*.safetensors" in allow_patterns))
        if "down" in name:
            raise OSError("no\n network")
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert Hymba.from_pretrained("state-spaces/mamba-130m.hf").config.pattern == "MM"
    with pytest.raises(ConnectionError, match="no folder lab/down, nor a download from huggingface.co: no network"):
        Hymba.from_pretrained("lab/down")
    for name in ("mamba", "a/b/c", "/a/b", "../b", "a/", "./a", "a b/c", "https://huggingface.co/a/b"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor owner/model on huggingface.co"):
            Hymba.from_pretrained(name)
    name = "state-spaces/mamba-130m.hf"  # its config.json is read before the weights are downloaded
    assert asked == [(name, False), (name, True), ("lab/down", False)]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="to get it from huggingface.co: pip install huggingface_hub"):
        Hymba.from_pretrained("lab/model")


def test_a_crash_in_save_pretrained_leaves_the_old_files(tmp_path, monkeypatch):
    write_released(tmp_path, MAMBA_JSON)
    before, model = contents(tmp_path), Hymba.from_pretrained(tmp_path)

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(files, "save_file", full)
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    with torch.no_grad():
        model.embed.weight.zero_()
    model.save_pretrained(tmp_path)  # over the file that is mapped
    assert not Hymba.from_pretrained(tmp_path).embed.weight.any() and error(model.norm.weight, torch.ones(32)) < 1


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers


@pytest.fixture
def tr(monkeypatch):
    """The package transformers. It looks for a package called kernels, and must not find the file kernels.py."""
    tr = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    for module in (tr.utils, tr.utils.import_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda *args: False)
    return tr


def compare_with_transformers(theirs, folder: Path, **options) -> Hymba:
    """Logits of theirs, with weights large enough to matter, and of what we load from its save_pretrained."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2, generator=g) if p.dim() > 1 else p.add_(torch.rand(p.shape, generator=g) - 0.5)
    theirs.eval().save_pretrained(folder, **options)
    model, idx = Hymba.from_pretrained(folder), tokens(2, 40, vocab=67)
    with torch.no_grad():
        assert error(model(idx), theirs(idx).logits) < 1e-5
    model.save_pretrained(folder / "again")
    with torch.no_grad():  # theirs reads what we write
        assert torch.equal(type(theirs).from_pretrained(folder / "again")(idx).logits, theirs(idx).logits)
    return model


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3], ids=["plain", "llama3"])
@pytest.mark.parametrize("tied", [True, False])
def test_against_llama(tied, rope, tmp_path, tr):
    c = tr.LlamaConfig(vocab_size=67, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters=rope | {"rope_theta": 500.0})  # fmt: skip
    model = compare_with_transformers(tr.LlamaForCausalLM(c), tmp_path)
    assert model.config.tied == tied and (model.lm_head is None) == tied
    # transformers before 5 wrote it so
    c = json.loads((tmp_path / "config.json").read_text())
    c |= {"rope_theta": c.pop("rope_parameters")["rope_theta"], "rope_scaling": rope if rope == LLAMA3 else None}
    (tmp_path / "config.json").write_text(json.dumps(c))
    assert Hymba.from_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize("tied", [True, False])
def test_against_mamba2(tied, tmp_path, tr):
    """Logits, and greedy tokens as their cache gives them."""
    mamba2 = tr.Mamba2ForCausalLM(tr.Mamba2Config(vocab_size=67, hidden_size=32, state_size=8, num_hidden_layers=3,
        conv_kernel=3, expand=2, head_dim=16, num_heads=4, n_groups=1, chunk_size=16, layer_norm_epsilon=1e-5,
        tie_word_embeddings=tied,
    ))  # fmt: skip
    model = compare_with_transformers(mamba2, tmp_path)
    assert model.config.tied == tied
    c = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(c | {"time_step_limit": [0.0, math.inf]}))  # before transformers 5
    assert Hymba.from_pretrained(tmp_path).config == model.config
    prompt = tokens(1, 9, vocab=67)
    theirs = mamba2.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 9:]
    assert [t for (t,) in Engine(model).generate(prompt.tolist(), 20, temperature=0)] == theirs.tolist()


def test_against_mamba(tmp_path, tr):
    """A pure M model against MambaForCausalLM, whose slow path also checks the mixer and the scan."""
    mamba = tr.MambaForCausalLM(tr.MambaConfig(vocab_size=67, hidden_size=32, state_size=4, num_hidden_layers=3,
        conv_kernel=5, expand=2, time_step_rank=2, layer_norm_epsilon=1e-5, use_mambapy=False, use_cache=False,
    ))  # fmt: skip
    compare_with_transformers(mamba, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
