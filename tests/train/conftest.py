"""What a test of training changes of the whole process is taken back."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Threads and kernels are those before the test: a dry run, which times a step here, takes those of its configuration."""
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    yield
    if torch:
        torch.set_num_threads(threads)
    if native := sys.modules.get("distcond.ops.native"):
        native.use_kernels("torch")
