"""llama.cpp in a child process: what aborts, hangs or disagrees there never takes the notebook with it.

`LlamaChild` is the parent's side. The child is kit.gguf.worker: it reads one JSON
request per line on stdin and writes JSON lines on stdout, each carrying the request's number.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from kit.common.errors import GateError, KitError
from kit.common.paths import PROJECT

Message = dict[str, str]
TROUBLE = (("error", "what():", "assert", "out of memory", "no space"), ("failed", "exception", "invalid"))


def child_command(*arguments: str) -> list[str]:
    """The command line that starts this module as a child."""
    return [sys.executable, "-m", "kit.gguf.worker", *arguments]


def child_environment() -> dict[str, str]:
    """This process's environment, with the folder that holds `kit` on the child's import path."""
    home = str(PROJECT)
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


def last_trouble(log: str) -> str:
    """The last line that names an error, else one that speaks of failing, else the last line, else ''."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for words in TROUBLE:  # the cause before its consequences ("failed to load model")
        if told := [line for line in lines if any(word in line.lower() for word in words)]:
            return told[-1][:500]
    return (lines or [""])[-1][:500]


def how_it_ended(returncode: int) -> str:
    """'killed by SIGABRT' or 'exit code 1'."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


class LlamaChild:
    """A GGUF loaded by llama-cpp-python in a child process; use it in a `with` block.

    `seconds` is the longest silence allowed: loading, a token of a stream, any other answer. A child that dies,
    stays silent or reports an exception raises GateError with the cause; leaving the block always ends the child.
    `template_kwargs` (such as enable_thinking) go to the chat template; `logits=True` is needed for `logprobs`.
    """

    def __init__(self, gguf: Path, n_ctx: int = 2048, seconds: float = 120, logits: bool = False,
                 template_kwargs: dict[str, Any] | None = None) -> None:
        self.gguf = Path(gguf)
        self.seconds = seconds
        self.finish_reason = ""
        self._load = {"gguf": str(self.gguf), "n_ctx": n_ctx, "logits": logits,
                      "template_kwargs": template_kwargs or {}}
        self._process: subprocess.Popen[str] | None = None
        self._number = 0

    def __enter__(self) -> Self:
        if not self.gguf.is_file():
            raise KitError(f"no GGUF at {self.gguf}", "export one first (gguf=[q8_0]), or give its path")
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self._lines: queue.Queue[str | None] = queue.Queue()
        try:
            self._process = subprocess.Popen(
                child_command("serve"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
                encoding="utf-8", env=child_environment())
            threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
            self._ask("load", **self._load)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the child, if there is one, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                try:
                    if pipe:
                        pipe.close()
                except OSError:  # a request that the dead child never read
                    pass
            self._process = None
        if hasattr(self, "_stderr"):
            self._stderr.close()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._running().pid

    def tokenize(self, text: str, special: bool = True, add_bos: bool = False) -> list[int]:
        """Token ids of `text`; `special` reads control tokens written in it as such."""
        return self._ask("tokenize", text=text, special=special, add_bos=add_bos)

    def render(self, messages: list[Message], template_kwargs: dict[str, Any] | None = None) -> str:
        """The prompt that the GGUF's own chat template makes, up to where the answer begins."""
        return self._ask("render", messages=messages, template_kwargs=template_kwargs or {})

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The token ids llama-cpp-python feeds for a chat completion of `messages`."""
        return self._ask("prompt_ids", messages=messages)

    def stream(self, messages: list[Message], max_new_tokens: int, temperature: float = 0.0,
               **sampling: Any) -> Iterator[str]:
        """Text pieces of one answer; afterwards `finish_reason` is 'stop' or 'length'.

        `sampling` are keywords of llama-cpp-python's create_chat_completion (top_p, top_k, seed, ...).
        """
        self.finish_reason = ""
        number = self._send("stream", messages=messages, max_tokens=max_new_tokens, temperature=temperature,
                            **sampling)
        while True:
            piece = self._receive(number)
            if "finish_reason" in piece:
                self.finish_reason = piece["finish_reason"]
                return
            yield piece["text"]

    def answer(self, messages: list[Message], max_new_tokens: int) -> tuple[str, str]:
        """The greedy answer and its finish reason ('stop' or 'length')."""
        return "".join(self.stream(messages, max_new_tokens)), self.finish_reason

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """Natural log probabilities of the next token after each id: float32 (len(ids), vocabulary)."""
        return self._evaluate(ids, list(range(len(ids))), None)["all"]

    def said(self, ids: list[int], where: list[int], top_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the model holds of the token after each of the n places `where` in `ids`.

        `top_ids` (n, k) are tokens of interest: returned are their natural log probabilities (n, k), the likeliest
        token (n), and the log probability of the token that really follows (n).
        """
        found = self._evaluate(ids, where, top_ids)
        return found["top"], found["best"], found["next"]

    def _evaluate(self, ids: list[int], where: list[int], top_ids: np.ndarray | None) -> dict[str, np.ndarray]:
        if not self._load["logits"]:
            raise KitError("this child keeps no logits", "open it with LlamaChild(..., logits=True)")
        with tempfile.TemporaryDirectory(prefix="kit-logprobs-") as folder:
            asked, file = Path(folder) / "top.npy", Path(folder) / "logprobs.npz"
            if top_ids is not None:
                np.save(asked, top_ids)
            self._ask("evaluate", ids=list(map(int, ids)), where=where, file=str(file),
                      top="" if top_ids is None else str(asked))
            with np.load(file) as arrays:
                return dict(arrays)

    def metadata(self) -> dict[str, str]:
        """The GGUF's key-value pairs, arrays left out, every value as text."""
        return self._ask("metadata")

    def ends(self) -> dict[str, Any]:
        """`eos` and `eot` (token ids, -1 for none), and `add_bos`: whether a BOS is put before every prompt."""
        return self._ask("ends")

    def _ask(self, method: str, **arguments: Any) -> Any:
        return self._receive(self._send(method, **arguments))["result"]

    def _send(self, method: str, **arguments: Any) -> int:
        pipe = self._running().stdin
        assert pipe is not None
        self._number += 1
        self._said_before = os.fstat(self._stderr.fileno()).st_size
        line = json.dumps({"id": self._number, "method": method, "arguments": arguments})
        try:
            pipe.write(line + "\n")
            pipe.flush()
        except OSError:  # the child is gone: _receive says how it ended
            pass
        return self._number

    def _receive(self, number: int) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.get(timeout=self.seconds)
            except queue.Empty:
                raise self._failed(f"no answer within {self.seconds:g} seconds",
                                   "allow more seconds, a smaller n_ctx, or a smaller quantisation") from None
            if line is None:
                ended = how_it_ended(self._running().wait())
                raise self._failed(f"llama.cpp died ({ended})",
                                   "the file or its tokenizer is broken: run the export again")
            reply = json.loads(line)
            if reply["id"] != number:  # left over from a stream that the caller broke off
                continue
            if "error" in reply:
                raise self._failed(reply["error"], "raise n_ctx or shorten the prompt"
                                   if "context window" in reply["error"] else "run the export again")
            return reply

    def _failed(self, cause: str, hint: str) -> GateError:
        """The error to raise, with llama.cpp's own last words; the child is ended."""
        self._stderr.seek(self._said_before)
        said = last_trouble(self._stderr.read().decode("utf-8", "replace"))
        self.close()
        return GateError(f"{self.gguf.name}: {cause}" + (f"; llama.cpp said: {said}" if said else ""), hint)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise KitError("the llama.cpp child is not running", "use LlamaChild in a `with` block")
        return self._process

    def _listen(self, pipe: IO[str]) -> None:
        """Pass the child's lines on, then None when it has ended (a thread, so that waiting can time out)."""
        lines = self._lines
        try:
            for line in pipe:
                lines.put(line)
        except (OSError, ValueError):  # closed by `close`
            pass
        lines.put(None)
