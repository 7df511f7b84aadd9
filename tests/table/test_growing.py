"""Growing tensors and key indices: what they hold, what they cost."""

import copy
import io
import itertools
import mmap
import pickle
import re
from pathlib import Path

import pytest
import torch

from distcond.table import growing
from distcond.table.growing import Growing
from distcond.table.key_index import SMALL, KeyIndex


@pytest.fixture(params=["address space reserved", "moved"])
def reserves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "moved":
        monkeypatch.setattr(growing, "_reserve", lambda size: None)
    return bool(request.param != "moved")


@pytest.mark.parametrize("shape", [(), (3,), (0,)])
def test_rows_stay_and_new_ones_are_zeros(reserves: bool, shape: tuple[int, ...]) -> None:
    rows = Growing(shape, torch.float32)
    for size in (0, 1, 5, 5, 40):
        before = rows.tensor.clone()
        rows.resize(size)
        assert rows.tensor.shape == (size, *shape)
        assert torch.equal(rows.tensor[: len(before)], before) and not rows.tensor[len(before) :].any()
        rows.tensor.fill_(7.0)


@pytest.mark.parametrize("width", [3, 700, 5000])
def test_rows_that_come_again_are_zeros_and_so_is_the_one_behind_the_last(reserves: bool, width: int) -> None:
    rows = Growing((width,), torch.float32)
    assert not rows.with_zeros().any()
    for size in (9, 2, 30, 29, 0, 4):
        kept = min(size, len(rows.tensor))
        rows.resize(size)
        assert bool((rows.tensor[:kept] == 7.0).all()) and not rows.tensor[kept:].any()
        assert rows.with_zeros().shape == (size + 1, width) and not rows.with_zeros()[size].any()
        rows.tensor.fill_(7.0)


def test_growth_moves_nothing_or_by_a_quarter(reserves: bool) -> None:
    rows = Growing((3,), torch.float32)
    places = []
    for size in range(1, 501):
        rows.resize(size)
        places.append(rows.tensor.data_ptr())
        if reserves:
            assert rows.tensor.untyped_storage().nbytes() == size * 12  # what torch.save would write
        assert rows.tensor.untyped_storage().nbytes() <= 12 * (1.25 * size + 1)
    moves = sum(one != other for one, other in itertools.pairwise(places))
    assert moves == 0 if reserves else moves <= 30  # log 500 / log 1.25 = 28


def test_what_outgrows_its_place_moves_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "RESERVED_BYTES", 4096)
    rows = Growing((4,), torch.float32)
    for size in (200, 300, 3000):
        rows.resize(size)
        rows.tensor[-1] = size
    assert rows.tensor[[199, 299, 2999], 0].tolist() == [200, 300, 3000]


def test_memory_of_rows_that_went_is_given_back() -> None:
    rows = Growing((2**10,), torch.float32)
    rows.resize(2**13)
    rows.tensor.fill_(1.0)
    before = resident_bytes(rows.tensor.data_ptr(), 2**25)
    rows.resize(3)
    assert before - resident_bytes(rows.tensor.data_ptr(), 2**25) > 0.9 * 2**25 and bool((rows.tensor == 1.0).all())


def test_memory_is_taken_by_rows_that_are_written() -> None:
    width = 2**10
    rows = Growing((width,), torch.float32)
    rows.resize(1)
    place = rows.tensor.data_ptr(), 2**14 * 4 * width
    before = resident_bytes(*place)
    for size in range(2**10, 2**14 + 1, 2**10):
        rows.resize(size)
        rows.tensor[-(2**10) :] = 1.0
    assert rows.tensor.data_ptr() == place[0]
    taken = resident_bytes(*place) - before
    assert 0.9 * rows.tensor.nbytes < taken < 1.1 * rows.tensor.nbytes


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs huge pages")
def test_only_large_tensors_lie_in_huge_pages() -> None:
    rows = Growing((), torch.uint8)
    rows.resize(2 * growing.HUGE_FROM)
    assert [are_pages_huge(rows.tensor[at:].data_ptr()) for at in (0, growing.HUGE_FROM - 1, growing.HUGE_FROM)] == [
        False,
        False,
        True,
    ]


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs huge pages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_large_room_lies_in_huge_pages_and_it_goes_with_its_tensor(dtype: torch.dtype) -> None:
    row = torch.empty(2**10, dtype=dtype)
    fits = growing.HUGE_FROM // row.nbytes
    small, large = (growing.huge_empty_like(row.expand(count, -1).t()) for count in (fits - 1, fits))
    assert (small.shape, large.shape, large.dtype) == ((2**10, fits - 1), (2**10, fits), dtype) and large.is_contiguous()
    assert [are_pages_huge(large.data_ptr()), are_pages_huge(small.data_ptr())] == [True, False]
    large.fill_(1.0)
    place = large.data_ptr(), large.nbytes
    assert resident_bytes(*place) >= large.nbytes
    del large
    assert resident_bytes(*place) < place[1]


def are_pages_huge(address: int) -> bool:
    """Whether huge pages are asked for there: `hg` among the flags of the mapping."""
    return "hg" in mappings_of(address, 1)[0]["VmFlags"].split()


def resident_bytes(address: int, size: int) -> int:
    """Memory of the mappings there: less is in it that other tests do than in that of the process."""
    return sum(1024 * int(mapping["Rss"].split()[0]) for mapping in mappings_of(address, size))


def mappings_of(address: int, size: int) -> list[dict[str, str]]:
    """What /proc/self/smaps says of those that hold some of these bytes."""
    found: list[dict[str, str]] = []
    for mapping in re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        head, *lines = mapping.splitlines()
        start, end = (int(bound, 16) for bound in head.split()[0].split("-"))
        if start < address + size and address < end:
            found.append({key: value for key, _, value in (line.partition(":") for line in lines)})
    return found


def test_columns_are_apart_in_the_bits_from_which_a_cache_predicts_its_ways() -> None:
    columns = [Growing((64,), torch.float32) for _ in range(20)]
    for column in columns:
        column.resize(100)
    low_bits = {column.tensor.data_ptr() % growing.COLOR_BYTES for column in columns}
    assert len(low_bits) == len(columns) and max(low_bits) < 2**8 * mmap.PAGESIZE


def test_copies_are_whole_and_can_grow(reserves: bool) -> None:
    rows = Growing.of(torch.arange(6.0).view(3, 2))
    saved = io.BytesIO()
    torch.save(rows.tensor, saved)
    assert saved.tell() < 4096
    for other in (copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        other.resize(4)
        other.tensor[0] = 9.0
        assert other.tensor.tolist() == [[9.0, 9.0], [2.0, 3.0], [4.0, 5.0], [0.0, 0.0]]
    assert rows.tensor.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


@pytest.mark.parametrize("batch", [1, 700, 5000])
def test_an_index_is_a_dictionary(batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    keys = torch.randperm(30_000, generator=generator)[: 20 * batch] * 2**46
    places = torch.randperm(len(keys), generator=generator)
    index, known = KeyIndex(), dict[int, int]()
    assert index.find(keys[:3]).tolist() == [-1, -1, -1]
    for some_keys, some_places in zip(keys.split(batch), places.split(batch), strict=True):
        index.insert(some_keys, some_places)
        known |= dict(zip(some_keys.tolist(), some_places.tolist(), strict=True))
        asked = torch.cat([keys[:50], some_keys[:50], some_keys[:50] + 1])
        assert index.find(asked).tolist() == [known.get(key, -1) for key in asked.tolist()]


def test_an_index_moves_a_key_a_logarithmic_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_keys = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda keys: sorted_keys.append(len(keys)) or sort(keys))
    index, batch, number = KeyIndex(), SMALL, 200
    for start in range(0, number * batch, batch):
        keys = torch.arange(start, start + batch)
        index.insert(keys, keys)
    assert sum(sorted_keys) < 10 * number * batch  # log2(200) = 8; each run at least doubles
    assert index.find(torch.tensor([0, number * batch - 1, number * batch])).tolist() == [0, number * batch - 1, -1]
