"""INT4 with AWQ in blocks of 64 inputs, for models whose sizes are not multiples of 128 (see int4_awq.py)."""

from __future__ import annotations

from builder.formats.int4_awq import of_block

FORMAT = of_block(64, "int4_awq_64", "INT4 (AWQ, blocks of 64)")
