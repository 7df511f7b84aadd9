"""The memory that checkpoints are written from."""

import os

import torch
from safetensors.torch import load, save
from torch import Tensor

from distcond.train.snapshot import DTYPES, Snapshot, file_pieces


def some_tensors(size: int) -> dict[str, Tensor]:
    """Of every type, and of shapes with many, one and no elements; in no order, with names that JSON has to escape."""
    generator = torch.Generator().manual_seed(size)
    tensors: dict[str, Tensor] = {}
    for number, dtype in enumerate(DTYPES):
        for shape in ((size, 3), (), (0, 2)):
            values = torch.randint(0, 2, shape, generator=generator).to(dtype)
            tensors[f'{(7 * number) % 16}/"größe"\n{len(shape)}{shape[:1]}'] = values
    return tensors


def content(snapshot: Snapshot, place: tuple[str, int, int]) -> bytes:
    return os.pread(snapshot.descriptor, place[2], place[1])


def test_files_are_those_of_safetensors() -> None:
    snapshot = Snapshot()
    for size in (5, 1000, 1001, 3):  # memory is made, grows, fits, shrinks
        files = {"a": some_tensors(size), "b": {"one": torch.ones(size, 2).T}, "c": {}}
        places = snapshot.take(files)
        assert [name for name, _, _ in places] == list(files)
        for place in places:
            tensors = files[place[0]]
            written = b"".join(bytes(piece) for piece in file_pieces(tensors))
            assert content(snapshot, place) == written
            assert written == save({name: value.contiguous() for name, value in tensors.items()})
            assert all(torch.equal(value, tensors[name]) for name, value in load(written).items() if "8" not in str(value.dtype))
    snapshot.close()


def test_memory_is_kept_and_what_changes_later_is_not_in_it() -> None:
    snapshot, value = Snapshot(), torch.ones(10_000)
    (place,) = snapshot.take({"a": {"value": value}})
    size, before = os.fstat(snapshot.descriptor).st_size, content(snapshot, place)
    assert place[2] < size < 1.2 * place[2]
    value.add_(1)
    assert content(snapshot, place) == before
    assert snapshot.take({"a": {"value": value}}) == [place]
    assert os.fstat(snapshot.descriptor).st_size == size and content(snapshot, place) != before
    snapshot.close()
