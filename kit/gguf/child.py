"""llama.cpp in a child process: what aborts, hangs or disagrees there never takes the notebook with it.

`LlamaChild` is the parent's side. The child is kit.gguf.worker: it reads one JSON request per line on stdin and writes
JSON lines on stdout, each carrying the request's number.
"""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from kit.common.debug import debugging
from kit.common.errors import GateError, KitError
from kit.common.files import PROJECT
from kit.gguf.formats import chat_templates, read_header
from kit.gguf.messages import Message
from kit.gguf.trial import NO_REAL_ONE, OVERTIME, OVERTIME_CODE

# Silence that says nothing yet, in seconds, and the least that is done in a second of work. On two cores that others
# kept busy (load 6) the starter model, of 0.13e9 weights, was read at 1.0 to 1.3e10 weights x tokens per second in f16,
# bf16, q8_0 and q4_k_m; Colab's two answer with 4 to 5 tokens/s of a 4B model, 2e10, and read faster than that.
QUIET, WEIGHTS_PER_SECOND = 60.0, 4e9
BYTES_PER_SECOND = 25e6  # a disk over a network
PIECE_TOKENS = 8  # a character may take several tokens, and text comes by whole characters

WORKER = (sys.executable, "-m", "kit.gguf.worker")
TROUBLE = (("error", "what():", "assert", "out of memory", "no space"), ("failed", "exception", "invalid"))

BROKEN = "the file or its tokenizer is broken: run the export again"
HINTS = {"out of memory": 'CUDA_VISIBLE_DEVICES="" before the command answers on the CPU',
         "context window": "raise n_ctx or shorten the prompt", "the chat template needs": NO_REAL_ONE,
         "the chat template writes": NO_REAL_ONE}  # by words of the child's error


def allowed_seconds(weights: float, tokens: int = 0, file_bytes: int = 0, quiet: float = QUIET) -> float:
    """How long a child that works may be silent: it reads `tokens` with a model of `weights`, or loads a file."""
    return quiet + weights * tokens / WEIGHTS_PER_SECOND + file_bytes / BYTES_PER_SECOND


def child_environment() -> dict[str, str]:
    """This process's environment, with the folder that holds `kit` on the child's import path."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


def last_trouble(log: str) -> str:
    """The last line that names an error, else one that speaks of failing, else the last line, else ''."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for words in TROUBLE:  # the cause before its consequences ("failed to load model")
        for line in reversed(lines):
            if any(word in line.lower() for word in words):
                return line[:500]
    return lines[-1][:500] if lines else ""


def how_it_ended(returncode: int) -> str:
    """'killed by SIGABRT' or 'exit code 1'."""
    return f"exit code {returncode}" if returncode >= 0 else f"killed by {signal.Signals(-returncode).name}"


class LlamaChild:
    """A GGUF loaded by llama-cpp-python in a child process; use it in a `with` block.

    It computes on the GPU where the installed llama.cpp can and the model has room there. `seconds` is the silence
    allowed besides the work of a request (allowed_seconds). Entering the block raises KitError for a file whose header
    is not sound. A child that dies, stays silent or reports an exception raises GateError with the cause; leaving the
    block always ends the child.
    `template_kwargs` (such as enable_thinking) go to the chat template; `logits=True` is needed for `predictions`.
    """

    def __init__(self, gguf: Path, n_ctx: int = 2048, seconds: float = QUIET, logits: bool = False,
                 template_kwargs: dict[str, Any] | None = None) -> None:
        self.gguf, self.seconds = gguf, seconds
        self.finish_reason = ""
        self._load: dict[str, Any] = {"gguf": str(gguf), "n_ctx": n_ctx, "logits": logits,
                                      "template_kwargs": template_kwargs or {}}
        self._process: Any = None  # subprocess.Popen while the child runs
        self._number = 0
        self._weights = 0

    def __enter__(self) -> Self:
        header = read_header(self.gguf)
        self._weights = sum(math.prod(tensor.shape) for tensor in header.tensors)
        # Matrices of f16 would be multiplied with sums in f16: the answers' speed, and an error that is not the file's.
        exact = {"GGML_CUDA_CUBLAS_COMPUTE_TYPE": "f32"} if self._load["logits"] else {}
        self._stderr = tempfile.TemporaryFile()
        self._lines: queue.Queue[str | None] = queue.Queue()
        try:
            self._process = subprocess.Popen(
                [*WORKER, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
                encoding="utf-8", env=exact | child_environment())
            threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
            if remark := self._ask("load", file_bytes=self.gguf.stat().st_size, **self._load,
                                   templates=chat_templates(header)):
                print(f"{self.gguf.name}: {remark}", file=sys.stderr)
        except BaseException:
            self.close()
            raise
        return self

    def close(self, *_: object) -> None:
        """Kill the child, if there is one, and wait until it is gone."""
        if debugging() and not self._stderr.closed:
            self._stderr.seek(0)
            print(self._stderr.read().decode("utf-8", "replace"), file=sys.stderr)
        self._stderr.close()
        if self._process is not None:
            with suppress(OSError), self._process:  # a request that the dead child never read
                self._process.kill()
                self._process.wait()
        self._process = None

    __exit__ = close

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
        read = self._receive(number)["tokens"]
        while "finish_reason" not in (piece := self._receive(number, read + PIECE_TOKENS)):
            read = 0
            yield piece["text"]
        self.finish_reason = piece["finish_reason"]

    def answer(self, messages: list[Message], max_new_tokens: int) -> tuple[str, str]:
        """The greedy answer and its finish reason ('stop' or 'length')."""
        return "".join(self.stream(messages, max_new_tokens)), self.finish_reason

    def predictions(self, ids: list[int], places: Sequence[int],
                    top_ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the model predicts for the token after each of the n `places` in `ids`.

        `top_ids` (n, k) are tokens of interest, without them the whole vocabulary: returned are their natural log
        probabilities (n, k), the likeliest token (n), and the log probability of the token that really follows (n;
        after the last of `ids` none does, and that figure means nothing).
        """
        if not self._load["logits"]:
            raise KitError("this child keeps no logits", "open it with LlamaChild(..., logits=True)")
        with tempfile.TemporaryDirectory(prefix="kit-logprobs-") as folder:
            if top_ids is not None:
                np.save(f"{folder}/top_ids.npy", top_ids)
            self._ask("evaluate", len(ids), ids=list(map(int, ids)), places=list(places), folder=folder)
            with np.load(f"{folder}/logprobs.npz") as arrays:
                return arrays["top"], arrays["best"], arrays["next"]

    def metadata(self) -> dict[str, str]:
        """The GGUF's key-value pairs, arrays left out, every value as text."""
        return self._ask("metadata")

    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a BOS before every prompt."""
        return self._ask("adds_bos")

    def _ask(self, method: str, tokens: int = 0, file_bytes: int = 0, **arguments: Any) -> Any:
        return self._receive(self._send(method, **arguments), tokens, file_bytes)["result"]

    def _send(self, method: str, **arguments: Any) -> int:
        if self._process is None:
            raise KitError("the llama.cpp child is not running", "use LlamaChild in a `with` block")
        self._number += 1
        self._stderr_before = os.fstat(self._stderr.fileno()).st_size
        line = json.dumps({"id": self._number, "method": method, "arguments": arguments})
        with suppress(OSError):  # the child is gone: _receive says how it ended
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self._number

    def _receive(self, number: int, tokens: int = 0, file_bytes: int = 0) -> dict[str, Any]:
        allowed = allowed_seconds(self._weights, tokens, file_bytes, self.seconds)
        while True:
            try:
                line = self._lines.get(timeout=allowed)
            except queue.Empty:
                raise self._failed(f"no answer within {allowed:.0f} seconds",
                                   "end what else keeps this machine busy, or take a smaller quantisation") from None
            if line is None:
                code = self._process.wait()
                if code == OVERTIME_CODE:
                    raise self._failed(OVERTIME, NO_REAL_ONE)
                raise self._failed(f"llama.cpp died ({how_it_ended(code)})", BROKEN)
            reply = json.loads(line)
            if reply["id"] != number:  # left over from a stream that the caller broke off
                continue
            if "error" in reply:
                raise self._failed(reply["error"], next((hint for words, hint in HINTS.items()
                                                         if words in reply["error"]), "run the export again"))
            return reply

    def _failed(self, cause: str, hint: str) -> GateError:
        """The error to raise, with llama.cpp's own last words; the child is ended."""
        self._stderr.seek(self._stderr_before)
        trouble = last_trouble(self._stderr.read().decode("utf-8", "replace"))
        self.close()
        if hint == BROKEN and "out of memory" in trouble:
            hint = HINTS["out of memory"]
        return GateError(f"{self.gguf.name}: {cause}" + (f"; llama.cpp said: {trouble}" if trouble else ""), hint)

    def _listen(self, pipe: IO[str]) -> None:
        """Pass the child's lines on, then None when it has ended (a thread, so that waiting can time out)."""
        lines = self._lines
        with suppress(OSError, ValueError):  # closed by `close`
            for line in pipe:
                lines.put(line)
        lines.put(None)
