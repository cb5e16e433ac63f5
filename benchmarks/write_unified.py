"""Quantizes a model without data by the writer alone, to what ModelOpt's W4A16_NVFP4 export holds: one layout, without
the store's hashes and the inspection of `builder quantize`. benchmarks/data_free.py measures it as a process.

    python benchmarks/write_unified.py MODEL OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from builder.formats.assignment import ModelFormats
from builder.formats.registry import get
from builder.quantize import writer
from builder.quantize.ranges import Ranges
from builder.quantize.source_weights import SourceModel

if __name__ == "__main__":
    writer.write(SourceModel.open(Path(sys.argv[1])), ModelFormats(get("w4a16_nvfp4")), Ranges(), Path(sys.argv[2]))
