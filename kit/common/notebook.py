"""The notebook that this runs in, if it does; it needs the standard library alone, as before packages are installed."""

import importlib.util
import sys
from typing import Any


def ipython() -> Any:
    """The IPython shell that runs this code, a notebook's kernel among them; else None."""
    module = sys.modules.get("IPython")  # in a shell it has been imported
    return module.get_ipython() if module else None


def in_kernel() -> bool:
    """Whether this is a notebook's kernel, also one that papermill or nbconvert started."""
    return getattr(ipython(), "kernel", None) is not None


def shows_widgets() -> bool:
    """Whether a person's front end shows this cell: it sends the cell's id, which papermill and nbconvert do not."""
    if not in_kernel() or importlib.util.find_spec("ipywidgets") is None:
        return False
    metadata = ipython().kernel.get_parent("shell").get("metadata", {})
    return "cellId" in metadata or "google.colab" in sys.modules
