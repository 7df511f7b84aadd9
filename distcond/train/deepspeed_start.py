"""How DeepSpeed is started: on the right device, without compilers, in a process group of its own where nobody made one."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

# NOTE: read when DeepSpeed is imported.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu")

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler


@contextmanager
def compiling_late() -> Iterator[None]:
    """What DeepSpeed compiles is compiled when it is called: ZeRO imports Muon, of which few have use, 3 s of compilers."""
    at_once = compiler.compile

    def compile_late(*arguments: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            compiled = cache(lambda: at_once(*arguments, **options)(function))
            return wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

        return decorate

    compiler.compile = compile_late
    try:
        yield
    finally:
        compiler.compile = at_once


def start_process_group() -> None:
    """Initialise DeepSpeed's communication; a process on its own is a group of one."""
    # The shared-memory operation would be compiled on first use (46 s), or fail where there is no compiler.
    # NOTE: set in the module's dictionary; to ask for the attribute is to start compilers that probe every operation.
    known = vars(deepspeed.ops)
    known["__compatible_ops__"] = {**known.get("__compatible_ops__", {}), "deepspeed_shm_comm": False}
    if not dist.is_initialized() and "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
