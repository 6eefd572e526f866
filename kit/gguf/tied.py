"""A child that ends when the process that started it is gone, however that ended: kill -9 too.

    python -m kit.gguf.tied SCRIPT ARGUMENTS…
"""

import os
import runpy
import sys
import threading
import time
from pathlib import Path

SECONDS = 0.5  # between two looks


def tie() -> None:
    """End this process soon after its parent; where the system gives an orphan no other parent (Windows), never."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run a script as Python would, tied to its parent."""
    tie()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
