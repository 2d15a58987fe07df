"""
Generate text from a checkpoint: python sample.py [--flag=value ...]

    python sample.py                                  # the newest checkpoint under out/
    python sample.py --prompt="def " --n_samples=3 --temperature=0.8 --top_k=50 --top_p=0.95 --seed=1
    python sample.py --init_from=out/tiny/best --prompt="class " --max_new_tokens=1000
    python sample.py --file=prompts.txt --batch_size=64 > texts.jsonl      # one prompt a line, one JSON line for each
"""

import argparse
import codecs
import json
import sys
from pathlib import Path

import tiktoken
import torch

import prepare
from model import Hymba


def stream(model: Hymba, tokenizer: tiktoken.Encoding, prompt: str, max_new_tokens: int, **options) -> str:
    """Print the prompt and its continuation piece by piece, up to the end of the text, and return both.

    options go to Hymba.generate. A character whose bytes are spread over tokens is printed when it is whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    eot = tokenizer.eot_token
    text = prompt
    print(prompt, end="", flush=True)
    tokens = tokenizer.encode_ordinary(prompt) or [eot]
    for (token,) in model.generate([tokens], max_new_tokens, stop=eot, **options):
        # the vocabulary is padded to a multiple of 64: a token beyond the tokenizer's is never trained, nor text
        piece = decoder.decode(tokenizer.decode_single_token_bytes(token)) if token < tokenizer.n_vocab else ""
        text += piece
        print(piece, end="", flush=True)
    print()
    return text


def write_jsonl(
    model: Hymba, tokenizer: tiktoken.Encoding, prompts: list[str], batch_size: int, max_new_tokens: int, **options
) -> None:
    """Print {"prompt": ..., "text": ...} for every prompt, in order, as soon as it and those before it are done.

    text is the continuation alone. options go to Hymba.generate; prompt i draws from stream i in batches of any size.
    """
    eot = tokenizer.eot_token
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        texts, written = [[] for _ in batch], 0

        def write(prompt: str, tokens: list[int]) -> None:
            text = tokenizer.decode([token for token in tokens if token < tokenizer.n_vocab])
            print(json.dumps({"prompt": prompt, "text": text}), flush=True)

        rows = [tokenizer.encode_ordinary(prompt) or [eot] for prompt in batch]
        for step in model.generate(rows, max_new_tokens, stop=eot, first_row=first, **options):
            for tokens, token in zip(texts, step, strict=True):
                tokens += [] if token is None else [token]
            while step[written] is None:  # some row is still going
                write(batch[written], texts[written])
                written += 1
        for prompt, tokens in list(zip(batch, texts, strict=True))[written:]:
            write(prompt, tokens)


def pick_device(name: str | None) -> torch.device:
    """The device called name, or the best there is: cuda, mps, cpu. ValueError if this machine has none called so."""
    auto = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or auto)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device={name}: there is none here; leave it out or use {auto}") from None
    return device


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("sample.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--init_from", help="checkpoint folder [the newest under out/]")
    parser.add_argument("--prompt", default="", help="text to continue [none: a new text]")
    parser.add_argument("--n_samples", type=int, default=1)
    parser.add_argument("--file", type=Path, help="continue each line of a text file, and write JSON lines")
    parser.add_argument("--batch_size", type=int, default=64, help="--file: prompts at a time [64]")
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token [0.8]")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens [all]")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest that reach probability p [all]")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights [bfloat16 on cuda]")
    parser.add_argument("--compile", action="store_true", help="faster steps on cuda, after half a minute more")
    args = parser.parse_args(argv)
    if args.file:  # what can be wrong with it shows before the model is loaded
        prompts = [line for line in args.file.read_text(encoding="utf-8").splitlines() if line]
        if not prompts:
            raise ValueError(f"{args.file} is empty: write one prompt a line")
        if args.batch_size < 1 or args.prompt or args.n_samples > 1:
            raise ValueError("--file goes with a --batch_size of 1 or more, and without --prompt and --n_samples")
    runs = sorted(Path("out").glob("*/*/model.safetensors"), key=lambda f: f.stat().st_mtime)
    if not args.init_from and not runs:
        raise ValueError("no checkpoint under out/: run python train.py first, or pass --init_from=FOLDER")
    newest = runs and [f.parent for f in runs if f.parts[:2] == runs[-1].parts[:2]]  # of the newest run
    folder = Path(args.init_from or min(newest))  # best before last
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = Hymba.from_pretrained(folder).cast(dtype).to(device).eval()
    if args.compile:
        model.compile_steps()
    tokenizer = prepare.load_tokenizer(json.loads((folder / "config.json").read_text())["tokenizer"], folder)
    print(f"{folder}: {model.config.pattern}, {model.num_params():,} parameters, on {device}", file=sys.stderr)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.file:
        return write_jsonl(model, tokenizer, prompts, args.batch_size, args.max_new_tokens, seed=args.seed, **options)
    for i in range(args.n_samples):
        if i:
            print("-" * 80)
        stream(model, tokenizer, args.prompt, args.max_new_tokens, seed=args.seed + i, **options)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows ?
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"sample.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
