"""Stop strings, matched in the text of an answer rather than in its tokens, across the borders of its pieces."""

from __future__ import annotations

from collections.abc import Sequence

from builder.gateway.text_parts import beginning_at_end


class StopStrings:
    """Ends an answer before the first of some strings.

    The first string that is complete, as if the text came one character at a time, ends the answer; of several that
    are complete at the same character, the longest. So the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.matched: str | None = None

    @property
    def held(self) -> int:
        """The number of characters that are held back."""
        return len(self._held)

    def add(self, text: str) -> str:
        """The text that can be sent now. Holds back only what may be the beginning of a stop string.

        After a match (`matched` is set) the rest of the text is dropped.
        """
        if not self._strings:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(string), at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        hold = beginning_at_end(text, self._strings)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def rest(self) -> str:
        """What was held back when the answer ended without a match."""
        held, self._held = self._held, ""
        return held
