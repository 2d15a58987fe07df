"""What released checkpoints look like: small ones with random weights, worked out from the formats' descriptions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HYMBA_JSON = dict(model_type="hymba", vocab_size=67, hidden_size=32, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=40, mamba_d_state=4, mamba_d_conv=3, mamba_expand=2, mamba_dt_rank=2,
    num_memory_tokens=5, sliding_window=6, global_attn_idx=[0, 3, 7], kv_reuse_group=[[1, 2], [4, 5, 6]],
    rope_theta=10000.0, rope_type="ntk", orig_max_position_embeddings=16, max_position_embeddings=64,
    rms_norm_eps=1e-6, tie_word_embeddings=True, hidden_act="silu")  # fmt: skip
LLAMA_JSON = dict(model_type="llama", vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=5e5,
    tie_word_embeddings=False, attention_bias=False)  # fmt: skip
MAMBA_JSON = dict(model_type="mamba", vocab_size=67, hidden_size=32, num_hidden_layers=2, state_size=4, expand=2,
    conv_kernel=5, time_step_rank=2, intermediate_size=64, use_bias=False, layer_norm_epsilon=1e-5)  # fmt: skip
MAMBA2_JSON = dict(model_type="mamba2", vocab_size=67, hidden_size=32, num_hidden_layers=2, state_size=4, expand=2,
    conv_kernel=3, head_dim=16, num_heads=4, n_groups=1, use_bias=False, layer_norm_epsilon=1e-5,
    tie_word_embeddings=True)  # fmt: skip
RELEASED = {"hymba": HYMBA_JSON, "llama": LLAMA_JSON, "mamba": MAMBA_JSON, "mamba2": MAMBA2_JSON}
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}{% endif %}
<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}"""  # trim_blocks and lstrip_blocks make one line of it
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]


def released_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a released checkpoint, worked out from config.json by hand."""
    V, C, n = c["vocab_size"], c["hidden_size"], c["num_hidden_layers"]
    layers = [f"model.layers.{i}." for i in range(n)]
    if c["model_type"] == "mamba":
        D, N, R, K = c["intermediate_size"], c["state_size"], c["time_step_rank"], c["conv_kernel"]
        shapes = {"backbone.embeddings.weight": (V, C), "backbone.norm_f.weight": (C,)}
        for p in (f"backbone.layers.{i}." for i in range(n)):
            shapes |= {p + "norm.weight": (C,), p + "mixer.in_proj.weight": (2 * D, C), p + "mixer.D": (D,)}
            shapes |= {p + "mixer.conv1d.weight": (D, 1, K), p + "mixer.conv1d.bias": (D,), p + "mixer.A_log": (D, N)}
            shapes |= {p + "mixer.x_proj.weight": (R + 2 * N, D), p + "mixer.dt_proj.weight": (D, R)}
            shapes |= {p + "mixer.dt_proj.bias": (D,), p + "mixer.out_proj.weight": (C, D)}
        return shapes
    if c["model_type"] == "mamba2":
        J, P, N, K = c["num_heads"], c["head_dim"], c["state_size"], c["conv_kernel"]
        D, shapes = J * P, {"backbone.embeddings.weight": (V, C), "backbone.norm_f.weight": (C,)}
        for p in (f"backbone.layers.{i}." for i in range(n)):
            shapes |= {p + "norm.weight": (C,), p + "mixer.in_proj.weight": (2 * D + 2 * N + J, C)}
            shapes |= {p + "mixer.conv1d.weight": (D + 2 * N, 1, K), p + "mixer.conv1d.bias": (D + 2 * N,)}
            shapes |= {p + f"mixer.{name}": (J,) for name in ("dt_bias", "A_log", "D")}
            shapes |= {p + "mixer.norm.weight": (D,), p + "mixer.out_proj.weight": (C, D)}
        return shapes
    H, G, I = c["num_attention_heads"], c["num_key_value_heads"], c["intermediate_size"]  # noqa: E741
    E, shapes = C // H, {"model.embed_tokens.weight": (V, C)}
    if c["model_type"] == "llama":
        shapes |= {"model.norm.weight": (C,)} | ({} if c["tie_word_embeddings"] else {"lm_head.weight": (V, C)})
        for p in layers:
            shapes |= {p + "input_layernorm.weight": (C,), p + "post_attention_layernorm.weight": (C,)}
            shapes |= {p + f"self_attn.{m}_proj.weight": (h * E, C) for m, h in [("q", H), ("k", G), ("v", G)]}
            shapes |= {p + "self_attn.o_proj.weight": (C, H * E), p + "mlp.down_proj.weight": (C, I)}
            shapes |= {p + f"mlp.{m}_proj.weight": (I, C) for m in ("gate", "up")}
        return shapes
    D, N, R, K = c["mamba_expand"] * C, c["mamba_d_state"], c["mamba_dt_rank"], c["mamba_d_conv"]
    shapes |= {"model.memory_tokens": (c["num_memory_tokens"], C), "model.final_layernorm.weight": (C,)}
    shared = {i for group in c["kv_reuse_group"] for i in group[1:]}
    for i, p in enumerate(layers):
        kv = 0 if i in shared else G * E + G * (D // H)
        shapes |= {p + "input_layernorm.weight": (C,), p + "pre_moe_layernorm.weight": (C,)}
        shapes |= {p + "mamba.in_proj.weight": (H * E + kv + 2 * D, C), p + "mamba.out_proj.weight": (C, D)}
        shapes |= {p + "mamba.conv1d.weight": (D, 1, K), p + "mamba.conv1d.bias": (D,), p + "mamba.D.0": (D,)}
        shapes |= {p + "mamba.x_proj.0.weight": (R + 2 * N, D), p + "mamba.dt_layernorm.weight": (R,)}
        shapes |= {p + "mamba.B_layernorm.weight": (N,), p + "mamba.C_layernorm.weight": (N,)}
        shapes |= {p + "mamba.dt_proj.0.weight": (D, R), p + "mamba.dt_proj.0.bias": (D,), p + "mamba.A_log.0": (D, N)}
        shapes |= {p + "mamba.pre_avg_layernorm1.weight": (D,), p + "mamba.pre_avg_layernorm2.weight": (D,)}
        shapes |= {p + f"moe.experts.0.{m}_proj.weight": (I, C) for m in ("gate", "up")}
        shapes |= {p + "moe.experts.0.down_proj.weight": (C, I)}
    return shapes


def write_released(folder: Path, c: dict, shards: int = 1, dtype=torch.float32, **changed) -> dict[str, torch.Tensor]:
    """A random checkpoint for config.json c; in changed, a tensor by its name, or None to leave it out."""
    g = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape, generator=g) * 0.2 + (len(shape) == 1 and "bias" not in name)).to(dtype)
               for name, shape in released_shapes(c).items()}  # fmt: skip
    tensors = {name: t for name, t in (tensors | changed).items() if t is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(tensors)}  # a block's tensors in several files
    for file in files:
        save_file({name: t for name, t in tensors.items() if where[name] == file}, folder / file, {"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def write_chat_tokenizer(folder: Path, merges: int = 0, **settings) -> Path:
    """A released model's tokenizer of ASCII letters and so many merges, with a chat template, and without weights."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -r requirements-dev.txt")
    pytest.importorskip("jinja2", reason="pip install -r requirements-dev.txt")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.decoder = tokenizers.decoders.Fuse()
    size = len(SPECIAL) + 27 + merges
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    letters = "abcdefghijklmnopqrstuvwxyz "
    tokenizer.train_from_iterator([a + b for a in letters for b in letters], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)  # of some batch in its training, not of ours
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "config.json").write_text(json.dumps(HYMBA_JSON | {"vocab_size": size, "eos_token_id": 3}))
    return folder


def write_chat_model(folder: Path, merges: int = 0, **settings) -> Path:
    """A random released Hymba with that tokenizer."""
    write_chat_tokenizer(folder, merges, **settings)
    config = (folder / "config.json").read_text()
    write_released(folder, json.loads(config))
    return folder


BAD_TEMPLATES = [
    (None, "has no chat template, so it was not trained to chat: use --prompt"),
    ([{"name": "tool_use", "template": "x"}], "has no chat template"),
    ("{% for %}", "the chat template of .*: Expected"),
    ("{{ raise_exception('only French') }}", "the chat template of .*: only French"),
    ("{{ messages.append(1) }}", "the chat template of .*: "),  # the sandbox
    ("{{ ''.__class__.__mro__ }}", "the chat template of .*: "),
]
