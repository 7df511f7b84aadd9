"""Where in a text a byte stands: at the start of a line, of a word, inside a number; for telling what a model ponders over."""

import numpy as np

PLACES = ("line start", "word start", "inside a word", "number start", "inside a number", "space", "line end", "other")
"What a byte can be; the first one that fits. Words: letters, digits and _ from a letter or _ on, as identifiers are."
_NONE, _WORD, _NUMBER = range(3)
_DIGIT = np.array([chr(byte).isdigit() and byte < 128 for byte in range(256)])
_LETTER = np.array([byte >= 128 or chr(byte).isalpha() or byte == ord("_") for byte in range(256)])


def places_of(text_BT: np.ndarray) -> np.ndarray:
    """Index into PLACES of every byte but the first of each row: uint8 [B, T] -> int64 [B, T - 1].

    Bytes above 127 are letters, as in UTF-8 of other alphabets. What the first byte of a row belongs to is not known:
    it is taken for a start.
    """
    found_BT = np.empty((text_BT.shape[0], text_BT.shape[1] - 1), np.int64)
    inside_B = _enter(text_BT[:, 0], np.full(len(text_BT), _NONE))
    for t in range(1, text_BT.shape[1]):
        byte_B, before_B = text_BT[:, t], inside_B
        inside_B = _enter(byte_B, before_B)
        tests = (
            text_BT[:, t - 1] == ord("\n"),
            (inside_B == _WORD) & (before_B != _WORD),
            inside_B == _WORD,
            (inside_B == _NUMBER) & (before_B != _NUMBER),
            inside_B == _NUMBER,
            (byte_B == ord(" ")) | (byte_B == ord("\t")),
            byte_B == ord("\n"),
        )
        found_BT[:, t - 1] = np.select(tests, range(len(tests)), len(tests))
    return found_BT


def _enter(byte_B: np.ndarray, before_B: np.ndarray) -> np.ndarray:
    """The kind of token that each byte belongs to, given that of the byte before; letters after digits go on with a number."""
    goes_on = _LETTER[byte_B] | _DIGIT[byte_B]
    fresh = np.where(_DIGIT[byte_B], _NUMBER, _WORD)
    return np.where(goes_on, np.where(before_B != _NONE, before_B, fresh), _NONE)
