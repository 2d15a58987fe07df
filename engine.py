"""
Fast generation: prompts of different lengths in one batch, a cache, CUDA graphs, sampling.

    engine = Engine(model)
    for tokens in engine.generate([[1, 2, 3], [4]], max_new_tokens=10, temperature=0.8):  # one token for each prompt
        ...

Engine.generate draws from the distribution of Hymba.generate, and greedily gives the same tokens: that is how it is
tested. Letters are the ones of model.py.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import ops
from model import Block, Experts, Hymba, HymbaConfig, Mixer, RMSNorm, fuse, rope_angles, swiglu, windowed_attention

try:
    import engine_kernels  # one new token a row, on GPUs; optional
except ImportError:
    engine_kernels = None

PREFILL = 16384  # tokens, of all rows together, that are read in one call: bounds the memory of long texts

# ----------------------------------------------------------------------------------------------------------------------
# The cache


class Cache:
    """What generation keeps of B sequences, for each block only what it owns:

    - full attention: keys and values of every token, in a buffer with room for n_tokens that grows when it is full;
    - windowed attention: keys and values of the meta tokens, pinned, and a ring of the last `window` tokens;
    - SSM: the last K - 1 inputs of the convolution and the float32 state.

    Made by Engine.new_cache, which fills in the meta tokens. Rows may stand at different positions while they take one
    token a call; a longer call needs rows of equal length (Engine.generate shows how: prefill equal rows together).
    """

    def __init__(self, config: HymbaConfig, batch_size: int, n_tokens: int, dtype: torch.dtype, device: torch.device):
        c, new = config, lambda *shape, dtype=dtype: torch.zeros(batch_size, *shape, dtype=dtype, device=device)
        self.n_meta, self.pattern, self.kv_owner, self.capacity = c.n_meta, c.pattern, c.kv_owner, n_tokens
        self.pos = torch.zeros(batch_size, dtype=torch.long, device=device)  # tokens each row has seen, meta included
        self.longest, self.ragged = 0, False  # the largest of pos and whether they differ, known without a device sync
        self.kv, self.ssm = {}, {}  # by block
        for i, letter in enumerate(c.pattern):
            if self.kv_owner[i] == i:
                slots = c.n_meta + (c.window if letter in "th" else n_tokens)
                self.kv[i] = tuple(new(slots, c.n_kv_head, size) for size in (c.head_size, c.value_size(letter)))
            if letter in "MHh":
                tail, state = c.ssm_cache(letter)
                self.ssm[i] = new(*tail), new(*state, dtype=torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes held: cost.cache_bytes(config, capacity, dtype) for each row."""
        return sum(u.nbytes for pair in [*self.kv.values(), *self.ssm.values()] for u in pair)

    def map(self, f: Callable[[Tensor], Tensor]) -> "Cache":
        """A cache with f applied to every tensor: rows are the first axis of each."""
        new = copy.copy(self)
        new.pos = f(self.pos)
        new.kv, new.ssm = ({i: tuple(f(u) for u in pair) for i, pair in d.items()} for d in (self.kv, self.ssm))
        return new

    def reserve(self, n_tokens: int) -> None:
        """Make room for n_tokens more in every row; buffers at least double, so that growing costs O(1) a token."""
        if (need := self.longest + n_tokens - self.n_meta) > self.capacity:
            more, self.capacity = max(self.capacity, need - self.capacity), max(2 * self.capacity, need)
            for i in self.kv:
                if self.pattern[i] in "TH":
                    self.kv[i] = tuple(F.pad(u, (0, 0, 0, 0, 0, more)) for u in self.kv[i])  # along the slots

    def block(self, i: int) -> "BlockCache":
        """What block i needs of the cache."""
        kv = self.kv.get(self.kv_owner[i])
        return BlockCache(kv, self.ssm.get(i), self.pos, self.longest, self.ragged, self.n_meta)


@dataclass
class BlockCache:
    """One block's part of a Cache: the same tensors, None where it has none. A block uses attend, ssm and keep."""

    kv: tuple[Tensor, Tensor] | None  # keys (B, slots, G, E) and values (B, slots, G, F), its own or its producer's
    ssm: tuple[Tensor, Tensor] | None  # conv tail (B, K - 1, D) and state (B, D, N); of Mamba-2, see config.ssm_cache
    pos: Tensor
    longest: int
    ragged: bool
    n_meta: int

    def attend(self, q: Tensor, kv: tuple[Tensor, Tensor] | None, heads) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention of q (B, T, H, E) over all that is in reach -> (B, T, H, F), and the kv for blocks that share it.

        kv are the new tokens' keys (B, T, G, E) and values (B, T, G, F) if heads owns_kv. Else they are those that the
        owner handed on; with one new token, these are in the owner's part of the cache, too.
        """
        if q.shape[1] == 1:
            if heads.owns_kv:
                self.write(heads.window, *kv)
            return decode_attention(q, *self.kv, self.pos), self.kv
        if heads.owns_kv:
            kv = self.extend(heads.window, *kv)
        return windowed_attention(q, *kv, heads.window, heads.n_meta), kv

    def keep(self, tail: Tensor, state: Tensor) -> None:
        """Store the convolution's last inputs and the state that follow the new tokens."""
        self.ssm[0].copy_(tail)
        self.ssm[1].copy_(state)

    def slot(self, window: int | None, pos: Tensor) -> Tensor:
        """Where the token at position pos is kept."""
        M = self.n_meta
        return pos if window is None else torch.where(pos < M, pos, M + (pos - M) % window)

    def write(self, window: int | None, k: Tensor, v: Tensor) -> None:
        """Store one token of each row, k (B, 1, G, E), v (B, 1, G, F)."""
        for buffer, new in zip(self.kv, (k, v), strict=True):
            buffer[torch.arange(len(k), device=k.device), self.slot(window, self.pos)] = new[:, 0]

    @ops.untraced  # the host decides what is where
    def extend(self, window: int | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, G, E or F) and return what their queries see: (B, S, G, E), (B, S, G, F).

        Keys come in order of position with the new ones last, as windowed_attention takes them: what lies between the
        meta tokens and the window is gone, but that changes no distance inside the window.
        """
        T, M, p = k.shape[1], self.n_meta, self.longest
        if self.ragged:
            raise ValueError("the rows of this cache differ in length: feed them one token a call, or apart")
        if window is None:
            for buffer, new in zip(self.kv, (k, v), strict=True):
                buffer[:, p : p + T] = new
            return tuple(buffer[:, : p + T] for buffer in self.kv)
        on = dict(device=k.device)  # slots are made where they are used: the host would wait for a copy
        old = torch.cat([torch.arange(min(p, M), **on), torch.arange(max(p - window + 1, M), max(p, M), **on)])
        n = T if p < M else min(T, window)  # what the ring keeps of this call
        old, last = self.slot(window, old), self.slot(window, torch.arange(p + T - n, p + T, **on))
        seen = []
        for buffer, new in zip(self.kv, (k, v), strict=True):
            seen.append(torch.cat([buffer[:, old], new], dim=1))
            buffer[:, last] = new[:, T - n :]
        return tuple(seen)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    """One new token's attention over the cache: q (B, 1, H, E), k (B, S, G, E), v (B, S, G, F) -> (B, 1, H, F).

    pos (B,): the token's position. The slots of a cache fill from the left and all that it holds is in reach, so a
    row sees slots 0 ... pos (all S once the ring is full). Their order does not matter: RoPE was applied before.
    """
    mask = torch.arange(k.shape[1], device=q.device) <= pos[:, None]  # (B, S)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# A block for one new token a row, by kernels that update the cache in place. ops.steps_by_kernels says where.


def step_linear(layer: nn.Linear, x: Tensor, norm: nn.Module | None = None, add: Tensor | None = None) -> Tensor:
    """layer(norm(x)) + add for x (B, 1, n): of few rows, all of it in one kernel."""
    if engine_kernels.fits_matvec(x):
        return engine_kernels.matvec(x, layer.weight, None, *scale_of(norm), add)
    y = layer(x if norm is None else norm(x))
    return y if add is None else add + y


def scale_of(norm: nn.Module | None) -> tuple[Tensor | None, float]:
    """An RMSNorm's scale and eps, (None, 0) of no norm."""
    return (norm.weight, norm.eps) if isinstance(norm, RMSNorm) else (None, 0.0)


def step_mixer(mixer: Mixer, proj: Tensor, rope: tuple[Tensor, Tensor], cache: BlockCache) -> Tensor:
    """What lies between the projections: in_proj's output proj (B, 1, ...) -> (B, 1, width of out_proj's input)."""
    if attn := mixer.attn:
        sizes = attn.H, attn.owns_kv, attn.window or 0, attn.n_meta
        q = engine_kernels.rope_append(proj, *rope, cache.pos, *cache.kv, *sizes)
        y = engine_kernels.decode_attention(q, *cache.kv, cache.pos).flatten(2)  # (B, 1, H F)
    if ssm := mixer.ssm:
        tail, state = cache.ssm
        x = engine_kernels.conv_step(proj, ssm.conv_weight, ssm.conv_bias, tail)  # (B, 1, D)
        dtBC = step_linear(ssm.x_proj, x)  # (B, 1, R + 2 N)
        dt = step_linear(ssm.dt_proj, dtBC[..., : ssm.dtBC_sizes[0]], ssm.dt_norm)  # (B, 1, D)
        (B_scale, eps), (C_scale, _) = scale_of(ssm.B_norm), scale_of(ssm.C_norm)
        s = engine_kernels.scan_step(x, dt, ssm.A_log, dtBC, ssm.D, proj, ssm.dt_bias, state, B_scale, C_scale, eps)
        y = fuse(y, s, mixer.attn_branch_norm, mixer.ssm_branch_norm, mixer.fusion) if attn else s
    return y


def step_block(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], cache: BlockCache) -> Tensor:
    """block(x, rope, kv, cache) for x (B, 1, C) -> (B, 1, C). Keys and values go through the cache alone."""
    y = step_mixer(block.mixer, step_linear(block.mixer.in_proj, x, block.mixer_norm), rope, cache)
    x = step_linear(block.mixer.out_proj, y, add=x)
    if block.ffn is None:
        return x
    if isinstance(block.ffn, Experts):
        return x + block.ffn(block.ffn_norm(x))
    gate, up = block.ffn.gate_proj, block.ffn.up_proj
    if engine_kernels.fits_matvec(x):
        y = engine_kernels.matvec(x, gate.weight, up.weight, *scale_of(block.ffn_norm))
    else:
        y = block.ffn_norm(x)
        y = swiglu(gate(y), up(y))
    return step_linear(block.ffn.down_proj, y, add=x)


# ----------------------------------------------------------------------------------------------------------------------
# The engine


class Engine:
    """Generation from a model. It keeps the cache of the meta tokens, which run once, and follows changed weights."""

    def __init__(self, model: Hymba):
        self.model = model
        self._meta = None  # the state of the weights, and the cache of one row that has seen the meta tokens alone

    @torch.no_grad()
    def blocks(self, x: Tensor, cache: Cache) -> Tensor:
        """All blocks on embeddings x (B, T, C), which continue the cache -> (B, T, C), not normed."""
        T = x.shape[1]
        x = x.to(ops.compute_dtype(x))
        cache.reserve(T)
        rope = rope_angles(self.model.config, cache.pos[:, None] + torch.arange(T, device=x.device))  # (B, T)
        kv = None
        for i, block in enumerate(self.model.blocks):
            if T == 1 and ops.steps_by_kernels(block, x):
                x = step_block(block, x, rope, cache.block(i))
            else:
                x, kv = block(x, rope, kv, cache.block(i))
        cache.pos += T
        cache.longest += T
        return x

    @torch.no_grad()
    def hidden(self, idx: Tensor, cache: Cache) -> Tensor:
        """Final normed states (B, T, C) of tokens idx (B, T), which continue the cache."""
        return self.model.norm(self.blocks(self.model.embed(idx), cache))

    @torch.no_grad()
    def logits(self, idx: Tensor, cache: Cache) -> Tensor:
        """Logits (B, T, V) of tokens idx (B, T), which continue the cache."""
        return F.linear(self.hidden(idx, cache), self.model.output)

    def new_cache(self, batch_size: int, n_tokens: int) -> Cache:
        """A cache for batch_size sequences that has seen the meta tokens and has room for n_tokens before it grows.

        The meta tokens run once per engine, not per cache; weights that were changed in place, as optimizers and
        load_state_dict do, are noticed and run them again.
        """
        model = self.model
        device, dtype = model.embed.weight.device, ops.compute_dtype(model.embed.weight)
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
        state = [str(model.config), dtype, versions]
        if self._meta is None or self._meta[0] != state:
            once = Cache(model.config, 1, 0, dtype, device)
            if model.meta is not None:
                self.blocks(model.meta[None], once)
            self._meta = state, once
        cache = self._meta[1].map(lambda u: u.repeat_interleave(batch_size, dim=0))
        cache.reserve(n_tokens)
        return cache

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Collection[int] | None = None,
        seed: int = 0,
        first_row: int = 0,
        cache: Cache | None = None,
    ) -> Iterator[list[int | None]]:
        """Continue every prompt (token ids; lengths may differ), yielding one token for each at every step.

        Each item is a list with the next token of every prompt, None for those that have ended with a token in
        `stop` (which is not yielded). Ends when all have, or after max_new_tokens. Temperature 0 is greedy; top_k
        keeps the k likeliest tokens, top_p the likeliest that together reach probability p. Row i draws from its own
        stream of random numbers, (seed, first_row + i): what else is in the batch does not change it. (Matrix
        products of other sizes may round differently, and turn a near-tie: in bfloat16, now and then.)

        With a cache of one row (from new_cache), the one prompt continues it. The cache has then seen the prompt and
        all tokens that were yielded but the last; where a token in `stop` ended the iteration, the last one, too.

        Raises ValueError for an empty prompt, a token outside of the vocabulary, or settings out of range.
        """
        self._check_prompts(prompts, cache)
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        device = self.model.embed.weight.device
        rows = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the prompt of each row of the batch
        room = len(prompts[rows[-1]]) + (256 if max_new_tokens is None else min(max_new_tokens, 4096))
        ahead = cache is None
        cache = cache or self.new_cache(len(rows), room)
        cache.reserve(room)

        def draw(x: Tensor, cache: Cache, row: Tensor) -> Tensor:  # hidden states (B, C) -> tokens (B,)
            logits = F.linear(x, self.model.output).float()
            return sample_token(logits, temperature, top_k, top_p, (seed, row, cache.pos))

        last = self._prefill([prompts[i] for i in rows], cache)
        row = torch.tensor(rows, device=device) + first_row
        loop = TokenLoop(self, cache, draw(last, cache, row), row, draw)
        del cache, last  # what the loop leaves behind as its cache grows is free
        ends = {stop} if isinstance(stop, int) else set(stop or ())
        step, going, cuda = 0, set(rows), device.type == "cuda"
        while max_new_tokens is None or step < max_new_tokens:
            step += 1
            drawn = loop.tokens.to("cpu", non_blocking=cuda, copy=True)
            arrived = cuda and torch.cuda.current_stream(device).record_event()
            if ahead and step != max_new_tokens:  # the next step runs while the host reads this one's tokens
                loop.advance()
            if arrived:
                arrived.synchronize()
            out: list[int | None] = [None] * len(prompts)
            for i, token in zip(rows, drawn.tolist(), strict=True):
                if token in ends:
                    going.discard(i)
                out[i] = token if i in going else None
            if not going:
                return
            yield out
            if not ahead and step != max_new_tokens:
                loop.advance()
            if 2 * len(going) <= len(rows):  # rows that have ended leave the batch: by halves, as each size is captured
                keep = torch.tensor([j for j, i in enumerate(rows) if i in going], device=device)
                rows = [i for i in rows if i in going]
                loop = loop.take(keep)

    def _check_prompts(self, prompts: Sequence[Sequence[int]], cache: Cache | None) -> None:
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("every prompt needs at least one token: begin an empty one with the end-of-text token")
        if bad := [t for p in prompts for t in p if not 0 <= t < self.model.config.vocab_size]:
            raise ValueError(f"token {bad[0]} is outside of the vocabulary of {self.model.config.vocab_size}")
        if cache is not None and not len(prompts) == len(cache.pos) == 1:
            raise ValueError(f"{len(prompts)} prompts, {len(cache.pos)} cache rows: only one prompt continues one row")
        device = self.model.embed.weight.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():  # kernels and graphs go to that one
            raise ValueError(f"the model is on {device}: call torch.cuda.set_device({device.index}) before generate")

    def _prefill(self, prompts: list[Sequence[int]], cache: Cache) -> Tensor:
        """Read prompts, which come in order of length: the final states (B, C) of their last tokens.

        Prompts of equal length are read together, in their own rows of the cache and PREFILL tokens at a time.
        """
        last, lengths = [], []
        for length, group in groupby(prompts, key=len):
            group = torch.tensor([list(prompt) for prompt in group], device=cache.pos.device)
            for idx in group.split(max(1, PREFILL // length)):
                own = slice(len(lengths), len(lengths) + len(idx))
                part = cache.map(lambda u, own=own: u[own])
                for piece in idx.split(PREFILL, dim=1):
                    x = self.hidden(piece, part)[:, -1]
                last.append(x)
                lengths += [length] * len(idx)
        cache.longest, cache.ragged = part.longest, lengths[0] < lengths[-1]
        return torch.cat(last)


class TokenLoop:
    """One-token steps of a batch: each feeds `tokens` (B,) to the model and puts what is drawn next in their place.

    Nothing in a step needs the host: on a GPU, all of it is one CUDA graph. A graph is bound to the addresses it was
    captured with, so the first step, and each after the cache has grown, runs operation by operation (which also
    compiles the kernels); the second is captured, and replayed from then on.
    """

    def __init__(self, engine: Engine, cache: Cache, tokens: Tensor, row: Tensor, draw: Callable):
        """row (B,): the number of each row's random stream; draw(hidden states (B, C), cache, row) -> tokens (B,)."""
        self.engine, self.cache, self.tokens, self.row, self.draw = engine, cache, tokens, row, draw
        self.capacity, self.graph = None, None

    def _step(self) -> None:
        x = self.engine.hidden(self.tokens[:, None], self.cache)[:, -1]
        self.tokens.copy_(self.draw(x, self.cache, self.row))

    @torch.no_grad()
    def advance(self) -> None:
        """One step."""
        self.cache.reserve(1)
        fits = self.capacity == self.cache.capacity and self.tokens.is_cuda
        if not fits or torch.is_autocast_enabled("cuda"):  # (weights that autocast converts outlive no graph)
            self.capacity, self.graph = self.cache.capacity, None
            return self._step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        else:
            self.cache.longest += 1  # what else the host does in a step
        self.graph.replay()

    def take(self, keep: Tensor) -> "TokenLoop":
        """The steps of some rows alone, in the same memory: keep (b,) says which, in ascending order."""
        n = len(keep)
        pick = lambda u: u[:n].copy_(u[keep])  # noqa: E731
        return TokenLoop(self.engine, self.cache.map(pick), pick(self.tokens), pick(self.row), self.draw)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def final_states(model: Hymba, idx: Tensor) -> Tensor:
    """Final states (B, T, C) of whole texts idx (B, T), without a cache. Matrix products are in the weights' dtype."""
    enabled = idx.is_cuda and model.output.dtype == torch.bfloat16
    with torch.autocast(idx.device.type, torch.bfloat16, enabled=enabled):
        return model.hidden(idx)


def check_sampling(max_new_tokens: int | None, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for what generate cannot do."""
    if not temperature >= 0 or (top_k is not None and top_k < 1) or not (top_p is None or 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: use >= 0, >= 1, and 0 < p <= 1")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be 0 or more, or None for no limit")


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, counter: tuple[int, Tensor, Tensor]
) -> Tensor:
    """Draw one token a row from logits (B, V) -> (B,), with the random numbers of counter (see exponential).

    Exponentials race, and token v, with rate p_v, comes in first with probability p_v: the Gumbel-max trick.
    """
    if temperature < 1e-30:  # the likeliest token has all the probability, and 1e-46 would be 0 in float32
        return logits.argmax(-1)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_k is not None or top_p is not None:
        ranked, order = probs.sort(-1, descending=True)
        if top_k is not None:
            ranked[:, top_k:] = 0
        if top_p is not None:  # drop what is preceded by p already
            ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p * ranked.sum(-1, keepdim=True), 0)
        probs = probs.scatter(1, order, ranked)
    return (probs / exponential(*counter, logits.shape[1])).argmax(-1)


def exponential(seed: int, row: Tensor, pos: Tensor, n: int) -> Tensor:
    """Exponentially distributed numbers (B, n), float32; number (b, j) follows from (seed, row[b], pos[b], j) alone.

    A counter-based generator: SplitMix64 (Steele, Lea & Flood 2014), whose finaliser mixes the counter's bits, in
    PyTorch's wrapping 64-bit integers. row and pos (B,) int64.
    """
    shift = lambda x, k: (x >> k) & ((1 << (64 - k)) - 1)  # of unsigned numbers  # noqa: E731

    def mix(x):
        x = (x ^ shift(x, 30)) * -0x40A7B892E31B1A47
        x = (x ^ shift(x, 27)) * -0x6B2FB644ECCEEE15
        return x ^ shift(x, 31)

    gamma, key = -0x61C8864680B583EB, torch.full_like(row, (seed + 2**63) % 2**64 - 2**63)
    for u in (row, pos):
        key = mix(key + gamma) + u
    bits = mix(mix(key + gamma)[:, None] + gamma * torch.arange(1, n + 1, device=row.device))
    u = (shift(bits, 11).float() + 0.5) * 2.0**-53  # in (0, 1], finest near 0, where the race is decided
    return -torch.log1p(-u.clamp(max=1 - 2.0**-24))  # 1 would give infinity, and a lone candidate would not come in
