"""The weight-tied transformer: causal under every halting, and a halted position stays visible as it was."""

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcond.nn import AdaptiveComputation, FixedComputation, PonderNet
from distcond.nn.linear import TreeOptions
from distcond.nn.transformer import Block, Memory, Transformer, rotate
from tests.trees import seed_cpu

EXACT = {"rtol": 0, "atol": 1e-11}  # float64; at most 6 steps of sums over 16 features
BATCH, LENGTH, WIDTH, HEADS = 3, 7, 8, 2
TREES = [TreeOptions(), TreeOptions(depth=3), TreeOptions(depth=3, full_depth=1, rank=2, storage="lazy")]
PONDERS: list[tuple[str, int]] = [("none", 1), ("fixed", 3), ("act", 6)]


def build(kind: str, max_steps: int, tree: TreeOptions = TreeOptions()) -> Transformer:  # noqa: B008 (frozen)
    seed_cpu(0)
    block = Block(WIDTH, HEADS, 16, tree, ["up"])
    ponder: nn.Module = FixedComputation(block, max_steps)
    if kind in {"act", "ponder"}:
        made = AdaptiveComputation if kind == "act" else PonderNet
        ponder = made(block, WIDTH, max_steps, halting_bias=-1.0)
        nn.init.normal_(ponder.halting.weight)
    return Transformer(block, ponder, WIDTH).double()


def make_bytes(seed: int = 1) -> Tensor:
    return torch.randint(256, (BATCH, LENGTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


LENGTHS = torch.full((BATCH,), LENGTH)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("kind", "max_steps"), PONDERS)
def test_changing_a_byte_changes_nothing_before_it(kind: str, max_steps: int, tree: TreeOptions) -> None:
    model = build(kind, max_steps, tree).eval()
    inputs = make_bytes()
    logits, stats = model(inputs, LENGTHS)
    steps = stats.steps.view(BATCH, LENGTH)
    assert kind != "act" or len(steps.unique()) > 2
    for time in range(LENGTH):
        changed = inputs.clone()
        changed[:, time] = (changed[:, time].long() + 77).to(torch.uint8)
        other, other_stats = model(changed, LENGTHS)
        torch.testing.assert_close(other[:, :time], logits[:, :time], **EXACT)
        assert torch.equal(other_stats.steps.view(BATCH, LENGTH)[:, :time], steps[:, :time])
        assert ((other - logits)[:, time:].abs().amax(-1) > 1e-6).all()  # and everything after it


@pytest.mark.parametrize(("kind", "max_steps"), PONDERS)
def test_gradient_flows_from_a_position_to_itself_and_those_before_it(kind: str, max_steps: int) -> None:
    model = build(kind, max_steps)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits, _ = model(make_bytes(), LENGTHS)
    (grad,) = torch.autograd.grad(logits[0, 3].sum(), embedded)
    reached = grad.abs().sum(2) > 0
    assert reached[0].tolist() == [True] * 4 + [False] * 3 and not reached[1:].any()


def turned(vector: Tensor, time: int) -> Tensor:
    """A query or key of one head at a position, its halves taken as complex numbers and turned."""
    half = len(vector) // 2
    turns = [cmath.exp(1j * time * 10000.0 ** (-k / half)) for k in range(half)]
    numbers = [complex(vector[k], vector[half + k]) * turn for k, turn in enumerate(turns)]
    return torch.tensor([z.real for z in numbers] + [z.imag for z in numbers], dtype=vector.dtype)


def test_rotation_turns_pairs_by_the_position() -> None:
    x = torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    position = torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 5])
    expected = torch.stack(
        [torch.stack([turned(head, int(time)) for head in row]) for row, time in zip(x, position, strict=True)]
    )
    # The angles are float32: positions up to 8 with a relative error of 6e-8.
    torch.testing.assert_close(rotate(x, position), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("rows", [[0, 2, 3, 6, 14, 20], [8], [], list(range(3 * LENGTH - 1))])
def test_rows_attend_as_they_would_among_all(rows: list[int]) -> None:
    """Where the others do not change: some sequences have few rows, or none."""
    block, count = build("fixed", 1).block[0], BATCH * LENGTH
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = []
    for some in (rows, range(count)):
        block.start(BATCH, LENGTH)
        everyone, given = x.clone().requires_grad_(), x.clone().requires_grad_()
        block._attend(everyone, torch.arange(count))
        out = block._attend(given[list(some)], torch.tensor(list(some), dtype=torch.int64))
        if some is not rows:
            out = out[rows]
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        (out * weight).sum().backward()
        assert given.grad is not None
        found.append((out, given.grad if everyone.grad is None else given.grad + everyone.grad))
    torch.testing.assert_close(*found, **EXACT)


def by_hand(model: Transformer, text: Tensor, ponder_steps: list[int]) -> list[Tensor]:
    """Last states of one sequence whose positions run the given numbers of steps; positions one by one.

    A position that has halted is not touched again: its state, and the keys and values of its last step, stay.
    """
    block, head_width = model.block[0], WIDTH // HEADS
    states = list(model.embedding(text.long()))
    keys: list[Any] = [None] * LENGTH
    values: list[Any] = [None] * LENGTH
    for number in range(1, max(ponder_steps) + 1):
        running = [time for time in range(LENGTH) if ponder_steps[time] >= number]
        flag = torch.tensor([float(number == 1)], dtype=torch.float64)
        queries, entered = {}, {}
        for time in running:  # all of a step's keys and values are there before anyone attends
            entered[time] = states[time] + block.first_step(flag)
            q, k, v = block.qkv(block.attention_norm(entered[time])).chunk(3)
            queries[time], keys[time], values[time] = q, k.view(HEADS, head_width), v.view(HEADS, head_width)
        for time in running:
            mixed = []
            for head in range(HEADS):
                query = queries[time].view(HEADS, head_width)[head]
                seen = [turned(keys[past][head], past) for past in range(time + 1)]
                scores = torch.stack([turned(query, time) @ key / math.sqrt(head_width) for key in seen])
                mixed.append(sum(w * values[past][head] for past, w in enumerate(scores.softmax(0))))
            state = entered[time] + block.merge(torch.cat(mixed))
            hidden = nn.functional.gelu(block.up(block.feed_forward_norm(state)), approximate="tanh")
            states[time] = state + block.down(hidden)
    return states


@pytest.mark.parametrize("ponder_steps", [[1] * 7, [3] * 7, [1, 3, 2, 4, 1, 2, 3], [4, 1, 1, 1, 2, 1, 1], [1, 1, 1, 1, 1, 1, 5]])
@torch.no_grad()
def test_a_halted_position_keeps_its_keys_and_values_and_stays_visible(ponder_steps: list[int]) -> None:
    model = build("act", 6)
    block, text = model.block[0], make_bytes()[:1]
    state = model.embedding(text.long())[0]
    block.start(1, LENGTH)
    for number in range(1, max(ponder_steps) + 1):  # the calls that a halting module makes
        rows = torch.tensor([time for time in range(LENGTH) if ponder_steps[time] >= number])
        flag = torch.full((len(rows), 1), float(number == 1), dtype=torch.float64)
        state[rows] = block(flag, state[rows], rows)
    # The angles of the rotation are float32 in the model: 6e-8 of an angle of at most 6, over up to 5 steps.
    torch.testing.assert_close(state, torch.stack(by_hand(model, text[0], ponder_steps)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_step_without_rows_leaves_the_block_as_it_was() -> None:
    """What a rank does in lockstep after its last row has halted."""
    model = build("act", 6)
    block, text = model.block[0], make_bytes()[:1]
    state = model.embedding(text.long())[0]
    results = []
    for idle in (0, 2):
        block.start(1, LENGTH)
        after = block(torch.ones(LENGTH, 1).double(), state, torch.arange(LENGTH))
        for _ in range(idle):
            out = block(torch.zeros(0, 1).double(), after[:0], torch.arange(0))
            assert out.shape == (0, WIDTH)
        some = torch.tensor([2, 5])
        results.append(block(torch.zeros(2, 1).double(), after[some], some))
    torch.testing.assert_close(results[0], results[1], **EXACT)


@pytest.mark.parametrize("tree", TREES)
def test_an_empty_step_stays_linked_so_that_backward_runs_it_too(tree: TreeOptions) -> None:
    model = build("act", 6, tree)
    block = model.block[0]
    backwards: list[int] = []
    for layer in (block.qkv, block.up, block.down, block.merge):
        layer.register_full_backward_hook(lambda module, grad_in, grad_out: backwards.append(len(grad_out[0])))
    state = model.embedding(make_bytes().long()).flatten(0, 1)
    everyone, nobody = torch.arange(BATCH * LENGTH), torch.arange(0)
    block.start(BATCH, LENGTH)
    state = block(torch.ones(len(everyone), 1).double(), state, everyone)
    idle = block(torch.zeros(0, 1).double(), state[:0], nobody)
    state.index_add(0, nobody, idle).sum().backward()
    assert sorted(backwards) == [0] * 4 + [BATCH * LENGTH] * 4


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model = build("act", 6).eval()
    inputs = make_bytes()
    together, _ = model(inputs, LENGTHS)
    for row in range(BATCH):
        alone, _ = model(inputs[row : row + 1], LENGTHS[:1])
        torch.testing.assert_close(together[row], alone[0], **EXACT)


@pytest.mark.parametrize(("kind", "max_steps"), PONDERS)
def test_an_empty_batch_gives_empty_logits(kind: str, max_steps: int) -> None:
    logits, stats = build(kind, max_steps)(make_bytes()[:0], LENGTHS[:0])
    assert logits.shape == (0, LENGTH, 256) and stats.steps.shape == (0,)


@pytest.mark.parametrize(("kind", "max_steps"), PONDERS)
def test_nothing_of_a_batch_is_kept_for_the_next(kind: str, max_steps: int) -> None:
    model = build(kind, max_steps).eval()
    first, _ = model(make_bytes(), LENGTHS)
    model(make_bytes(seed=5)[:1, :3], LENGTHS[:1])
    again, _ = model(make_bytes(), LENGTHS)
    assert torch.equal(first, again)
    assert model.block[0]._seen is None


@pytest.mark.parametrize("tree", TREES)
def test_it_runs_and_learns_in_bfloat16(tree: TreeOptions) -> None:
    model = build("act", 6, tree).bfloat16()
    logits, stats = model(make_bytes(), LENGTHS)
    assert logits.dtype == torch.bfloat16 and stats.ponder_cost.dtype == torch.float32
    (logits.float().square().mean() + stats.ponder_cost.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("kind", "max_steps"), [*PONDERS, ("ponder", 6)])
def test_what_is_read_piece_by_piece_is_answered_as_the_whole(kind: str, max_steps: int, tree: TreeOptions) -> None:
    model = build(kind, max_steps, tree).eval()
    inputs, logits, steps = make_bytes(), torch.zeros(BATCH, LENGTH, 256).double(), torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    expected, stats = model(inputs, LENGTHS)
    assert kind not in {"act", "ponder"} or len(stats.steps.unique()) > 2
    memory, flat = Memory(BATCH, LENGTH), torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    # A sequence that waits, pieces of unequal size, single positions, all of a sequence at once.
    for ends in ((3, 0, 1), (4, 0, 5), (5, 0, 6), (7, 7, 7)):
        starts = num_read(steps)
        place = torch.cat([row[start:end] for row, start, end in zip(flat, starts, ends, strict=True)])
        read, read_stats = model.read_on(inputs.flatten()[place], place, memory)
        logits.view(-1, 256)[place], steps.view(-1)[place] = read, read_stats.steps
    torch.testing.assert_close(logits, expected, **EXACT)
    assert torch.equal(steps.flatten(), stats.steps)
    again, _ = model(inputs, LENGTHS)  # nothing of it is left in the block
    assert torch.equal(again, expected)


def num_read(steps: Tensor) -> list[int]:
    """Positions that were read of each sequence."""
    return [int(number) for number in (steps > 0).sum(1)]


def test_a_position_that_takes_more_steps_than_any_before_sees_their_last_ones() -> None:
    model = build("act", 6).eval()
    alone = model(torch.arange(256)[:, None], torch.ones(256))[1].steps
    inputs = alone.argsort(stable=True)[None, ::16]  # bytes that take few steps come first
    expected, stats = model(inputs, torch.tensor([16]))
    taken = stats.steps.tolist()
    assert len({max(taken[:end]) for end in range(1, 17)}) > 1  # the memory gets entries of further steps while in use
    memory = Memory(1, 16)
    for place in torch.arange(16).split(1):
        logits, _ = model.read_on(inputs[0, place], place, memory)
        torch.testing.assert_close(logits, expected[0, place], **EXACT)
