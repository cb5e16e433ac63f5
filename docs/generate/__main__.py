"""python -m docs.generate [DIRECTORY]"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.pop("BUILDER_OUTPUT", None)  # its value would become the documented default of --output

from docs.generate import write

write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "reference")
