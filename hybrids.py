"""
Patterns of hybrids, after Bae et al. 2025 (https://arxiv.org/abs/2510.04800): python train.py --hybrid=inter:1:5:spread

    inter  whole blocks of one kind or the other, T among M        intra  hybrid blocks H among M

The first number is the share of T or H. The paper's advice: a Transformer block never comes first. Inter-layer hybrids
want T in the middle or spread; intra-layer hybrids want H scattered, and neither clustered nor at both ends.
"""

import re

PLACES = {"inter": ("front", "middle", "spread"), "intra": ("scattered", "clustered", "sandwich", "spread")}


def hybrid_pattern(spec: str, n_layer: int) -> str:
    """The letters of n_layer blocks for a kind, a ratio and a place: "inter:1:5:spread", 12 -> "MMTMMMMMTMMM".

    front: T first. middle, clustered: side by side, in the middle. spread, scattered (one and the same): each in the
    middle of its stretch of the model, and never first. sandwich: half at each end.
    Raises ValueError for what is not understood.
    """
    match = re.fullmatch(r"(inter|intra):([1-9]\d{0,2}):([1-9]\d{0,2}):([a-z]+)", spec, re.ASCII)
    if not match or match[4] not in PLACES[match[1]]:
        places = "; ".join(f"{kind}: {', '.join(places)}" for kind, places in PLACES.items())
        raise ValueError(f"hybrid='{spec[:60]}': write inter:1:5:spread, or another ratio and place ({places})")
    if not 2 <= n_layer <= 1000:
        raise ValueError(f"hybrid='{spec}' needs 2 to 1000 blocks, not n_layer={n_layer}")
    kind, a, b, place = match[1], int(match[2]), int(match[3]), match[4]
    n, k = n_layer, min(max(1, round(n_layer * a / (a + b))), n_layer - 1)  # k blocks with attention
    if place in ("spread", "scattered"):  # one where i k / n passes a whole number
        shift = min(n // 2, n - k - 1)  # half a stretch, but the first block stays M
        chosen = [i for i in range(n) if ((i + 1) * k + shift) // n > (i * k + shift) // n]
    elif place == "sandwich":
        chosen = [*range((k + 1) // 2), *range(n - k // 2, n)]
    else:
        first = 0 if place == "front" else (n - k) // 2
        chosen = range(first, first + k)
    return "".join("TH"[kind == "intra"] if i in chosen else "M" for i in range(n))
