"""--debug: what upstream libraries log, what the kit else leaves out, and the traceback behind a KitError.

The switch is the variable KIT_DEBUG, so that the processes the kit starts (a notebook's kernel, llama.cpp) have it too.
"""

import os
import sys
import traceback
import warnings

OPTION = "--debug"
# Read by each library when it is imported. Requests and their signed addresses (HF_DEBUG=1) are not logged.
UPSTREAM = {"TRANSFORMERS_VERBOSITY": "info", "DATASETS_VERBOSITY": "info", "HF_HUB_VERBOSITY": "debug",
            "UNSLOTH_ENABLE_LOGGING": "1", "PYTHONWARNINGS": "default"}


def debugging() -> bool:
    """Whether --debug was given, or KIT_DEBUG=1 is set."""
    return os.environ.get("KIT_DEBUG", "0") not in ("", "0")


def first(arguments: list[str]) -> list[str]:
    """A command's arguments with --debug, wherever it stands, in front: it is an option of every verb."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if OPTION not in arguments[:end]:
        return arguments
    return [OPTION, *(word for word in arguments[:end] if word != OPTION), *arguments[end:]]


def begin() -> None:
    """Switch it on for this process, before anything heavy is imported, and for those it starts."""
    os.environ["KIT_DEBUG"] = "1"
    for name, value in UPSTREAM.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("default")


def trace(error: BaseException) -> None:
    """When debugging, print where an error comes from, with what was raised before it."""
    if debugging():
        print(traced(error), end="", file=sys.stderr)


def traced(error: BaseException) -> str:
    """The traceback, with the errors that `raise … from None` hides."""
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__ = link.__cause__ is not None
        link = link.__cause__ or link.__context__
    return "".join(traceback.format_exception(error))
