"""Kernels of `fused_recurrent`, in Triton. A program takes a block of sequences from their first step to their last.

What it writes for all its threads to read, it reads after a barrier. Frames hold states [states, BM, width]: of a program
first one of zeros, then the mean-field states of each time step, then those after each ponder step it recorded, then two more.

Legend: BM sequences of a block, BN hidden units or BK inputs at a time, G outputs of the matrix: gates x width.
"""

import triton
import triton.language as tl

TANH, LSTM, GRU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _tanh(x):
    """As exact near 0 as elsewhere, where 2 sigmoid(2 x) - 1 is not."""
    is_near = tl.abs(x) < 0.15
    small = tl.where(is_near, x, 0.0)
    square = small * small
    near = small * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    return tl.where(is_near, near, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _product(
    total, left_ptr, right_ptr, row, column, inner_size, left_stride, right_stride, is_column,
    precision: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """total + left [BM, inner] @ right [inner, columns]."""
    for low in range(0, inner_size, BK):
        inner = low + tl.arange(0, BK)
        is_inner = inner < inner_size
        left = tl.load(left_ptr + row[:, None] * left_stride + inner[None, :], mask=is_inner[None, :], other=0.0)
        right = tl.load(
            right_ptr + inner[:, None] * right_stride + column[None, :], mask=is_inner[:, None] & is_column[None, :], other=0.0
        )
        total = tl.dot(left, right, total, input_precision=precision)
    return total


@triton.jit
def _given(given_ptr, flag_ptr, gate, place, unit, is_first, batch, width, outputs):
    """What inputs, biases and the flag give to one gate of some units."""
    is_unit = unit < width
    mask = (place < batch)[:, None] & is_unit[None, :]
    given = tl.load(given_ptr + place[:, None] * outputs + (gate * width + unit)[None, :], mask=mask, other=0.0)
    flag = tl.load(flag_ptr + gate * width + unit, mask=is_unit, other=0.0)
    return given + tl.where(is_first, flag, 0.0)[None, :]


@triton.jit
def forward(
    given_ptr, weight_ptr, flag_ptr, halting_ptr, bias_ptr, lengths_ptr, frames_ptr, made_ptr, marks_ptr, steps_ptr, left_ptr,
    taken_ptr, used_ptr, batch, length, width, room, max_steps, least,
    cell: tl.constexpr, states: tl.constexpr, gates: tl.constexpr, saved: tl.constexpr, halts: tl.constexpr,
    precision: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Mean-field states of all time steps, N and R of each; and of each ponder step what backward needs, if there is room.

    weight [width, width, gates]: input, unit, gate; so one product gives all gates of a unit.
    taken [program, time]: ponder steps of the block; used [program]: those of all time steps, maybe more than
    there is room for.
    """
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BM)
    place = program * BM + row
    lengths = tl.load(lengths_ptr + place, mask=place < batch, other=0)
    outputs, plane, frame = gates * width, BM * width, states * BM * width
    frames_ptr += program * (length + room + 3) * frame
    made_ptr += program * (room + 2) * saved * plane
    marks_ptr += program * room * 3 * BM
    bias = tl.load(bias_ptr)
    used = 0
    for time in range(length):
        is_alive = lengths > time
        old_ptr, mean_ptr = frames_ptr + time * frame, frames_ptr + (time + 1) * frame
        tl.debug_barrier()
        for low in range(0, width, BN):
            unit = low + tl.arange(0, BN)
            is_unit = (unit < width)[None, :]
            for state in tl.static_range(states):
                at = state * plane + row[:, None] * width + unit[None, :]
                old = tl.load(old_ptr + at, mask=is_unit, other=0.0)
                tl.store(mean_ptr + at, tl.where(is_alive[:, None], 0.0, old), mask=is_unit)
        running = is_alive.to(tl.int32)
        spent, left, steps = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.int32)
        number, going = 0, tl.max(running, 0)
        before = time * frame
        while going > 0:
            number += 1
            slot = tl.where(used < room, used, room + number % 2)
            after = (length + 1 + slot) * frame
            before_ptr, after_ptr, kept_ptr = frames_ptr + before, frames_ptr + after, made_ptr + slot * saved * plane
            here_ptr = given_ptr + time * batch * outputs
            logit = tl.zeros((BM,), tl.float32)
            for low in range(0, width, BN):
                unit = low + tl.arange(0, BN)
                is_unit = unit < width
                at, mask = row[:, None] * width + unit[None, :], is_unit[None, :]
                column = low * gates + tl.arange(0, gates * BN)
                is_column = column < outputs
                first = _given(here_ptr, flag_ptr, 0, place, unit, number == 1, batch, width, outputs)
                if cell != TANH:
                    second = _given(here_ptr, flag_ptr, 1, place, unit, number == 1, batch, width, outputs)
                    third = _given(here_ptr, flag_ptr, 2, place, unit, number == 1, batch, width, outputs)
                    fourth = _given(here_ptr, flag_ptr, 3, place, unit, number == 1, batch, width, outputs)
                    old = tl.load(before_ptr + (states - 1) * plane + at, mask=mask, other=0.0)
                total = tl.zeros((BM, gates * BN), tl.float32)
                total = _product(total, before_ptr, weight_ptr, row, column, width, width, outputs, is_column, precision, BK)
                if cell == TANH:
                    new = _tanh(first + total)
                else:
                    even, odd = tl.split(tl.reshape(total, (BM, BN, 2, 2)))
                    of_first, of_third = tl.split(even)
                    of_second, of_fourth = tl.split(odd)
                    first, second, third, fourth = first + of_first, second + of_second, third + of_third, fourth + of_fourth
                    first, second = tl.sigmoid(first), tl.sigmoid(second)
                    if cell == LSTM:
                        third, fourth = tl.sigmoid(third), _tanh(fourth)
                        memory = second * old + first * fourth
                        seen = _tanh(memory)
                        new = third * seen
                        tl.store(after_ptr + plane + at, memory, mask=mask)
                        tl.store(kept_ptr + 4 * plane + at, seen, mask=mask)
                    else:
                        third = _tanh(third + first * fourth)
                        new = third + second * (old - third)
                    tl.store(kept_ptr + at, first, mask=mask)
                    tl.store(kept_ptr + plane + at, second, mask=mask)
                    tl.store(kept_ptr + 2 * plane + at, third, mask=mask)
                    tl.store(kept_ptr + 3 * plane + at, fourth, mask=mask)
                tl.store(after_ptr + at, new, mask=mask)
                if halts:
                    logit += tl.sum(new * tl.load(halting_ptr + unit, mask=is_unit, other=0.0)[None, :], 1)
            may_run_on = (running > 0) & (number < max_steps)
            if halts:
                h = tl.sigmoid(logit + bias)
                runs_on = may_run_on & ~(spent + h >= least)  # NaN runs on
                weight = tl.where(running > 0, tl.where(runs_on, h, 1.0 - spent), 0.0)
                left = tl.where((running > 0) & ~runs_on, weight, left)
                spent = tl.where(runs_on, spent + h, spent)
            else:
                h, runs_on = logit, may_run_on
                weight = tl.where((running > 0) & ~runs_on, 1.0, 0.0)
            if used < room:
                mark_ptr = marks_ptr + used * 3 * BM + row
                tl.store(mark_ptr, weight)
                tl.store(mark_ptr + BM, h)
                tl.store(mark_ptr + 2 * BM, (running + runs_on.to(tl.int32)).to(tl.float32))
            tl.debug_barrier()
            for low in range(0, width, BN):
                unit = low + tl.arange(0, BN)
                mask = (unit < width)[None, :]
                for state in tl.static_range(states):
                    at = state * plane + row[:, None] * width + unit[None, :]
                    part = weight[:, None] * tl.load(after_ptr + at, mask=mask, other=0.0)
                    mean = tl.load(mean_ptr + at, mask=mask, other=0.0) + tl.where(weight[:, None] == 0.0, 0.0, part)
                    tl.store(mean_ptr + at, mean, mask=mask)
            steps += running
            running = runs_on.to(tl.int32)
            going = tl.max(running, 0)
            before = after
            used += 1
        at = time * batch + place
        tl.store(steps_ptr + at, steps.to(tl.int64), mask=place < batch)
        tl.store(left_ptr + at, left, mask=place < batch)
        tl.store(taken_ptr + program * length + time, number)
    tl.store(used_ptr + program, used)


@triton.jit
def backward(
    weight_ptr, halting_ptr, lengths_ptr, frames_ptr, made_ptr, marks_ptr, taken_ptr, used_ptr, grad_ptr, grad_left_ptr,
    out_ptr, met_ptr, of_given_ptr, work_ptr, of_flag_ptr, of_halting_ptr, batch, length, width, room,
    cell: tl.constexpr, states: tl.constexpr, gates: tl.constexpr, saved: tl.constexpr, halts: tl.constexpr,
    precision: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of outputs of the matrix and the states that they met, step by step; of what inputs gave; and, summed over the
    sequences of a block, those of the flag's column and of the halting unit [width + 1], its bias last.

    All of them are zeros at first, and so is work, [states, BM, width] twice: gradients of the mean-field states and of those
    before the step that comes next.
    """
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BM)
    place = program * BM + row
    is_row = place < batch
    lengths = tl.load(lengths_ptr + place, mask=is_row, other=0)
    outputs, plane, frame = gates * width, BM * width, states * BM * width
    frames_ptr += program * (length + room + 3) * frame
    made_ptr += program * (room + 2) * saved * plane
    marks_ptr += program * room * 3 * BM
    out_ptr += program * room * gates * plane
    met_ptr += program * room * plane
    mean_ptr = work_ptr + program * 2 * frame
    carried_ptr = mean_ptr + frame
    of_flag_ptr += program * outputs
    of_halting_ptr += program * (width + 1)
    blocks = tl.num_programs(0)
    of_bias = 0.0
    slot = tl.load(used_ptr + program) - 1
    for back in range(length):
        time = length - 1 - back
        is_alive = lengths > time
        at_time = time * batch + place
        for low in range(0, width, BN):
            unit = low + tl.arange(0, BN)
            mask = (unit < width)[None, :]
            at = row[:, None] * width + unit[None, :]
            grad = tl.load(grad_ptr + at_time[:, None] * width + unit[None, :], mask=is_row[:, None] & mask, other=0.0)
            tl.store(mean_ptr + at, tl.load(mean_ptr + at, mask=mask, other=0.0) + grad, mask=mask)
        grad_left = tl.load(grad_left_ptr + at_time, mask=is_row, other=0.0)
        at_last = tl.zeros((BM,), tl.float32)
        count = tl.load(taken_ptr + program * length + time)
        here_ptr = of_given_ptr + (time * blocks + program) * BM * outputs
        for step in range(count):
            is_first = step == count - 1
            after_ptr = frames_ptr + (length + 1 + slot) * frame
            before_ptr = frames_ptr + tl.where(is_first, time, length + slot) * frame
            kept_ptr = made_ptr + slot * saved * plane
            to_ptr = out_ptr + slot * gates * plane
            mark_ptr = marks_ptr + slot * 3 * BM + row
            weight, h, mark = tl.load(mark_ptr), tl.load(mark_ptr + BM), tl.load(mark_ptr + 2 * BM)
            runs_on = mark > 1.5
            of_logit = tl.zeros((BM,), tl.float32)
            if halts:
                along = tl.zeros((BM,), tl.float32)
                for low in range(0, width, BN):
                    unit = low + tl.arange(0, BN)
                    mask = (unit < width)[None, :]
                    for state in tl.static_range(states):
                        at = state * plane + row[:, None] * width + unit[None, :]
                        grad = tl.load(mean_ptr + at, mask=mask, other=0.0)
                        along += tl.sum(grad * tl.load(after_ptr + at, mask=mask, other=0.0), 1)
                at_last = tl.where((mark > 0.5) & ~runs_on, along, at_last)
                of_logit = tl.where(runs_on, (along - at_last - grad_left) * h * (1.0 - h), 0.0)
                of_bias += tl.sum(of_logit, 0)
            for low in range(0, width, BN):
                unit = low + tl.arange(0, BN)
                is_unit = unit < width
                at, mask = row[:, None] * width + unit[None, :], is_unit[None, :]
                new = tl.load(after_ptr + at, mask=mask, other=0.0)
                carried = tl.load(carried_ptr + at, mask=mask, other=0.0)
                own = weight[:, None] * tl.load(mean_ptr + at, mask=mask, other=0.0) + tl.where(runs_on[:, None], carried, 0.0)
                if halts:
                    own += of_logit[:, None] * tl.load(halting_ptr + unit, mask=is_unit, other=0.0)[None, :]
                    total = tl.load(of_halting_ptr + unit, mask=is_unit, other=0.0) + tl.sum(of_logit[:, None] * new, 0)
                    tl.store(of_halting_ptr + unit, total, mask=is_unit)
                old = tl.load(before_ptr + at, mask=mask, other=0.0)
                tl.store(met_ptr + slot * plane + at, old, mask=mask)
                if cell == TANH:
                    _put(own * (1.0 - new * new), to_ptr, here_ptr, of_flag_ptr, 0, row, unit, is_first, width, outputs, is_unit)
                else:
                    first = tl.load(kept_ptr + at, mask=mask, other=0.0)
                    second = tl.load(kept_ptr + plane + at, mask=mask, other=0.0)
                    third = tl.load(kept_ptr + 2 * plane + at, mask=mask, other=0.0)
                    fourth = tl.load(kept_ptr + 3 * plane + at, mask=mask, other=0.0)
                    if cell == LSTM:
                        seen = tl.load(kept_ptr + 4 * plane + at, mask=mask, other=0.0)
                        memory = tl.load(before_ptr + plane + at, mask=mask, other=0.0)
                        of_memory = weight[:, None] * tl.load(mean_ptr + plane + at, mask=mask, other=0.0)
                        of_memory += tl.where(runs_on[:, None], tl.load(carried_ptr + plane + at, mask=mask, other=0.0), 0.0)
                        of_memory += own * third * (1.0 - seen * seen)
                        of_first = of_memory * fourth * first * (1.0 - first)
                        of_second = of_memory * memory * second * (1.0 - second)
                        of_third = own * seen * third * (1.0 - third)
                        of_fourth = of_memory * first * (1.0 - fourth * fourth)
                        tl.store(carried_ptr + plane + at, of_memory * second, mask=mask)
                    else:
                        of_third = own * (1.0 - second) * (1.0 - third * third)
                        of_first = of_third * fourth * first * (1.0 - first)
                        of_second = own * (old - third) * second * (1.0 - second)
                        of_fourth = of_third * first
                        tl.store(carried_ptr + at, own * second, mask=mask)
                    _put(of_first, to_ptr, here_ptr, of_flag_ptr, 0, row, unit, is_first, width, outputs, is_unit)
                    _put(of_second, to_ptr, here_ptr, of_flag_ptr, 1, row, unit, is_first, width, outputs, is_unit)
                    _put(of_third, to_ptr, here_ptr, of_flag_ptr, 2, row, unit, is_first, width, outputs, is_unit)
                    _put(of_fourth, to_ptr, here_ptr, of_flag_ptr, 3, row, unit, is_first, width, outputs, is_unit)
            tl.debug_barrier()
            for low in range(0, width, BN):
                unit = low + tl.arange(0, BN)
                is_unit = unit < width
                at = row[:, None] * width + unit[None, :]
                total = tl.zeros((BM, BN), tl.float32)
                if cell == GRU:
                    total = tl.load(carried_ptr + at, mask=is_unit[None, :], other=0.0)
                total = _product(total, to_ptr, weight_ptr, row, unit, outputs, outputs, width, is_unit, precision, BK)
                tl.store(carried_ptr + at, total, mask=is_unit[None, :])
            tl.debug_barrier()
            slot -= 1
        if count > 0:
            for low in range(0, width, BN):
                unit = low + tl.arange(0, BN)
                mask = is_alive[:, None] & (unit < width)[None, :]
                for state in tl.static_range(states):
                    at = state * plane + row[:, None] * width + unit[None, :]
                    tl.store(mean_ptr + at, tl.load(carried_ptr + at, mask=mask, other=0.0), mask=mask)
            tl.debug_barrier()
    tl.store(of_halting_ptr + width, of_bias)


@triton.jit
def _put(gradient, to_ptr, here_ptr, of_flag_ptr, gate, row, unit, is_first, width, outputs, is_unit):
    """The gradient of the matrix' outputs for one gate of some units: of the step, and added to those of time step and flag."""
    column = gate * width + unit
    at, mask = row[:, None] * outputs + column[None, :], is_unit[None, :]
    tl.store(to_ptr + at, gradient, mask=mask)
    tl.store(here_ptr + at, tl.load(here_ptr + at, mask=mask, other=0.0) + gradient, mask=mask)
    flag = tl.load(of_flag_ptr + column, mask=is_unit, other=0.0)
    tl.store(of_flag_ptr + column, flag + tl.where(is_first, tl.sum(gradient, 0), 0.0), mask=is_unit)
