"""FBGEMM's table-batched embedding on the CPU: rows looked up, and updated by SGD within the backward pass."""

import warnings
from collections.abc import Callable

import torch

NAME = "FBGEMM, fused SGD"


def table(touched: int, width: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Update alone, and look-up and update, of every second row of a table of 2 x touched rows of `width` numbers.

    Raises ImportError, or OSError where the library was made for another torch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optimisers that it has on GPUs alone
        import fbgemm_gpu  # noqa: F401 - loads the operators
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

    torch.manual_seed(0)
    spec = (2 * touched, width, EmbeddingLocation.HOST, ComputeDevice.CPU)
    options = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 1e-5, "pooling_mode": PoolingMode.SUM}
    embedding = SplitTableBatchedEmbeddingBagsCodegen([spec], **options)
    rows, offsets = torch.randperm(2 * touched)[:touched].sort().values, torch.arange(touched + 1)
    looked_up, grad = embedding(rows, offsets), torch.randn(touched, width)
    update = lambda: looked_up.backward(grad, retain_graph=True)  # noqa: E731
    return update, lambda: embedding(rows, offsets).backward(grad)
