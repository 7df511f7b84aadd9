"""RowStore against a dictionary: rows keep place, numbers and optimiser state whatever comes after them."""

import pickle

import pytest
import torch
from torch import Tensor

from distcond.table import RowStore

WIDTH = 3
KEYS = torch.tensor([9, 2, 2**62, 0, 5])


def rows_for(keys: Tensor) -> Tensor:
    """Numbers that tell which key a row belongs to."""
    return torch.stack([keys.float(), keys.float() + 0.5, -keys.float()], dim=1)


def filled() -> RowStore:
    store = RowStore(WIDTH)
    store.append(KEYS, rows_for(KEYS))
    store.add_state("moment", (WIDTH,), torch.float32)
    store.add_state("clock", (), torch.int64)
    store.state["moment"].copy_(10 * rows_for(KEYS))
    store.state["clock"].copy_(torch.arange(1, len(KEYS) + 1))
    return store


def test_a_key_finds_its_row_and_an_unknown_one_finds_none() -> None:
    store = filled()
    unknown = torch.tensor([1, 3, 10, 2**62 - 1, 2**62 + 1, 2**63 - 2])
    assert store.find(unknown).tolist() == [-1] * len(unknown)
    asked = torch.tensor([5, 5, 2**62, 7, 0])
    found = store.find(asked)
    assert found.tolist() == [4, 4, 2, -1, 3]
    assert torch.equal(store.keys[found[found >= 0]], asked[found >= 0])
    assert len(store.find(asked[:0])) == 0


def test_an_empty_store_finds_nothing() -> None:
    assert RowStore(WIDTH).find(torch.tensor([0, 7])).tolist() == [-1, -1]


def test_growth_keeps_rows_places_and_state_and_gives_new_rows_zero_state() -> None:
    store = filled()
    data, state = store.data.clone(), {name: value.clone() for name, value in store.state.items()}
    extra = torch.randperm(200, generator=torch.Generator().manual_seed(0)) + 100
    for part in extra.split(7):
        store.append(part, rows_for(part))
        store.add_state("moment", (WIDTH,), torch.float32)  # what every optimiser step does
    assert store.size == len(KEYS) + 200 and len(store.data) == store.size
    assert torch.equal(store.data[:5], data)
    assert torch.equal(store.find(KEYS), torch.arange(5))
    assert torch.equal(store.data[store.find(extra)], rows_for(extra))
    for name, value in store.state.items():
        assert torch.equal(value[:5], state[name]) and not value[5:].any()


def test_data_and_state_are_the_store_itself_not_copies() -> None:
    store = filled()
    store.data[2] = 7.0
    store.state["clock"][2] = 70
    assert store.data[2].tolist() == [7.0] * WIDTH and int(store.state["clock"][2]) == 70


def test_replace_forgets_everything_else() -> None:
    store, keys = filled(), torch.tensor([4, 2])
    store.add_gradient(torch.tensor([0]), torch.ones(1, WIDTH))
    data, clock = rows_for(keys), torch.tensor([3, 1])
    store.replace(keys, data, {"clock": clock})
    data.zero_(), clock.zero_(), keys.zero_()
    assert store.find(torch.tensor([9, 4, 2])).tolist() == [-1, 0, 1]
    assert torch.equal(store.data, rows_for(torch.tensor([4, 2])))
    assert store.state.keys() == {"clock"} and store.state["clock"].tolist() == [3, 1]
    assert len(store.take_gradient()[0]) == 0


def test_keep_keeps_rows_in_their_order_with_their_state() -> None:
    store = filled()
    store.keep(torch.tensor([True, False, True, False, True]))
    left = KEYS[[0, 2, 4]]
    assert torch.equal(store.keys, left) and torch.equal(store.data, rows_for(left))
    assert torch.equal(store.state["moment"], 10 * rows_for(left)) and store.state["clock"].tolist() == [1, 3, 5]
    assert store.find(KEYS).tolist() == [0, -1, 1, -1, 2]
    store.append(torch.tensor([2]), rows_for(torch.tensor([2])))  # a key that was dropped may come again, as a stranger
    assert int(store.state["clock"][3]) == 0 and not store.state["moment"][3].any()


def test_of_new_rows_only_those_stay_that_are_wanted_and_old_ones_all_do() -> None:
    store = filled()
    store.settle()
    new = torch.tensor([30, 10, 20, 40])
    store.append(new, rows_for(new))
    removals = store.num_removals
    store.keep_new(torch.tensor([40, 10, 9]))
    assert store.keys.tolist() == [*KEYS.tolist(), 10, 40] and store.num_settled == 7
    assert torch.equal(store.data, rows_for(store.keys)) and store.num_removals == removals + 1
    assert store.find(torch.tensor([*KEYS.tolist(), *new.tolist()])).tolist() == [0, 1, 2, 3, 4, -1, 5, -1, 6]
    store.append(new[:1], None)  # comes again, as a stranger
    assert not store.data[7].any() and int(store.state["clock"][7]) == 0
    store.keep_new(new)
    assert store.size == 8 and store.num_removals == removals + 1


def test_rows_that_are_taken_arrive_whole_elsewhere_and_leave_the_others_whole() -> None:
    store, other = filled(), filled()
    other.keep(torch.tensor([False] * 5))
    whole = {key: (store.data[row].clone(), int(store.state["clock"][row])) for row, key in enumerate(KEYS.tolist())}
    moved = KEYS[[4, 1]]
    other.put(store.take(store.find(moved)))
    for part, keys in ((store, KEYS[[0, 2, 3]]), (other, moved)):
        assert sorted(part.keys.tolist()) == sorted(keys.tolist())
        rows = part.find(keys)
        assert [(part.data[row].tolist(), int(part.state["clock"][row])) for row in rows] == [
            (whole[key][0].tolist(), whole[key][1]) for key in keys.tolist()
        ]
        assert torch.equal(part.state["moment"], 10 * part.data)
    store.append(moved, None)  # as strangers
    assert not store.state["moment"][3:].any() and not store.data[3:].any()


@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_gradients_of_micro_batches_add_up_per_row_by_ascending_key_and_are_taken_once(calls: int) -> None:
    store, generator = filled(), torch.Generator().manual_seed(calls)
    total: dict[int, Tensor] = {}
    for _ in range(calls):
        keys = KEYS[torch.rand(5, generator=generator) < 0.6].sort().values
        grad = torch.randint(-4, 5, (len(keys), WIDTH), generator=generator).float()  # whole numbers: exact sums
        store.add_gradient(store.find(keys), grad)
        for key, row in zip(keys.tolist(), grad, strict=True):
            total[key] = total.get(key, torch.zeros(WIDTH)) + row
        store.append(torch.tensor([1000 + len(store.keys)]), torch.zeros(1, WIDTH))  # growth between the calls is harmless
    rows, grad = store.take_gradient()
    assert store.keys[rows].tolist() == sorted(total)
    assert grad.shape == (len(total), WIDTH)
    for key, row in zip(store.keys[rows].tolist(), grad, strict=True):
        assert torch.equal(row, total[key])
    assert len(store.take_gradient()[0]) == 0


def test_moving_to_float64_moves_numbers_and_leaves_keys_and_clocks_whole() -> None:
    store = filled()
    store.move(torch.device("cpu"), torch.float64)
    assert store.data.dtype == store.state["moment"].dtype == torch.float64
    assert store.keys.dtype == store.state["clock"].dtype == torch.int64
    assert torch.equal(store.find(KEYS), torch.arange(5)) and torch.equal(store.data, rows_for(KEYS).double())


def test_the_first_gradient_of_a_step_is_in_the_same_memory_and_others_are_in_their_own() -> None:
    store = filled()
    places = []
    for _ in range(3):
        first, second = store.new_gradient(2), None
        first.fill_(1.0)
        store.add_gradient(torch.tensor([1, 0]), first)
        second = store.new_gradient(2)
        second.fill_(2.0)
        store.add_gradient(torch.tensor([1, 0]), second)
        assert second.data_ptr() != first.data_ptr()
        places.append(first.data_ptr())
        rows, grad = store.take_gradient()
        assert sorted(rows.tolist()) == [0, 1] and bool((grad == 3.0).all())
    assert len(set(places)) == 1
    store.move(torch.device("cpu"), torch.float64)
    assert store.new_gradient(2).dtype == torch.float64
    assert store.new_gradient(9).shape == (9, WIDTH)
    assert len(pickle.dumps(store)) < 4096  # without the memory of gradients
