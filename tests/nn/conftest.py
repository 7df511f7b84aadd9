"""What tests of layers share: the kernels that compute them."""

import shutil
from collections.abc import Iterator

import pytest

from distcond.ops import use_kernels

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc here")


@pytest.fixture(params=["torch", pytest.param("native", marks=needs_gcc)])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    use_kernels(request.param)
    yield request.param
    use_kernels("torch")
