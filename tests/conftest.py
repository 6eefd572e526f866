"""Every fixture lives in support/fixtures.py."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many workers as cores: threads of their own would only wait

pytest_plugins = ["support.fixtures"]
