"""The compiled kernels against plain torch in float64, over sizes that end inside a vector, a tile and a panel."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distcond.errors import ConfigError
from distcond.nn import TreeLinear
from distcond.ops import (
    NodeTensors,
    Schedule,
    TreePath,
    compiler,
    count_nonfinite,
    kernels,
    leaf_product,
    native,
    tree_backward,
    tree_forward,
    tree_leaf,
    tree_path,
    use_kernels,
)
from distcond.optim import RowAdam
from distcond.table.key_index import SMALL, KeyIndex
from tests.ops.test_tree_matmul import random_leaves
from tests.pairs import every_pair
from tests.trees import seed_cpu, tokens

# fp32: sums of up to 600 products of size 1, in another order.
CLOSE = {"rtol": 1e-5, "atol": 3e-5}
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc here")


@pytest.fixture
def compiled() -> Iterator[None]:
    use_kernels("native")
    yield
    use_kernels("torch")


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaves_of(kind: str, count: int, depth: int) -> Tensor:
    if kind == "one":
        return torch.full((count,), 2**depth - 1)
    return torch.arange(count) % 2**depth if kind == "own" else random_leaves(count, depth, seed=count)


# ---- the path --------------------------------------------------------------------------------------------------------


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("count", [1, 2, 13, 3000])
@pytest.mark.parametrize(
    ("depth", "trees"), [(0, 1), (1, 1), (5, 1), (11, 1), (12, 1), (62, 1), (0, 3), (5, 2), (11, 5), (58, 16)]
)
def test_path_is_that_of_torch(depth: int, trees: int, count: int) -> None:
    leaf = random_leaves(count, depth) + (torch.arange(count) % trees << depth)
    path, expected = tree_path(leaf, depth, trees), TreePath.of(leaf, depth, trees)
    assert path.known_flat is not None and expected.known_flat is None
    assert torch.equal(path.order_T, expected.order_T) and torch.equal(path.place_T, expected.place_T)
    for number, (level, other) in enumerate(zip(path.levels, expected.levels, strict=True)):
        assert torch.equal(level.nodes_G, other.nodes_G) and (number == 0 or torch.equal(level.parent_G, other.parent_G))
        assert torch.equal(level.count_G, other.count_G) and level.sizes == other.sizes
    size = len(expected.flat().start_N)
    assert torch.equal(path.flat().bounds, expected.flat().bounds)
    assert torch.equal(path.flat().start_N[:size], expected.flat().start_N)
    roots = path.nodes.bounds[1]  # whose parents have no meaning
    assert torch.equal(path.flat().parents.flat_N[roots:], expected.flat().parents.flat_N[roots:])


# ---- leaves and look-ups ---------------------------------------------------------------------------------------------


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("depth", "trees"), [(0, 1), (0, 3), (1, 1), (7, 3), (62, 1), (58, 16)])
def test_leaves_are_those_of_torch(depth: int, trees: int) -> None:
    gates = numbers(40, trees, depth + 1, seed=1)[..., :depth]  # not contiguous
    gates[:3], gates[3:5] = 0.0, torch.nan
    assert torch.equal(tree_leaf(gates), tree_leaf(gates.double()))


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tokens_without_a_leaf_are_counted_as_by_torch(bad: float) -> None:
    gates = numbers(40, 2, 5, seed=1)[..., :4]  # not contiguous
    assert count_nonfinite(gates) == 0
    gates[0, 0, 0], gates[0, 1, 2], gates[39, 1, 3] = bad, -bad, bad
    assert count_nonfinite(gates) == count_nonfinite(gates.double()) == 2
    assert count_nonfinite(gates[:0]) == count_nonfinite(gates[..., :0]) == 0


@needs_gcc
@pytest.mark.usefixtures("compiled")
def test_keys_are_found_as_torch_finds_them() -> None:
    """Among runs of several lengths, one of them empty; keys ascending and not, in more pieces than one, near and far apart."""
    known = 3 * torch.randperm(7 * SMALL, generator=torch.Generator().manual_seed(0))
    index, asked = KeyIndex(), torch.arange(-5, 21 * SMALL + 5)
    for keys in (asked, asked[:0]):
        assert torch.equal(index.find(keys), torch.full_like(keys, -1))
    for first, end in ((0, 4 * SMALL), (4 * SMALL, 6 * SMALL), (6 * SMALL, 7 * SMALL)):
        index.insert(known[first:end], torch.arange(first, end))
    assert len(index._runs) == 3
    for dropped in (7 * SMALL, 5 * SMALL, 3 * SMALL):
        index.drop(dropped)
        for keys in (asked, asked.flip(0), known, asked[::700].clone(), asked.flip(0)[::700].clone(), known[:100], known[:31]):
            found = index.find(keys)
            use_kernels("torch")
            assert torch.equal(found, index.find(keys))
            use_kernels("native")


# ---- the product of leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", pytest.param("native", marks=needs_gcc)])
@pytest.mark.parametrize("trees", [1, 3])
@pytest.mark.parametrize(
    ("count", "leaves", "width", "out"), [(1, 1, 3, 1), (40, 5, 130, 16), (300, 2, 37, 70), (513, 40, 256, 65), (7, 9, 64, 300)]
)
def test_each_token_is_multiplied_with_the_matrix_of_its_leaf(
    count: int, leaves: int, width: int, out: int, trees: int, name: str
) -> None:
    """The last place stands for leaves without a matrix."""
    x, weight, bias = (numbers(*shape, seed=at) for at, shape in enumerate([(count, width), (leaves, width, out), (leaves, out)]))
    leaf_V = random_leaves(count * trees, 10) % (leaves + 1)
    use_kernels(name)
    try:
        y = leaf_product(x, tree_path(leaf_V, 0, leaves + 1), weight, bias)
        empty = leaf_product(x[:0], tree_path(leaf_V[:0], 0, leaves + 1), weight, bias)
    finally:
        use_kernels("torch")
    has_V = leaf_V < leaves
    own = leaf_V[has_V]
    rows = x.double().repeat_interleave(trees, 0)[has_V]
    expected = torch.einsum("vq,vqp->vp", rows, weight.double()[own]) + bias.double()[own]
    assert y.shape == (count * trees, out) and empty.shape == (0, out)
    torch.testing.assert_close(y[has_V].double(), expected, **CLOSE)


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("count", [0, 1, 31, 2**14, 2**16 + 37])
def test_squares_are_summed_in_double_precision(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(count, seed=count) * 1e18
    expected = x.double().square().sum().item()
    sums = set()
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sums.add(native.square(x))
    assert len(sums) == 1 and sums.pop() == pytest.approx(expected, rel=1e-14)


# ---- the product -----------------------------------------------------------------------------------------------------

SIZES = [  # depth, full_depth, in, out, rank, tokens, leaves
    (0, 0, 16, 16, 1, 1, "one"),
    (0, 0, 37, 5, 1, 30, "one"),
    (1, 0, 7, 3, 1, 4, "random"),
    (3, 3, 33, 70, 1, 50, "random"),
    (4, 4, 64, 32, 1, 16, "own"),
    (2, 2, 40, 300, 1, 210, "random"),
    (4, 4, 20, 40, 1, 100, "one"),
    (5, 3, 48, 17, 3, 90, "random"),
    (6, 6, 600, 20, 1, 70, "random"),
    (9, 2, 530, 31, 5, 40, "own"),
    (12, 0, 16, 65, 63, 20, "random"),
    (62, 1, 24, 24, 2, 9, "random"),
    (7, 2, 40, 33, 2, 100, "one"),
    (4, 1, 300, 70, 3, 250, "random"),
]


def make(size: tuple[Any, ...], missing: float, bias: bool) -> tuple[Tensor, Tensor, TreePath, list[Tensor], NodeTensors]:
    """x, gradient of y, path, rows and nodes in fp32; rows are shuffled, and a share of them is missing."""
    depth, full, width, out, rank, count, kind = size
    path = tree_path(leaves_of(kind, count, depth), depth)
    touched = [len(level.nodes_G) for level in path.levels]
    num_full, num_low = sum(touched[: full + 1]), sum(touched[full + 1 :])
    rows = [
        part.clone()
        for kind_rows, parts in ((num_full, touched[: full + 1]), (num_low, touched[full + 1 :]))
        for part in torch.randperm(kind_rows, generator=torch.Generator().manual_seed(3)).split(parts)
    ]
    for number, row in enumerate(rows[1:], 1):
        row[torch.rand(len(row), generator=torch.Generator().manual_seed(number)) < missing] = -1
    flat = numbers(num_full, out * width + bias * out, seed=4) * width**-0.5  # as tables have them: a bias after its matrix
    low = numbers(num_low, rank * width + (rank + bias) * out, seed=5) * width**-0.5
    nodes = NodeTensors(
        flat[:, : out * width].unflatten(1, (out, width)),
        flat[:, out * width :] if bias else flat.new_zeros(num_full, out),
        low[:, : rank * width].unflatten(1, (rank, width)),
        low[:, rank * width :].unflatten(1, (rank + bias, out)),
    )
    return numbers(count, width, seed=6), numbers(count, out, seed=7), path, rows, nodes


def exactly(size: tuple[Any, ...], nodes: NodeTensors, path: TreePath) -> tuple[Schedule, NodeTensors]:
    return Schedule.of(path, size[1], nodes), NodeTensors(*(part.double() for part in nodes))


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("size", "bias", "missing"), every_pair(SIZES, [True, False], [0.0, 0.5]))
def test_forward_is_that_of_torch(size: tuple[Any, ...], bias: bool, missing: float) -> None:
    x, _, path, rows, nodes = make(size, missing, bias)
    schedule, exact = exactly(size, nodes, path)
    expected = tree_forward(x.double(), path, rows, exact, schedule)
    torch.testing.assert_close(tree_forward(x, path, rows, nodes, schedule).double(), expected, **CLOSE)


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("gates", ["all", "every third", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_backward_is_that_of_torch(size: tuple[Any, ...], gates: str) -> None:
    x, grad, path, rows, nodes = make(size, 0.0, bias=gates != "none")
    schedule, exact = exactly(size, nodes, path)
    levels = {"all": range(1, size[0] + 1), "every third": range(size[0], 0, -3), "none": range(0)}[gates]
    out, expected_out = (NodeTensors(*(torch.full_like(part, torch.nan) for part in of)) for of in (nodes, exact))
    expected = tree_backward(x.double(), grad.double(), path, rows, exact, schedule, levels, expected_out)
    got = tree_backward(x, grad, path, rows, nodes, schedule, levels, out)
    names = ("x", "levels", "weight", "bias", "right", "left")
    for name, one, other in zip(names, (*got, *out), (*expected, *expected_out), strict=True):
        torch.testing.assert_close(one.double(), other, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("depth", "full"), [(0, 0), (4, 4), (5, 2)])
def test_a_forest_is_its_trees_one_by_one(depth: int, full: int) -> None:
    """Of a row of x that all trees of a token have in common."""
    trees, count = 3, 50
    leaf = random_leaves(count * trees, depth, seed=9).unflatten(0, (count, trees))
    x, grad = numbers(count, 37, seed=6), numbers(count, trees, 20, seed=7)
    path = tree_path((leaf + (torch.arange(trees) << depth)).flatten(), depth, trees)
    touched = path.nodes.sizes
    first, last = sum(touched[: full + 1]), sum(touched)
    rows = [torch.arange(*ends) - first * (number > full) for number, ends in enumerate(pairwise(path.nodes.bounds))]
    shapes = ((first, 20, 37), (first, 20), (last - first, 2, 37), (last - first, 3, 20))
    nodes = NodeTensors(*(numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)))
    schedule, exact = exactly((depth, full), nodes, path)
    out, expected_out = (NodeTensors(*(torch.full_like(part, torch.nan) for part in of)) for of in (nodes, exact))
    y, exact_y = tree_forward(x, path, rows, nodes, schedule), tree_forward(x.double(), path, rows, exact, schedule)
    levels, dy = range(1, depth + 1), grad.flatten(0, 1)
    got = tree_backward(x, dy, path, rows, nodes, schedule, levels, out)
    expected = tree_backward(x.double(), dy.double(), path, rows, exact, schedule, levels, expected_out)
    for one, other in zip((y, *got, *out), (exact_y, *expected, *expected_out), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)  # matrices whose numbers are of size 1


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("width", "out", "tokens", "leaves"), [(72, 80, 300, "random"), (300, 40, 90, "random"), (72, 80, 300, "one")]
)
def test_results_repeat_bit_for_bit_and_any_number_of_threads_agrees(width: int, out: int, tokens: int, leaves: str) -> None:
    """Gradients of nodes bit for bit, where threads own runs of leaves; not so where one leaf has all tokens."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3, 5):
            torch.set_num_threads(threads)
            x, grad, path, rows, nodes = make((6, 4, width, out, 2, tokens, leaves), 0.0, bias=True)
            schedule, made = Schedule.of(path, 4, nodes), NodeTensors(*(torch.full_like(part, torch.nan) for part in nodes))
            y = tree_forward(x, path, rows, nodes, schedule)
            results.append([y, *tree_backward(x, grad, path, rows, nodes, schedule, range(1, 7), made), *made])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(results[1], results[2], strict=True))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **CLOSE)
        assert leaves == "one" or all(map(torch.equal, result[-4:], results[0][-4:]))


# ---- layers and their optimiser --------------------------------------------------------------------------------------


def trained(name: str, storage: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """Parameters or rows of a layer after some steps, computed by the kernels of this name, and its last outputs."""
    use_kernels(name)
    seed_cpu(0)
    layer = TreeLinear(21, 18, 4, storage=storage, gate="hash", full_depth=2, rank=2, **options).to(dtype)
    optimizer = RowAdam(layer, lr=0.01, weight_decay=0.1)
    for step in range(6):
        y = layer(tokens(1 + 9 * (step % 3), 21, seed=step).to(dtype))
        (y - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = [store.data for _, store in layer.table.stores()] if layer.table is not None else list(layer.parameters())
    return [*(part.detach().clone() for part in kept), y.detach()]


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("storage", ["lazy", "dense"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_trees": 3}])
def test_training_is_that_of_torch(storage: str, options: dict[str, Any]) -> None:
    """Adam's first steps divide by a gradient's size, so that rounding counts where a gradient nearly cancels."""
    for one, other in zip(trained("native", storage, **options), trained("torch", storage, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@needs_gcc
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("width", [(3,), (16,), (5, 7), (20000,)])
def test_adam_is_that_of_torch(width: tuple[int, ...]) -> None:
    results = []
    for name in ("native", "torch"):
        use_kernels(name)
        optimizer = RowAdam(torch.nn.Module(), lr=0.1, betas=(0.5, 0.9), weight_decay=0.3)
        data, state = numbers(6, *width, seed=1), {"exp_avg": torch.zeros(6, *width), "exp_avg_sq": torch.zeros(6, *width)}
        state |= {"clock": torch.zeros(6, dtype=torch.int64), "log_decay": torch.zeros(6, dtype=torch.float64)}
        for step, rows in enumerate(([0, 3], [3, 5, 1], [3], [0, 1, 2, 3, 4, 5])):
            optimizer.log_decay += -0.03
            optimizer._update(data, state, torch.tensor(rows), numbers(len(rows), *width, seed=step))
        results.append([data, *state.values()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@needs_gcc
@pytest.mark.usefixtures("compiled")
def test_what_the_kernels_are_not_made_for_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "forward", lambda *_: pytest.fail("float64"))
    assert trained("native", "lazy", torch.float64)[0].dtype == torch.float64
    nodes = NodeTensors(torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.zeros(0, 64, 2), torch.zeros(0, 65, 2))
    assert not native.serves(torch.zeros(3, 2), nodes)  # 65 hidden units


# ---- choice and compiler ---------------------------------------------------------------------------------------------


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernels='cuda' are unknown; use one of"):
        use_kernels("cuda")
    assert kernels() == "torch"


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs a C compiler, gcc, on PATH; install one or use cluster\.kernels=torch"):
        compiler.load_compiled(tmp_path / "any.c")


@needs_gcc
def test_a_library_is_compiled_once_and_anew_when_its_source_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "answer.c", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    header.write_text("#define ANSWER 42\n")
    assert compiler.load_compiled(source).answer() == 42
    (kept,) = compiler.cache_folder().iterdir()
    written = kept.stat().st_mtime_ns
    assert compiler.load_compiled(source).answer() == 42 and kept.stat().st_mtime_ns == written
    header.write_text("#define ANSWER 43\n")
    assert compiler.load_compiled(source).answer() == 43
    header.write_text("broken\n")
    with pytest.raises(ConfigError, match=r"gcc cannot compile answer.c \(.*error: .*\); use torch"):
        compiler.load_compiled(source)
    assert len(list(compiler.cache_folder().iterdir())) == 2
