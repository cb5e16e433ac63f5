"""Tokenizers of other families behind a real Triton: all ways to ask give the same text, streamed in whole characters.

The stand-in for the engine repeats the prompt's tokens, one at a time, so the right text is what the tokenizer makes of
them, with the space that some write before a text alone. What a tokenizer does not know (Unigram without bytes) is its
unknown token in the prompt already.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers_of_kinds import byte_level, llama2, unigram, write_snapshot

from builder.core.output import Output
from builder.recipe import schema
from builder.serving.client import Client, Request
from builder.serving.server import ServerOptions, serve
from tests.gateway.conftest import ECHO, MODEL, running, write_repository

TEXTS = [
    "Hello, world. The a is of two   spaces",
    "Grüße 世界 \U0001f389 and 👩‍👩‍👧 and 🇨🇭",
    "x\u0301y\u0308 a\u200db اللغة हिन्दी",
    "<|extra_7|>tab<|extra_8|>\n\nend",
]


def many_added() -> Tokenizer:
    """Like models with hundreds of added tokens, some of which are special."""
    made = Tokenizer.from_str(llama2().to_str())
    made.add_tokens([AddedToken(f"<|extra_{number}|>", normalized=False) for number in range(300)])
    made.add_special_tokens([AddedToken(f"<|control_{number}|>", special=True) for number in range(50)])
    return made


KINDS: dict[str, tuple[Any, str]] = {
    "byte-level": (byte_level, "<|im_end|>"),
    "llama2": (llama2, "</s>"),
    "unigram": (unigram, "</s>"),
    "many added tokens": (many_added, "</s>"),
}


@dataclass
class Ways:
    tokenizer: Tokenizer
    direct: Client
    http: str
    openai: openai.OpenAI

    def all(self, text: str) -> dict[str, list[str]]:
        """The pieces of the answer to a text, of each way to ask."""
        length = len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        request = Request(text, length)
        plain: Any = {"model": MODEL, "prompt": text, "max_tokens": length, "temperature": 0}
        chat: Any = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": length}
        return {
            "ensemble, generate": [self.direct.http_generate(request).text],
            "ensemble_infer, HTTP": [self.direct.http_infer(request).text],
            "ensemble_infer, gRPC": [self.direct.grpc_infer(request).text],
            "bls, gRPC": list(self.direct.grpc_chunks(request)),
            "bls, generate_stream": self.generate_stream(text, length),
            "completions": [self.openai.completions.create(**plain).choices[0].text],
            "completions, streamed": [
                event.choices[0].text for event in self.openai.completions.create(**plain, stream=True)
            ],
            "chat": [self.openai.chat.completions.create(**chat).choices[0].message.content or ""],
            "chat, streamed": [
                event.choices[0].delta.content or ""
                for event in self.openai.chat.completions.create(**chat, stream=True)
            ],
        }

    def generate_stream(self, text: str, length: int) -> list[str]:
        body = {"text_input": text, "max_tokens": length, "top_k": 1, "stream": True, "exclude_input_in_output": True}
        url = f"{self.http}/v2/models/tensorrt_llm_bls/generate_stream"
        url = url if url.startswith("http") else f"http://{url}"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as response:
            lines = [line for line in response.read().decode().split("\n\n") if line]
        return [json.loads(line.removeprefix("data: "))["text_output"] for line in lines]


@pytest.fixture(scope="module", params=KINDS)
def ways(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    make, end = KINDS[request.param]
    tokenizer, tmp = make(), tmp_path_factory.mktemp("kind")
    snapshot = write_snapshot(tmp / "snapshot", tokenizer, end)
    (snapshot / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    made = write_repository(
        tmp, schema.Repository(bls_instances=1, guided_decoding=False, add_special_tokens=False), snapshot
    )
    facts = json.loads((made.path / "manifest.json").read_text())["facts"]
    options = ServerOptions(engine_backend=ECHO)
    with (
        serve(made.models, out=Output("quiet"), log=tmp / "log", options=options) as server,
        running(made.path, server.grpc_url) as gateway,
        gateway.client() as client,
    ):
        direct = Client.for_repository(server.http_url, server.grpc_url, facts, 60)
        yield Ways(tokenizer, direct, server.http_url, client)


@pytest.mark.parametrize("text", TEXTS)
def test_every_way_gives_the_same_text_in_whole_characters(ways: Ways, text: str) -> None:
    wanted = ways.tokenizer.decode(ways.tokenizer.encode(text, add_special_tokens=False).ids)
    found = ways.all(text)
    texts = {way: "".join(pieces) for way, pieces in found.items()}
    assert set(texts.values()) in ({wanted}, {f" {wanted}"}), texts
    for way, pieces in found.items():
        assert "\ufffd" not in "".join(pieces), way
    streamed = [pieces for way, pieces in found.items() if "stream" in way or "bls" in way]
    # Tokens that wait are sent together, on a busy machine perhaps all of one stream.
    assert any(len([piece for piece in pieces if piece]) > 1 for pieces in streamed)
