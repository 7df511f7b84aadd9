"""Kernels that find nodes and update their rows, in Triton: leaves, paths, look-up, Adam. The host side is `fused_rows`.

Legend: V tokens of all trees, T of them sorted by leaf, K depth, N nodes of all levels, W numbers of a row.
"""

import triton
import triton.language as tl


@triton.jit
def leaf(gates_ptr, leaf_ptr, tokens, trees, depth, BLOCK: tl.constexpr):
    """Leaves tree << depth | bits of gates [V, K]; a bit is whether its gate is above 0."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < tokens
    bits = token % trees
    for level in range(depth):
        bits = bits * 2 + (tl.load(gates_ptr + token * depth + level, mask=is_token, other=0.0) > 0).to(tl.int64)
    tl.store(leaf_ptr + token, bits, mask=is_token)


@triton.jit
def mark(sorted_ptr, is_first_ptr, tokens, depth, BLOCK: tl.constexpr):
    """is_first [K + 1, T] = 1 where a node's tokens begin, but for the very first one: their running sum numbers nodes from 0."""
    level = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < tokens
    own = tl.load(sorted_ptr + token, mask=is_token, other=0) >> (depth - level)
    before = tl.load(sorted_ptr + tl.maximum(token - 1, 0), mask=is_token, other=0) >> (depth - level)
    begins = tl.where(token == 0, tl.minimum(level, 1), (own != before).to(tl.int32))
    tl.store(is_first_ptr + level.to(tl.int64) * tokens + token, begins.to(tl.int64), mask=is_token)


@triton.jit
def list_nodes(
    sorted_ptr, number_ptr, node_ptr, start_ptr, parent_ptr, count_ptr, tokens, trees, depth, halvings, BLOCK: tl.constexpr
):  # fmt: skip
    """Id, first token, parent on the level above and number of tokens of each node, written by its first token."""
    level = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < tokens
    row_ptr = number_ptr + level.to(tl.int64) * tokens
    number = tl.load(row_ptr + token, mask=is_token, other=-1)
    before = tl.load(row_ptr + tl.maximum(token - 1, 0), mask=is_token, other=-1)
    is_first = tl.where(token == 0, -1, before) != number
    prefix = tl.load(sorted_ptr + token, mask=is_first, other=0) >> (depth - level)
    tl.store(node_ptr + number, prefix + trees * ((tl.full((), 1, tl.int64) << level) - 1), mask=is_first)
    tl.store(start_ptr + number, token.to(tl.int64), mask=is_first)
    above_ptr = number_ptr + tl.maximum(level - 1, 0).to(tl.int64) * tokens
    parent = tl.load(above_ptr + token, mask=is_first, other=0) - tl.load(above_ptr)
    tl.store(parent_ptr + number, tl.where(level > 0, parent, 0), mask=is_first)
    # The first token of the next node, by halving.
    low, high = token + 1, tl.zeros_like(token) + tokens
    for _ in range(halvings):
        middle = (low + high) // 2
        is_next = tl.load(row_ptr + middle, mask=is_first & (middle < tokens), other=0) > number
        is_open = low < high
        high = tl.where(is_open & is_next, middle, high)
        low = tl.where(is_open & (is_next == 0), middle + 1, low)
    tl.store(count_ptr + number, (low - token).to(tl.int64), mask=is_first)


@triton.jit
def look_up(keys_ptr, found_ptr, run_keys_ptr, run_places_ptr, keys, run, halvings, BLOCK: tl.constexpr):
    """found [N] = the place of each key in a sorted run; what is not in it keeps its place."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_key = at < keys
    key = tl.load(keys_ptr + at, mask=is_key, other=-1)
    low, high = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + run
    for _ in range(halvings):
        middle = (low + high) // 2
        is_below = tl.load(run_keys_ptr + middle, mask=is_key & (middle < run), other=0) < key
        is_open = low < high
        high = tl.where(is_open & (is_below == 0), middle, high)
        low = tl.where(is_open & is_below, middle + 1, low)
    is_here = is_key & (low < run)
    is_found = is_here & (tl.load(run_keys_ptr + low, mask=is_here, other=-1) == key)
    tl.store(found_ptr + at, tl.load(run_places_ptr + low, mask=is_found, other=-1), mask=is_found)


@triton.jit
def adam(
    data_ptr, first_ptr, second_ptr, grad_ptr, rows_ptr, clock_ptr, decay_ptr, width, lr, eps,
    beta1: tl.constexpr, beta2: tl.constexpr, decays: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One update of a block of numbers of a row: Adam, bias corrected by the row's own clock, after its weight decay."""
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index)
    time = (tl.load(clock_ptr + row) + 1).to(tl.float64)
    correction1 = (1.0 - tl.exp2(time * tl.full((), beta1, tl.float64))).to(tl.float32)
    correction2 = tl.sqrt(1.0 - tl.exp2(time * tl.full((), beta2, tl.float64))).to(tl.float32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < width
    place = row * width + at
    grad = tl.load(grad_ptr + index.to(tl.int64) * width + at, mask=is_inside, other=0.0)
    first = tl.load(first_ptr + place, mask=is_inside, other=0.0)
    second = tl.load(second_ptr + place, mask=is_inside, other=0.0)
    data = tl.load(data_ptr + place, mask=is_inside, other=0.0)
    if decays:
        data *= tl.load(decay_ptr + index).to(tl.float32)
    weight1 = (1.0 - tl.exp2(tl.full((), beta1, tl.float64))).to(tl.float32)
    weight2 = (1.0 - tl.exp2(tl.full((), beta2, tl.float64))).to(tl.float32)
    first += weight1 * (grad - first)
    second += weight2 * (grad * grad - second)
    data -= lr / correction1 * first / (tl.sqrt(second) / correction2 + eps)
    tl.store(first_ptr + place, first, mask=is_inside)
    tl.store(second_ptr + place, second, mask=is_inside)
    tl.store(data_ptr + place, data, mask=is_inside)
