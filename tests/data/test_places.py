"""Where a byte stands in a text."""

import numpy as np

from distcond.data.places import PLACES, places_of


def of(text: str) -> list[str]:
    row = np.frombuffer(text.encode(), np.uint8)[None]
    return [PLACES[place] for place in places_of(row)[0]]


def test_every_byte_has_its_place() -> None:
    assert of(" if x1 == 0xff:\n\treturn é_2 + 3.14\n  y") == [
        *("word start", "inside a word", "space"),
        *("word start", "inside a word", "space"),  # x1
        *("other", "other", "space"),
        *("number start", "inside a number", "inside a number", "inside a number", "other", "line end"),  # 0xff:
        "line start",
        *("word start", *["inside a word"] * 5, "space"),
        *("word start", "inside a word", "inside a word", "inside a word", "space", "other", "space"),  # two bytes of é
        *("number start", "other", "number start", "inside a number", "line end"),
        *("line start", "space", "word start"),
    ]


def test_rows_do_not_depend_on_each_other() -> None:
    rows = np.frombuffer(b"12 ab\nx12 \n ", np.uint8).reshape(2, 6)
    both = places_of(rows)
    assert np.array_equal(both, np.concatenate([places_of(rows[:1]), places_of(rows[1:])]))
    assert [PLACES[place] for place in both[0]] == ["inside a number", "space", "word start", "inside a word", "line end"]
