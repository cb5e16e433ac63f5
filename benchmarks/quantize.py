"""All benchmarks of quantization, and one table of their figures beside the goals:

    python benchmarks/quantize.py [--rounds 2] [--peers modelopt,llm-compressor] [--json] [--only data_free,resume]

Each of them can be run alone: benchmarks/data_free.py, calibrated.py, download.py and resume.py say what they measure.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import calibrated
import data_free
import download
import resume
from comparison import clear, parser, show, started

PARTS = {"data_free": data_free, "calibrated": calibrated, "download": download, "resume": resume}
# The way that the others' times are multiples of
BASES = {
    "data_free": "builder",
    "calibrated": "builder --memory low (streamed)",
    "download": "download alone",
    "resume": "whole run",
}


def main() -> int:
    """Exit code 1 if a goal is missed or a benchmark ended with an error."""
    options = parser(__doc__)
    options.add_argument("--only", default=",".join(PARTS), help="parts to run (default: %(default)s)")
    arguments = options.parse_args()
    results, failed, start = [], [], time.perf_counter()
    with started(arguments) as asked:
        for name in arguments.only.split(","):
            part = asked.work / name
            clear(part)
            try:
                results.append(PARTS[name].measure(dataclasses.replace(asked, work=part)))
                if not arguments.json:
                    show(results[-1], BASES[name])
            except SystemExit as error:
                failed.append(name)
                print(f"{name}: {error}", file=sys.stderr)
            clear(part)
    if arguments.json:
        print(json.dumps([one.as_json() for one in results]))
    else:
        print(f"\nAll figures, {asked.rounds} rounds, {time.perf_counter() - start:.0f} s")
        for result in results:
            print(f"  {result.title}", *(f"    {one}" for one in result.figures), sep="\n")
        for name in failed:
            print(f"  {name} FAILED")
    return 1 if failed or not all(one.met for result in results for one in result.figures) else 0


if __name__ == "__main__":
    sys.exit(main())
