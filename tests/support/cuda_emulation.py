"""An emulated CUDA card: Unsloth's real GPU path, and the kit's, on a machine that has none.

`card_environment("T4")` is an environment in which a Python process believes that it has a T4. torch.cuda's answers are
replaced, "cuda" as a device is the CPU, tensors say that they are on the card, and Triton's own interpreter executes
the kernels. What runs so: loading, LoRA and full finetuning in float16, bfloat16 and float32, packed and padding-free
batches, GradScaler, gradient checkpointing, answers, reference, verify. What can't: bitsandbytes' kernels, xformers and
FlashAttention, torch.compile, NCCL, memory, speed.

Triton's interpreter stores bfloat16 as whole numbers and computes with those (its file calls it "stored as uint16"):
gradients came out as NaN. So here a kernel gets bfloat16 tensors as float32 and its results are rounded.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent / "emulated_card"
SWITCH = "KIT_EMULATED_CARD"


class Card(NamedTuple):
    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    processors: int


# https://developer.nvidia.com/cuda-gpus; memory as PyTorch reports it.
PROFILES = {"P100": Card("Tesla P100-PCIE-16GB", (6, 0), 17_059_545_088, 56),
            "T4": Card("Tesla T4", (7, 5), 15_642_329_088, 40),
            "L4": Card("NVIDIA L4", (8, 9), 23_796_580_352, 58),
            "A100": Card("NVIDIA A100-SXM4-40GB", (8, 0), 42_405_855_232, 108),
            "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 132)}


class Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


class Chosen(contextlib.nullcontext):  # type: ignore[type-arg]
    idx = 0

    def __init__(self, *_: Any) -> None:
        super().__init__()


def driver_environment(profile: str, **more: str) -> dict[str, str]:
    """os.environ where the driver's tool names the card, and nothing else knows of it."""
    tools = os.pathsep.join([str(FOLDER), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, SWITCH: profile, "PATH": tools, **more}


def card_environment(profile: str, **more: str) -> dict[str, str]:
    """os.environ with the emulated card in it; `more` comes last."""
    path = os.pathsep.join(filter(None, [str(FOLDER), str(FOLDER.parent.parent), os.environ.get("PYTHONPATH")]))
    return driver_environment(profile, PYTHONPATH=path, TRITON_INTERPRET="1", UNSLOTH_COMPILE_DISABLE="1",
                              TORCHDYNAMO_DISABLE="1") | more


def begin() -> None:
    """Emulate the card that the environment names, unless CUDA_VISIBLE_DEVICES hides it: each library is changed as
    soon as it has been imported."""
    if os.environ.get(SWITCH) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        sys.meta_path.insert(0, AfterImport({
            "torch": emulate_torch, "triton.runtime.interpreter": round_bfloat16,
            "transformers.modeling_utils": load_on_the_cpu, "unsloth.kernels.utils": four_bits_of_the_cpu}))
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: (  # type: ignore[assignment]
            version(name).replace("+cpu", "+cu130") if name == "torch" else version(name))


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with each of these modules when Python has executed it."""

    def __init__(self, calls: dict[str, Callable[[Any], None]]) -> None:
        self.calls = calls

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.calls:
            return None
        call = self.calls.pop(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def executed(module: types.ModuleType) -> None:
                execute(module)
                call(module)

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def emulate_torch(torch: Any) -> None:
    card = PROFILES[os.environ[SWITCH]]
    properties = types.SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=card.memory,
        multi_processor_count=card.processors, warp_size=32, max_threads_per_multi_processor=1024,
        shared_memory_per_block=49152, shared_memory_per_block_optin=65536, regs_per_multiprocessor=65536,
        L2_cache_size=4 << 20, is_integrated=0, gcnArchName="", uuid="emulated")
    stream = Stream()
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "get_device_properties": properties,
        "get_device_capability": card.capability, "get_device_name": card.name, "current_device": 0,
        "is_bf16_supported": card.capability >= (8, 0), "mem_get_info": (card.memory, card.memory),
        "is_initialized": False, "is_current_stream_capturing": False, "get_rng_state_all": [],
        "current_stream": stream, "default_stream": stream,
        "max_memory_allocated": 0, "max_memory_reserved": 0, "memory_allocated": 0, "memory_reserved": 0,
        "get_arch_list": [f"sm_{major}{minor}" for major, minor in {(7, 5), (8, 0), (9, 0)}]}
    answers |= dict.fromkeys(["empty_cache", "synchronize", "set_device", "reset_peak_memory_stats", "_lazy_init",
                              "set_rng_state_all", "manual_seed_all", "manual_seed", "ipc_collect"])
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, _value=value, **__: _value)
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.random.manual_seed_all = lambda *_: None
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.device = torch.cuda.device_of = torch.cuda.stream = Chosen
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, name, lambda *_: None)
    _on_the_cpu(torch)
    _autocast_of_the_cpu(torch)


def _on_the_cpu(torch: Any) -> None:
    """"cuda" as an argument is the CPU, and tensors and models say that they are on the card."""
    from torch.overrides import TorchFunctionMode

    there, here = torch.device("cuda", 0), torch.device("cpu")
    is_cuda, device = torch.Tensor.is_cuda.__get__, torch.Tensor.device.__get__

    def moved(value: Any) -> Any:
        if isinstance(value, str) and value.partition(":")[0] == "cuda":
            return "cpu"
        return here if isinstance(value, torch.device) and value.type == "cuda" else value

    class OnTheCPU(TorchFunctionMode):
        def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function == is_cuda:
                return args[0].device.type == "cpu"  # in here it says so itself
            if function == device:
                real = function(*args)
                return there if real.type == "cpu" else real  # a tensor without values is on "meta"
            if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
                return args[0]
            if function is torch.device and args and type(args[0]) is int:
                return there
            named = {name: here if name == "device" and type(value) is int else moved(value)
                     for name, value in (kwargs or {}).items()}
            named.pop("pin_memory", None)
            return function(*map(moved, args), **named)

    OnTheCPU().__enter__()
    inner = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def bootstrap(self: threading.Thread) -> None:
        with OnTheCPU():  # modes belong to a thread
            inner(self)

    threading.Thread._bootstrap_inner = bootstrap  # type: ignore[attr-defined]
    load, move = torch.load, torch.nn.Module.to
    torch.load = lambda *args, **options: load(*args, **{name: moved(value) for name, value in options.items()})
    torch.nn.Module.to = lambda self, *args, **options: move(
        self, *map(moved, args), **{name: moved(value) for name, value in options.items()})
    torch.nn.Module.cuda = lambda self, *_: self


    class Generator(torch.Generator):  # type: ignore[misc]
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, moved(device))

    torch.Generator = Generator


def _autocast_of_the_cpu(torch: Any) -> None:
    """torch.autocast("cuda") does to CPU tensors what it does to the card's."""
    mode = torch.amp.autocast_mode.autocast
    init = mode.__init__

    def initialised(self: Any, device_type: str, *args: Any, **options: Any) -> None:
        init(self, "cpu" if device_type == "cuda" else device_type, *args, **options)

    mode.__init__ = initialised
    torch.set_autocast_dtype("cpu", torch.float16)  # a card's default
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        function = getattr(torch, name)
        setattr(torch, name, lambda device_type="cpu", *args, _function=function: _function(
            "cpu" if device_type == "cuda" else device_type, *args))
    torch.get_autocast_gpu_dtype = lambda: torch.get_autocast_dtype("cpu")


def round_bfloat16(interpreter: Any) -> None:
    """Kernels compute on float32 copies of bfloat16 tensors; what they wrote is rounded back."""
    import torch

    run = interpreter.GridExecutor.__call__

    def widened(self: Any, *args: Any, **options: Any) -> None:
        copies: dict[int, tuple[Any, Any]] = {}

        def wide(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.bfloat16:
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in copies:
                whole = torch.empty(0, dtype=value.dtype).set_(storage)
                copies[storage.data_ptr()] = (whole, whole.float())
            return copies[storage.data_ptr()][1].as_strided(value.size(), value.stride(), value.storage_offset())

        run(self, *map(wide, args), **{name: wide(value) for name, value in options.items()})
        with torch.no_grad():
            for original, copy in copies.values():
                original.copy_(copy)

    interpreter.GridExecutor.__call__ = widened


def load_on_the_cpu(modeling: Any) -> None:
    load = modeling.PreTrainedModel.from_pretrained.__func__

    def loaded(cls: Any, *args: Any, **options: Any) -> Any:
        if options.get("device_map") is not None:
            options["device_map"] = {"": "cpu"}
        return load(cls, *args, **options)

    modeling.PreTrainedModel.from_pretrained = classmethod(loaded)


def four_bits_of_the_cpu(kernels: Any) -> None:
    """Unsloth calls bitsandbytes' CUDA library by pointers; here its functions for the CPU do the same."""
    def dequantized(weight: Any, state: Any = None, *_: Any, **__: Any) -> Any:
        if state is None:
            return weight
        from bitsandbytes.functional import dequantize_4bit

        turned = weight.shape[0] == 1
        full = dequantize_4bit(weight.t() if turned else weight, state)
        return full.t() if turned else full

    def product(row: Any, weight: Any, state: Any, out: Any = None) -> Any:
        full = dequantized(weight, state)
        result = row @ (full if full.shape[0] == row.shape[-1] else full.t())
        return result if out is None else out.copy_(result)

    kernels._fast_dequantize_bnb, kernels._fast_gemv_bnb = dequantized, product
