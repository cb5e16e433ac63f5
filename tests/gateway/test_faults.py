"""Requests that kill Triton can't pass the gateway, and each workaround in the code is in the table of the guide."""

from __future__ import annotations

import re
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.gateway.settings import Model
from builder.gateway.tensors import Sampling, TokenRequest, encode, encode_stop
from builder.triton import repository
from tests.gateway.conftest import MODEL, Running
from tests.gateway.test_limits import body, connect, head, status

GUIDE = Path("docs/guides/triton-faults.md")
ROWS = [line.split(" | ") for line in GUIDE.read_text().splitlines() if line.startswith("| ")][2:]
NAMED = re.compile(r"Triton (?:alone does neither \()?2\d\.\d\d|seen in 2\d\.\d\d|Until 2\d\.\d\d")
# Versions that stand beside a measurement or name an image, not a fault.
NO_FAULTS = {"limits.py", "stream_capacity.py", "recovery.py", "launch.py", "compatibility.py"}

IDS = st.integers(0, 300)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_p=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 1, 50]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, -1.0]),
    min_tokens=st.integers(0, 3),
    bias=st.dictionaries(IDS, st.floats(-100, 100), max_size=3),
)
REQUESTS = st.builds(
    TokenRequest,
    ids=st.lists(IDS, min_size=1, max_size=5),  # an empty prompt is rejected
    max_tokens=st.integers(1, 9),
    sampling=SAMPLINGS,
    end_ids=st.lists(IDS, max_size=3),
    streaming=st.booleans(),
    log_probs=st.booleans(),
)


@pytest.fixture(scope="module")
def model(echo_repository: repository.Repository) -> Model:
    return Model.read(echo_repository.models, echo_repository.facts)


@given(request=REQUESTS)
def test_no_request_has_an_empty_tensor_or_asks_for_a_classification(model: Model, request: TokenRequest) -> None:
    for message in (encode(model, request, "1"), encode_stop(model, "1")):
        assert all(all(length > 0 for length in tensor.shape) for tensor in message.inputs)
        assert all(message.raw_input_contents)
        assert not [output for output in message.outputs if output.parameters]
        assert set(message.parameters) <= {"triton_enable_empty_final_response"}


@pytest.mark.parametrize(
    "fields",
    [{"classification": 1}, {"parameters": {"classification": 1}}, {"embedding_bias": []}, {"prompt": []},
     {"prompt": [[]]}, {"prompt": ""}, {"outputs": [{"name": "text_output", "parameters": {"classification": 1}}]}],
)  # fmt: skip
def test_a_client_can_not_ask_for_them(gateway: Running, fields: dict[str, object]) -> None:
    asked = body(**fields)
    connection = connect(gateway)
    connection.sendall(head(len(asked)) + asked)
    assert status(connection) == 400


@pytest.mark.parametrize("fields", [{"logit_bias": {}}, {"stop": []}, {"extra_body": {"stop_token_ids": []}}])
def test_empty_fields_are_left_out(client: openai.OpenAI, fields: dict[str, object]) -> None:
    found = client.completions.create(model=MODEL, prompt="one two", max_tokens=2, **fields)  # type: ignore[call-overload]
    assert found.choices[0].finish_reason == "length"


def test_each_workaround_is_in_the_table() -> None:
    listed = {name for row in ROWS for name in re.findall(r"`([\w./]+\.(?:py|toml))`", row[-1])}
    files = [path for root in ("builder", "triton_templates") for path in Path(root).rglob("*.py")]
    named = {str(path) for path in files if NAMED.search(path.read_text()) and path.name not in NO_FAULTS}
    assert len(named) >= 8
    assert named <= listed
    assert all(Path(name).is_file() for name in listed)


def test_each_row_names_the_versions() -> None:
    assert len(ROWS) >= 12
    for row in ROWS:
        assert len(row) == 5, row[0]
        assert re.fullmatch(r"2\d\.\d\d", row[1]), row[0]
        assert re.match(r"none known|(after )?2\d\.\d\d", row[2]), row[0]
