"""Numbers and strange characters as people read them."""

import unicodedata
from collections.abc import Sequence

MISSING = "–"
_SHOWN = {0x09: "⇥", 0x0A: "⏎", 0x20: "·", 0x7F: "␡"}


def show(value: float | str | None, digits: int = 4) -> str:
    """So many significant digits, with thousands separators; a dash for nothing."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e12 else f"{value:.{digits}g}"


def large(value: float | None) -> str:
    """Three significant digits and a word: 1.23 million."""
    if value is None:
        return MISSING
    for size, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"), (1e4, "")):
        if abs(value) >= size:
            return f"{show(float(f'{value / size:.3g}'), 3)}{word}" if word else f"{float(f'{value:.3g}'):,.0f}"
    return show(float(f"{value:.3g}"), 3)


def percent(share: float | None) -> str:
    """A share of one in percent."""
    return MISSING if share is None else f"{100 * share:.3g}%"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes, seconds."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"


def plural(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def glyphs(values: Sequence[int], *, is_bytes: bool) -> list[str]:
    """A visible sign for every byte of a text, or for every token the number of its id.

    A character of several bytes stands at its first one, and ‥ at the others. Bytes that are no UTF-8 and characters that
    cannot be seen, or that would move others, are shown by their numbers.
    """
    if not is_bytes:
        return [str(value) for value in values]
    text, signs = bytes(values), list[str]()
    while (place := len(signs)) < len(text):
        size = _character_size(text[place:])
        sign = _sign(text[place : place + size].decode()) if size else f"‹{text[place]:02X}›"
        signs += [sign, *["‥"] * (size - 1)]
    return signs


def visible(text: str) -> str:
    """A text of which everything can be seen; lines stay lines."""
    return "".join(letter if letter == "\n" or letter.isprintable() else _picture(letter) for letter in text)


def _character_size(text: bytes) -> int:
    """Bytes of the UTF-8 character that a text begins with; 0: there is none."""
    size = next((size for least, size in ((0xF0, 4), (0xE0, 3), (0xC0, 2)) if text[0] >= least), 1)
    try:
        return size if len(text[:size].decode()) == 1 else 0
    except UnicodeDecodeError:
        return 0


def _sign(letter: str) -> str:
    if ord(letter) in _SHOWN or not letter.isprintable():
        return _picture(letter)
    return f"◌{letter}" if unicodedata.category(letter).startswith("M") else letter


def _picture(letter: str) -> str:
    code = ord(letter)
    if code in _SHOWN:
        return _SHOWN[code]
    return chr(0x2400 + code) if code < 0x20 else f"‹{code:X}›"
