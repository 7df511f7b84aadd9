"""Text as data: whatever a byte is, something visible stands for it, and everything is in its place."""

import random

import pytest

from distcond.report.words import duration, glyphs, large, percent, show, visible


@pytest.mark.parametrize(
    ("text", "signs"),
    [
        (b"a b\t\n", ["a", "·", "b", "⇥", "⏎"]),
        ("é€😀".encode(), ["é", "‥", "€", "‥", "‥", "😀", "‥", "‥", "‥"]),
        (b"\x00\x1b\x7f\xff\xc3(", ["␀", "␛", "␡", "‹FF›", "‹C3›", "("]),
        ("‮".encode(), ["‹202E›", "‥", "‥"]),  # would turn what follows around
        ("́".encode(), ["◌́", "‥"]),  # would sit on the letter before
        ("é".encode()[:1], ["‹C3›"]),  # a window may end inside a character
    ],
)
def test_every_byte_has_a_sign(text: bytes, signs: list[str]) -> None:
    assert glyphs(text, is_bytes=True) == signs


def test_any_bytes_give_as_many_signs_none_of_which_acts() -> None:
    text = random.Random(0).randbytes(4096)
    signs = glyphs(text, is_bytes=True)
    assert len(signs) == len(text)
    assert all(sign and sign.isprintable() for sign in signs)


def test_tokens_are_shown_by_their_numbers() -> None:
    assert glyphs([7, 300], is_bytes=False) == ["7", "300"]


def test_nothing_invisible_is_left_in_a_text_but_its_lines() -> None:
    shown = visible("a\tb\x1b[2J\ud800\u202ec\nd\x85")
    assert shown == "a⇥b␛[2J‹D800›‹202E›c\nd‹85›"
    shown.encode()


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (show(2.16666), "2.167"),
        (show(1234.0), "1,234"),
        (show(12345.6), "12,346"),
        (show(None), "–"),
        (large(1_203_000), "1.2 million"),
        (large(31_180), "31,200"),
        (percent(0.1234), "12.3%"),
        (duration(212), "3 min 32 s"),
        (duration(7325), "2 h 2 min"),
    ],
)
def test_numbers_read_as_people_write_them(shown: str, text: str) -> None:
    assert shown == text
