"""
A model as lm-evaluation-harness wants one (https://github.com/EleutherAI/lm-evaluation-harness), an optional extra:

    pip install lm_eval
    python evaluate.py harness --init_from=out/tiny --tasks=piqa,lambada_openai

The harness downloads its tasks' data, unless --include names a folder with tasks of your own.
"""

import importlib.util
from itertools import groupby

import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine import Engine
from model import Hymba
from tokenizer import Tokenizer, detokenizer, encode_piece, stops

AT_ONCE, TEXTS = 16384, 32  # tokens in one forward pass, and texts that are continued together


def check_installed() -> None:
    """Raise ValueError with the line to install if the harness is missing."""
    if not importlib.util.find_spec("lm_eval"):
        raise ValueError("the task harness needs a package that is missing: pip install lm_eval")


def adapter(model: Hymba, tokenizer: Tokenizer, length: int = 0):
    """The model as the harness wants one: a TemplateLM, with the methods that this class asks for. Of what is longer
    than `length` tokens (0: block_size), the model reads the end."""
    check_installed()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    length, device = length or model.config.block_size, model.embed.weight.device

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.eot_token

        def tok_encode(self, string, add_special_tokens=None, **_):
            piece = add_special_tokens is False
            return encode_piece(tokenizer, string) if piece else tokenizer.encode_ordinary(string)

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
            """Of each request (text, tokens of the context, tokens of the answer): the answer's log-likelihood, and
            whether greedy decoding gives it."""
            rows = [(context + answer)[-length - 1 :] for _, context, answer in requests]
            results, left = [(0.0, True)] * len(rows), sorted(range(len(rows)), key=lambda i: len(rows[i]))
            bar = tqdm(total=len(rows), desc="likelihoods", leave=False, disable=disable_tqdm or None)
            while left:  # the longest first, with others of about that length: rows are filled up on the right
                n = max(1, AT_ONCE // len(rows[left[-1]]))
                now, left = left[-n:], left[:-n]
                idx = torch.zeros(len(now), len(rows[now[-1]]), dtype=torch.long)
                asked = torch.zeros_like(idx, dtype=torch.bool)
                for b, i in enumerate(now):
                    idx[b, : len(rows[i])] = torch.tensor(rows[i])
                    asked[b, max(1, len(rows[i]) - len(requests[i][2])) : len(rows[i])] = True
                idx, asked = idx.to(device), asked[:, 1:].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=idx.is_cuda):
                    x = model.hidden(idx[:, :-1])[asked].to(model.output.dtype)
                scores = []
                for piece, target in zip(x.split(1024), idx[:, 1:][asked].split(1024), strict=True):
                    logits = F.linear(piece, model.output).float()
                    log_p = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
                    scores.append(torch.stack([log_p, (logits.argmax(-1) == target).float()]).cpu())
                parts = torch.cat(scores, dim=1).double().split(asked.sum(1).tolist(), dim=1)
                for i, (log_p, greedy) in zip(now, parts, strict=True):
                    results[i] = log_p.sum().item(), bool(greedy.all())
                bar.update(len(now))
            bar.close()
            return results

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            pieces, counts = [], []
            for request in requests:
                tokens = encode_piece(tokenizer, request.args[0])
                windows = map(make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, length, 1))
                new = [("", context, answer) for context, answer in windows]
                pieces, counts = pieces + new, [*counts, len(new)]
            scores = iter(self._loglikelihood_tokens(pieces, disable_tqdm))
            return [sum(next(scores)[0] for _ in range(n)) for n in counts]

        def generate_until(self, requests, disable_tqdm=False):
            engine, texts = Engine(model), []
            bar = tqdm(total=len(requests), desc="texts", leave=False, disable=disable_tqdm or None)
            for options, group in groupby((request.args for request in requests), lambda args: args[1]):
                contexts = [context for context, _ in group]
                for i in range(0, len(contexts), TEXTS):
                    texts += continue_until(engine, tokenizer, contexts[i : i + TEXTS], length, options)
                    bar.update(len(texts) - bar.n)
            bar.close()
            return texts

    return Adapter()


def continue_until(engine: Engine, tokenizer: Tokenizer, contexts: list[str], length: int, options: dict) -> list[str]:
    """The continuation of each context up to the first of the texts options["until"], or the end of the text."""
    ends, n = options.get("until") or [], options.get("max_gen_toks", 256)
    ends = [ends] if isinstance(ends, str) else ends
    temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0.0
    rows = [tokenizer.encode_ordinary(c)[-max(1, length - n) :] or [tokenizer.eot_token] for c in contexts]
    adds, texts = [detokenizer(tokenizer, row) for row in rows], ["" for _ in rows]
    for step in engine.generate(rows, n, temperature, stop=stops(tokenizer)):
        for i, token in enumerate(step):
            texts[i] += "" if token is None else adds[i](token)
        if all(token is None or any(end in text for end in ends) for token, text in zip(step, texts, strict=True)):
            break
    return [min((text.partition(end)[0] for end in ends), key=len, default=text) for text in texts]


def results(
    model: Hymba, tokenizer: Tokenizer, tasks: list[str], length: int = 0, limit: int | None = None,
    shots: int | None = None, include: str | None = None,
) -> dict:  # fmt: skip
    """What the harness says of its tasks, called by name: {task: {metric: value}}. limit: documents of each task;
    shots: examples in front of each; include: a folder with tasks of your own. ValueError for an unknown task."""
    model_here = adapter(model, tokenizer, length)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"--tasks: lm-evaluation-harness knows no {', '.join(unknown)}; lm-eval ls tasks names all")
    options = dict(num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=1000, log_samples=False)
    found = simple_evaluate(model_here, tasks=tasks, **options)["results"]
    return {
        task: {k.removesuffix(",none"): v for k, v in values.items() if isinstance(v, int | float)}
        for task, values in found.items()
    }
