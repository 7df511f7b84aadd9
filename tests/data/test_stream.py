"""A text in several shards, against the same text in one."""

import numpy as np
import pytest

from distcond.data.stream import Stream

TEXT = np.arange(1000).astype(np.uint16)


@pytest.mark.parametrize("borders", [[], [500], [1, 2, 3, 999], [0, 0, 400, 400, 403, 1000], list(range(0, 1000, 3))])
@pytest.mark.parametrize("length", [1, 2, 17, 1000])
def test_windows_do_not_know_where_shards_end(borders: list[int], length: int) -> None:
    stream = Stream(np.split(TEXT, borders))
    assert len(stream) == 1000 and stream.tobytes() == TEXT.tobytes()
    places = 1000 - length + 1
    for starts in (np.arange(places), np.random.default_rng(0).integers(0, places, 50), np.empty(0, np.int64)):
        windows = stream.windows(starts, length)
        assert windows.dtype == np.uint16
        assert np.array_equal(windows, starts[:, None] + np.arange(length))


def test_nothing_is_a_text() -> None:
    assert len(Stream([])) == 0 and Stream([np.empty(0, np.uint8)]).tobytes() == b""
