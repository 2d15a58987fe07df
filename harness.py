"""
A model as lm-evaluation-harness wants one (https://github.com/EleutherAI/lm-evaluation-harness), an optional extra:

    pip install lm_eval
    python evaluate.py harness --init_from=out/tiny --tasks=piqa,lambada_openai

The harness downloads its tasks' data, unless --include names a folder with tasks of your own.
"""

import importlib.util
from functools import cache
from itertools import groupby

import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine import PREFILL, Engine, final_states
from model import Hymba
from tokenizer import Tokenizer, detokenizer, encode_piece, stops

TEXTS = 32  # that are continued together


def check_installed() -> None:
    """Raise ValueError with the line to install if the harness is missing."""
    if not importlib.util.find_spec("lm_eval"):
        raise ValueError("the task harness needs a package that is missing: pip install lm_eval")


def adapter(model: Hymba, tokenizer: Tokenizer, length: int = 0):
    """The model as the harness wants one: a TemplateLM, with the methods that this class asks for. Of a context that is
    too long for `length` tokens (0: block_size), the model reads the end; for an answer that is, ValueError."""
    check_installed()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    length, device = length or model.config.block_size, model.embed.weight.device

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.eot_token
        prefix_token_id = first_token(tokenizer)  # stands before a text that has no context

        def tok_encode(self, string, add_special_tokens=None, **_):
            piece = add_special_tokens is False
            return encode_piece(tokenizer, string) if piece else tokenizer.encode_ordinary(string)

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
            """Of each request (text, tokens of the context, tokens of the answer): the answer's log-likelihood, and
            whether greedy decoding gives it."""
            if (most := max((len(answer) for *_, answer in requests), default=0)) > length:
                raise ValueError(f"--length={length}: a task has an answer of {most:,} tokens; give as many")
            rows = [((context or [self.prefix_token_id]) + answer)[-length - 1 :] for _, context, answer in requests]
            results, left = [(0.0, True)] * len(rows), sorted(range(len(rows)), key=lambda i: len(rows[i]))
            bar = tqdm(total=len(rows), desc="likelihoods", leave=False, disable=disable_tqdm or None)
            while left:  # the longest first, with others of about that length: rows are filled up on the right
                n = max(1, PREFILL // len(rows[left[-1]]))
                now, left = left[-n:], left[:-n]
                idx = torch.zeros(len(now), len(rows[now[-1]]), dtype=torch.long)
                asked = torch.zeros_like(idx, dtype=torch.bool)
                for b, i in enumerate(now):
                    idx[b, : len(rows[i])] = torch.tensor(rows[i])
                    asked[b, len(rows[i]) - len(requests[i][2]) : len(rows[i])] = True
                idx, asked = idx.to(device), asked[:, 1:].to(device)
                x, scores = final_states(model, idx[:, :-1])[asked], []
                for piece, target in zip(x.split(1024), idx[:, 1:][asked].split(1024), strict=True):
                    logits = F.linear(piece.float(), model.output.float())  # in bfloat16, many would be equal
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
                pieces += new
                counts.append(len(new))
            scores = iter(self._loglikelihood_tokens(pieces, disable_tqdm))
            return [sum(next(scores)[0] for _ in range(n)) for n in counts]

        def generate_until(self, requests, disable_tqdm=False):
            engine, texts = Engine(model), []
            bar = tqdm(total=len(requests), desc="texts", leave=False, disable=disable_tqdm or None)
            for options, group in groupby((request.args for request in requests), lambda args: args[1]):
                contexts = [context for context, _ in group]
                for i in range(0, len(contexts), TEXTS):
                    some = contexts[i : i + TEXTS]
                    texts += continue_until(engine, tokenizer, some, length, options, first_row=len(texts))
                    bar.update(len(texts) - bar.n)
            bar.close()
            return texts

    return Adapter()


def first_token(tokenizer: Tokenizer) -> int:
    """The token that begins every text, or else the one that ends it and so stands between texts."""
    return (tokenizer.encode_ordinary("") or [tokenizer.eot_token])[0]


def continue_until(
    engine: Engine, tokenizer: Tokenizer, contexts: list[str], length: int, options: dict, first_row: int = 0
) -> list[str]:
    """The continuation of each context up to the first of the texts options["until"], or the end of the text. The
    other options are those of the harness's tasks. Texts are drawn as rows first_row, first_row + 1, ... (Engine)."""
    ends, names = options.get("until") or [], ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    ends = [end for end in ([ends] if isinstance(ends, str) else ends) if end]
    n = next((options[name] for name in names if options.get(name) is not None), 256)
    if n >= length:
        raise ValueError(f"--length={length}: a task writes up to {n} tokens; give more than that, and its questions")
    draw = options.get("do_sample", options.get("temperature", 0) > 0)
    choice = (options.get("temperature", 1.0) if draw else 0.0), options.get("top_k") or None, options.get("top_p")
    rows = [tokenizer.encode_ordinary(c)[n - length :] or [first_token(tokenizer)] for c in contexts]
    adds, texts = [detokenizer(tokenizer, row) for row in rows], ["" for _ in rows]
    for step in engine.generate(rows, n, *choice, stop=stops(tokenizer), first_row=first_row):
        for i, token in enumerate(step):
            texts[i] += "" if token is None else adds[i](token)
        if all(token is None or any(end in text for end in ends) for token, text in zip(step, texts, strict=True)):
            break
    return [min((text.partition(end)[0] for end in ends), key=len, default=text) for text in texts]


@cache  # reading all of its tasks takes seconds
def task_manager(include: str | None = None):
    """The harness's own, of its tasks and those in a folder."""
    check_installed()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def known_tasks(tasks: list[str], include: str | None = None) -> list[str]:
    """The tasks called by name or pattern. Raises ValueError if one is unknown."""
    manager = task_manager(include)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"--tasks: lm-evaluation-harness knows no {', '.join(unknown)}; lm-eval ls tasks names all")
    return manager.match_tasks(tasks)


def results(
    model: Hymba, tokenizer: Tokenizer, tasks: list[str], length: int = 0, limit: int | None = None,
    shots: int | None = None, include: str | None = None,
) -> dict:  # fmt: skip
    """What the harness says of its tasks, called by name: {task: {metric: value}}. limit: documents of each task;
    shots: examples in front of each; include: a folder with tasks of your own. ValueError for an unknown task."""
    model_here, names = adapter(model, tokenizer, length), known_tasks(tasks, include)
    from lm_eval import simple_evaluate

    options = dict(num_fewshot=shots, limit=limit, bootstrap_iters=1000, log_samples=False)
    found = simple_evaluate(model_here, tasks=names, task_manager=task_manager(include), **options)["results"]
    return {
        task: {k.removesuffix(",none"): v for k, v in values.items() if isinstance(v, int | float)}
        for task, values in found.items()
    }
