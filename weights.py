"""
Checkpoints: ours, and those that others release. Hymba.from_pretrained and Hymba.save_pretrained do their work here.

Each foreign format is one table of names (FORMATS) and a few lines that read its config.json (released_config).
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# By config.json's model_type: their tensor -> our parameter. Tensors that share one are its rows, in this order.
FORMATS = {
    "hymba": {
        "model.embed_tokens.weight": "embed.weight",
        "model.memory_tokens": "meta",
        "model.layers.{i}.input_layernorm.weight": "blocks.{i}.mixer_norm.weight",
        "model.layers.{i}.mamba.in_proj.weight": "blocks.{i}.mixer.in_proj.weight",
        "model.layers.{i}.mamba.conv1d.weight": "blocks.{i}.mixer.conv_weight",
        "model.layers.{i}.mamba.conv1d.bias": "blocks.{i}.mixer.conv_bias",
        "model.layers.{i}.mamba.x_proj.0.weight": "blocks.{i}.mixer.x_proj.weight",
        "model.layers.{i}.mamba.dt_layernorm.weight": "blocks.{i}.mixer.dt_norm.weight",
        "model.layers.{i}.mamba.B_layernorm.weight": "blocks.{i}.mixer.B_norm.weight",
        "model.layers.{i}.mamba.C_layernorm.weight": "blocks.{i}.mixer.C_norm.weight",
        "model.layers.{i}.mamba.dt_proj.0.weight": "blocks.{i}.mixer.dt_proj.weight",
        "model.layers.{i}.mamba.dt_proj.0.bias": "blocks.{i}.mixer.dt_bias",
        "model.layers.{i}.mamba.A_log.0": "blocks.{i}.mixer.A_log",
        "model.layers.{i}.mamba.D.0": "blocks.{i}.mixer.D",
        "model.layers.{i}.mamba.pre_avg_layernorm1.weight": "blocks.{i}.mixer.attn_norm.weight",
        "model.layers.{i}.mamba.pre_avg_layernorm2.weight": "blocks.{i}.mixer.ssm_norm.weight",
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
        "backbone.layers.{i}.mixer.conv1d.weight": "blocks.{i}.mixer.conv_weight",
        "backbone.layers.{i}.mixer.conv1d.bias": "blocks.{i}.mixer.conv_bias",
        "backbone.layers.{i}.mixer.x_proj.weight": "blocks.{i}.mixer.x_proj.weight",
        "backbone.layers.{i}.mixer.dt_proj.weight": "blocks.{i}.mixer.dt_proj.weight",
        "backbone.layers.{i}.mixer.dt_proj.bias": "blocks.{i}.mixer.dt_bias",
        "backbone.layers.{i}.mixer.A_log": "blocks.{i}.mixer.A_log",
        "backbone.layers.{i}.mixer.D": "blocks.{i}.mixer.D",
        "backbone.layers.{i}.mixer.out_proj.weight": "blocks.{i}.mixer.out_proj.weight",
        "backbone.norm_f.weight": "norm.weight",
        "lm_head.weight": "lm_head",
    },
}

# Stay float32 in a bfloat16 model: what the convolution and the scan multiply and add channel by channel
FLOAT32 = ("conv_weight", "conv_bias", "dt_bias", "A_log", ".D")


def released_config(c: dict) -> dict:
    """The fields of HymbaConfig for a released Hymba, or a Llama or Mamba of transformers, from its config.json.

    Raises ValueError for what model.py cannot compute, KeyError or TypeError for what config.json should have.
    """

    def only(values: dict, **supported) -> None:
        for key, value in supported.items():
            if values.get(key) not in (None, value):
                raise ValueError(f"config.json: {key}={values[key]!r} is not supported, only {value!r}")

    kind, n = c["model_type"], c["num_hidden_layers"]
    only(c, hidden_act="silu")
    tied = c.get("tie_word_embeddings", kind != "llama")  # transformers' defaults
    common = dict(vocab_size=c["vocab_size"], n_embd=c["hidden_size"], tied=tied)
    if kind == "mamba":
        only(c, use_bias=False, use_conv_bias=True, intermediate_size=c["expand"] * c["hidden_size"])
        ssm = dict(d_state=c["state_size"], d_conv=c["conv_kernel"], expand=c["expand"])
        ssm["dt_rank"] = 0 if c["time_step_rank"] == "auto" else c["time_step_rank"]
        return dict(pattern="M" * n, n_hidden=0, n_meta=0, norm_eps=c["layer_norm_epsilon"], **common, **ssm)

    heads = c["num_attention_heads"]
    common |= dict(n_head=heads, n_kv_head=c.get("num_key_value_heads") or heads, n_hidden=c["intermediate_size"])
    common |= dict(norm_eps=c["rms_norm_eps"], block_size=c["max_position_embeddings"])
    if kind == "llama":
        only(c, attention_bias=False, mlp_bias=False, head_dim=c["hidden_size"] // heads)
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # transformers 5, and before
        base = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
        if (rope_type := rope.get("rope_type", rope.get("type", "default"))) == "llama3":
            common |= dict(rope_orig=rope["original_max_position_embeddings"], rope_factor=rope["factor"])
            common |= dict(rope_low=rope["low_freq_factor"], rope_high=rope["high_freq_factor"])
        elif rope_type != "default":
            raise ValueError(f"config.json: rope_type={rope_type!r} is not supported, only 'default' and 'llama3'")
        return dict(pattern="T" * n, n_meta=0, rope_base=base, **common)

    only(c, rope_type="ntk", mlp_hidden_act="silu")
    common |= dict(d_state=c["mamba_d_state"], d_conv=c["mamba_d_conv"], expand=c["mamba_expand"])
    common |= dict(dt_rank=0 if c["mamba_dt_rank"] == "auto" else c["mamba_dt_rank"], n_meta=c["num_memory_tokens"])
    return dict(
        pattern="".join("H" if i in c["global_attn_idx"] else "h" for i in range(n)),
        window=c["sliding_window"] + 1,  # theirs sees keys up to that far away, ours counts the query itself
        rope_base=c["rope_theta"],
        rope_orig=c["orig_max_position_embeddings"] if c.get("rope_type") else 0,
        kv_share=bool(c["kv_reuse_group"]),
        **common,
    )


def pretrained_folder(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint: name itself, or the download of what huggingface.co calls so (owner/model).

    Without weights, only the small files are downloaded, so that what is wrong with them shows before time is spent.
    Raises FileNotFoundError if name is neither, ConnectionError if it cannot be downloaded, and ValueError with the
    line to install if huggingface_hub is missing.
    """
    folder = Path(name)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
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
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.json")
    return folder


def read_config(folder: Path) -> tuple[str | None, dict, dict]:
    """The format of a checkpoint (None: our own), its config.json, and the fields of HymbaConfig that it makes."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        if "model" in config:
            return None, config, {**config["model"]}
        if (kind := config.get("model_type")) not in FORMATS:
            raise ValueError(f"config.json: model_type={kind!r} is not supported, only {', '.join(FORMATS)}")
        return kind, config, released_config(config)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file} describes no model: {type(e).__name__}: {e}") from None


def layout(model, kind: str | None) -> dict[str, dict[str, tuple[int, ...]]]:
    """Where a format (None: our own) keeps each parameter: our name -> {their name: shape}, in order of rows."""
    names, places = {}, {}
    for theirs, ours in FORMATS[kind].items() if kind else ():
        for i in range(model.config.n_layer if "{i}" in theirs else 1):
            names.setdefault(ours.format(i=i), []).append(theirs.format(i=i))
    for ours, p in model.named_parameters():
        theirs = names.get(ours, [ours])
        rows = model.get_submodule(ours.removesuffix(".in_proj.weight")).sizes if len(theirs) > 1 else p.shape[:1]
        places[ours] = {name: (n, *p.shape[1:]) for name, n in zip(theirs, rows, strict=True)}
        if theirs[0].endswith("conv1d.weight"):
            places[ours] = {theirs[0]: (len(p), 1, p.shape[1])}  # one input channel a group, as PyTorch has it
    return places


def save(model, folder: Path, extra: dict) -> None:
    """See Hymba.save_pretrained."""
    kind, config, dtypes = model.source or (None, {"model": asdict(model.config)}, {})
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
        save_file(tensors, new[0], metadata={"format": "pt"})  # transformers wants to know
        new[1].write_text(json.dumps(config | extra, indent=2) + "\n")
        for file in new:
            file.replace(file.with_suffix(""))
    finally:
        for file in new:
            file.unlink(missing_ok=True)


def load(
    model, name: str | Path, kind: str | None, config: dict, dtype: torch.dtype | None, device: str | torch.device
) -> None:
    """Fill a model on the meta device from the checkpoint called name. See Hymba.from_pretrained."""
    if kind == "hymba":
        owner = model.config.kv_owner
        groups = [group for i in range(len(owner)) if len(group := [j for j, o in enumerate(owner) if o == i]) > 1]
        if groups != sorted(config["kv_reuse_group"] or []):
            given = config["kv_reuse_group"]
            raise ValueError(f"config.json: kv_reuse_group={given} is not supported, only {groups}")
    folder = pretrained_folder(name)
    tensors, files = {}, [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        try:
            files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"{index} is corrupt: {type(e).__name__}: {e}") from None
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is not a whole checkpoint: it has no {file.name}")
        try:
            new = load_file(file)  # mapped: nothing is read before it is used
        except SafetensorError as e:
            raise ValueError(f"{file} is corrupt: {e}") from None
        if twice := sorted(tensors.keys() & new.keys()):
            raise ValueError(f"{file} is corrupt: another file of {folder} has {', '.join(twice)}, too")
        tensors |= new

    places, dtypes = layout(model, kind), {}
    shapes = {name: shape for theirs in places.values() for name, shape in theirs.items()}
    if kind and model.config.tied and "lm_head.weight" in tensors:
        (embed,) = places["embed.weight"]
        shapes["lm_head.weight"] = shapes[embed]
        dtypes["lm_head.weight"] = tensors["lm_head.weight"].dtype
    wrong = [f"missing {name}" for name in shapes if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in shapes]
    wrong += [f"{name} of shape {tuple(t.shape)}, not {shapes[name]}" for name, t in tensors.items()
              if name in shapes and t.shape != shapes[name]]  # fmt: skip
    wrong += [f"{name} of {t.dtype}: quantised weights are not supported" for name, t in tensors.items()
              if name in shapes and not t.is_floating_point()]  # fmt: skip
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
