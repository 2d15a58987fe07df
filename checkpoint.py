"""
Checkpoints: ours, and the ones that others release. Hymba.from_pretrained is load, and model.save_pretrained is save.

Each foreign format is one table of names (FORMATS) and a few lines that read its config.json (released_config). Our own
is config.json with {"model": the fields of HymbaConfig, ...} beside model.safetensors with the names of our parameters.
A checkpoint of training has the optimizer's state, too (save_training, load_training).
"""

import hashlib
import json
import os
import re
import types
from dataclasses import asdict, fields
from pathlib import Path

import torch

from files import INFINITY, brief, check_keys, read_json, read_tensors, recover, replacing, write_tensors
from model import Hymba, HymbaConfig

# By config.json's model_type: their tensor -> our parameter. Tensors that share one are its rows, in this order.
FORMATS = {
    "hymba": {
        "model.embed_tokens.weight": "embed.weight",
        "model.memory_tokens": "meta",
        "model.layers.{i}.input_layernorm.weight": "blocks.{i}.mixer_norm.weight",
        "model.layers.{i}.mamba.in_proj.weight": "blocks.{i}.mixer.in_proj.weight",
        "model.layers.{i}.mamba.conv1d.weight": "blocks.{i}.mixer.ssm.conv_weight",
        "model.layers.{i}.mamba.conv1d.bias": "blocks.{i}.mixer.ssm.conv_bias",
        "model.layers.{i}.mamba.x_proj.0.weight": "blocks.{i}.mixer.ssm.x_proj.weight",
        "model.layers.{i}.mamba.dt_layernorm.weight": "blocks.{i}.mixer.ssm.dt_norm.weight",
        "model.layers.{i}.mamba.B_layernorm.weight": "blocks.{i}.mixer.ssm.B_norm.weight",
        "model.layers.{i}.mamba.C_layernorm.weight": "blocks.{i}.mixer.ssm.C_norm.weight",
        "model.layers.{i}.mamba.dt_proj.0.weight": "blocks.{i}.mixer.ssm.dt_proj.weight",
        "model.layers.{i}.mamba.dt_proj.0.bias": "blocks.{i}.mixer.ssm.dt_bias",
        "model.layers.{i}.mamba.A_log.0": "blocks.{i}.mixer.ssm.A_log",
        "model.layers.{i}.mamba.D.0": "blocks.{i}.mixer.ssm.D",
        "model.layers.{i}.mamba.pre_avg_layernorm1.weight": "blocks.{i}.mixer.attn_branch_norm.weight",
        "model.layers.{i}.mamba.pre_avg_layernorm2.weight": "blocks.{i}.mixer.ssm_branch_norm.weight",
        "model.layers.{i}.mamba.out_proj.weight": "blocks.{i}.mixer.out_proj.weight",
        "model.layers.{i}.pre_moe_layernorm.weight": "blocks.{i}.ffn_norm.weight",
        "model.layers.{i}.moe.experts.0.gate_proj.weight": "blocks.{i}.ffn.gate_proj.weight",
        "model.layers.{i}.moe.experts.0.up_proj.weight": "blocks.{i}.ffn.up_proj.weight",
        "model.layers.{i}.moe.experts.0.down_proj.weight": "blocks.{i}.ffn.down_proj.weight",
        "model.final_layernorm.weight": "norm.weight",
        "lm_head.weight": "lm_head",
    },
    "llama": {
        "model.embed_tokens.weight": "embed.weight",
        "model.layers.{i}.input_layernorm.weight": "blocks.{i}.mixer_norm.weight",
        "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.mixer.in_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.mixer.in_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.mixer.in_proj.weight",
        "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.mixer.out_proj.weight",
        "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.ffn_norm.weight",
        "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.ffn.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.ffn.up_proj.weight",
        "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.ffn.down_proj.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "lm_head",
    },
    "mamba": {
        "backbone.embeddings.weight": "embed.weight",
        "backbone.layers.{i}.norm.weight": "blocks.{i}.mixer_norm.weight",
        "backbone.layers.{i}.mixer.in_proj.weight": "blocks.{i}.mixer.in_proj.weight",
        "backbone.layers.{i}.mixer.conv1d.weight": "blocks.{i}.mixer.ssm.conv_weight",
        "backbone.layers.{i}.mixer.conv1d.bias": "blocks.{i}.mixer.ssm.conv_bias",
        "backbone.layers.{i}.mixer.x_proj.weight": "blocks.{i}.mixer.ssm.x_proj.weight",
        "backbone.layers.{i}.mixer.dt_proj.weight": "blocks.{i}.mixer.ssm.dt_proj.weight",
        "backbone.layers.{i}.mixer.dt_proj.bias": "blocks.{i}.mixer.ssm.dt_bias",
        "backbone.layers.{i}.mixer.A_log": "blocks.{i}.mixer.ssm.A_log",
        "backbone.layers.{i}.mixer.D": "blocks.{i}.mixer.ssm.D",
        "backbone.layers.{i}.mixer.out_proj.weight": "blocks.{i}.mixer.out_proj.weight",
        "backbone.norm_f.weight": "norm.weight",
        "lm_head.weight": "lm_head",
    },
}
_MAMBA2 = {name: ours for name, ours in FORMATS["mamba"].items() if "x_proj" not in name and "dt_proj" not in name}
FORMATS["mamba2"] = _MAMBA2 | {
    "backbone.layers.{i}.mixer.dt_bias": "blocks.{i}.mixer.ssm.dt_bias",
    "backbone.layers.{i}.mixer.norm.weight": "blocks.{i}.mixer.ssm.norm.weight",
}

# What their config.json must have, and what it may have, by types
_SIZES = dict.fromkeys(["vocab_size", "hidden_size", "num_hidden_layers"], int)
_HEADS = _SIZES | dict(num_attention_heads=int, intermediate_size=int, rms_norm_eps=float, max_position_embeddings=int)
_MAY = dict(num_key_value_heads=int, tie_word_embeddings=bool, rope_theta=float)
RELEASED_KEYS = {
    "hymba": (
        _HEADS
        | dict.fromkeys(["mamba_d_state", "mamba_d_conv", "mamba_expand", "num_memory_tokens", "sliding_window"], int)
        | dict(mamba_dt_rank=int | str, global_attn_idx=list, kv_reuse_group=list | types.NoneType, rope_theta=float),
        _MAY | dict(rope_type=str, orig_max_position_embeddings=int),
    ),
    "llama": (_HEADS, _MAY | dict(rope_parameters=dict, rope_scaling=dict)),
    "mamba": (
        _SIZES | dict(state_size=int, conv_kernel=int, expand=int, time_step_rank=int | str, layer_norm_epsilon=float),
        _MAY,
    ),
    "mamba2": (
        _SIZES
        | dict(state_size=int, conv_kernel=int, expand=int, head_dim=int, num_heads=int, n_groups=int)
        | dict(layer_norm_epsilon=float),
        _MAY | dict(time_step_limit=list),
    ),
}

# Stay float32 in a bfloat16 model: what the convolution and the scan multiply and add channel by channel, and what
# chooses experts
FLOAT32 = ("conv_weight", "conv_bias", "dt_bias", "A_log", ".D", "router_proj.weight")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights

# What our own checkpoints called otherwise before: parts of names of parameters, and a field of the configuration
RENAMED = {
    r"mixer\.((conv_weight|conv_bias|x_proj|dt_proj|dt_norm|B_norm|C_norm|dt_bias|A_log|D)\b)": r"mixer.ssm.\1",
    r"mixer\.(attn|ssm)_norm\b": r"mixer.\1_branch_norm",
}
RETIRED = {"kernels"}  # --kernels is a flag of the program now


def current_name(name: str) -> str:
    """Our name today of a tensor in a checkpoint of ours, of any age."""
    for old, new in RENAMED.items():
        name = re.sub(old, new, name)
    return name


def cast(model: Hymba, dtype: torch.dtype) -> Hymba:
    """The model itself with weights in dtype, for inference, but for those named in FLOAT32."""
    for name, p in model.named_parameters():
        if not name.endswith(FLOAT32):
            p.data = p.data.to(dtype)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Configurations


def released_config(c: dict) -> dict:
    """The fields of HymbaConfig, from config.json of a released Hymba, or of transformers' Llama, Mamba or Mamba-2.

    Its keys have the types of RELEASED_KEYS. Raises ValueError for what model.py cannot compute.
    """

    def only(values: dict, **supported) -> None:
        for key, value in supported.items():
            if values.get(key) not in (None, value):
                raise ValueError(f"{key}={brief(values[key])} is not supported, only {value!r}")

    kind, n = c["model_type"], c["num_hidden_layers"]
    if not 1 <= n <= 1000 or c.get("num_attention_heads", 1) < 1:
        raise ValueError(f"num_hidden_layers={n}, num_attention_heads={c.get('num_attention_heads')} is not possible")
    only(c, hidden_act="silu")
    tied = c.get("tie_word_embeddings", kind not in ("llama", "mamba2"))  # transformers' defaults
    common = dict(vocab_size=c["vocab_size"], n_embd=c["hidden_size"], tied=tied)
    if kind in ("mamba", "mamba2"):
        D = c["expand"] * c["hidden_size"]
        only(c, use_bias=False, use_conv_bias=True)
        ssm = dict(ssm=kind, d_state=c["state_size"], d_conv=c["conv_kernel"], expand=c["expand"])
        if kind == "mamba":
            only(c, intermediate_size=D)
            ssm["dt_rank"] = 0 if c["time_step_rank"] == "auto" else c["time_step_rank"]
        else:
            only(c, n_groups=1, num_heads=D // max(c["head_dim"], 1), time_step_limit=[0.0, INFINITY])
            ssm["ssm_head"] = c["head_dim"]
        return dict(pattern="M" * n, n_hidden=0, n_meta=0, norm_eps=c["layer_norm_epsilon"], **common, **ssm)

    heads = c["num_attention_heads"]
    common |= dict(n_head=heads, n_kv_head=c.get("num_key_value_heads") or heads, n_hidden=c["intermediate_size"])
    common |= dict(norm_eps=c["rms_norm_eps"], block_size=c["max_position_embeddings"])
    if kind == "llama":
        only(c, attention_bias=False, mlp_bias=False, head_dim=c["hidden_size"] // heads)
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # transformers 5, and before
        base = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
        if (rope_type := rope.get("rope_type", rope.get("type", "default"))) == "llama3":
            names = dict(rope_orig="original_max_position_embeddings", rope_factor="factor")
            names |= dict(rope_low="low_freq_factor", rope_high="high_freq_factor")
            check_keys(rope, "its rope_scaling", {theirs: int | float for theirs in names.values()})
            common |= {ours: rope[theirs] for ours, theirs in names.items()}
        elif rope_type != "default":
            raise ValueError(f"rope_type={brief(rope_type)} is not supported, only 'default' and 'llama3'")
        return dict(pattern="T" * n, n_meta=0, rope_base=base, **common)

    only(c, rope=True, memory_tokens_interspersed_every=0, mlp_hidden_act="silu")
    ntk = c.get("rope_type") not in (None, "default")
    if ntk:
        only(c, rope_type="ntk")
        check_keys(c, "it", {"orig_max_position_embeddings": int})
        if c["max_position_embeddings"] < c["orig_max_position_embeddings"]:  # the base would shrink
            raise ValueError(
                f"rope_type='ntk' with max_position_embeddings={c['max_position_embeddings']} is not "
                f"supported, only orig_max_position_embeddings={c['orig_max_position_embeddings']} or more"
            )
    common |= dict(d_state=c["mamba_d_state"], d_conv=c["mamba_d_conv"], expand=c["mamba_expand"])
    common |= dict(dt_rank=0 if c["mamba_dt_rank"] == "auto" else c["mamba_dt_rank"], n_meta=c["num_memory_tokens"])
    return dict(
        pattern="".join("H" if i in c["global_attn_idx"] else "h" for i in range(n)),
        window=c["sliding_window"] + 1,  # theirs sees keys up to that far away, ours counts the query itself
        rope_base=c["rope_theta"],
        rope_orig=c["orig_max_position_embeddings"] if ntk else 0,
        kv_share=bool(c["kv_reuse_group"]),
        **common,
    )


def pretrained_folder(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint: name itself, the best or else the last checkpoint in it if it is a run's folder, or
    the download of what huggingface.co calls so (owner/model).

    Without weights, only the small files are downloaded, so that what is wrong with them shows before time is spent.
    Raises FileNotFoundError if name is neither, ConnectionError if it cannot be downloaded, and ValueError with the
    line to install if huggingface_hub is missing.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir() and Path(f"{folder}.old/config.json").is_file():  # where a crash left it
        folder = Path(f"{folder}.old")
    if not folder.is_dir():
        owner_model = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name))
        if not owner_model or folder.parent.exists() or folder.parts[0] == "out":  # a path, by its looks
            raise FileNotFoundError(f"{name} is not a checkpoint: neither a folder nor owner/model on huggingface.co")
        try:
            from huggingface_hub import snapshot_download
        except ImportError:
            message = f"there is no folder {name}; to get it from huggingface.co: pip install huggingface_hub"
            raise ValueError(message) from None
        patterns = ["*.json", "*.jinja"] + ["model*.safetensors"] * weights
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=patterns))
        except (OSError, ValueError) as e:
            reason = " ".join(str(e).split())
            raise ConnectionError(f"there is no folder {name}, nor a download from huggingface.co: {reason}") from None
    if (folder / "config.json").is_file():
        return folder
    for part in ("best", "last", "last.old", "new/last"):  # of a run; the latter two are where a crash leaves it
        if (folder / part / "config.json").is_file():
            return folder / part
    raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.json")


def read_config(folder: Path) -> tuple[str | None, dict, HymbaConfig]:
    """The format of a checkpoint (None: our own), its config.json, and the configuration that it makes.

    Raises ValueError, naming the file and the key.
    """
    file = folder / "config.json"
    config = read_json(file, may={"model_type": str})
    if "model" in config:
        check_keys(config, str(file), {"model": dict})
    elif (kind := config.get("model_type")) in FORMATS:
        check_keys(config, str(file), *RELEASED_KEYS[kind])
    else:
        raise ValueError(f"{file}: model_type={brief(kind)} is not supported, only {', '.join(FORMATS)}")
    try:
        if "model" in config:
            arguments = {k: v for k, v in config["model"].items() if k not in RETIRED}
            if unknown := arguments.keys() - {f.name for f in fields(HymbaConfig)}:
                raise ValueError(f"another version wrote it: unknown keys {', '.join(map(brief, sorted(unknown)[:5]))}")
            return None, config, HymbaConfig(**arguments)
        model = HymbaConfig(**released_config(config))
        if kind == "hymba":
            check_groups(model, config["kv_reuse_group"])
        return kind, config, model
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def layout(model: Hymba, kind: str | None) -> dict[str, dict[str, tuple[int, ...]]]:
    """Where a format (None: our own) keeps each parameter: our name -> {their name: shape}, in order of rows."""
    names, places = {}, {}
    for theirs, ours in FORMATS[kind].items() if kind else ():
        for i in range(model.config.n_layer if "{i}" in theirs else 1):
            names.setdefault(ours.format(i=i), []).append(theirs.format(i=i))
    for ours, p in model.named_parameters():
        theirs = names.get(ours, [ours])
        rows = p.shape[:1]
        if len(theirs) > 1:  # q, k, v
            rows = model.get_submodule(ours.removesuffix(".in_proj.weight")).attn.sizes
        places[ours] = {name: (n, *p.shape[1:]) for name, n in zip(theirs, rows, strict=True)}
        if theirs[0].endswith("conv1d.weight"):
            places[ours] = {theirs[0]: (len(p), 1, p.shape[1])}  # one input channel a group, as PyTorch has it
    return places


def save(model: Hymba, folder: str | Path, **extra) -> None:
    """Write model.safetensors and config.json into folder, each whole or not at all.

    A model that load read from another project's format goes back into that format, the same to the bit as long as
    nothing has changed it; any other has our names and {"model": the configuration, **extra}.
    """
    folder = Path(folder)
    kind, config, dtypes = getattr(model, "source", None) or (None, {"model": asdict(model.config)}, {})
    params, tensors = model.state_dict(), {}
    for ours, theirs in layout(model, kind).items():
        parts = params[ours].split([shape[0] for shape in theirs.values()])
        for (name, shape), part in zip(theirs.items(), parts, strict=True):
            tensors[name] = part.reshape(shape).to(dtypes.get(name, part.dtype)).contiguous()
    if model.config.tied and "lm_head.weight" in dtypes:  # the file had the embedding twice
        tensors["lm_head.weight"] = params["embed.weight"].clone()
    folder.mkdir(parents=True, exist_ok=True)
    new = [folder / "model.safetensors.new", folder / "config.json.new"]
    try:
        write_tensors(tensors, new[0], sign=kind is None)
        new[1].write_text(json.dumps(config | extra, indent=2) + "\n")
        for file in new:
            file.replace(file.with_suffix(""))
    finally:
        for file in new:
            file.unlink(missing_ok=True)


def load(name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Hymba:
    """Load a checkpoint: a folder with config.json and safetensors (one file, or shards and their index), or a model on
    huggingface.co, such as "nvidia/Hymba-1.5B-Base".

    Reads what save (and so train.py) writes, released Hymba weights, and transformers' Llama, Mamba and Mamba-2.
    Parameters get dtype, or keep the file's if it is None; those in FLOAT32 are float32 at least. On a CPU they stay
    where the file is mapped into memory as long as neither dtype nor rows change: no second copy.

    Raises FileNotFoundError for a missing file, ConnectionError for a failed download, ValueError for a config.json
    that model.py cannot compute and for tensors that do not fit it, naming each missing, unexpected or misshapen.
    """
    folder = pretrained_folder(name, weights=False)
    kind, config, settings = read_config(folder)
    with torch.device("meta"):
        model = Hymba(settings)
    tensors = read_weights(pretrained_folder(name))
    if kind is None:
        tensors = {current_name(name): t for name, t in tensors.items()}
    fill(model, tensors, folder, kind, config, dtype, device)
    return model.requires_grad_()


def check_groups(config: HymbaConfig, given: list[list[int]] | None) -> None:
    """Raise ValueError if blocks share keys and values in other groups than ours."""
    owner = config.kv_owner
    groups = [group for i in range(len(owner)) if len(group := [j for j, o in enumerate(owner) if o == i]) > 1]
    if not all(group in groups for group in given or []) or len(given or []) != len(groups):
        raise ValueError(f"kv_reuse_group={brief(given)} is not supported, only {groups}")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by their names in its files."""
    tensors, files = {}, [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        names = set(map(str, read_json(index, {"weight_map": dict})["weight_map"].values()))
        if outside := [name for name in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name)]:
            raise ValueError(f"{index} is corrupt: {brief(outside[0])} is no file of this folder")
        files = [folder / name for name in sorted(names)]
    for file in files:
        new = read_tensors(file)
        if twice := sorted(tensors.keys() & new.keys()):
            raise ValueError(f"{file} is corrupt: another file of {folder} has {', '.join(twice)}, too")
        tensors |= new
    return tensors


def misfits(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Tensors that are missing, unexpected or of another shape, in words."""
    wrong = [f"missing {name}" for name in shapes if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in shapes]
    wrong += [f"{name} of shape {tuple(t.shape)}, not {tuple(shapes[name])}" for name, t in tensors.items()
              if name in shapes and t.shape != shapes[name]]  # fmt: skip
    return wrong[:16] + [f"and {len(wrong) - 16} more"] * (len(wrong) > 16)


def fill(
    model: Hymba, tensors: dict[str, torch.Tensor], folder: Path, kind: str | None, config: dict,
    dtype: torch.dtype | None, device: str | torch.device,
) -> None:  # fmt: skip
    """Put the tensors of a checkpoint of format kind into a model on the meta device."""
    places, dtypes = layout(model, kind), {}
    shapes = {name: shape for theirs in places.values() for name, shape in theirs.items()}
    if kind and model.config.tied and "lm_head.weight" in tensors:
        (embed,) = places["embed.weight"]
        shapes["lm_head.weight"] = shapes[embed]
        dtypes["lm_head.weight"] = tensors["lm_head.weight"].dtype
    wrong = misfits(tensors, shapes)
    wrong += [f"{name} of {t.dtype}: quantised weights are not supported" for name, t in tensors.items()
              if name in shapes and t.dtype not in DTYPES][:4]  # fmt: skip
    matrices = [name for ours in places if ours.endswith(("proj.weight", "embed.weight")) for name in places[ours]]
    if not wrong and dtype is None and len(kinds := {str(tensors[name].dtype)[6:] for name in matrices}) > 1:
        wrong = [f"matrices of {' and '.join(sorted(kinds))}: give one dtype, such as sample.py --dtype=float32"]
    if not wrong and dtypes and not torch.equal(tensors["lm_head.weight"], tensors[embed]):
        wrong = [f"lm_head.weight differs from {embed} despite tie_word_embeddings"]
    if wrong:
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {', '.join(wrong)}")

    state = {}
    for ours, p in model.named_parameters():
        parts = [tensors[name] for name in places[ours]]
        new = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(p.shape)
        wanted = dtype or new.dtype
        if ours.endswith(FLOAT32):
            dtypes |= dict.fromkeys(places[ours], wanted)  # save_pretrained goes back to these
            wanted = torch.promote_types(wanted, torch.float32)
        state[ours] = new.to(device, wanted)
    model.load_state_dict(state, assign=True)
    model.source = (kind, config, dtypes) if kind else None


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints of training


def save_training(folder: Path, model: Hymba, optimizer, extra: dict, tokenizer: bytes | None) -> None:
    """Write a checkpoint beside folder and rename it into place: wherever this stops, a whole one is left.

    tokenizer: the data set's tokenizer.tiktoken, if it has one.
    """
    with replacing(folder) as new:
        if tokenizer is not None:
            (new / "tokenizer.tiktoken").write_bytes(tokenizer)
            extra = extra | {"tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest()}
        save(model, new, **extra)
        if optimizer is not None:
            names = {p: name for name, p in model.named_parameters()}
            state = {f"{names[p]}.{k}": v for p, s in optimizer.state.items() for k, v in s.items()}
            write_tensors(state, new / "optimizer.safetensors")


# What config.json of a checkpoint of training has, and what those of older versions may lack
TRAINING_KEYS = {"step": int, "train": dict, "tokenizer": str}
LATER_KEYS = {"best_val_loss": float, "threads": int, "processes": int, "device": str, "data": dict}


def read_training(folder: Path) -> dict:
    """config.json of a checkpoint of training. Raises ValueError if there is none to resume, or if it is corrupt."""
    if folder.with_name(folder.name + ".old").exists():  # the machine stopped between two renames
        recover(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"nothing to resume: {folder} holds no checkpoint; leave --resume out to start one")
    extra = read_json(folder / "config.json", TRAINING_KEYS, LATER_KEYS)
    if not 1 <= extra["step"] < 2**31 or not 0 <= (extra.get("threads") or 0) <= 1024:
        raise ValueError(f"{folder / 'config.json'}: step={extra['step']}, threads={extra.get('threads')} cannot be")
    return extra


def load_training(folder: Path, model: Hymba, optimizer, step: int) -> None:
    """Load weights and the optimizer's state in place. Raises ValueError for a checkpoint of another architecture, and
    for an optimizer file that does not fit, or is of another step."""
    mine, theirs = asdict(model.config), asdict(read_config(folder)[2])
    differ = [k for k in mine if mine[k] != theirs[k] and k != "block_size"]
    if differ:
        changes = ", ".join(f"{k}={theirs[k]!r} there and {mine[k]!r} here" for k in differ)
        raise ValueError(f"{folder} is a checkpoint of another architecture: {changes}")
    weights, file = load(folder).state_dict(), folder / "optimizer.safetensors"
    state = {current_name(name): t for name, t in read_tensors(file).items()}
    shapes = {}
    for name, p in model.named_parameters():
        shapes |= {f"{name}.step": (), f"{name}.exp_avg": p.shape, f"{name}.exp_avg_sq": p.shape}
    wrong = misfits(state, shapes) + [f"{k} of {t.dtype}" for k, t in state.items() if t.dtype != torch.float32][:4]
    if wrong := wrong or [f"{k} is not finite" for k, t in state.items() if not t.isfinite().all()][:4]:
        raise ValueError(f"{file} does not fit the model: {', '.join(wrong)}")
    if other := [t.item() for name, t in state.items() if name.endswith(".step") and t != step]:
        raise ValueError(f"{file} is not of this checkpoint: it is of step {other[0]:g}, and config.json of {step}")
    model.load_state_dict(weights)
    for name, p in model.named_parameters():  # copies: the file is mapped, and about to be replaced
        s = {k: state[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {k: v.to(p.device if k != "step" or p.is_cuda else "cpu", copy=True) for k, v in s.items()}
