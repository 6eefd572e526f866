"""The child's side of kit.gguf.child, and llama.cpp's quantiser; run as `python -m kit.gguf.worker`."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, chat_formatter_to_chat_completion_handler

from kit.gguf.messages import Message, for_template
from kit.gguf.tied import tie
from kit.gguf.trial import BeyondLimits, attempt, check_length, limited


class Worker:
    """One loaded model; each public method answers one kind of request, as LlamaChild's of that name describes it."""

    def load(self, gguf: str, n_ctx: int, logits: bool, template_kwargs: dict[str, Any], templates: list[str]) -> str:
        """A remark, or ''."""
        for template in templates:  # before Llama(...) compiles them all
            attempt(template)
        # llama-cpp-python takes half the cores; more than eight gain little for models of this size.
        threads = min(os.cpu_count() or 1, 8)
        make = partial(llama_cpp.Llama, model_path=gguf, n_ctx=n_ctx, logits_all=logits, n_threads=threads,
                       n_threads_batch=threads, verbose=True)
        remark, offload = "", bool(llama_cpp.llama_supports_gpu_offload())  # built for a GPU, and one is there
        try:
            self.llama: Any = make(n_gpu_layers=-1 if offload else 0)
        except (ValueError, RuntimeError) as error:
            if not offload:
                raise
            self.llama = make(n_gpu_layers=0)
            remark = f"it answers on the CPU, as it could not be loaded to the GPU, which may be full ({error})"
        # Llama(...) swaps a template it recognises for a built-in one and takes no template variables. So the
        # formatter is made here, from the GGUF's own text, with the arguments Llama(...) itself would use.
        template = self.llama.metadata.get("tokenizer.chat_template")
        if template:
            eos, bos = self.llama.token_eos(), self.llama.token_bos()
            self.formatter = Jinja2ChatFormatter(template, eos_token=self._token(eos), bos_token=self._token(bos),
                                                 stop_token_ids=[eos])
            self.template_kwargs = template_kwargs
            self.llama.chat_handler = chat_formatter_to_chat_completion_handler(self._format)
        return remark

    def tokenize(self, text: str, special: bool, add_bos: bool) -> list[int]:
        return self.llama.tokenize(text.encode("utf-8"), add_bos=add_bos, special=special)

    def render(self, messages: list[Message], template_kwargs: dict[str, Any]) -> str:
        return self._formatted(messages, **template_kwargs).prompt

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        prompt = self._formatted(messages)
        return self.tokenize(prompt.prompt, special=True, add_bos=not prompt.added_special)

    def stream(self, messages: list[Message], **sampling: Any) -> Iterator[dict[str, Any]]:
        # Before the first token, whose time hangs on it; a template that refuses the conversation says so here.
        yield {"tokens": len(self.prompt_ids(messages))}
        reason = "length"
        for chunk in self.llama.create_chat_completion(messages, stream=True, **sampling):
            choice = chunk["choices"][0]
            if choice["delta"].get("content"):
                yield {"text": choice["delta"]["content"]}
            reason = choice["finish_reason"] or reason
        yield {"finish_reason": reason}

    def evaluate(self, ids: list[int], places: list[int], folder: str) -> bool:
        """Write logprobs.npz: `top` (of the tokens in top_ids.npy, if that is there), `best` and `next`."""
        if len(ids) > self.llama.n_ctx():
            raise ValueError(f"{len(ids)} tokens exceed the context window of {self.llama.n_ctx()}")
        self.llama.reset()
        self.llama.eval(ids)
        scores = self.llama.scores[places]
        scores = scores - scores.max(axis=-1, keepdims=True)
        logprobs = (scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))).astype(np.float32)
        wanted = Path(folder, "top_ids.npy")
        top = np.take_along_axis(logprobs, np.load(wanted), -1) if wanted.is_file() else logprobs
        following = np.roll(ids, -1)[places]  # of the last place the first token: none follows
        np.savez(f"{folder}/logprobs.npz", top=top, best=logprobs.argmax(-1),
                 next=logprobs[np.arange(len(places)), following])
        return True

    def metadata(self) -> dict[str, str]:
        return self.llama.metadata

    def adds_bos(self) -> bool:
        return bool(self.llama._model.add_bos_token())

    def _token(self, token: int) -> str:
        return self.llama._model.token_get_text(token) if token != -1 else ""

    def _formatted(self, messages: list[Message], **template_kwargs: Any) -> Any:
        if not hasattr(self, "formatter"):
            raise ValueError("the GGUF holds no chat template (tokenizer.chat_template)")
        return self._format(messages=messages, **template_kwargs)

    def _format(self, messages: list[Message], **request: Any) -> Any:
        taken, tools = for_template(messages)
        if tools:
            request["tools"] = tools
        with limited():
            formatted = self.formatter(messages=taken, **{**self.template_kwargs, **request})
            check_length(formatted.prompt, messages)
        return formatted


def serve() -> None:
    """Answer requests until stdin ends. Only the parent decides on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever native code prints must not fall between the JSON lines
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result = getattr(worker, request["method"])(**request["arguments"])
            for part in result if isinstance(result, Iterator) else [{"result": result}]:
                print(json.dumps({"id": request["id"], **part}), file=replies, flush=True)
        except Exception as error:
            kind = "" if isinstance(error, BeyondLimits) else f"{type(error).__name__}: "
            reply = {"id": request["id"], "error": f"{kind}{error}"}
            print(json.dumps(reply), file=replies, flush=True)


def quantize(source: str, target: str, file_type: str) -> None:
    """Make the GGUF `target` of llama.cpp's numeric `file_type` (llama_ftype) from the 16-bit GGUF `source`."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(file_type)
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters)
    sys.exit(int(code != 0))


if __name__ == "__main__":
    tie()
    serve() if sys.argv[1] == "serve" else quantize(*sys.argv[2:])
