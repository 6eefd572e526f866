"""A chat template tried out under limits: it is a program that comes with a model, and may loop or grow without end.

Run as `python -m kit.gguf.trial` with the template on stdin: what it prints is why the template can't be used, '' for
nothing. kit.gguf.templates is the parent's side; kit.gguf.worker, a process of its own too, uses the parts.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5  # of processor time; real templates take milliseconds
MEMORY = 512 * 2**20  # bytes besides what the process has; real templates take a few million
OVERTIME = f"the chat template takes more than {SECONDS} seconds"
OVERTIME_CODE = -getattr(signal, "SIGPROF", 256)  # how a process ends by `limited`
NO_REAL_ONE = "no real template does this: fetch the model from its maker"
# What a template may write beyond ten times the contents: tools and rules of real ones are below 50,000 characters.
OWN_CHARACTERS, TURN_CHARACTERS = 2**20, 1000

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why? 为什么？"}
ASSISTANT = {"role": "assistant", "content": "<think>\nA question.\n</think>\n\nBecause."}
TALKS = ([USER], [USER, ASSISTANT], [USER, ASSISTANT, USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT])
OPTIONS: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})


class BeyondLimits(ValueError):
    """A template needs more memory or writes more text than any real one; says which."""


class Generation(Extension):
    """transformers' own tag around what is trained: here what stands in it is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@contextmanager
def limited() -> Iterator[None]:
    """Bound what this process, which must not be the user's own, uses inside.

    More than MEMORY raises BeyondLimits; more than SECONDS ends the process by SIGPROF, whatever code is at work.
    Windows has neither limit, macOS only that of time.
    """
    if not hasattr(signal, "SIGPROF"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):  # no /proc, or a limit that may not be set
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
        most = int(pages) * os.sysconf("SC_PAGE_SIZE") + MEMORY
        soft = most if before[0] == resource.RLIM_INFINITY else min(most, before[0])
        resource.setrlimit(resource.RLIMIT_AS, (soft, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except MemoryError:
        raise BeyondLimits(f"the chat template needs more than {MEMORY >> 20} MB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, before)


def check_length(text: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise BeyondLimits for a rendering far longer than its conversation."""
    contents = sum(len(str(value)) for message in messages for value in message.values())
    if len(text) > OWN_CHARACTERS + TURN_CHARACTERS * len(messages) + 10 * contents:
        raise BeyondLimits(f"the chat template writes {len(text):,} characters for a conversation of {contents:,}")


def attempt(template: str) -> None:
    """Compile and render the template, in an environment like transformers' and llama-cpp-python's.

    Raises BeyondLimits, or ends the process. Whatever else is wrong with it, the one who renders it will say.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    with limited():
        try:
            compiled = environment.from_string(template)  # constants are worked out already here
        except MemoryError:
            raise
        except Exception:
            return
        for messages, prompt, options in product(TALKS, (False, True), OPTIONS):
            own = [{**message} for message in messages]  # a filter may write into the list
            try:
                text = compiled.render(messages=own, add_generation_prompt=prompt, bos_token="<s>",
                                       eos_token="</s>", tools=None, documents=None, raise_exception=_refuse,
                                       strftime_now=lambda form: datetime.now().strftime(form), **options)
            except MemoryError:
                raise
            except Exception:
                continue
            check_length(text, messages)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


if __name__ == "__main__":
    try:
        attempt(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    except BeyondLimits as error:
        print(error)
