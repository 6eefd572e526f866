"""A tokenizer or model from a folder that may be anybody's: safetensors only, and no Python code without consent.

Consent is `trust_remote_code`, and comes from whoever calls; nothing that lies in such a folder can give it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from kit.common.errors import KitError
from kit.common.files import read_json
from kit.common.weight_files import read_weights_header, weight_files

READING_BYTES = 2_500_000_000  # of a GPU, for a batch of 1,024 tokens and the logits of a vocabulary of 150,000


def saved_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies in a folder. Raises KitError when it needs Python code that is not trusted."""
    from transformers import AutoTokenizer  # not at the top: unsloth, where it is needed, must come before it

    with code_refused(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def saved_model(folder: Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """The model that lies in a folder; `options` are keywords of transformers' `from_pretrained`.

    Raises KitError when it needs Python code that is not trusted, or its weights are no safetensors.
    """
    from transformers import AutoModelForCausalLM

    weight_files(folder)
    with code_refused(folder):
        # A pickle (.bin) can hold code as well.
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=trust_remote_code,
                                                    **options)


def placement(folder: Path) -> dict[str, Any]:
    """`dtype` and `device_map` of `from_pretrained` for a folder's model to be read on this machine, whatever its size.

    On a GPU without bfloat16 it is read in float16. Where it has no room on one GPU, layers go to the next one and at
    last to the computer's memory, from where they come one after the other. Quantised ones can't be moved: one GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return {"dtype": "auto", "device_map": "cpu"}
    tensors = [tensor for file in weight_files(folder) for tensor in read_weights_header(file).tensors.values()]
    has_bf16 = torch.cuda.get_device_capability(0) >= (8, 0)
    narrow = not has_bf16 and any(tensor.dtype == "BF16" for tensor in tensors)
    options = {"dtype": torch.float16 if narrow else "auto", "device_map": "cuda"}
    room = [max(0, torch.cuda.mem_get_info(number)[0] - READING_BYTES) for number in range(torch.cuda.device_count())]
    size = sum(tensor.end - tensor.begin for tensor in tensors)
    if size <= room[0] or read_json(folder / "config.json").get("quantization_config"):
        return options
    left = psutil.virtual_memory().available
    print(f"{folder.name}: {size / 1e9:.1f} GB, of which {min(size, sum(room)) / 1e9:.1f} go to {len(room)} GPU"
          f"{'s' * (len(room) > 1)}" + (", the rest to the computer's memory: slower" if size > sum(room) else ""))
    return {**options, "device_map": "sequential", "max_memory": {**dict(enumerate(room)), "cpu": left}}


def weights_of(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of every weight, to be changed in place; also of layers that wait in the computer's memory, whose
    parameters are empty meanwhile."""
    for prefix, module in model.named_modules():
        waiting = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}", waiting[name] if waiting and parameter.is_meta else parameter.data


@contextmanager
def code_refused(source: str | Path) -> Iterator[None]:
    """What transformers says of a folder or hub id with code of its own becomes a KitError that names the consent."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # Unsloth makes the one of the other
        if "trust_remote_code" not in str(error):
            raise
        raise KitError(f"{source} needs Python code that came with it, and that is not run without your consent",
                       "read its .py files; if you trust who wrote them: --trust-remote-code (in Python and in a "
                       "recipe: trust_remote_code)") from error
