"""The matrix of container images agrees with itself, the facts of each version, the reference and the Dockerfile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from builder.core.errors import UnsupportedError
from builder.core.release import order
from builder.machine import containers
from builder.recipe import schema
from builder.trtllm import flags as trtllm_flags
from docs.generate import facts


def test_every_row_has_every_field_or_null() -> None:
    rows = containers.rows()
    assert len({row.image for row in rows}) == len(rows)
    for row in rows:
        if row.triton:
            assert None not in (row.tensorrt, row.cuda, row.driver, row.gb)
            assert row.image.endswith(f":{row.triton}-trtllm-python-py3")
            assert re.fullmatch(r"\d+(\.\d+)+", str(row.driver))


def test_rows_are_newest_first() -> None:
    tags = [row.triton for row in containers.rows() if row.triton]
    assert tags == sorted(tags, reverse=True)
    versions = [order(row.tensorrt_llm) for row in containers.rows()]
    assert versions == sorted(versions, reverse=True)


def test_the_engine_column_matches_what_upstream_removed() -> None:
    end = yaml.safe_load(Path("configs/trtllm/engine_path.yaml").read_text())
    gone = order(end["gone_from"])
    assert {row.engine for row in containers.rows()} == {True, False}
    for row in containers.rows():
        assert row.engine == (order(row.tensorrt_llm) < gone)


def test_every_version_that_builds_has_an_image() -> None:
    for version in trtllm_flags.versions():
        assert containers.newest(version).modelopt
        floor = containers.driver_floor(containers.newest(version).cuda or "")
        assert floor
        assert containers.numbers(floor) <= containers.numbers(containers.newest(version).driver or "")


def test_an_unknown_version_is_rejected_with_one_that_has_an_image() -> None:
    with pytest.raises(UnsupportedError, match=r"No Triton image with TensorRT-LLM 9\.9\.9"):
        containers.newest("9.9.9")


def test_the_default_recipe_has_an_image() -> None:
    assert containers.newest(schema.Engine().tensorrt_llm).triton == "26.07"


def test_drivers_compare_as_numbers() -> None:
    assert containers.numbers("580.95.05") < containers.numbers("590.44.01") < containers.numbers("590.44.02")


def test_the_documentation_has_the_matrix() -> None:
    """The reference page on versions has one row for each image, with what configs/containers.yaml says of it."""
    lines = [line for line in facts.versions() if line.startswith("|")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    written = {tuple(row[:2]): row[3:7] for row in cells}
    for row in containers.rows():
        versions = [row.tensorrt, row.cuda, row.driver, row.modelopt]
        assert written[row.triton or "", row.tensorrt_llm] == [version or "" for version in versions]
    assert {version for _, version in written} >= set(trtllm_flags.versions())
