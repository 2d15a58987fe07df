"""
Generate text from a checkpoint: python sample.py [--flag=value ...]

    python sample.py                                  # the newest checkpoint under out/
    python sample.py --prompt="def " --n_samples=3 --temperature=0.8 --top_k=50 --top_p=0.95 --seed=1
    python sample.py --init_from=out/tiny/best --prompt="class " --max_new_tokens=1000
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
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token [0.8]")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens [all]")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest that reach probability p [all]")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    args = parser.parse_args(argv)
    runs = sorted(Path("out").glob("*/*/model.safetensors"), key=lambda f: f.stat().st_mtime)
    if not args.init_from and not runs:
        raise ValueError("no checkpoint under out/: run python train.py first, or pass --init_from=FOLDER")
    newest = runs and [f.parent for f in runs if f.parts[:2] == runs[-1].parts[:2]]  # of the newest run
    folder = Path(args.init_from or min(newest))  # best before last
    device = pick_device(args.device)
    model = Hymba.from_pretrained(folder).to(device).eval()
    tokenizer = prepare.load_tokenizer(json.loads((folder / "config.json").read_text())["tokenizer"], folder)
    print(f"{folder}: {model.config.pattern}, {model.num_params():,} parameters, on {device}", file=sys.stderr)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    for i in range(args.n_samples):
        if i:
            print("-" * 80)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            stream(model, tokenizer, args.prompt, args.max_new_tokens, seed=args.seed + i, **options)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows ?
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"sample.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
