"""Thresholds under plain DistributedDataParallel: those of the global batch, on every rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distcond.nn import TreeLinear
from tests.helpers import run_ranks
from tests.trees import seed_cpu, tokens

COUNTS = [13, 7]
"Rows of the two ranks; one process has all of them."
STEPS = 4
ROUNDING = {"rtol": 0, "atol": 1e-12}  # float64 sums of 20 numbers of size 1, in another order, over 4 steps of SGD


def trained(options: dict[str, Any]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Buffers after each forward pass, and parameters in the end: of this rank's rows, or of all where there is no group."""
    seed_cpu(0)
    model = nn.Sequential(TreeLinear(5, 6, 3, **options), nn.Tanh(), TreeLinear(6, 4, 3, **options)).double()
    rank, size = (dist.get_rank(), 2) if dist.is_initialized() else (None, 1)
    net = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step in range(STEPS):
        x = tokens(sum(COUNTS), seed=step) + 1.0
        part = x if rank is None else x.split(COUNTS)[rank]
        optimizer.zero_grad()
        loss = size * net(part).square().sum() / len(x)
        seen.append([buffer.clone() for buffer in model.buffers()])
        loss.backward()
        optimizer.step()
    return seen, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"gate": "hash", "gate_gradient": "sampled", "num_trees": 2}])
def test_ranks_hold_the_thresholds_of_one_process_with_the_whole_batch(options: dict[str, Any]) -> None:
    (alone,), ranks = run_ranks(trained, 0, options), run_ranks(trained, 2, options)
    (seen, parameters), (others, theirs) = ranks
    for buffers, other in zip(seen, others, strict=True):
        assert all(torch.equal(*pair) for pair in zip(buffers, other, strict=True))
    assert all(torch.equal(*pair) for pair in zip(parameters, theirs, strict=True))
    torch.testing.assert_close((seen, parameters), alone, **ROUNDING)


def trained_unevenly() -> int:
    """Steps of a rank that has one batch more than the one before it."""
    seed_cpu(0)
    model = DistributedDataParallel(TreeLinear(5, 4, 3).double())
    steps = 0
    with model.join():
        for step in range(2 + dist.get_rank()):
            model(tokens(6, seed=step)).square().sum().backward()
            steps += 1
    return steps


def test_a_rank_that_has_more_batches_than_others_does_not_wait_for_them() -> None:
    assert run_ranks(trained_unevenly, 2) == [2, 3]
