"""What `kit doctor` asks of torch, bitsandbytes and llama.cpp, each in a child process: a library that is broken ends
the child with its reason, and the checks go on. Run as a module this file is the child; it answers in JSON lines.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from kit.common.errors import KitError, one_line
from kit.gguf.child import child_environment, how_it_ended, last_trouble
from kit.recipe.machine import look

UNKNOWN = "unknown model architecture"  # llama.cpp's words
NO_SUCH_ARCHITECTURE = "kit-doctor-no-such-architecture"


class Probe:
    """A child at work; use it in a `with` block. `answer` waits for its next line."""

    def __init__(self, *arguments: str, seconds: float = 60) -> None:
        self._arguments, self._seconds, self._late = arguments, seconds, False

    def __enter__(self) -> Self:
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kit.readiness.probe", *self._arguments], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=self._stderr, encoding="utf-8", env=child_environment())
        self._timer = threading.Timer(self._seconds, self._stop)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _stop(self) -> None:
        self._late = True
        self._process.kill()

    def answer(self) -> dict[str, Any]:
        """The child's next line. Raises KitError with the cause when it has ended without one."""
        for line in self._process.stdout or ():
            if line.startswith("{"):  # a library may print lines of its own
                return json.loads(line)
        code = self._process.wait()
        self._stderr.seek(0)
        said = last_trouble(self._stderr.read().decode("utf-8", "replace"))
        ended = f"no answer within {self._seconds:.0f} s" if self._late else how_it_ended(code)
        raise KitError(f"{ended}: {said}" if said else ended)


def free_memory_gb(device: str) -> float:
    """Memory that a run could take now, in GB (1e9 bytes)."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] / 1e9
    import psutil

    return psutil.virtual_memory().available / 1e9


def unsloth_cpu() -> ModuleType:
    """Unsloth's own rules for this CPU: the one file, because importing its package takes seconds."""
    home = importlib.util.find_spec("unsloth_zoo")
    for folder in (home and home.submodule_search_locations) or ():
        file = Path(folder) / "cpu" / "runtime.py"
        spec = importlib.util.spec_from_file_location("unsloth_cpu", file)
        if file.is_file() and spec and spec.loader:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise KitError("unsloth_zoo is not installed, or older than its CPU path")


def _not_compiled(function: Any = None, **_: Any) -> Any:
    """In place of torch.compile, as `@torch.compile` and as `@torch.compile(…)`."""
    return _not_compiled if function is None else function


def quantised(bits: int, device: str) -> None:
    """A 4-bit or 8-bit layer, forwards and backwards; raises what goes wrong."""
    import torch

    # bitsandbytes decorates functions with it on import, which loads a compiler for two seconds.
    torch.compile = _not_compiled
    if bits == 4 and device == "cpu":
        if not unsloth_cpu().cpu_bnb_4bit_supported():
            raise RuntimeError("bitsandbytes has no 4-bit kernels for this CPU")
        return
    import bitsandbytes

    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    options = {"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    layer = kind(64, 64, bias=False, **options).to(device)
    row = torch.randn(4, 64, dtype=dtype, device=device, requires_grad=True)
    layer(row).float().sum().backward()
    if row.grad is None or not bool(torch.isfinite(row.grad).all()):
        raise RuntimeError(f"a {bits}-bit layer gives no finite gradient")


def known_architectures(names: list[str], folder: Path) -> dict[str, bool]:
    """Which architectures the installed llama.cpp can load: each is asked with a GGUF that names it and no more.

    Writes those files into `folder`. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    import llama_cpp

    said: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _level, text, _data: said.append(text.decode("utf-8", "replace")))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    known = {}
    for name in names:
        said.clear()
        text = [struct.pack("<Q", len(part)) + part for part in (b"general.architecture", name.encode())]
        file = folder / "header.gguf"
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text[0] + struct.pack("<I", 8) + text[1])
        llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        known[name] = UNKNOWN not in "".join(said)
    return known


def torch_child(folder: str, bits: str) -> None:
    """First the machine, then whether layers of `bits` run on it ('0': not asked)."""
    # What `platforms.machine` says, without the seconds that importing Unsloth takes.
    machine = look(Path(folder), lambda: unsloth_cpu().cpu_bf16_supported())
    say(machine=vars(machine), free_memory_gb=free_memory_gb(machine.device))
    if bits != "0":
        try:
            quantised(int(bits), machine.device)
            say(trouble="")
        except Exception as error:
            say(trouble=one_line(error))


def llama_child(*names: str) -> None:
    """The runtime's version, and which of `names` it knows; `probed` is False where that can't be told."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        known = known_architectures([*names, NO_SUCH_ARCHITECTURE], Path(folder)) if names else {}
    # A name nobody knows must be refused with those words, else their absence says nothing.
    say(version=llama_cpp.__version__, probed=not known.pop(NO_SUCH_ARCHITECTURE, True), known=known)


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    (torch_child if sys.argv[1] == "torch" else llama_child)(*sys.argv[2:])
