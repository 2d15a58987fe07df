"""The adapter of lm-evaluation-harness, through the harness's own code, on tasks that are files. Skipped without it."""

import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from released import write_chat_tokenizer
from runs import ROOT

import evaluate
import harness
from conftest import small
from model import Hymba
from tokenizer import ReleasedTokenizer, load_tokenizer

TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n",
    "words": "output_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: ' {{choices[answer]}}'\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
    "metric_list: [{metric: byte_perplexity}]\n",
    "writing": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[answer]}}'\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n",
}
DOCS = [
    {"question": "the fox", "choices": ["jumps", "is not here", "a"], "answer": 0},
    {"question": "one and two are", "choices": ["three", "nothing", "b"], "answer": 1},
    {"question": "a cat sat on the mat and then it went away", "choices": ["to sleep", "home", "c"], "answer": 2},
]


@pytest.fixture
def tasks(tmp_path):
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in TASKS.items():
        data = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(f"task: local_{name}\n{data}{text}target_delimiter: ' '\n")
    return folder


def log_p(model, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """Of one text, read whole: the log-likelihood of its end, and whether it is the likeliest, token by token."""
    logits = model(torch.tensor([context + answer]))
    logits = getattr(logits, "logits", logits)[0, len(context) - 1 : -1]
    sums = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
    return sums, logits.argmax(-1).tolist() == answer


@torch.no_grad()
def test_tasks_in_files(tasks, monkeypatch):
    """Four kinds of tasks, against each text read whole by the model."""
    model, tokenizer = small("hMT", vocab_size=257, block_size=64), load_tokenizer("bytes", ".")
    found = harness.results(model, tokenizer, [f"local_{name}" for name in TASKS], include=str(tasks))
    right, logs = 0, []
    for doc in DOCS:
        context = list(doc["question"].encode())
        choices = [log_p(model, context, list(f" {c}".encode())) for c in doc["choices"]]
        right += max(range(3), key=lambda i: choices[i][0]) == doc["answer"]
        logs.append(choices[doc["answer"]][0])
    share = right / 3
    assert abs(found["local_choice"]["acc"] - share) < 1e-9
    assert abs(found["local_choice"]["acc_stderr"] - (share * (1 - share) / 2) ** 0.5) < 1e-6
    assert abs(found["local_words"]["perplexity"] / math.exp(-sum(logs) / 3) - 1) < 1e-4
    texts = [list(doc["question"].encode()) for doc in DOCS]
    whole = sum(log_p(model, [256], text)[0] for text in texts)
    expected = math.exp(-whole / sum(map(len, texts)))
    assert abs(found["local_rolling"]["byte_perplexity"] / expected - 1) < 1e-4
    assert found["local_writing"]["exact_match"] == 0
    with pytest.raises(ValueError, match="lm-evaluation-harness knows no nothing_here"):
        harness.results(model, tokenizer, ["nothing_here"], include=str(tasks))
    monkeypatch.setattr(evaluate, "open_inputs", lambda *args: None)
    with pytest.raises(ValueError, match="knows no nothing_here;"):  # before a model is loaded
        evaluate.main(["harness", "nowhere", "--tasks=local_choice,nothing_here,", f"--include={tasks}"])
    with pytest.raises(ValueError, match="the task harness needs names"):
        evaluate.main(["harness", "nowhere", "--tasks=,"])


def request(*args):
    return types.SimpleNamespace(args=args)


@torch.no_grad()
def test_likelihoods_of_long_texts_and_of_texts_together(tasks, monkeypatch):
    """A text that is too long is read from its end, or rolled over; batches of any size give the same."""
    model, tokenizer = small("hT", vocab_size=257), load_tokenizer("bytes", ".")
    adapter = harness.adapter(model, tokenizer, length=20)
    pairs = [("a" * 50 + "b", "cd"), ("x", "yz"), ("", "abc"), ("some words", " and" * 5), (" ", "abc")]
    expected = []
    for context, answer in pairs:
        n = len(answer) + (context == " ")  # the harness counts a space before an answer in
        tokens = ([256] if not context.strip() else []) + list((context + answer).encode())
        expected.append(log_p(model, tokens[-21:-n], tokens[-n:]))
    for at_once in (1, 60, 16384):
        monkeypatch.setattr(harness, "PREFILL", at_once)
        for (a, greedy), (b, same) in zip(adapter.loglikelihood([request(*p) for p in pairs]), expected, strict=True):
            assert abs(a - b) < 1e-3 and greedy == same
    with pytest.raises(ValueError, match="--length=20: a task has an answer of 21 tokens"):
        adapter.loglikelihood([request("x", "y" * 21)])
    text = bytes(range(60, 115))
    rolled = adapter.loglikelihood_rolling([request(text.decode()), request("ab")])
    rows = [256, *text]
    first = log_p(model, rows[:1], rows[1:21])[0] + log_p(model, rows[20:21], rows[21:41])[0]
    last = log_p(model, rows[35:41], rows[41:])[0]
    assert abs(rolled[0] - first - last) < 1e-3


@torch.no_grad()
def test_texts_that_are_written(tasks):
    """Greedy, up to a word, to the end of the text, or so many tokens; several at a time as each alone."""
    model, tokenizer = small("hM", vocab_size=257, block_size=64), load_tokenizer("bytes", ".")
    adapter = harness.adapter(model, tokenizer)
    contexts = ["one", "a longer context", "", "two", "x" * 70]
    read = [list(c.encode())[-52:] or [256] for c in contexts]  # of what is too long, the end
    full = [bytes(t for t in model.generate(row, 12, temperature=0) if t < 256) for row in read]
    full = [text.decode(errors="replace") for text in full]
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    write = lambda c, **more: adapter.generate_until([request(c, options | more)])[0]  # noqa: E731
    written = adapter.generate_until([request(c, options) for c in contexts])
    for a, b in zip(written, full, strict=True):  # a character that is not complete at the end is left out
        assert len(a) > 4 and b.startswith(a) and set(b[len(a) :]) <= {"\ufffd"} and len(b) - len(a) < 4
    for context, text in zip(contexts, written, strict=True):
        for n in (1, 2, 3):  # characters
            assert write(context, until=[text[3 : 3 + n], "", "nowhere"]) == text.partition(text[3 : 3 + n])[0]
    for name in ("max_new_tokens", "max_tokens"):
        assert write("one", max_gen_toks=None, **{name: 5}) == write("one", max_gen_toks=5)
    with pytest.raises(ValueError, match="--length=64: a task writes up to 64 tokens; give more than that"):
        write("one", max_gen_toks=64)
    drawn = {"until": [], "max_gen_toks": 12, "temperature": 1.0}
    texts = adapter.generate_until([request("one", drawn) for _ in range(2 * harness.TEXTS)])
    assert len(set(texts)) == 2 * harness.TEXTS  # all repeats differ
    sure = {"do_sample": True, "top_k": 1}
    assert write("one", **sure) == write("one", top_p=1e-6, do_sample=True) == written[0]


@torch.no_grad()
def test_against_transformers(tasks, tmp_path, monkeypatch):
    """Log-likelihoods of a random Llama, with a tokenizer that begins every text with <s>."""
    tr = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    for module in (tr.utils, tr.utils.import_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda *args: False)
    folder = write_chat_tokenizer(tmp_path, merges=20)
    tokenizer = ReleasedTokenizer(folder)
    c = tr.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1)  # fmt: skip
    torch.manual_seed(0)
    theirs = tr.LlamaForCausalLM(c).eval()
    for p in theirs.parameters():
        p.normal_(std=0.2) if p.dim() > 1 else None
    theirs.save_pretrained(folder)
    adapter = harness.adapter(Hymba.from_pretrained(folder), tokenizer)
    pairs = [(doc["question"], " " + choice) for doc in DOCS for choice in doc["choices"]]
    for (context, answer), (score, greedy) in zip(
        pairs, adapter.loglikelihood([request(*p) for p in pairs]), strict=True
    ):
        both, first = tokenizer.encode_ordinary(context + answer), tokenizer.encode_ordinary(context)
        assert both[0] == 0 and both[: len(first)] == first
        expected, same = log_p(theirs, first, both[len(first) :])
        assert abs(score - expected) < 1e-3 and greedy == same
    (rolled,), ((alone, _),) = (f([request(*a)]) for f, a in (
        (adapter.loglikelihood_rolling, ("the fox",)), (adapter.loglikelihood, ("", "the fox"))
    ))  # fmt: skip
    whole = tokenizer.encode_ordinary("the fox")
    assert abs(rolled - log_p(theirs, whole[:1], whole[1:])[0]) < 1e-3 and abs(rolled - alone) < 1e-6


def test_tasks_that_import_a_package_called_evaluate(tasks, tmp_path):
    """As many of the harness's own do: they find the package, and not this repository's file."""
    (tmp_path / "packages/evaluate").mkdir(parents=True)
    (tmp_path / "packages/evaluate/__init__.py").write_text("def load(name): return name\n")
    (tasks / "helper.py").write_text("import evaluate\n\ndef text(doc): return evaluate.load(doc['question'])\n")
    file = tasks / "choice.yaml"
    file.write_text(file.read_text().replace("'{{question}}'", "!function helper.text"))
    small("hM", vocab_size=257, block_size=64).save_pretrained(tmp_path / "model", tokenizer="bytes")
    flags = [f"--init_from={tmp_path / 'model'}", "--tasks=local_choice", f"--include={tasks}", "--device=cpu"]
    command = [sys.executable, ROOT / "evaluate.py", "harness", *flags]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "packages"), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0 and "local_choice" in done.stdout, done.stderr


def test_harness_command(tasks, tmp_path, capsys):
    model = small("hM", vocab_size=257, block_size=64)
    model.save_pretrained(tmp_path / "model", tokenizer="bytes")
    flags = ["--tasks=local_choice,local_writing", f"--include={tasks}", "--limit=2", "--device=cpu"]
    evaluate.main(["harness", f"--init_from={tmp_path / 'model'}", *flags])
    result = json.loads((tmp_path / "model_harness.json").read_text())["models"][str(tmp_path / "model")]
    assert set(result["tasks"]) == {"local_choice", "local_writing"} and "acc" in result["tasks"]["local_choice"]
    assert "local_choice" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the task harness needs names: --tasks="):
        evaluate.main(["harness", f"--init_from={tmp_path / 'model'}", "--device=cpu"])
