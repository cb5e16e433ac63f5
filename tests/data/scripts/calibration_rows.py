"""Writes tests/data/calibration/rows.jsonl: 512 paragraphs of the Python language reference, from `pydoc`'s topics.

    python tests/data/scripts/calibration_rows.py > tests/data/calibration/rows.jsonl
"""

from __future__ import annotations

import json
import random
from pydoc_data.topics import topics

ROWS = 512
SHORTEST, LONGEST = 150, 1500  # characters

found = dict.fromkeys(
    " ".join(text.split())
    for name in sorted(topics)
    for text in topics[name].split("\n\n")
    if not text.startswith(" " * 3) and SHORTEST <= len(text) <= LONGEST
)
rows = list(found)
random.Random(0).shuffle(rows)
for row in rows[:ROWS]:
    print(json.dumps({"text": row}, ensure_ascii=False))
