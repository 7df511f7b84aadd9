"""distcond.ops: the path of sorted tokens, and forward and backward against a loop over single tokens in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distcond.ops import NodeTensors, Schedule, TreePath, tree_backward, tree_forward
from tests.pairs import every_pair

# float64; sums of at most (depth + 1) x in_features <= 60 products of numbers of size 1 to 10.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random_leaves(tokens: int, depth: int, seed: int = 0) -> Tensor:
    """Leaves of which some come more than once."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(2**depth, (max(1, tokens // 2),), generator=generator)
    return few[torch.randint(len(few), (tokens,), generator=generator)]


# ---- the path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 2, 13])
@pytest.mark.parametrize(("depth", "trees"), [*((depth, 1) for depth in (0, 1, 2, 5, 40, 62)), (0, 3), (2, 3), (60, 4), (5, 64)])
def test_path_is_the_distinct_prefixes_of_sorted_tokens(depth: int, trees: int, tokens: int) -> None:
    leaf = random_leaves(tokens, depth) + (torch.arange(tokens) % trees << depth)
    if tokens > 1:
        leaf[0], leaf[1] = trees * 2**depth - 1, 0  # both ends of the forest
    path = TreePath.of(leaf, depth, trees)
    assert sorted(path.order_T.tolist()) == list(range(tokens))
    assert torch.equal(path.order_T[path.place_T], torch.arange(tokens))
    assert len(path.levels) == depth + 1
    above: list[int] = []
    for number, level in enumerate(path.levels):
        node_of = [trees * (2**number - 1) + (value >> (depth - number)) for value in leaf.tolist()]
        nodes = level.nodes_G.tolist()
        assert nodes == sorted(set(node_of))
        runs = [run.tolist() for run in path.order_T.split(level.sizes)]
        assert [[node_of[token] for token in run] for run in runs] == [[node] * node_of.count(node) for node in nodes]
        if number:
            assert [above[parent] for parent in level.parent_G.tolist()] == [(node - trees) // 2 for node in nodes]
        above = nodes


def test_tokens_of_one_leaf_keep_their_order() -> None:
    path = TreePath.of(torch.tensor([3, 0, 3, 0, 3]), 2)
    assert path.order_T.tolist() == [1, 3, 0, 2, 4]


# ---- forward and backward --------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Random tokens, and random nodes stored in random order."""

    x: Tensor
    leaf: Tensor
    path: TreePath
    rows: list[Tensor]
    nodes: NodeTensors
    full_depth: int
    rank: int
    trees: int


def make_case(
    depth: int,
    full_depth: int,
    *,
    tokens: int = 11,
    sizes: tuple[int, int, int] = (3, 5, 2),
    bias: int = 1,
    missing: float = 0.0,
    seed: int = 0,
    trees: int = 1,
) -> Case:
    p, q, rank = sizes
    generator = torch.Generator().manual_seed(seed)
    leaf = random_leaves(tokens * trees, depth, seed) + (torch.arange(trees) << depth).repeat(tokens)
    path = TreePath.of(leaf, depth, trees)
    rows, sizes_of_kind = [], {True: 0, False: 0}
    for number, level in enumerate(path.levels):
        full = number <= full_depth
        place = sizes_of_kind[full] + torch.arange(len(level.nodes_G))
        sizes_of_kind[full] += len(place)
        gone = torch.rand(len(place), generator=generator) < (missing if number else 0.0)  # the root always exists
        rows.append(torch.where(gone, -1, place))
    num_full, num_low = sizes_of_kind[True], sizes_of_kind[False]
    shuffle_full, shuffle_low = (torch.randperm(n, generator=generator) for n in (num_full, num_low))
    for number, place in enumerate(rows):
        order = shuffle_full if number <= full_depth else shuffle_low
        rows[number] = torch.where(place < 0, -1, order[place.clamp(min=0)])

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    nodes = NodeTensors(
        numbers(num_full, p, q), numbers(num_full, p), numbers(num_low, rank, q), numbers(num_low, rank + bias, p)
    )
    return Case(numbers(tokens, q), leaf, path, rows, nodes, full_depth, rank, trees)


def contribution(case: Case, token: int, number: int, nodes: NodeTensors, x: Tensor) -> Tensor:
    """U_l x + c_l of one token on one level; zeros where the node is missing."""
    level = case.path.levels[number]
    depth = len(case.path.levels) - 1
    node = case.trees * (2**number - 1) + (int(case.leaf[token]) >> (depth - number))
    x_Q = x[token // case.trees]
    row = int(case.rows[number][level.nodes_G.tolist().index(node)])
    if row < 0:
        return x.new_zeros(nodes.bias_SP.shape[1])
    if number <= case.full_depth:
        return nodes.weight_SPQ[row] @ x_Q + nodes.bias_SP[row]
    return nodes.left_SxP[row, : case.rank].T @ (nodes.right_SrQ[row] @ x_Q) + nodes.left_SxP[row, case.rank :].sum(0)


def naive(case: Case, nodes: NodeTensors, x: Tensor, multiplier_TK: Tensor) -> Tensor:
    depth = len(case.path.levels) - 1
    outputs = [
        sum(
            (multiplier_TK[t, level - 1] * contribution(case, t, level, nodes, x) for level in range(1, depth + 1)),
            contribution(case, t, 0, nodes, x),
        )
        for t in range(len(case.leaf))
    ]
    return torch.stack(outputs) if outputs else x.new_zeros(0, nodes.bias_SP.shape[1])


SHAPES = [
    (0, 0), (1, 1), (1, 0), (3, 3), (3, 2), (3, 0), (6, 2), (9, 9), (12, 4),
]  # fmt: skip
DETAILS = [
    {},
    {"tokens": 0},
    {"tokens": 1, "bias": 0},
    {"sizes": (1, 1, 1), "seed": 1},
    {"sizes": (4, 3, 3), "tokens": 30, "seed": 2},
    {"trees": 3, "tokens": 7},
    {"trees": 2, "tokens": 1, "bias": 0},
]
# Every shape with the first details; every detail with two of them, in which full and low-rank levels meet.
CASES = [*((*shape, DETAILS[0]) for shape in SHAPES), *((*shape, details) for shape in SHAPES[4:7:2] for details in DETAILS[1:])]


def schedules(case: Case) -> list[Schedule]:
    """Every way of computing the levels, the one that would be chosen among them."""
    depth, full = len(case.path.levels) - 1, case.full_depth
    ways = [Schedule(full, merged, gathered) for merged in range(full + 1) for gathered in range(full + 1, depth + 2)]
    assert Schedule.of(case.path, full, case.nodes) in ways
    return ways


@pytest.mark.parametrize("missing", [0.0, 0.5])
@pytest.mark.parametrize(("depth", "full_depth", "details"), CASES)
def test_forward_is_the_sum_along_each_tokens_path(depth: int, full_depth: int, details: dict, missing: float) -> None:
    case = make_case(depth, full_depth, missing=missing, **details)
    expected = naive(case, case.nodes, case.x, torch.ones(len(case.leaf), depth, dtype=torch.float64))
    for schedule in schedules(case):
        y = tree_forward(case.x, case.path, case.rows, case.nodes, schedule)
        torch.testing.assert_close(y, expected, **EXACT)


def test_forward_before_any_low_rank_row_exists_is_the_full_part_alone() -> None:
    case = make_case(4, 1, missing=0.0)
    bare = NodeTensors(*case.nodes[:2], *(tensor[:0] for tensor in case.nodes[2:]))
    rows = [*case.rows[:2], *(torch.full_like(row, -1) for row in case.rows[2:])]
    missing = Case(case.x, case.leaf, case.path, rows, bare, 1, case.rank, 1)
    expected = naive(missing, bare, case.x, torch.ones(11, 4, dtype=torch.float64))
    for schedule in schedules(case):
        y = tree_forward(case.x, case.path, rows, bare, schedule)
        torch.testing.assert_close(y, expected, **EXACT)


def test_levels_are_merged_while_nodes_have_many_tokens_and_copied_where_they_have_few() -> None:
    small, large = (NodeTensors(*(torch.zeros(0, *shape) for shape in shapes)) for shapes in (
        ((64, 64), (64,), (1, 64), (2, 64)), ((512, 512), (512,), (8, 512), (9, 512)),
    ))  # fmt: skip
    uniform = TreePath.of(torch.arange(2**10), 10)
    assert Schedule.of(uniform, 10, small) == Schedule(full_depth=10, merged=7, gathered=11)  # 2**7 nodes of 8 tokens
    assert Schedule.of(uniform, 3, small) == Schedule(full_depth=3, merged=3, gathered=7)  # 192 numbers: 2.5 us a copy
    assert Schedule.of(uniform, 3, large) == Schedule(full_depth=3, merged=3, gathered=10)  # 8,704 numbers: 25 us
    one_leaf = TreePath.of(torch.full((1024,), 77), 10)
    assert Schedule.of(one_leaf, 4, small) == Schedule(full_depth=4, merged=4, gathered=11)
    assert Schedule.of(TreePath.of(torch.tensor([77]), 10), 4, small) == Schedule(full_depth=4, merged=0, gathered=5)


def assert_rows_hold(
    got: Sequence[Tensor], rows: list[Tensor], expected: Sequence[Tensor], bounds: dict[str, float] = EXACT
) -> None:
    """Level after level, each tensor's rows are those of the stored tensor's gradient."""
    for tensor, stored in zip(got, expected, strict=True):
        torch.testing.assert_close(tensor, stored[torch.cat(rows)], **bounds)


@pytest.mark.parametrize(("depth", "full_depth", "details"), CASES)
def test_backward_is_the_gradient_of_the_sum(depth: int, full_depth: int, details: dict) -> None:
    case = make_case(depth, full_depth, **details)
    x = case.x.clone().requires_grad_()
    nodes = NodeTensors(*(tensor.clone().requires_grad_() for tensor in case.nodes))
    multiplier = torch.ones(len(case.leaf), depth, dtype=torch.float64, requires_grad=True)
    y = naive(case, nodes, x, multiplier)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    linked = sum(tensor.sum() for tensor in (x, multiplier, *nodes))
    wanted = torch.autograd.grad((y * grad_y).sum() + 0 * linked, (x, multiplier, *nodes))
    gates = (range(1, depth + 1), range(depth, 0, -2), ())
    for merged, gathered, gate_levels in every_pair(range(full_depth + 1), range(full_depth + 1, depth + 2), gates):
        schedule = Schedule(full_depth, merged, gathered)
        out = NodeTensors(*(torch.full_like(tensor, torch.nan) for tensor in case.nodes))  # every number must be written
        backward = (case.x, grad_y, case.path, case.rows, case.nodes, schedule, gate_levels, out)
        grad_x, grad_levels = tree_backward(*backward)
        torch.testing.assert_close(grad_x.unflatten(0, (-1, case.trees)).sum(1), wanted[0], **EXACT)
        mask = torch.tensor([float(level in gate_levels) for level in range(1, depth + 1)], dtype=torch.float64)
        torch.testing.assert_close(grad_levels, wanted[1] * mask, **EXACT)
        assert_rows_hold(out[:2], case.rows[: full_depth + 1], wanted[2:4])
        if full_depth < depth:
            assert_rows_hold(out[2:], case.rows[full_depth + 1 :], wanted[4:])
