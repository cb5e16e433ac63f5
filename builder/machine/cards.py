"""Cards by the names that people use: RTX 5090, rtx-5090, 5090 and "NVIDIA GeForce RTX 5090" are the same card."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Vendor, brand, generation and kind of product: words that tell no two of our cards apart. DGX and HGX are systems.
_FILLER = re.compile("nvidia|geforce|tesla|blackwell|generation|edition|workstation|graphics|card|gpu|dgx|hgx")
# Words in a card's name that people leave out where the rest of the name is enough: memory size and connector.
_QUALIFIER = re.compile(r"\b(\d+ ?GB|SXM\d*|PCIe|HBM\w+)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A card that can be bought. GB are 10^9 bytes, rates are dense TFLOPS; None where no source was found.

    `also` holds its other names: the driver's, where it differs, and the systems that contain the card.
    """

    name: str
    source: str
    memory_gb: float | None = None
    bandwidth_gb_s: float | None = None
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    also: tuple[str, ...] = ()


def plain(name: str) -> str:
    """A name's letters and digits in lower case: what is left when spelling does not count."""
    return "".join(character for character in name.lower() if character.isalnum())


def find(name: str, cards: Sequence[Card]) -> list[Card]:
    """The cards that this name fits: one of its names, or else its name without memory size and connector.

    Cards of equal memory count as one (`H100` is the first of H100 SXM and H100 PCIe), so more than one card in the
    result means that the name is ambiguous.
    """
    asked = _key(name)
    if not asked:
        return []
    found = [card for card in cards if asked in map(_key, (card.name, *card.also))]
    found = found or [card for card in cards if asked == _key(_QUALIFIER.sub("", card.name))]
    return list({card.memory_gb: card for card in reversed(found)}.values())[::-1]


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to four of the known names that someone who typed this may have meant: by its beginning, else by likeness."""
    keys = {_key(one) or plain(one): one for one in known}
    asked = _key(name)
    starts = [one for key, one in keys.items() if asked and key.startswith(asked)]
    return starts[:4] or [keys[key] for key in difflib.get_close_matches(asked, keys, n=4, cutoff=0.7)]


def _key(name: str) -> str:
    """The same for each spelling of a name: `rtxpro6000maxq`, `rtx5090laptop`, `a100sxm480gb`; empty for no name."""
    key = _FILLER.sub("", plain(name))
    key = re.sub("mobile|notebook", "laptop", key)
    key = re.sub(r"(?<=\d)gi?b?$", "gb", key)
    key = re.sub(r"^(rtx)?(\d{4})pro", r"rtxpro\2", key)  # "RTX 6000 PRO"
    return f"rtx{key}" if re.match(r"\d{4}|pro", key) else key
