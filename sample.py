"""
Generate text from a checkpoint or released weights: python sample.py [--flag=value ...]

    python sample.py                                  # the newest checkpoint under out/
    python sample.py --prompt="def " --n_samples=3 --temperature=0.8 --top_k=50 --top_p=0.95 --seed=1
    python sample.py --init_from=out/tiny/best --prompt="class " --max_new_tokens=1000
    python sample.py --file=prompts.txt --batch_size=64 > texts.jsonl      # one prompt a line, one JSON line for each
    python sample.py --init_from=nvidia/Hymba-1.5B-Base --prompt="The capital of France"
    python sample.py --init_from=nvidia/Hymba-1.5B-Instruct --chat

--init_from takes a folder or the name of a model on huggingface.co. A chat ends with an empty line or Ctrl-D; Ctrl-C
stops an answer. Released weights need a few packages more: pip install tokenizers huggingface_hub jinja2
"""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import tiktoken
import torch

import prepare
from model import Hymba, check_sampling
from weights import pretrained_folder


def read_json(file: Path) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {}


class ReleasedTokenizer:
    """A released model's tokenizer.json, with the names that tiktoken.Encoding has for what is used here.

    Raises FileNotFoundError without tokenizer.json, ValueError if it is corrupt, if no file says which token ends a
    text, or, with the line to install, if the package tokenizers is missing.
    """

    def __init__(self, folder: Path):
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{folder} needs a package that is missing: pip install tokenizers") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:  # all that the package raises
            raise ValueError(f"{folder / 'tokenizer.json'} is corrupt: {e}") from None
        self.tokenizer.no_truncation()  # some files were saved with the limits of their training
        self.n_vocab = self.tokenizer.get_vocab_size()
        configs = [read_json(folder / f"{name}.json") for name in ("tokenizer_config", "generation_config", "config")]
        eos = configs[0].get("eos_token")
        stops = [self.tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos or "")]
        for config in configs[1:]:
            ids = config.get("eos_token_id")
            stops += ids if isinstance(ids, list) else [ids]
        stops = [token for token in stops if token is not None]
        if not stops:
            raise ValueError(f"{folder} says nowhere which token ends a text: its config.json needs an eos_token_id")
        self.eot_token, self.stops = stops[0], set(stops)

    def encode_ordinary(self, text: str) -> list[int]:
        """The tokens of text, behind the token that begins every text if there is one."""
        return self.tokenizer.encode(text).ids

    def encode(self, text: str) -> list[int]:
        """The tokens of text and of the special tokens written in it, as a chat template does."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.tokenizer.decode(tokens)


def stops(tokenizer: tiktoken.Encoding | ReleasedTokenizer) -> set[int]:
    """The tokens that end a text: released models may have several."""
    return getattr(tokenizer, "stops", {tokenizer.eot_token})


def decoder(tokenizer: tiktoken.Encoding | ReleasedTokenizer, before: list[int]) -> Callable[[int], str]:
    """A function that is given one token after the other, and returns what each adds to the text of those before.

    A character whose bytes are spread over tokens comes when it is whole.
    """
    tokens = before[-8:]  # some tokens read differently at the beginning of a text
    start, done = 0, len(tokens)

    def add(token: int) -> str:
        nonlocal start, done
        if token >= tokenizer.n_vocab:  # a vocabulary padded to a multiple of 64: never trained, nor text
            return ""
        tokens.append(token)
        old, new = tokenizer.decode(tokens[start:done]), tokenizer.decode(tokens[start:])
        if new.endswith("\ufffd") and len(tokens) - done < 4:  # UTF-8 has at most four bytes
            return ""
        start, done = done, len(tokens)
        return new[len(old) :]

    return add


def stream(
    model: Hymba, tokenizer: tiktoken.Encoding | ReleasedTokenizer, prompt: str, max_new_tokens: int, **options
) -> str:
    """Print the prompt and its continuation piece by piece, up to the end of the text, and return both.

    options go to Hymba.generate.
    """
    text = prompt
    print(prompt, end="", flush=True)
    tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    add = decoder(tokenizer, tokens)
    for (token,) in model.generate([tokens], max_new_tokens, stop=stops(tokenizer), **options):
        text += (piece := add(token))
        print(piece, end="", flush=True)
    print()
    return text


def chat_template(folder: Path) -> Callable[[list[dict]], str]:
    """A released model's chat template: a function from messages ({"role", "content"}) to the text the model continues.

    Raises ValueError if there is none, if it refuses the messages, or, with the line to install, without jinja2.
    """
    config, file = read_json(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
    source = file.read_text() if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {template["name"]: template["template"] for template in source}.get("default")
    if not source:
        raise ValueError(f"{folder} has no chat template, so it was not trained to chat: use --prompt")
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # templates are downloaded code
    except ImportError:
        raise ValueError("--chat needs a package that is missing: pip install jinja2") from None

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(  # as transformers sets it up
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name) or ""
        environment.globals[name] = token["content"] if isinstance(token, dict) else token

    def render(messages: list[dict]) -> str:
        try:
            return environment.from_string(source).render(messages=messages, add_generation_prompt=True)
        except jinja2.TemplateError as e:
            raise ValueError(f"the chat template of {folder}: {e}") from None

    render([{"role": "user", "content": "Hello"}])  # whatever is wrong with it shows before the model is loaded
    return render


def chat(
    model: Hymba, tokenizer: ReleasedTokenizer, render: Callable, max_new_tokens: int, seed: int = 0, **options
) -> None:
    """A conversation in the terminal, until an empty line or Ctrl-D. Ctrl-C stops an answer.

    The cache is kept between turns, and reads only what each turn adds. An SSM state cannot take tokens back: where the
    conversation does not begin with the tokens in the cache (the template drops or changes what was said before, or the
    tokens of an answer are not those that its text is cut into), all of it is read again. options go to Hymba.generate.
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
        if cache is None or tokens[:-1][: len(seen)] != seen:  # one token at least must be new
            if seen:
                print("[reading the whole conversation again: nothing is lost but time]", file=sys.stderr)
            cache, seen = model.new_cache(1, len(tokens) + max_new_tokens), []
        answer, text, add = [], "", decoder(tokenizer, tokens)
        try:
            new = [tokens[len(seen) :]]
            for (token,) in model.generate(new, max_new_tokens, seed=seed + len(messages), cache=cache, **options):
                if token in stops(tokenizer):
                    break
                answer.append(token)
                text += (piece := add(token))
                print(piece, end="", flush=True)
            seen = (tokens + answer)[: int(cache.pos) - model.config.n_meta]
            status = f"[cache: {cache.nbytes / 1e6:,.1f} MB, {len(seen):,} tokens]"
        except KeyboardInterrupt:  # some blocks may have seen a token that others have not
            cache, seen, status = None, [], "[stopped: the next turn reads the whole conversation again]"
        print()
        print(status, file=sys.stderr)
        messages.append({"role": "assistant", "content": text})


def write_jsonl(
    model: Hymba,
    tokenizer: tiktoken.Encoding | ReleasedTokenizer,
    prompts: list[str],
    batch_size: int,
    max_new_tokens: int,
    **options,
) -> None:
    """Print {"prompt": ..., "text": ...} for every prompt, in order, as soon as it and those before it are done.

    text is the continuation alone. options go to Hymba.generate; prompt i draws from stream i in batches of any size.
    """
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        rows = [tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token] for prompt in batch]
        adds, texts, written = [decoder(tokenizer, row) for row in rows], ["" for _ in batch], 0
        for step in model.generate(rows, max_new_tokens, stop=stops(tokenizer), first_row=first, **options):
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
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device={name}: there is none here; leave it out or use {auto}") from None
    return device


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("sample.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--init_from", help="folder, or name on huggingface.co [the newest under out/]")
    parser.add_argument("--prompt", default="", help="text to continue [none: a new text]")
    parser.add_argument("--chat", action="store_true", help="talk to an instruction-tuned model")
    parser.add_argument("--n_samples", type=int, default=1)
    parser.add_argument("--file", type=Path, help="continue each line of a text file, and write JSON lines")
    parser.add_argument("--batch_size", type=int, default=64, help="--file: prompts at a time [64]")
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token [0.8]")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens [all]")
    parser.add_argument("--top_p", type=float, help="draw from the likeliest that reach probability p [all]")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights [bfloat16 on cuda, else the checkpoint's]"
    )
    args = parser.parse_args(argv)
    check_sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p)  # before the model is loaded
    if args.n_samples < 1:
        raise ValueError(f"n_samples={args.n_samples}: must be 1 or more")
    if args.file:
        try:
            prompts = [line for line in args.file.read_text(encoding="utf-8-sig").split("\n") if line]
        except UnicodeDecodeError as e:
            raise ValueError(f"{args.file} is not UTF-8 text: {e}") from None
        if not prompts:
            raise ValueError(f"{args.file} is empty: write one prompt a line")
        if args.batch_size < 1 or args.prompt or args.n_samples > 1 or args.chat:
            raise ValueError("--file goes with a --batch_size of 1 or more, without --prompt, --n_samples and --chat")
    if args.chat and (args.prompt or args.n_samples > 1):
        raise ValueError("--chat goes without --prompt and --n_samples: it asks for what to answer")
    runs = sorted(Path("out").glob("*/*/model.safetensors"), key=lambda f: f.stat().st_mtime)
    if not args.init_from and not runs:
        raise ValueError("no checkpoint under out/: run python train.py first, or pass --init_from=FOLDER")
    newest = runs and [f.parent for f in runs if f.parts[:2] == runs[-1].parts[:2]]  # of the newest run
    device = pick_device(args.device)
    name = args.init_from or min(newest)  # best before last
    folder = pretrained_folder(name, weights=False)
    spec = read_json(folder / "config.json").get("tokenizer")  # of train.py's checkpoints
    tokenizer = prepare.load_tokenizer(spec, folder) if spec else ReleasedTokenizer(folder)
    render = chat_template(folder) if args.chat else None
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else None)
    model = Hymba.from_pretrained(name, dtype and getattr(torch, dtype), device).eval()
    print(f"{folder}: {model.config.pattern}, {model.num_params():,} parameters, on {device}", file=sys.stderr)
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.chat:
        return chat(model, tokenizer, render, args.max_new_tokens, seed=args.seed, **options)
    if args.file:
        return write_jsonl(model, tokenizer, prompts, args.batch_size, args.max_new_tokens, seed=args.seed, **options)
    for i in range(args.n_samples):
        if i:
            print("-" * 80)
        stream(model, tokenizer, args.prompt, args.max_new_tokens, seed=args.seed + i, **options)


if __name__ == "__main__":
    for terminal in (sys.stdin, sys.stdout):  # a character that it cannot show is a ?
        terminal.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"sample.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
