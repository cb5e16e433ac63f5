"""`builder serve` with its gateway, on a repository with the reference executor; and `builder gateway` by itself."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import exports
import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from printed_json import first_object
from pydantic import BaseModel, Field

from builder import pipeline
from builder.cli import main
from builder.cli.gateway import read_keys
from builder.cli.serve import open_named
from builder.core import supervisor
from builder.core.output import Output
from builder.core.store import Store
from builder.gateway.fields import IGNORED, REFUSED
from builder.gateway.listener import authority, listen
from builder.recipe import schema
from builder.serving.client import Client, Request
from tests.grammar.test_json_schema import SCHEMAS, valid

KEY = "sk-test"
TALK: Any = [{"role": "user", "content": "Return the number of items in the list."}]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("serve") / "artifacts", Output("quiet"))
    recipe = schema.resolve({"model.id": str(exports.MODELS["qwen3"]), "gpu": "cpu", "quality.check": False,
                             "calibration.samples": 0, "repository.tool_calls": "hermes"})  # fmt: skip
    found = pipeline.build(recipe, store, until="repository").repository
    assert found is not None
    return found.path


@contextmanager
def command(*argv: str) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    """A running command, and the JSON object that it prints at the start."""
    with subprocess.Popen(
        [sys.executable, "-m", "builder", *argv, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    ) as child:  # fmt: skip
        try:
            yield first_object(child), child
        finally:
            child.terminate()
            child.wait(60)


@pytest.fixture(scope="module")
def served(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# ours\n{KEY}\n")
    with command("serve", str(built), "--model-name", "tiny", "--api-keys", str(keys)) as (found, _):
        yield found


def test_greedy_text_is_that_of_the_other_ways(served: dict[str, Any], built: Path) -> None:
    facts = json.loads((built / "manifest.json").read_text())["facts"]
    direct = Client.for_repository(served["http"], served["grpc"], facts, 60)
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        for prompt in ("Return the number of", "def f(x):\n    ", "Grüße 世界 🎉"):
            asked: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
            text = client.completions.create(**asked).choices[0].text
            stream = client.completions.create(**asked, stream=True)
            assert "".join(event.choices[0].text for event in stream) == text
            assert direct.grpc_stream(Request(prompt, 24)).text == text


CONTRACT = Path(__file__).parents[2] / "docs" / "guides" / "requests.md"
EXAMPLES = re.findall(r"^```(bash|python)\n(.*?)^```$", CONTRACT.read_text(encoding="utf-8"), re.S | re.M)


def test_the_contract_has_an_example_for_each_client() -> None:
    text = "".join(example for _, example in EXAMPLES)
    for client in ("curl", "openai.OpenAI", "http.InferenceServerClient", "grpc.InferenceServerClient", "grpc.aio"):
        assert client in text


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_of_the_contract_prints_an_answer(served: dict[str, Any], number: int) -> None:
    kind, text = EXAMPLES[number]
    addresses = {"127.0.0.1:9000": served["openai"], "127.0.0.1:8000": served["http"], "127.0.0.1:8001": served["grpc"]}
    for shown, real in addresses.items():
        text = text.replace(shown, real.removeprefix("http://").removesuffix("/v1"))
    text = text.replace("Bearer none", f"Bearer {KEY}").replace('api_key="none"', f'api_key="{KEY}"')
    argv = ["bash", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"] if kind == "bash" else done.stdout
    assert answer.strip()


def test_the_contract_names_the_fields_that_are_ignored_and_refused() -> None:
    text = CONTRACT.read_text(encoding="utf-8")
    for name in (*IGNORED, *REFUSED):
        assert f"`{name}`" in text


PERSON: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_an_answer_follows_a_json_schema_streamed_or_not(served: dict[str, Any]) -> None:
    asked: Any = {"model": "tiny", "messages": TALK, "max_tokens": 200, "response_format": form(PERSON)}
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        for seed in range(3):
            [choice] = client.chat.completions.create(**asked, seed=seed).choices
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
            stream = client.chat.completions.create(**asked, seed=seed, stream=True)
            assert "".join(event.choices[0].delta.content or "" for event in stream) == choice.message.content
        several = client.chat.completions.create(**asked, n=3)
        for choice in several.choices:
            jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
        cut = client.chat.completions.create(**{**asked, "max_tokens": 3}).choices[0]
        assert cut.finish_reason == "length", "an answer that max_tokens ended is no JSON"
        whole = client.completions.create(
            model="tiny", prompt="x", max_tokens=300, extra_body={"response_format": {"type": "json_object"}}
        ).choices[0]
        assert whole.text.startswith("{")
        assert whole.finish_reason == "length" or isinstance(json.loads(whole.text), dict)


def test_pydantic_models_are_parsed_by_the_openai_client(served: dict[str, Any]) -> None:
    class Person(BaseModel):
        name: Annotated[str, Field(max_length=8)]
        kind: Literal["a", "b"]

    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        asked: Any = {"model": "tiny", "messages": TALK, "max_tokens": 100, "response_format": Person}
        parsed = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(parsed, Person)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 1 << 30))
def test_finished_answers_of_the_model_fulfil_any_schema(served: dict[str, Any], schema: Any, seed: int) -> None:
    asked: Any = {"model": "tiny", "messages": TALK, "max_tokens": 60, "response_format": form(schema), "seed": seed}
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        [choice] = client.chat.completions.create(**asked).choices
    if choice.finish_reason == "stop":
        valid((choice.message.content or "").encode(), schema)


PARAMETERS: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Zürich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def function(name: str, *, strict: bool = True) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS, "strict": strict}}


def test_a_call_that_is_required_is_complete_and_fulfils_its_schema(served: dict[str, Any]) -> None:
    """The model itself can't call functions: it has 1 M parameters."""
    named: Any = {"type": "function", "function": {"name": "snow"}}
    asked: Any = {"model": "tiny", "messages": TALK, "max_tokens": 200, "parallel_tool_calls": False}
    asked |= {"tools": [function("weather", strict=False), function("snow")]}
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        for seed, choice in enumerate((named, "required")):
            whole = client.chat.completions.create(**asked, seed=seed, tool_choice=choice).choices[0]
            [call] = whole.message.tool_calls or []
            assert call.type == "function"
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
            assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
            assert call.function.name == "snow" or choice == "required"
            stream = client.chat.completions.create(**asked, seed=seed, tool_choice=choice, stream=True)
            deltas = [delta for event in stream for delta in event.choices[0].delta.tool_calls or []]
            arguments = "".join((delta.function and delta.function.arguments) or "" for delta in deltas)
            assert arguments == call.function.arguments


def test_a_strict_function_that_the_model_may_call(served: dict[str, Any]) -> None:
    """A bias makes the model begin a call, which the grammar then completes."""
    asked: Any = {"model": "tiny", "messages": TALK, "max_tokens": 300, "logit_bias": {"4090": 30}}  # <tool_call>
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        found = client.chat.completions.create(**asked, tools=[function("weather")]).choices[0]
        calls = found.message.tool_calls or []
        assert calls
        for call in calls:
            assert call.type == "function"
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
        asked["max_tokens"] = 30
        free = client.chat.completions.create(**asked, tools=[function("weather", strict=False)]).choices[0]
        assert not free.message.tool_calls, "only a strict function has a grammar"
        both = {
            **asked,
            "max_tokens": 80,
            "logit_bias": {},
            "response_format": form(PERSON),
            "tools": [function("weather")],
        }
        other = client.chat.completions.create(**both).choices[0]
        if other.finish_reason == "stop":
            jsonschema.validate(json.loads(other.message.content or ""), PERSON)


def test_a_response_follows_a_json_schema_streamed_or_not(served: dict[str, Any]) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    asked: Any = {"model": "tiny", "input": "Who?", "max_output_tokens": 200, "text": text, "temperature": 0}
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        whole = client.responses.create(**asked)
        assert (whole.status, whole.text and whole.text.format and whole.text.format.type) == (
            "completed", "json_schema"
        )  # fmt: skip
        jsonschema.validate(json.loads(whole.output_text), PERSON)
        events = client.responses.create(**asked, stream=True)
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == (
            whole.output_text
        )
        called = client.responses.create(
            model="tiny", input="Snow?", max_output_tokens=200, tool_choice="required", parallel_tool_calls=False,
            tools=[{"type": "function", "name": "snow", "parameters": PARAMETERS, "strict": True}],
        ).output[0]  # fmt: skip
        assert called.type == "function_call"
        jsonschema.validate(json.loads(called.arguments), PARAMETERS)


def test_tritons_own_clients_can_send_a_guide(served: dict[str, Any]) -> None:
    body = {
        "text_input": "x",
        "max_tokens": 8,
        "guided_decoding_guide_type": "regex",
        "guided_decoding_guide": "[a-c]{4}",
    }

    def generate(**change: Any) -> dict[str, Any]:
        url = f"{served['http']}/v2/models/ensemble/generate"
        url = url if url.startswith("http") else f"http://{url}"
        request = urllib.request.Request(url, json.dumps({**body, **change}).encode())
        try:
            with urllib.request.urlopen(request) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))

    assert re.fullmatch("[a-c]{4}", generate()["text_output"])
    assert "guided_decoding_guide can't be used" in generate(guided_decoding_guide="(")["error"]


def test_sampling_depends_on_the_seed(served: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:

        def text(**options: Any) -> str:
            found = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=12, **options)
            return found.choices[0].message.content or ""

        assert text(seed=1) == text(seed=1)
        assert len({text(temperature=1.5) for _ in range(4)}) > 1, "temperature alone samples"
        assert len({text(temperature=0) for _ in range(2)}) == 1
        choices = client.chat.completions.create(
            model="tiny", messages=TALK, max_tokens=12, n=3, seed=1, temperature=1.5
        ).choices
        assert len({choice.message.content for choice in choices}) > 1


def test_log_probabilities_are_those_of_the_model(served: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        found = client.completions.create(model="tiny", prompt="Return the", max_tokens=5, temperature=0, logprobs=0)
    log_probs = found.choices[0].logprobs
    assert log_probs is not None
    values = log_probs.token_logprobs or []
    assert len(values) == 5
    assert all(value is not None and -20 < value < 0 for value in values), "0 would be that of the only candidate"


def test_a_bias_changes_the_answer(served: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        found = client.completions.create(
            model="tiny", prompt="Return the", max_tokens=3, temperature=0, logit_bias={"100": 100}, logprobs=0
        ).choices[0]
    assert found.logprobs is not None
    assert len(set(found.logprobs.tokens or [])) == 1


def test_curl(served: dict[str, Any]) -> None:
    asked = json.dumps({"model": "tiny", "messages": TALK, "max_tokens": 3, "stream": True})
    argv = ["curl", "-sN", f"{served['openai']}/chat/completions", "-d", asked]
    argv += ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-2])


def test_a_gateway_that_ends_is_reported(built: Path) -> None:
    with command("serve", str(built), "--model-name", "again") as (found, child):
        url = found["openai"].removesuffix("/v1")
        with urllib.request.urlopen(f"{url}/health/ready", timeout=30) as response:
            assert response.status == 200
        port = url.rpartition(":")[2]
        [gateway] = [
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if (argv := arguments(path))[1:4] == ["-m", "builder", "gateway"] and port in argv
        ]
        os.kill(gateway, signal.SIGKILL)
        assert child.wait(90) == 5
        deadline = time.monotonic() + 10
        while (Path("/proc") / str(found["pid"])).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not (Path("/proc") / str(found["pid"])).exists(), "the server ends, too"


def test_a_server_that_dies_is_started_again_behind_its_gateway(built: Path) -> None:
    with command("serve", str(built), "--model-name", "phoenix") as (found, child):
        url = found["openai"].removesuffix("/v1")
        with openai.OpenAI(base_url=found["openai"], api_key="-", max_retries=0) as client:
            asked: Any = {"model": "phoenix", "prompt": "Return the", "max_tokens": 4, "temperature": 0}
            text = client.completions.create(**asked).choices[0].text
            os.kill(triton_of(child.pid), signal.SIGKILL)
            status, why = waited_for(f"{url}/health/ready", 503, "The model server is down")
            assert (status, why["error"]["message"]) == (
                503, "The model server is down: The server was killed by SIGKILL."
            )  # fmt: skip
            with pytest.raises(openai.InternalServerError) as raised:
                client.completions.create(**asked)
            assert (raised.value.status_code, raised.value.response.headers["retry-after"]) == (503, "1")
            waited_for(f"{url}/health/ready", 200, "ready")
            assert [client.completions.create(**asked).choices[0].text for _ in range(8)] == [text] * 8
        with urllib.request.urlopen(f"{url}/metrics") as response:
            metrics = response.read().decode()
        for line in ("watchdog_restarts_total 1.0", "watchdog_replaced_total 0.0", "watchdog_server_up 1.0"):
            assert line in metrics.splitlines()
        child.terminate()
        assert child.wait(60) == 0


def triton_of(serve: int) -> int:
    """The process id of the Triton below `builder serve`."""
    below = set(supervisor.descendants(serve))
    return next(pid for pid, name, _, _ in supervisor.processes() if name == "tritonserver" and pid in below)


def waited_for(url: str, status: int, text: str) -> tuple[int, Any]:
    """The answer at `url`, once it has this status and text."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=20) as response:
                found = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                found = error.code, error.read().decode()
        if found[0] == status and text in found[1]:
            return found[0], json.loads(found[1])
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def arguments(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_text().split("\0")
    except OSError:
        return []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-requests", "0"], "--max-requests must be at least 1 (got 0)"),
        (["--stalled-timeout", "0"], "--stalled-timeout must be at least 1 (got 0)"),
        (["--api-keys", "absent.txt"], "Can't read the API keys in"),
        (["--api-keys", os.devnull], "has no API key"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_wrong_options(
    built: Path, command: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([command, str(built), *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Triton is ready" not in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "9000"], "--port has no effect with --no-gateway"),
        (["--api-keys", "keys.txt"], "--api-keys has no effect"),
        (["--triton-host", "0.0.0.0"], "--host is Triton's address"),
        (["--request-timeout", "5"], "--request-timeout has no effect"),
    ],
)
def test_options_of_a_gateway_that_is_not_started(
    built: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["serve", str(built), "--no-gateway", *options]) == 2
    assert says in capsys.readouterr().err


def test_one_port_for_two_servers(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", str(built), "--port", "9000", "--grpc-port", "9000"]) == 2
    assert "--port and --grpc-port are both 9000" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_a_port_in_use(built: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Named before Triton starts, which takes minutes for a large engine."""
    with listen("127.0.0.1", None) as other:
        port = str(other.getsockname()[1])
        assert main.main([command, str(built), "--port", port]) == 5
    error = capsys.readouterr().err
    assert f"Can't listen on 127.0.0.1:{port}" in error
    assert "with --port" in error
    assert "Triton is ready" not in error


def test_an_address_that_is_not_of_this_machine(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", str(built), "--host", "192.0.2.1"]) == 5
    error = capsys.readouterr().err
    assert "Can't listen on 192.0.2.1." in error
    assert "--host takes an address of this machine" in error


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert [authority(host, 9000) for host in ("::1", "127.0.0.1")] == ["[::1]:9000", "127.0.0.1:9000"]


def test_the_gateway_takes_its_repository_from_the_environment(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_REPOSITORY", "absent")
    assert main.main(["gateway", "--output", str(built.parents[1])]) == 2
    assert "no repository 'absent'" in capsys.readouterr().err


def test_the_only_repository_gives_its_model_the_name_of_its_link(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that of the directory, which is a key."""
    monkeypatch.delenv("MODEL_REPOSITORY", raising=False)
    asked = argparse.Namespace(repository=None, output=built.parents[1])
    assert open_named(asked).path == built
    assert asked.repository.name == "tiny-qwen3-cpu-nvfp4"


def test_a_gateway_that_is_interrupted(built: Path) -> None:
    with command("gateway", str(built), "--grpc", "127.0.0.1:9") as (found, child):
        assert found["url"].endswith("/v1")
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_bytes(b"\xef\xbb\xbf  # ours\r\n\r\n key-1 \r\nkey-2\n")
    assert read_keys(file) == ("key-1", "key-2")


def test_killed_serve_leaves_neither_gateway_nor_server(built: Path) -> None:
    with command("serve", str(built)) as (found, child):
        port = found["openai"].removesuffix("/v1").rpartition(":")[2]
        child.kill()
        child.wait(30)
        deadline = time.monotonic() + 20
        while remaining(found["pid"], port) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert remaining(found["pid"], port) == []


def remaining(server: int, port: str) -> list[str]:
    found = [" ".join(argv) for path in Path("/proc").glob("[0-9]*") if port in (argv := arguments(path))]
    return found + ([f"process {server}"] if (Path("/proc") / str(server)).exists() else [])
