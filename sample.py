"""
Generate text from a checkpoint or released weights: python sample.py [--flag=value ...]

    python sample.py                                  # the newest checkpoint under out/
    python sample.py --prompt="def " --n_samples=3 --temperature=0.8 --top_k=50 --top_p=0.95 --seed=1
    python sample.py --init_from=out/tiny/best --prompt="class " --max_new_tokens=1000
    python sample.py --file=prompts.txt --batch_size=64 > texts.jsonl      # one prompt a line, one JSON line for each
    python sample.py --init_from=nvidia/Hymba-1.5B-Base --prompt="The capital of France"
    python sample.py --init_from=nvidia/Hymba-1.5B-Instruct --chat

--init_from takes a run's folder (its best checkpoint, or else its last), a checkpoint, or the name of a model on
huggingface.co. A chat ends with an empty line or Ctrl-D; Ctrl-C stops an answer. Released
weights need a few packages more: pip install tokenizers huggingface_hub jinja2
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoint
import cost
import ops
from engine import Engine, check_sampling
from files import memory
from flags import Parser, run
from model import Hymba
from tokenizer import ReleasedTokenizer, Tokenizer, chat_template, detokenizer, stops, tokenizer_of


def stream(engine: Engine, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **options) -> str:
    """Print the prompt and its continuation piece by piece, up to the end of the text, and return both.

    options go to Engine.generate.
    """
    text = prompt
    print(prompt, end="", flush=True)
    tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    add = detokenizer(tokenizer, tokens)
    for (token,) in engine.generate([tokens], max_new_tokens, stop=stops(tokenizer), **options):
        text += (piece := add(token))
        print(piece, end="", flush=True)
    print()
    return text


def chat(
    engine: Engine, tokenizer: ReleasedTokenizer, render: Callable, max_new_tokens: int, seed: int = 0, **options
) -> None:
    """A conversation in the terminal, until an empty line or Ctrl-D. Ctrl-C stops an answer.

    The cache is kept between turns, and reads only what each turn adds. An SSM state cannot take tokens back: where the
    conversation does not begin with the tokens in the cache (the template drops or changes what was said before, or the
    tokens of an answer are not those that its text is cut into), all of it is read again. options go to generate.
    """
    messages, cache, seen = [], None, []
    while True:
        try:
            line = input("> ")
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        tokens = tokenizer.encode(render(messages))
        if not tokens:
            raise ValueError("the chat template made a text in which there is no token: use --prompt")
        if cache is None or tokens[:-1][: len(seen)] != seen:  # one token at least must be new
            if seen:
                print("[reading the whole conversation again: nothing is lost but time]", file=sys.stderr)
            cache, seen = engine.new_cache(1, len(tokens) + max_new_tokens), []
        answer, text, add = [], "", detokenizer(tokenizer, tokens)
        try:
            new = [tokens[len(seen) :]]
            for (token,) in engine.generate(new, max_new_tokens, seed=seed + len(messages), cache=cache, **options):
                if token in stops(tokenizer):
                    break
                answer.append(token)
                text += (piece := add(token))
                print(piece, end="", flush=True)
            seen = (tokens + answer)[: int(cache.pos) - engine.model.config.n_meta]
            status = f"[cache: {cache.nbytes / 1e6:,.1f} MB, {len(seen):,} tokens]"
        except KeyboardInterrupt:  # some blocks may have seen a token that others have not
            cache, seen, status = None, [], "[stopped: the next turn reads the whole conversation again]"
        print()
        print(status, file=sys.stderr)
        messages.append({"role": "assistant", "content": text})


def write_jsonl(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: list[str],
    batch_size: int,
    max_new_tokens: int,
    **options,
) -> None:
    """Print {"prompt": ..., "text": ...} for every prompt, in order, as soon as it and those before it are done.

    text is the continuation alone. options go to Engine.generate; prompt i draws from stream i in batches of any size.
    """
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        rows = [tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token] for prompt in batch]
        adds, texts, written = [detokenizer(tokenizer, row) for row in rows], ["" for _ in batch], 0
        for step in engine.generate(rows, max_new_tokens, stop=stops(tokenizer), first_row=first, **options):
            for i, token in enumerate(step):
                texts[i] += "" if token is None else adds[i](token)
            while step[written] is None:  # some row is still going
                print(json.dumps({"prompt": batch[written], "text": texts[written]}), flush=True)
                written += 1
        for prompt, text in list(zip(batch, texts, strict=True))[written:]:
            print(json.dumps({"prompt": prompt, "text": text}), flush=True)


def pick_device(name: str | None) -> torch.device:
    """The device called name, or the best there is: cuda, mps, cpu. ValueError if this machine has none called so.

    A GPU called by its number becomes the current one: kernels, streams and CUDA graphs go there.
    """
    auto = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or auto)
        torch.zeros(1, device=device).tolist()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device={name}: there is none here; leave it out or use {auto}") from None
    return device


def check_model(model: Hymba, tokenizer: Tokenizer, folder: Path, rows: int, max_new_tokens: int) -> None:
    """Raise ValueError for a model that does not go with its tokenizer, whose weights give no numbers, or whose cache
    does not fit into the memory."""
    config, weight, eot = model.config, model.embed.weight, tokenizer.eot_token
    if eot >= config.vocab_size:
        raise ValueError(f"{folder}: its tokenizer ends texts with token {eot}, its model has {config.vocab_size}")
    with torch.no_grad():
        if not model(torch.tensor([[eot]], device=weight.device)).isfinite().all():
            raise ValueError(f"{folder}: its weights give no finite numbers: take another checkpoint")
    need, there = rows * cost.cache_bytes(config, min(max_new_tokens, 4096), weight.dtype), memory(weight.device)
    if need > there:
        raise ValueError(
            f"{folder}: the cache of {rows} texts needs {need / 1e9:,.0f} GB, but there are {there / 1e9:,.0f} GB: "
            "lower --batch_size or --max_new_tokens, or window in config.json"
        )


def main(argv: list[str]) -> None:
    parser = Parser("sample.py", __doc__)
    parser.add_argument("--init_from", help="folder, or name on huggingface.co [the newest under out/]")
    parser.add_argument("--prompt", default="", help="text to continue [none: a new text]")
    parser.add_argument("--chat", action="store_true", help="talk to an instruction-tuned model")
    parser.add_argument("--n_samples", type=int, default=1, help="how many texts, one after the other [1]")
    parser.add_argument("--file", type=Path, help="continue each line of a text file, and write JSON lines")
    parser.add_argument("--batch_size", type=int, default=64, help="--file: prompts at a time [64]")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="of each text, or answer [500]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token [0.8]")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens [all]")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest that reach probability p [all]")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed draws the same text [1337]")
    parser.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights [bfloat16 on cuda, else the checkpoint's]"
    )
    parser.add_argument("--kernels", choices=["True", "False"], default="True", help="Triton kernels on a GPU [True]")
    args = parser.parse_args(argv)
    if args.kernels == "False":
        ops.use_kernels(False)
    check_sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)  # before the model is loaded
    if args.n_samples < 1:
        raise ValueError(f"n_samples={args.n_samples}: must be 1 or more")
    if not 0 <= args.seed < 2**62:
        raise ValueError(f"seed={args.seed}: must be 0 or more, and less than 2**62")
    if args.file:
        try:
            with args.file.open(encoding="utf-8-sig") as f:
                text = f.read(2**28 + 1)
        except UnicodeDecodeError as e:
            raise ValueError(f"{args.file} is not UTF-8 text: {e}") from None
        if not text or len(text) > 2**28:
            what = "has more than 268 million characters: split it" if text else "is empty: write one prompt a line"
            raise ValueError(f"{args.file} {what}")
        prompts = text.removesuffix("\n").split("\n")
        if args.batch_size < 1 or args.prompt or args.n_samples > 1 or args.chat:
            raise ValueError("--file goes with a --batch_size of 1 or more, without --prompt, --n_samples and --chat")
    if args.chat and (args.prompt or args.n_samples > 1):
        raise ValueError("--chat goes without --prompt and --n_samples: it asks for what to answer")
    runs = sorted(Path("out").glob("*/*/config.json"), key=lambda f: f.stat().st_mtime)
    if not args.init_from and not runs:
        raise ValueError("no checkpoint under out/: run python train.py first, or pass --init_from=FOLDER")
    device = pick_device(args.device)
    name = args.init_from or runs[-1].parents[1]  # of the newest run
    folder = checkpoint.pretrained_folder(name, weights=False)
    tokenizer = tokenizer_of(folder)
    render = chat_template(folder) if args.chat else None
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else None)
    model = checkpoint.load(name, dtype and getattr(torch, dtype), device).eval()
    check_model(model, tokenizer, folder, min(args.batch_size, len(prompts)) if args.file else 1, args.max_new_tokens)
    engine = Engine(model)
    print(f"{folder}: {model.config.pattern}, {model.num_params():,} parameters, on {device}", file=sys.stderr)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.chat:
        return chat(engine, tokenizer, render, args.max_new_tokens, seed=args.seed, **options)
    if args.file:
        return write_jsonl(engine, tokenizer, prompts, args.batch_size, args.max_new_tokens, seed=args.seed, **options)
    for i in range(args.n_samples):
        if i:
            print("-" * 80)
        stream(engine, tokenizer, args.prompt, args.max_new_tokens, seed=args.seed + i, **options)


if __name__ == "__main__":
    run("sample.py", main, "--batch_size or --max_new_tokens")
