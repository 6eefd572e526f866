"""What `kit doctor` asks of torch, bitsandbytes and llama.cpp, each in a child process: a library that is broken ends
the child with its reason, and the checks go on. Run as a module this file is the child; it answers with a line of JSON.
"""

import ctypes
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from kit.common.errors import KitError
from kit.gguf.child import child_environment, how_it_ended, last_trouble
from kit.recipe.machine import look, unsloth_cpu

UNKNOWN = b"unknown model architecture"  # llama.cpp's words
NO_SUCH_ARCHITECTURE = "kit-doctor-no-such-architecture"


def ask(*arguments: str, seconds: float = 60) -> dict[str, Any]:
    """The answer of a child with these arguments. Raises KitError: the child's own, or why it ended without an answer.
    """
    try:
        done = subprocess.run([sys.executable, "-m", "kit.readiness.probe", *arguments], stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=seconds, encoding="utf-8", errors="replace",
                              env=child_environment(), check=False)
    except subprocess.TimeoutExpired:
        raise KitError(f"no answer within {seconds:.0f} s") from None
    for line in done.stdout.splitlines():
        if line.startswith("{"):  # a library may print lines of its own
            answer = dict(json.loads(line))
            if "refused" in answer:
                raise KitError(*answer["refused"])
            return answer
    reason, ended = last_trouble(done.stderr), how_it_ended(done.returncode)
    raise KitError(f"{ended}: {reason}" if reason else ended)


def machine(folder: str) -> dict[str, Any]:
    """The machine, and the memory in GB (1e9 bytes) that a run could take now."""
    import torch  # a broken one ends this child with its reason, whether there is a GPU or not

    seen = look(Path(folder))
    free = torch.cuda.mem_get_info()[0] if seen.device == "cuda" else psutil.virtual_memory().available
    return {"machine": vars(seen), "free_memory_gb": free / 1e9}


def layers(bits: str) -> dict[str, Any]:
    """A 4-bit or 8-bit layer, forwards and backwards on this device; `trouble` is what went wrong, or ''."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if bits == "4" and device == "cpu":
        known = unsloth_cpu().cpu_bnb_4bit_supported()
        return {"trouble": "" if known else "bitsandbytes has no 4-bit kernels for this CPU"}
    # bitsandbytes decorates functions with it on import, which loads a compiler for two seconds.
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)
    import bitsandbytes

    kind = bitsandbytes.nn.Linear4bit if bits == "4" else bitsandbytes.nn.Linear8bitLt
    options = {"quant_type": "nf4"} if bits == "4" else {"has_fp16_weights": False}
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    layer = kind(64, 64, bias=False, **options).to(device)
    row = torch.randn(4, 64, dtype=dtype, device=device, requires_grad=True)
    layer(row).float().sum().backward()
    finite = row.grad is not None and bool(torch.isfinite(row.grad).all())
    return {"trouble": "" if finite else f"a {bits}-bit layer gives no finite gradient"}


def llama(*names: str) -> dict[str, Any]:
    """The runtime's version, and which architectures it can load: each is asked with a GGUF that names it and no more.

    `probed` is False where that can't be told. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    import llama_cpp

    llama_cpp.llama_backend_init()
    if not names:
        return {"version": llama_cpp.__version__, "gpu": getattr(llama_cpp, "llama_supports_gpu_offload", bool)()}
    log: list[bytes] = []
    callback = llama_cpp.llama_log_callback(lambda _level, text, _data: log.append(text))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    known = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "header.gguf"
        for name in (*names, NO_SUCH_ARCHITECTURE):
            log.clear()
            key, value = (struct.pack("<Q", len(part)) + part for part in (b"general.architecture", name.encode()))
            file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<I", 8) + value)
            llama_cpp.llama_model_load_from_file(str(file).encode(), options)
            known[name] = UNKNOWN not in b"".join(log)
    # A name nobody knows must be refused with those words, else their absence says nothing.
    return {"version": llama_cpp.__version__, "probed": not known.pop(NO_SUCH_ARCHITECTURE), "known": known}


def template(recipe: str) -> dict[str, Any]:
    """What the recipe's tokenizer, with its template, ends an answer with."""
    from kit.models.template import load_tokenizer
    from kit.recipe.recipe import Recipe

    return {"stop": load_tokenizer(Recipe.load(json.loads(recipe))).eos_token}


if __name__ == "__main__":
    question = {"machine": machine, "layers": layers, "llama": llama, "template": template}[sys.argv[1]]
    try:
        said = question(*sys.argv[2:])
    except KitError as error:
        said = {"refused": [error.message, error.hint]}
    print(json.dumps(said), flush=True)
