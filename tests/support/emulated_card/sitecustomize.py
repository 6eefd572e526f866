"""Python runs this file first where tests/support/emulated_card stands on PYTHONPATH: the card is there from the start,
in a notebook's kernel and in every other process too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from support.cuda_emulation import begin

begin()
