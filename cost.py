"""
What a model costs: bytes of its cache, floating-point operations of a token, and the share of a GPU's peak that
training reaches. model.num_params() counts its parameters. Letters are the ones of model.py.
"""

import math

import torch

from model import Hymba, HymbaConfig

# Dense bf16 peak of a GPU by words of the name it reports, FLOP/s (vendors' data sheets, without sparsity)
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "A10": 125e12, "4090": 165e12, "3090": 71e12}  # fmt: skip


def cache_bytes(config: HymbaConfig, n_tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the cache of one sequence with room for n_tokens (meta tokens not counted): what engine.Cache holds.

    Attention keeps E + F numbers for each key/value head and slot, in blocks that own keys and values. SSM heads keep
    the last K - 1 inputs of the convolution (in Mamba-2, of B and C, too), and their state in float32.
    """
    c, total = config, 0
    for i, letter in enumerate(c.pattern):
        if c.kv_owner[i] == i:
            slots = c.n_meta + (c.window if letter in "th" else n_tokens)
            total += slots * c.n_kv_head * (c.head_size + c.value_size(letter)) * dtype.itemsize
        if letter in "MHh":
            tail, state = c.ssm_cache(letter)
            total += math.prod(tail) * dtype.itemsize + math.prod(state) * 4
    return total


def flops_per_token(model: Hymba, n_tokens: int | None = None, training: bool = True) -> float:
    """Floating-point operations per text token, a multiply-add counted as two.

    Forward: 2 for each weight of a matrix (the output layer's, too), 2 H (E + F) for each key that attention sees,
    7 D N for the scan (dt A, exp, decay h, dt x B, +, and C . h), 2 K D for the convolution. Mamba-2: 5 D N (one decay
    a head), and 2 K (D + 2 N). That is the recurrence; the products by which it runs in chunks are more.
    Training: three times the forward pass (backward is two), averaged over n_tokens (block_size if None), the
    meta tokens' work included. Inference (training=False): one token's forward pass after n_tokens others.
    """
    c, T = model.config, model.config.block_size if n_tokens is None else n_tokens
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    last = c.n_meta + T  # position of the token in inference; in training, how many there are
    p = torch.arange(last, dtype=torch.float64) if training else torch.tensor([last], dtype=torch.float64)
    flops = 2.0 * matrices * len(p)
    for letter in c.pattern:
        if letter != "M":
            seen = p + 1
            if letter in "th":  # the window, and the meta tokens to the left of it
                seen = seen.clamp(max=c.window) + (seen - c.window).clamp(0, c.n_meta)
            flops += 2 * c.n_head * (c.head_size + c.value_size(letter)) * seen.sum().item()
        if letter in "MHh":
            tail, state = c.ssm_cache(letter)
            scan = (7 if c.ssm == "mamba" else 5) * math.prod(state)
            flops += (scan + 2 * c.d_conv * tail[1]) * len(p)
    output = 2 * model.output.numel()  # text tokens only
    return 3 * (flops / T + output) if training else flops + output


def estimate_mfu(model: Hymba, tokens_per_second: float) -> float | None:
    """Model FLOPs utilisation in training: the share of the GPU's bf16 peak that flops_per_token explains.

    None on a device whose peak is not in PEAK_FLOPS (CPUs among them).
    """
    name = torch.cuda.get_device_name().replace("-", " ") if model.embed.weight.is_cuda else ""
    peak = next((peak for gpu, peak in PEAK_FLOPS.items() if set(gpu.split()) <= set(name.split())), None)
    return peak and flops_per_token(model) * tokens_per_second / peak
