"""Ranks as processes of this machine, for what can only be timed among several of them."""

import contextlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distcond.ops import kernels, use_kernels

TIMEOUT = timedelta(minutes=5)
"Of a collective: ranks whose peer has failed give up then."


def on_ranks(work: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """What `work(*args)` returns on each rank of a gloo group, one thread and one process a rank.

    `work` must be found by its module and name. Raises a group of what the ranks raised.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(num_ranks, context) as pool:
        store = f"file://{folder}/store"
        ranks = [pool.submit(_rank, rank, num_ranks, store, kernels(), work, args) for rank in range(num_ranks)]
        errors = [error for rank in ranks if (error := rank.exception()) is not None]
    if errors:
        raise BaseExceptionGroup(f"{len(errors)} of {num_ranks} ranks failed", errors)
    return [rank.result() for rank in ranks]


def _rank(rank: int, num_ranks: int, store: str, kernels: str, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    use_kernels(kernels)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # which is for the table
            result = work(*args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return result
