"""The child's side of kit.gguf.child, and llama.cpp's quantiser; run as `python -m kit.gguf.worker`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kit.gguf.child import Message

if TYPE_CHECKING:
    pass

class Worker:
    """The child's side: one loaded model; each public method answers one kind of request."""

    def load(self, gguf: str, n_ctx: int, logits: bool, template_kwargs: dict[str, Any]) -> bool:
        from llama_cpp import Llama
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter, chat_formatter_to_chat_completion_handler

        # llama-cpp-python takes half the cores; more than eight gain little for models of this size.
        threads = min(os.cpu_count() or 1, 8)
        self.llama: Any = Llama(model_path=gguf, n_ctx=n_ctx, logits_all=logits, n_threads=threads,
                           n_threads_batch=threads, verbose=True)
        # Llama(...) swaps a template it recognises for a built-in one and takes no template variables. So the
        # formatter is made here, from the GGUF's own text, with the arguments Llama(...) itself would use.
        template = self.llama.metadata.get("tokenizer.chat_template")
        if template:
            eos, bos = self.llama.token_eos(), self.llama.token_bos()
            formatter = Jinja2ChatFormatter(template, eos_token=self._token(eos), bos_token=self._token(bos),
                                            stop_token_ids=[eos])
            self.format = lambda **request: formatter(**{**template_kwargs, **request})
            self.llama.chat_handler = chat_formatter_to_chat_completion_handler(self.format)
        return True

    def tokenize(self, text: str, special: bool, add_bos: bool) -> list[int]:
        return self.llama.tokenize(text.encode("utf-8"), add_bos=add_bos, special=special)

    def render(self, messages: list[Message], template_kwargs: dict[str, Any]) -> str:
        return self._formatted(messages, **template_kwargs).prompt

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        prompt = self._formatted(messages)
        return self.tokenize(prompt.prompt, special=True, add_bos=not prompt.added_special)

    def stream(self, messages: list[Message], **sampling: Any) -> Iterator[dict[str, str]]:
        self._formatted(messages)  # a template that refuses the conversation says so before the first token
        reason = "length"
        for chunk in self.llama.create_chat_completion(messages, stream=True, **sampling):
            choice = chunk["choices"][0]
            if choice["delta"].get("content"):
                yield {"text": choice["delta"]["content"]}
            reason = choice["finish_reason"] or reason
        yield {"finish_reason": reason}

    def evaluate(self, ids: list[int], where: list[int], file: str, top: str) -> bool:
        import numpy as np

        if len(ids) > self.llama.n_ctx():
            raise ValueError(f"{len(ids)} tokens exceed the context window of {self.llama.n_ctx()}")
        self.llama.reset()
        self.llama.eval(ids)
        scores = self.llama.scores[where]
        scores = scores - scores.max(axis=-1, keepdims=True)
        logprobs = (scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))).astype(np.float32)
        if not top:
            np.savez(file, all=logprobs)
            return True
        following = np.array([ids[place + 1] for place in where])
        np.savez(file, top=np.take_along_axis(logprobs, np.load(top), -1), best=logprobs.argmax(-1),
                 next=logprobs[np.arange(len(where)), following])
        return True

    def metadata(self) -> dict[str, str]:
        return self.llama.metadata

    def ends(self) -> dict[str, Any]:
        model = self.llama._model
        return {"eos": model.token_eos(), "eot": model.token_eot(), "add_bos": bool(model.add_bos_token())}

    def _token(self, token: int) -> str:
        return self.llama._model.token_get_text(token) if token != -1 else ""

    def _formatted(self, messages: list[Message], **template_kwargs: Any) -> Any:
        if not hasattr(self, "format"):
            raise ValueError("the GGUF holds no chat template (tokenizer.chat_template)")
        return self.format(messages=messages, **template_kwargs)


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
            parts = result if isinstance(result, Iterator) else [{"result": result}]
            for part in parts:
                print(json.dumps({"id": request["id"], **part}), file=replies, flush=True)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            print(json.dumps({"id": request["id"], "error": cause}), file=replies, flush=True)


def quantize(source: str, target: str, file_type: str) -> None:
    """Make the GGUF `target` of llama.cpp's numeric `file_type` (llama_ftype) from the 16-bit GGUF `source`."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(file_type)
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters)
    sys.exit(int(code != 0))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        quantize(*sys.argv[2:])
