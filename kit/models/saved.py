"""A tokenizer or model from a folder that may be anybody's: safetensors only, and no Python code without consent.

Consent is `trust_remote_code`, and comes from whoever calls; nothing that lies in such a folder can give it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.common.weight_files import weight_files


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
