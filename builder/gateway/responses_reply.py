"""The JSON of /v1/responses: a response with its output items, and the events of a stream that builds them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from builder.gateway.generation import Answer, Token
from builder.gateway.responses import Usage
from builder.gateway.responses_request import ResponsesRequest
from builder.gateway.text_parts import Part

# Kind of a part -> type of its item, of the part of its content, and the beginning of its events' names.
TEXTS = {
    "content": ("message", "output_text", "response.output_text"),
    "reasoning": ("reasoning", "reasoning_text", "response.reasoning_text"),
}
PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


class ResponsesReply:
    """For /v1/responses (see responses.Reply). There is one answer. A stream's last event has the whole response."""

    def __init__(self, id: str, asked: ResponsesRequest, served_name: str) -> None:
        form = asked.text.format
        choice = asked.tool_choice if isinstance(asked.tool_choice, str) else asked.tool_choice.model_dump()
        self._response: dict[str, Any] = {
            "id": id, "object": "response", "created_at": int(time.time()), "status": "in_progress", "error": None,
            "incomplete_details": None, "instructions": asked.instructions, "metadata": {}, "model": served_name,
            "output": [], "parallel_tool_calls": asked.parallel_tool_calls, "temperature": asked.temperature,
            "tool_choice": choice, "tools": [{"strict": False, "parameters": {}, **tool.model_dump(exclude_none=True)}
                                             for tool in asked.tools],
            "top_p": asked.top_p, "background": False, "max_output_tokens": asked.max_output_tokens,
            "previous_response_id": None, "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "text": {"format": form.as_dict() if form else {"type": "text"}}, "truncation": "disabled", "usage": None,
        }  # fmt: skip
        self._output: list[dict[str, Any]] = self._response["output"]
        self._open = False  # the last item is in progress
        self._number = 0

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The response of a request that is not streamed."""
        [answer] = answers
        if answer.reasoning:
            self._begin("reasoning")["content"][0]["text"] = "".join(answer.reasoning)
        if answer.text or not answer.calls:
            self._begin("content")["content"][0]["text"] = answer.text
        for call in answer.calls:
            self._begin_call(Part("call", call.name, id=call.id))["arguments"] = "".join(call.arguments)
        for item in self._output:
            item["status"] = "completed"
        if answer.finish_reason == "length":
            self._output[-1]["status"] = "incomplete"
        return self._finished(answer, usage)

    def start(self, index: int) -> bytes:
        """The first events."""
        return self._event("response.created", response=self._response) + self._event(
            "response.in_progress", response=self._response
        )

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> bytes:
        """The events of a part of the answer."""
        if part.kind == "call":
            return self._close("completed") + self._added(self._begin_call(part))
        if part.kind == "dropped":
            return self._close("incomplete")
        if part.kind == "arguments":
            self._output[-1]["arguments"] += part.text
            return self._delta("response.function_call_arguments.delta", part.text)
        if not part.text:
            return b""
        kind, _, event = TEXTS[part.kind]
        begun = b""
        if not self._open or self._output[-1]["type"] != kind:
            begun = self._close("completed") + self._added(self._begin(part.kind))
        self._output[-1]["content"][0]["text"] += part.text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return begun + self._delta(f"{event}.delta", part.text, content_index=0, **more)

    def end(self, index: int, answer: Answer) -> bytes:
        """The events that complete the last item."""
        begun = b"" if self._output else self._added(self._begin("content"))
        return begun + self._close("incomplete" if answer.finish_reason == "length" else "completed")

    def last(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        """The event with the whole response."""
        [answer] = answers
        name = "response.incomplete" if answer.finish_reason == "length" else "response.completed"
        return self._event(name, response=self._finished(answer, usage))

    def _finished(self, answer: Answer, usage: Usage) -> dict[str, Any]:
        cut = answer.finish_reason == "length"
        return self._response | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            },
        }

    def _begin(self, kind: str) -> dict[str, Any]:
        """A new item with an empty text."""
        item, part, _ = TEXTS[kind]
        content: dict[str, Any] = {"type": part, "text": ""}
        if item == "message":
            return self._item(item, role="assistant", content=[content | {"annotations": [], "logprobs": []}])
        return self._item(item, summary=[], content=[content])

    def _begin_call(self, part: Part) -> dict[str, Any]:
        return self._item("function_call", call_id=part.id, name=part.text, arguments="")

    def _item(self, kind: str, **values: Any) -> dict[str, Any]:
        self._output.append({"id": PREFIXES[kind] + uuid.uuid4().hex, "type": kind, "status": "in_progress", **values})
        return self._output[-1]

    def _added(self, item: dict[str, Any]) -> bytes:
        """The events at the beginning of an item."""
        self._open = True
        place = len(self._output) - 1
        if item["type"] == "function_call":
            return self._event("response.output_item.added", output_index=place, item=item)
        part = item["content"][0]
        return self._event(
            "response.output_item.added", output_index=place, item={**item, "content": []}
        ) + self._event(
            "response.content_part.added", item_id=item["id"], output_index=place, content_index=0, part=part
        )

    def _close(self, status: str) -> bytes:
        """The events at the end of the item that is in progress, if there is one."""
        if not self._open:
            return b""
        self._open = False
        item, place = self._output[-1], len(self._output) - 1
        item["status"] = status
        where = {"item_id": item["id"], "output_index": place}
        if item["type"] == "function_call":
            events = self._event("response.function_call_arguments.done", **where, arguments=item["arguments"])
        else:
            part, event = item["content"][0], next(one[2] for one in TEXTS.values() if one[0] == item["type"])
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            events = self._event(f"{event}.done", **where, content_index=0, text=part["text"], **more)
            events += self._event("response.content_part.done", **where, content_index=0, part=part)
        return events + self._event("response.output_item.done", output_index=place, item=item)

    def _delta(self, name: str, text: str, **more: Any) -> bytes:
        item = self._output[-1]
        return self._event(name, item_id=item["id"], output_index=len(self._output) - 1, delta=text, **more)

    def _event(self, kind: str, /, **values: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(body)}\n\n".encode()
