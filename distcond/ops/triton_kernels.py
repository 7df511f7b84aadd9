"""Kernels of `fused`, in Triton. Programs look for their nodes themselves, so that the host knows sizes alone.

Tokens are named by their place among those sorted by leaf; `order` tells their rows in x, y and their gradients.
`number[l, t]` is the place of the node of token t on level l, among the nodes of all levels.

Legend: T tokens, G nodes of a level (groups of tokens), N nodes of all levels, L levels, P out, Q in, r rank.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(order_ptr, at, is_inside, trees: tl.constexpr):
    """Row in x of tokens, which a forest shares, and in y."""
    own = tl.load(order_ptr + at, mask=is_inside, other=0)
    return own // trees, own


@triton.jit
def _stored(stored_ptr, stride, rows_ptr, number_ptr, place, at, is_inside):
    """Numbers of the stored row of the node of a token on a level, whose `number` is given; zeros where the row is -1."""
    row = tl.load(rows_ptr + tl.load(number_ptr + place))
    return tl.where(row >= 0, tl.load(stored_ptr + tl.maximum(row, 0) * stride + at, mask=is_inside, other=0.0), 0.0)


@triton.jit
def add_up(
    total_ptr, stored_ptr, stored_stride, rows_ptr, number_ptr, start_ptr, count_ptr, tokens, numbers, first_above, first_group,
    shared: tl.constexpr, levels: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total [G, numbers] = sum of the stored rows on the way to each node of the last of these levels.

    A program adds up a block of numbers for the nodes below one of level `shared` - 1; what they share is read once.
    """
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < numbers
    begin = tl.load(start_ptr + first_above + tl.program_id(0))
    end = begin + tl.load(count_ptr + first_above + tl.program_id(0)) - 1
    common = tl.zeros((BLOCK,), tl.float32)
    for level in tl.static_range(shared):
        common += _stored(stored_ptr, stored_stride, rows_ptr, number_ptr + level * tokens, begin, at, is_inside)
    last_ptr = number_ptr + (levels - 1) * tokens
    for group in range(tl.load(last_ptr + begin), tl.load(last_ptr + end) + 1):
        place = tl.load(start_ptr + group)
        total = common
        for level in tl.static_range(shared, levels):
            total += _stored(stored_ptr, stored_stride, rows_ptr, number_ptr + level * tokens, place, at, is_inside)
        tl.store(total_ptr + (group - first_group) * numbers + at, total.to(total_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def product(
    x_ptr, weight_ptr, bias_ptr, y_ptr, order_ptr, number_ptr, first_group, tokens, width_in, width_out,
    x_stride, weight_stride, weight_out, weight_in, bias_stride, y_stride,
    trees: tl.constexpr, has_bias: tl.constexpr, precision: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = x @ weight[group]^T + bias[group], group being the token's node on a level; in fp32.

    A program multiplies a tile of tokens by the matrix of one group after another, each time those of the group.
    """
    begin = tl.program_id(0) * BM
    place = begin + tl.arange(0, BM)
    is_token = place < tokens
    group_of = tl.load(number_ptr + place, mask=is_token, other=-1)
    row, own = _rows(order_ptr, place, is_token, trees)
    out = tl.program_id(1) * BN + tl.arange(0, BN)
    is_out = out < width_out
    total = tl.zeros((BM, BN), tl.float32)
    for group in range(tl.load(number_ptr + begin), tl.load(number_ptr + tl.minimum(begin + BM, tokens) - 1) + 1):
        is_mine = group_of == group
        at = group - first_group
        for low in range(0, width_in, BK):
            inner = low + tl.arange(0, BK)
            is_inner = inner < width_in
            x = tl.load(x_ptr + row[:, None] * x_stride + inner[None, :], mask=is_mine[:, None] & is_inner[None, :], other=0.0)
            weight = tl.load(
                weight_ptr + at * weight_stride + out[None, :] * weight_out + inner[:, None] * weight_in,
                mask=is_inner[:, None] & is_out[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(x, weight, total, input_precision=precision)
        if has_bias:
            bias = tl.load(bias_ptr + at * bias_stride + out, mask=is_out, other=0.0)
            total += tl.where(is_mine[:, None], bias[None, :], 0.0)
    tl.store(y_ptr + own[:, None] * y_stride + out[None, :], total, mask=is_token[:, None] & is_out[None, :])


@triton.jit
def level_change(
    x_ptr, grad_ptr, weight_ptr, bias_ptr, change_ptr, order_ptr, number_ptr, rows_ptr, wanted, tokens, width_in, width_out,
    x_stride, grad_stride, weight_stride, bias_stride, change_stride,
    trees: tl.constexpr, precision: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """change[token, level - 1] = grad . (weight x + bias) of the token's node on each level whose bit in `wanted` is set."""
    level = tl.program_id(1) + 1
    if (wanted >> level) & 1 == 1:
        number_ptr += level * tokens
        begin = tl.program_id(0) * BM
        place = begin + tl.arange(0, BM)
        is_token = place < tokens
        group_of = tl.load(number_ptr + place, mask=is_token, other=-1)
        row, own = _rows(order_ptr, place, is_token, trees)
        change = tl.zeros((BM,), tl.float32)
        for group in range(tl.load(number_ptr + begin), tl.load(number_ptr + tl.minimum(begin + BM, tokens) - 1) + 1):
            is_mine = group_of == group
            stored = tl.load(rows_ptr + group)
            for low_out in range(0, width_out, BN):
                out = low_out + tl.arange(0, BN)
                is_out = out < width_out
                total = tl.zeros((BM, BN), tl.float32)
                for low in range(0, width_in, BK):
                    inner = low + tl.arange(0, BK)
                    is_inner = inner < width_in
                    x = tl.load(
                        x_ptr + row[:, None] * x_stride + inner[None, :], mask=is_mine[:, None] & is_inner[None, :], other=0.0
                    )
                    weight = tl.load(
                        weight_ptr + stored * weight_stride + out[None, :] * width_in + inner[:, None],
                        mask=is_inner[:, None] & is_out[None, :], other=0.0,
                    )  # fmt: skip
                    total = tl.dot(x, weight.to(x.dtype), total, input_precision=precision)
                total += tl.load(bias_ptr + stored * bias_stride + out, mask=is_out, other=0.0)[None, :]
                is_grad = is_mine[:, None] & is_out[None, :]
                grad = tl.load(grad_ptr + own[:, None] * grad_stride + out[None, :], mask=is_grad, other=0.0)
                change += tl.sum(total * grad.to(tl.float32), 1)
        tl.store(change_ptr + own * change_stride + level - 1, change, mask=is_token)


@triton.jit
def outer(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, order_ptr, start_ptr, count_ptr, groups, width_out, width_in,
    grad_stride, x_stride, weight_stride, bias_stride,
    trees: tl.constexpr, parts: tl.constexpr, precision: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """weight[part, group] = grad^T @ x and bias[part, group] = sum of grad, over the tokens of a group, cut into parts."""
    part, group = (tl.program_id(0) // groups).to(tl.int64), (tl.program_id(0) % groups).to(tl.int64)
    begin, count = tl.load(start_ptr + group), tl.load(count_ptr + group)
    step = tl.cdiv(tl.cdiv(count, parts), BT) * BT
    blocks = tl.cdiv(width_in, BN)
    out = (tl.program_id(1) // blocks) * BM + tl.arange(0, BM)
    inner = (tl.program_id(1) % blocks) * BN + tl.arange(0, BN)
    is_out, is_inner = out < width_out, inner < width_in
    total, sums = tl.zeros((BM, BN), tl.float32), tl.zeros((BM,), tl.float32)
    for low in range(part * step, tl.minimum((part + 1) * step, count), BT):
        place = low + tl.arange(0, BT)
        is_token = place < count
        row, own = _rows(order_ptr, begin + place, is_token, trees)
        grad = tl.load(grad_ptr + own[None, :] * grad_stride + out[:, None], mask=is_token[None, :] & is_out[:, None], other=0.0)
        x = tl.load(x_ptr + row[:, None] * x_stride + inner[None, :], mask=is_token[:, None] & is_inner[None, :], other=0.0)
        total = tl.dot(grad, x, total, input_precision=precision)
        sums += tl.sum(grad.to(tl.float32), 1)
    at = part * groups + group
    is_weight = is_out[:, None] & is_inner[None, :]
    tl.store(weight_ptr + at * weight_stride + out[:, None] * width_in + inner[None, :], total, mask=is_weight)
    if tl.program_id(1) % blocks == 0:
        tl.store(bias_ptr + at * bias_stride + out, sums, mask=is_out)


@triton.jit
def _sum_up(
    rows_ptr, stride, at, is_inside, number_ptr, start_ptr, count_ptr, tokens, node, level, levels: tl.constexpr
):  # fmt: skip
    """`sum_up` of some numbers: nodes of a level one after another; a sum is written when its last node was added."""
    begin = tl.load(start_ptr + node)
    last = tl.load(number_ptr + level * tokens + begin + tl.load(count_ptr + node) - 1)
    sum1 = tl.zeros_like(at).to(tl.float32)
    sum2, sum3 = sum1, sum1
    for group in range(tl.load(number_ptr + level * tokens + begin), last + 1):
        place = tl.load(start_ptr + group)
        after = place + tl.load(count_ptr + group)
        sum1 += tl.load(rows_ptr + group * stride + at, mask=is_inside, other=0.0)
        above_ptr = number_ptr + (level - 1) * tokens
        parent = tl.load(above_ptr + place)
        if tl.where(group < last, tl.load(above_ptr + tl.where(group < last, after, place)), -1) != parent:
            tl.store(rows_ptr + parent * stride + at, sum1, mask=is_inside)
            sum2 += sum1
            sum1 = tl.zeros_like(sum1)
        if levels >= 2:
            above_ptr = number_ptr + (level - 2) * tokens
            parent = tl.load(above_ptr + place)
            if tl.where(group < last, tl.load(above_ptr + tl.where(group < last, after, place)), -1) != parent:
                tl.store(rows_ptr + parent * stride + at, sum2, mask=is_inside)
                sum3 += sum2
                sum2 = tl.zeros_like(sum2)
    if levels >= 3:
        tl.store(rows_ptr + node * stride + at, sum3, mask=is_inside)


@triton.jit
def sum_up(
    weight_ptr, weight_stride, weight_numbers, bias_ptr, bias_stride, bias_numbers, number_ptr, start_ptr, count_ptr, tokens,
    first, level, levels: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the nodes of one to three levels above a level = sums of the rows below them. first: node of the highest."""
    node = (first + tl.program_id(0)).to(tl.int64)
    blocks = tl.cdiv(weight_numbers, BLOCK)
    if tl.program_id(1) < blocks:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        _sum_up(
            weight_ptr, weight_stride, at, at < weight_numbers, number_ptr, start_ptr, count_ptr, tokens, node, level, levels
        )  # fmt: skip
    else:
        at = (tl.program_id(1) - blocks) * BLOCK + tl.arange(0, BLOCK)
        _sum_up(bias_ptr, bias_stride, at, at < bias_numbers, number_ptr, start_ptr, count_ptr, tokens, node, level, levels)


@triton.jit
def add_low_rank(
    x_ptr, y_ptr, right_ptr, left_ptr, order_ptr, rows_ptr, number_ptr, tokens, first, levels, width_in, width_out,
    x_stride, y_stride, right_stride, left_stride,
    trees: tl.constexpr, rank: tl.constexpr, has_bias: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y += left^T (right x, 1) of the nodes that a token passes from level `first` on; nothing where a row is -1."""
    token = tl.program_id(0)
    own = tl.load(order_ptr + token)
    inner, out = tl.arange(0, BQ), tl.arange(0, BP)
    is_inner, is_out = inner < width_in, out < width_out
    x = tl.load(x_ptr + own // trees * x_stride + inner, mask=is_inner, other=0.0).to(tl.float32)
    y_at = y_ptr + own * y_stride + out
    y = tl.load(y_at, mask=is_out, other=0.0)
    for level in range(first, levels):
        row = tl.load(rows_ptr + tl.load(number_ptr + level * tokens + token))
        if row >= 0:
            left_at = left_ptr + row * left_stride + out
            for unit in range(rank):
                right = tl.load(right_ptr + row * right_stride + unit * width_in + inner, mask=is_inner, other=0.0)
                y += tl.sum(right * x, 0) * tl.load(left_at + unit * width_out, mask=is_out, other=0.0)
            if has_bias:
                y += tl.load(left_at + rank * width_out, mask=is_out, other=0.0)
    tl.store(y_at, y, mask=is_out)


@triton.jit
def low_rank_backward(
    x_ptr, grad_ptr, grad_x_ptr, right_ptr, left_ptr, change_ptr, hidden_ptr, back_ptr, order_ptr, rows_ptr, number_ptr, wanted,
    tokens, first, levels, width_in, width_out, x_stride, grad_stride, grad_x_stride, right_stride, left_stride, change_stride,
    trees: tl.constexpr, rank: tl.constexpr, has_bias: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Adds to grad_x; writes hidden and back, [T, L, r]: right x and left grad; and change as `level_change`, where wanted."""
    token = tl.program_id(0)
    own = tl.load(order_ptr + token)
    inner, out = tl.arange(0, BQ), tl.arange(0, BP)
    is_inner, is_out = inner < width_in, out < width_out
    x = tl.load(x_ptr + own // trees * x_stride + inner, mask=is_inner, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + own * grad_stride + out, mask=is_out, other=0.0).to(tl.float32)
    grad_x_at = grad_x_ptr + own * grad_x_stride + inner
    grad_x = tl.load(grad_x_at, mask=is_inner, other=0.0)
    for level in range(first, levels):
        row = tl.load(rows_ptr + tl.load(number_ptr + level * tokens + token))
        left_at = left_ptr + row * left_stride + out
        scratch = (token.to(tl.int64) * (levels - first) + level - first) * rank
        change = 0.0
        for unit in range(rank):
            right = tl.load(right_ptr + row * right_stride + unit * width_in + inner, mask=is_inner, other=0.0)
            hidden = tl.sum(right * x, 0)
            back = tl.sum(grad * tl.load(left_at + unit * width_out, mask=is_out, other=0.0), 0)
            grad_x += back * right
            change += hidden * back
            tl.store(hidden_ptr + scratch + unit, hidden)
            tl.store(back_ptr + scratch + unit, back)
        if has_bias:
            change += tl.sum(grad * tl.load(left_at + rank * width_out, mask=is_out, other=0.0), 0)
        if (wanted >> level) & 1 == 1:
            tl.store(change_ptr + own * change_stride + level - 1, change)
    tl.store(grad_x_at, grad_x, mask=is_inner)


@triton.jit
def low_rank_outer(
    x_ptr, grad_ptr, right_ptr, left_ptr, hidden_ptr, back_ptr, order_ptr, start_ptr, count_ptr, node_ptr, first, levels,
    width_in, width_out, x_stride, grad_stride, right_stride, left_stride,
    trees: tl.constexpr, rank: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Gradients of low-rank nodes: right = back^T x, left = (hidden, 1)^T grad, over the tokens of each. A program: a row."""
    node, unit = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, count = tl.load(start_ptr + node), tl.load(count_ptr + node)
    # The level of a node: that of first_node(level) = trees (2^level - 1) <= id.
    level = first
    for deeper in range(first + 1, levels):
        level += (tl.load(node_ptr + node) >= trees * ((tl.full((), 1, tl.int64) << deeper) - 1)).to(tl.int32)
    at = tl.program_id(2) * BW + tl.arange(0, BW)
    total = tl.zeros((BT, BW), tl.float32)
    scratch = (begin * (levels - first) + level - first) * rank
    step = (levels - first) * rank
    if unit < rank:
        is_inside = at < width_in
        for low in range(0, count, BT):
            place = low + tl.arange(0, BT)
            is_token = place < count
            row, _ = _rows(order_ptr, begin + place, is_token, trees)
            back = tl.load(back_ptr + scratch + place * step + unit, mask=is_token, other=0.0)
            x = tl.load(x_ptr + row[:, None] * x_stride + at[None, :], mask=is_token[:, None] & is_inside[None, :], other=0.0)
            total += back[:, None] * x.to(tl.float32)
        tl.store(right_ptr + node * right_stride + unit * width_in + at, tl.sum(total, 0), mask=is_inside)
    else:
        unit -= rank
        is_inside = at < width_out
        for low in range(0, count, BT):
            place = low + tl.arange(0, BT)
            is_token = place < count
            _, own = _rows(order_ptr, begin + place, is_token, trees)
            is_hidden = tl.where(unit < rank, place, count) < count  # a bias is the factor of 1
            hidden = tl.load(hidden_ptr + scratch + place * step + unit, mask=is_hidden, other=1.0)
            is_grad = is_token[:, None] & is_inside[None, :]
            grad = tl.load(grad_ptr + own[:, None] * grad_stride + at[None, :], mask=is_grad, other=0.0)
            total += hidden[:, None] * grad.to(tl.float32)
        tl.store(left_ptr + node * left_stride + unit * width_out + at, tl.sum(total, 0), mask=is_inside)
