"""Every spelling of a card's name finds that card. An ambiguous or unknown name is an error with suggestions."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from builder.core.errors import UnsupportedError, UsageError
from builder.machine import cards, gpus
from builder.recipe import schema
from builder.trtllm import flags as trtllm_flags

OWNERS = {card: name for name in gpus.names() if name != "sm120-fmha" for card in gpus.load(name).cards}

# Product names of NVIDIA/open-gpu-kernel-modules README.md@df1c9a3d, which NVML returns too.
DRIVER = {
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA B300 SXM6 AC": "B300",
    "NVIDIA GB300": "GB300",
    "NVIDIA GB10": "GB10 (DGX Spark)",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA GeForce RTX 5090 D": "RTX 5090 D",
    "NVIDIA GeForce RTX 5080": "RTX 5080",
    "NVIDIA GeForce RTX 5070 Ti": "RTX 5070 Ti",
    "NVIDIA GeForce RTX 5070": "RTX 5070",
    "NVIDIA GeForce RTX 5060": "RTX 5060",
    "NVIDIA GeForce RTX 5050": "RTX 5050",
    "NVIDIA GeForce RTX 5090 Laptop GPU": "RTX 5090 Laptop GPU",
    "NVIDIA GeForce RTX 5080 Laptop GPU": "RTX 5080 Laptop GPU",
    "NVIDIA GeForce RTX 5070 Ti Laptop GPU": "RTX 5070 Ti Laptop GPU",
    "NVIDIA GeForce RTX 5070 Laptop GPU": "RTX 5070 Laptop GPU",
    "NVIDIA GeForce RTX 5060 Laptop GPU": "RTX 5060 Laptop GPU",
    "NVIDIA GeForce RTX 5050 Laptop GPU": "RTX 5050 Laptop GPU",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000 Blackwell",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "RTX PRO 6000 Blackwell",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000 Blackwell",
    "NVIDIA RTX PRO 5000 Blackwell": "RTX PRO 5000 Blackwell",
    "NVIDIA RTX PRO 5000 72GB Blackwell": "RTX PRO 5000 72GB Blackwell",
    "NVIDIA RTX PRO 4500 Blackwell": "RTX PRO 4500 Blackwell",
    "NVIDIA RTX PRO 4000 Blackwell": "RTX PRO 4000 Blackwell",
    "NVIDIA RTX PRO 4000 Blackwell SFF Edition": "RTX PRO 4000 Blackwell SFF Edition",
    "NVIDIA RTX PRO 2000 Blackwell": "RTX PRO 2000 Blackwell",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80 GB",
    "NVIDIA A100 80GB PCIe": "A100 PCIe 80 GB",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200 SXM",
    "NVIDIA GH200 480GB": "GH200 96 GB",
    "NVIDIA L40S": "L40S",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
}


def named(text: str) -> tuple[str, str]:
    profile = gpus.named(text)
    assert profile.card
    return profile.name, profile.card.name


@st.composite
def spellings(draw: st.DrawFn) -> tuple[cards.Card, str]:
    """A card and a spelling of its name: any case, any separators, with or without the vendor."""
    card = draw(st.sampled_from(list(OWNERS)))
    name = draw(st.sampled_from([card.name, *card.also]))
    words = "".join(character if character.isalnum() else " " for character in name).split()
    separators = draw(st.lists(st.sampled_from(["", " ", "-", "_"]), min_size=len(words), max_size=len(words)))
    spelled = "".join(f"{word}{separator}" for word, separator in zip(words, separators, strict=True))
    change = draw(st.sampled_from([str, str.lower, str.upper, str.title]))
    return card, draw(st.sampled_from(["", "NVIDIA ", "nvidia-", "NVIDIA GeForce "])) + change(spelled)


@given(spellings())
def test_every_spelling_finds_the_card(spelling: tuple[cards.Card, str]) -> None:
    card, text = spelling
    assert named(text) == (OWNERS[card], card.name)


@pytest.mark.parametrize("card", OWNERS, ids=lambda card: card.name)
def test_a_card_is_found_by_its_name_with_and_without_spaces(card: cards.Card) -> None:
    for text in (card.name, card.name.replace(" ", ""), card.name.replace(" ", "-").lower()):
        assert named(text) == (OWNERS[card], card.name)


def test_no_two_cards_share_a_name() -> None:
    names = [cards._key(name) for card in OWNERS for name in {cards._key(n): n for n in (card.name, *card.also)}]
    assert len(names) == len(set(names))
    assert not set(names) & set(gpus.names())


@pytest.mark.parametrize(("driver", "card"), DRIVER.items())
def test_the_drivers_name_is_the_same_card(driver: str, card: str) -> None:
    assert named(driver)[1] == card


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("5090", "RTX 5090"),
        ("RTX5090", "RTX 5090"),
        ("rtx-5090", "RTX 5090"),
        ("5090d", "RTX 5090 D"),
        ("5070 ti", "RTX 5070 Ti"),
        ("GeForce 5080", "RTX 5080"),
        ("rtx 5060 ti 16g", "RTX 5060 Ti 16 GB"),
        ("5060ti-8gb", "RTX 5060 Ti 8 GB"),
        ("RTX 5090 mobile", "RTX 5090 Laptop GPU"),
        ("rtx 5080 notebook", "RTX 5080 Laptop GPU"),
        ("RTX PRO 6000", "RTX PRO 6000 Blackwell"),
        ("rtx 6000 pro", "RTX PRO 6000 Blackwell"),
        ("PRO 6000 Max-Q", "RTX PRO 6000 Blackwell"),
        ("rtx pro 5000", "RTX PRO 5000 Blackwell"),
        ("RTX PRO 5000 72 GB", "RTX PRO 5000 72GB Blackwell"),
        ("b200", "B200"),
        ("DGX B200", "B200"),
        ("gb10", "GB10 (DGX Spark)"),
        ("DGX Spark", "GB10 (DGX Spark)"),
        ("h100", "H100 SXM"),
        ("H100 PCIe", "H100 PCIe"),
        ("h200", "H200 SXM"),
        ("A100", "A100 SXM 80 GB"),
        ("6000 Ada", "RTX 6000 Ada"),
    ],
)
def test_names_as_people_write_them(text: str, card: str) -> None:
    assert named(text)[1] == card


@pytest.mark.parametrize(
    ("text", "profile"), [("sm120", "sm120"), ("SM_120", "sm120"), ("sm120 FMHA", "sm120-fmha"), ("CPU", "cpu")]
)
def test_a_profile_is_named_in_any_case_and_has_no_card(text: str, profile: str) -> None:
    assert (gpus.named(text).name, gpus.named(text).card) == (profile, None)


def test_an_ambiguous_name_is_rejected_with_both_cards() -> None:
    with pytest.raises(UsageError, match="fits 2 cards: RTX 5060 Ti 16 GB and RTX 5060 Ti 8 GB") as caught:
        gpus.named("RTX 5060 Ti")
    assert caught.value.hint == "Name one of them: --gpu 'RTX 5060 Ti 8 GB'"
    assert named(caught.value.hint.partition("--gpu ")[2].strip("'"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rtx 5095", "'RTX 5090'"),
        ("RTX 5090 D v2", "'RTX 5090 D'"),
        ("a100 40gb", "'A100 SXM 80 GB' or 'A100 PCIe 80 GB'"),
        ("L40", "'L40S'"),
        ("RTX 6000", "'RTX 6000 Ada'"),
        ("sm10", "'sm100' or 'sm103'"),
        ("rtx 50", "'RTX 5090' or 'RTX 5090 D'"),
    ],
)
def test_an_unknown_name_is_rejected_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UnsupportedError, match="no GPU profile or card named") as caught:
        gpus.named(typed)
    assert caught.value.why.startswith("Did you mean ")
    assert meant in caught.value.why


@given(st.text(max_size=30))
def test_any_other_text_is_rejected_with_a_hint(text: str) -> None:
    known = {
        cards._key(name) for card in OWNERS for name in (card.name, cards._QUALIFIER.sub("", card.name), *card.also)
    }
    assume(cards._key(text) not in known)
    assume(cards.plain(text) not in map(cards.plain, gpus.names()))
    with pytest.raises(UnsupportedError) as caught:
        gpus.named(text)
    assert repr(text) in caught.value.what
    assert caught.value.hint


@given(spellings())
def test_the_recipe_and_the_flags_do_not_depend_on_the_spelling(spelling: tuple[cards.Card, str]) -> None:
    card, text = spelling
    by_card = schema.resolve({"model.id": "m", "gpu": text})
    by_profile = schema.resolve({"model.id": "m", "gpu": OWNERS[card]})
    assert by_card.recipe == by_profile.recipe
    if "nvfp4" in by_card.gpu.formats:
        config = {"hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 4096}
        assert trtllm_flags.resolve(by_card, config) == trtllm_flags.resolve(by_profile, config)
