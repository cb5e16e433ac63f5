"""Cards by the names that people use: RTX 5090, rtx-5090, 5090 and "NVIDIA GeForce RTX 5090" are the same card."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Vendor, brand, generation and kind of product: words that distinguish no two cards. DGX and HGX are systems.
_FILLER = re.compile("nvidia|geforce|tesla|blackwell|generation|edition|workstation|graphics|card|gpu|dgx|hgx")
# Words that people leave out if the rest of the name is enough: memory size and connector.
_QUALIFIER = re.compile(r"\b(\d+ ?GB|SXM\d*|PCIe|HBM\w+)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A card on the market. GB are 10^9 bytes and rates are dense TFLOPS; None if no source was found.

    `also` holds its other names: the driver's, if it differs, and those of systems that contain the card.
    """

    name: str
    source: str
    memory_gb: float | None = None
    bandwidth_gb_s: float | None = None
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    also: tuple[str, ...] = ()


def plain(name: str) -> str:
    """The letters and digits of a name in lower case, so that spellings compare equal."""
    return "".join(character for character in name.lower() if character.isalnum())


def find(name: str, cards: Sequence[Card]) -> list[Card]:
    """The cards that a name fits: by one of their names, or else by the name without memory size and connector.

    Of cards with equal memory only the first is returned (H100 SXM for `H100`, not H100 PCIe too), so more than one
    result means that the name is ambiguous.
    """
    wanted = _key(name)
    if not wanted:
        return []
    found = [card for card in cards if wanted in map(_key, (card.name, *card.also))]
    found = found or [card for card in cards if wanted == _key(_QUALIFIER.sub("", card.name))]
    return list({card.memory_gb: card for card in reversed(found)}.values())[::-1]


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to four known names that may have been meant: those that start like this, or else similar ones."""
    keys = {_key(one) or plain(one): one for one in known}
    wanted = _key(name)
    starts = [one for key, one in keys.items() if wanted and key.startswith(wanted)]
    return starts[:4] or [keys[key] for key in difflib.get_close_matches(wanted, keys, n=4, cutoff=0.7)]


def _key(name: str) -> str:
    """A key that all spellings of a name share: `rtxpro6000maxq`, `rtx5090laptop`, `a100sxm480gb`. May be empty."""
    key = _FILLER.sub("", plain(name))
    key = re.sub("mobile|notebook", "laptop", key)
    key = re.sub(r"(?<=\d)gi?b?$", "gb", key)
    key = re.sub(r"^(rtx)?(\d{4})pro", r"rtxpro\2", key)  # "RTX 6000 PRO"
    return f"rtx{key}" if re.match(r"\d{4}|pro", key) else key
