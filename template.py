"""
A chat template of a released model, in a process of its own: it is downloaded code, and whatever it does (errors, loops
without end, gigabytes) ends with this process. `render` is the function to call; the rest runs in the process.
"""

import json
import subprocess
import sys
from datetime import datetime

SECONDS, BYTES = 10, 2**29  # that a template may take; 2**29 is ten times what Python and jinja2 need


def render(source: str, tokens: dict[str, str], messages: list[dict]) -> str:
    """The text of messages ({"role", "content"}) up to the beginning of an answer. tokens are bos_token and the like.

    Raises ValueError with the template's error.
    """
    task = json.dumps([source, tokens, messages]).encode()
    try:
        done = subprocess.run([sys.executable, __file__], input=task, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"it took more than {SECONDS} seconds") from None
    try:
        kind, text = json.loads(done.stdout)
    except ValueError:
        raise ValueError(f"it ended with status {done.returncode}") from None
    if kind == "error":
        raise ValueError(text)
    return text


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except (ImportError, ValueError, OSError):  # Windows has no such limits; the time is limited all the same
        pass
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    source, tokens, messages = json.loads(sys.stdin.buffer.read())
    try:
        environment = ImmutableSandboxedEnvironment(  # with the settings of transformers
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime} | tokens
        text = environment.from_string(source).render(messages=messages, add_generation_prompt=True)
        if len(text) > 30_000 + 4 * sum(len(m["content"]) for m in messages):
            raise jinja2.TemplateError(f"it made {len(text):,} characters")
        print(json.dumps(["text", text]))
    except MemoryError:
        print(json.dumps(["error", "it needs too much memory"]))
    except jinja2.TemplateError as e:
        print(json.dumps(["error", f"{e}"[:500]]))
    except Exception as e:
        print(json.dumps(["error", f"{type(e).__name__}: {e}"[:500]]))


if __name__ == "__main__":
    main()
