"""
What a model costs: parameters, bytes of its cache, floating-point operations of a token, and the share of a GPU's peak
that training reaches. Letters are the ones of model.py.

    python cost.py                            # every system of config/ at four sizes, and beside the papers' figures
    python cost.py --match=flops --sizes=1b   # systems as expensive in training as Hymba, not as large
"""

import math
from pathlib import Path

import torch

from flags import Parser, parse, run
from hybrids import hybrid_pattern
from model import Experts, Hymba, HymbaConfig

# Dense bf16 peak of a GPU by words of the name it reports, FLOP/s (vendors' data sheets, without sparsity)
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "A10": 125e12, "4090": 165e12, "3090": 71e12}  # fmt: skip


def active_params(model: Hymba) -> int:
    """Parameters that work on one token: all of them, but of the experts only n_expert_active."""
    c, experts = model.config, [m for m in model.modules() if isinstance(m, Experts)]
    every = sum(p.numel() for m in experts for p in m.parameters(recurse=False))
    return model.num_params() - every + every * c.n_expert_active // max(c.n_expert, 1)


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

    Forward: 2 for each weight of a matrix (of experts, the active ones; the output layer's, too), 2 H (E + F) for each
    key that attention sees, 7 D N for the scan (dt A, exp, decay h, dt x B, +, and C . h), 2 K D for the convolution.
    Mamba-2: 5 D N (one decay a head), and 2 K (D + 2 N). That is the recurrence; the products by which it runs in
    chunks are more.
    Training: three times the forward pass (backward is two), averaged over n_tokens (block_size if None), the
    meta tokens' work included. Inference (training=False): one token's forward pass after n_tokens others.
    """
    c, T = model.config, model.config.block_size if n_tokens is None else n_tokens
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    matrices += sum(m.gate_proj[0].numel() * 3 * m.k for m in model.modules() if isinstance(m, Experts))
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


# ----------------------------------------------------------------------------------------------------------------------
# The table: every system of config/ at other sizes, matched to Hymba

SIZES = {  # Hymba's; 1b has the width and depth of Llama-3.2-1B and Bae et al.'s larger models
    "125m": dict(n_layer=24, n_embd=512, n_head=8, n_kv_head=4, n_hidden=1664),
    "350m": dict(n_layer=32, n_embd=768, n_head=12, n_kv_head=4, n_hidden=2432),
    "1b": dict(n_layer=16, n_embd=2048, n_head=32, n_kv_head=8, n_hidden=4608),
    "1.5b": dict(n_layer=32, n_embd=1600, n_head=25, n_kv_head=5, n_hidden=5504),
}
CONTEXTS = {"1k": 2**10, "8k": 2**13, "64k": 2**16, "1M": 2**20}


def meta_model(fields: dict) -> Hymba:
    with torch.device("meta"):
        return Hymba(HymbaConfig(**fields))


def solve(fields: dict, measure, target: float, step: int = 16) -> dict:
    """fields with n_hidden (a multiple of step), or without feed-forwards with as many blocks of the pattern's letter,
    such that measure(model) is nearest to target. Both are linear in what is changed, so two models tell."""
    make = lambda n: fields | {"n_hidden": n}  # noqa: E731
    if not fields["n_hidden"]:
        step, make = 1, lambda n: fields | {"n_layer": n, "pattern": fields["pattern"][0] * n}  # noqa: E731
    a, b = (measure(meta_model(make(n))) for n in (step, 2 * step))
    n = 1 + round((target - a) / (b - a))
    if n < 1:
        raise ValueError(f"{fields}: too large without any feed-forward")
    return make(n * step)


def at_size(file: Path, size: dict) -> dict:
    """The fields of a config file's system with other sizes. Attention keeps its share of the width."""
    cfg, args = parse([str(file)])
    old, n = HymbaConfig(**args), size["n_layer"]
    pattern = old.pattern[0] * n if len(set(old.pattern)) == 1 else ""  # none: Hymba's own
    pattern = hybrid_pattern(cfg.hybrid, n) if cfg.hybrid else pattern
    fields = args | size | dict(vocab_size=32001, pattern=pattern, n_hidden=size["n_hidden"] if old.n_hidden else 0)
    if "head_size" in args:
        fields["head_size"] = size["n_embd"] // size["n_head"]
        share = old.n_head * old.head_size / old.n_embd  # of the width; n_head stays a multiple of n_kv_head
        fields["n_kv_head"] = max(1, round(share * size["n_kv_head"]))
        fields["n_head"] = fields["n_kv_head"] * (size["n_head"] // size["n_kv_head"])
    return fields


def systems(size: str, match: str) -> list[dict]:
    """A row for each system, matched to Hymba in (active) parameters or in the FLOPs of training on 8,192 tokens."""
    measure = {"params": active_params, "flops": lambda model: flops_per_token(model, 8192)}[match]
    hymba, folder = SIZES[size] | dict(vocab_size=32001), Path(__file__).parent / "config"
    target, rows = measure(meta_model(hymba)), []
    for file in [folder / "hymba_125m.py", *sorted((folder / "systems").glob("*.py"))]:
        model = meta_model(solve(at_size(file, SIZES[size]), measure, target))
        c, n, active = model.config, model.num_params(), active_params(model)
        row = {"system": file.stem.removesuffix("_125m"), "blocks": c.n_layer, "n_hidden": c.n_hidden}
        row |= {"params M": f"{n / 1e6:,.1f}", "active M": f"{active / 1e6:,.1f}"}
        row |= {"train MFLOP": f"{flops_per_token(model, 8192) / 1e6:,.0f}"}
        row |= {"infer MFLOP": f"{flops_per_token(model, 8192, training=False) / 1e6:,.0f}"}
        rows.append(row | {f"cache {k}": f"{cache_bytes(c, n) / 2**20:,.1f}" for k, n in CONTEXTS.items()})
    return rows


BAE = dict(n_embd=2048, n_head=32, n_kv_head=8, n_hidden=8192, n_meta=0, vocab_size=128256, ssm="mamba2", d_state=128)
PAPERS = {  # fields, and the paper's MiB of cache and FLOPs of training over a Transformer's (Bae et al., Tables 1, 2)
    "Hymba-1.5B": (SIZES["1.5b"], 79, None),
    "Transformer 1B": (BAE | dict(pattern="T" * 16), 256.0, 1.0),
    "SWA 1B": (BAE | dict(pattern="t" * 16, window=1024 + 64, kv_share=False), 34.0, 11.8 / 13.7),
    "Mamba 1B": (BAE | dict(pattern="M" * 13), 13.4, 11.6 / 13.7),
    "inter-layer 1B, 1:5": (BAE | dict(pattern=hybrid_pattern("inter:1:5:spread", 13)), 52.2, 12.0 / 13.7),
    "intra-layer 1B, 1:5": (BAE | dict(pattern=hybrid_pattern("intra:1:5:spread", 13)), 63.6, 12.3 / 13.7),
}
NOTE = """Caches count as the papers do: 2-byte states, all K columns of the convolution (ours: 4 bytes, K - 1).
Bae et al.'s window must be 1,024 tokens and 64 more, and their Mamba 13 blocks: 34.0 and 13.4 MiB say so. What cannot
be derived: the caches of their two hybrids (with 2 attention blocks of 13 they are less, with 3 more); their parameters
and FLOPs of a block (10.1M and 134.2B of a Transformer's); the unit of their training FLOPs, so only ratios stand here;
and the caches in Hymba's Table 10 (414.72 MB of its Llama), which does not give sizes, but for its Mamba's 1.87 MB."""


def papers() -> list[dict]:
    """The papers' figures at 8,192 tokens, beside ours."""
    rows, models = [], {name: meta_model(fields) for name, (fields, _, _) in PAPERS.items()}
    base = flops_per_token(models["Transformer 1B"], 8192)
    for name, (_, cache, ratio) in PAPERS.items():
        c = models[name].config
        kept = [c.ssm_cache(letter) for letter in c.pattern if letter in "MHh"]
        mine = (cache_bytes(c, 8192) + sum(2 * (tail[1] - math.prod(state)) for tail, state in kept)) / 2**20
        row = {"system": name, "params M": f"{models[name].num_params() / 1e6:,.0f}"}
        row |= {"cache MiB": f"{mine:.1f}", "the paper's": f"{cache}"}
        relative = ratio and f"{flops_per_token(models[name], 8192) / base:.3f}"
        rows.append(row | {"training FLOPs": relative or "", "the paper's ": f"{ratio:.3f}" if ratio else ""})
    return rows


def table(rows: list[dict]) -> None:
    widths = [max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]]
    for cells in [rows[0], *(row.values() for row in rows)]:
        print(
            "  ".join(
                str(u).rjust(w) if i else str(u).ljust(w) for i, (u, w) in enumerate(zip(cells, widths, strict=True))
            )
        )


def main(argv: list[str]) -> None:
    parser = Parser("cost.py", __doc__)
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"which of {','.join(SIZES)}")
    parser.add_argument(
        "--match", choices=["params", "flops"], default="params", help="what all systems have in common"
    )
    args = parser.parse_args(argv)
    for size in args.sizes.split(","):
        if size not in SIZES:
            raise ValueError(f"size {size[:60]!r}: use {', '.join(SIZES)}")
        what = {"params": "active parameters", "flops": "FLOPs of training"}[args.match]
        print(f"\n{size}: as many {what} as Hymba. FLOPs of a token in sequences of 8,192; bf16 cache in MiB")
        table(systems(size, args.match))
    print("\nBeside the papers, 8,192 tokens")
    table(papers())
    print(f"\n{NOTE}")


if __name__ == "__main__":
    run("cost.py", main, "--sizes")
