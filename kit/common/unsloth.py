"""The one import of unsloth: `import kit.common.unsloth` stands on top of every file that imports what it patches.

That is transformers, TRL and PEFT. It takes seconds, so files that can do without torch don't import this one.
"""

import logging
import os

from kit.common.debug import debugging
from kit.common.files import cache_dir

# Its compiled files belong in the cache, and nothing is to be installed behind the user's back.
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth_compiled_cache"))
os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Else each load on a GPU asks a hub, for two minutes where none answers.
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
# Remarks that alarm and change nothing: of an optional speed-up, and of 8-bit's inputs, once for each product.
for name in () if debugging() else ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(name).setLevel(logging.ERROR)

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, once installed, warns in every run

from unsloth import FastLanguageModel, is_bfloat16_supported  # noqa: E402

__all__ = ["FastLanguageModel", "is_bfloat16_supported"]
