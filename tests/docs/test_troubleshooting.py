"""Each message that the page quotes is one that the code still raises."""

from __future__ import annotations

import documents
import error_messages
import pytest

PAGE = documents.ROOT / "docs" / "troubleshooting.md"
MESSAGES = [
    line.removeprefix("error: ")
    for block in documents.blocks(PAGE)
    if block.language == "text"
    for line in block.text.splitlines()
    if line.startswith("error: ")
]


def test_the_page_has_the_messages_that_users_meet() -> None:
    assert len(MESSAGES) >= 20


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_raised_by_the_code(message: str) -> None:
    if not error_messages.raised_as(message):
        pytest.fail(
            f"docs/troubleshooting.md quotes a message that was reworded, maybe to: {error_messages.nearest(message)}"
        )


def test_a_message_that_does_not_exist_is_found_out() -> None:
    assert not error_messages.raised_as("The flux capacitor has no power.")
