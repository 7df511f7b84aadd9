"""What a `TreeLinear` takes: rows of its width, of finite floating-point numbers.

Legend: T tokens, Q in.
"""

import torch
from torch import Tensor


def as_rows(x: Tensor, in_features: int) -> Tensor:
    """[..., in_features] as rows, [T, in_features].

    Raises ValueError for another last dimension, for numbers that are not floating-point, and in autograd's anomaly mode
    (`torch.autograd.detect_anomaly()`) for rows with NaN or infinite numbers. Out of that mode they are counted
    (`count_nonfinite`): to look would be to wait for a GPU. Raises RuntimeError under `torch.jit.trace`.
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("a trace would keep the nodes that its example picked for every input; use torch.compile instead")
    if x.shape[-1:] != (in_features,):
        raise ValueError(f"input of shape {tuple(x.shape)}: its last dimension must be in_features={in_features}")
    if not x.is_floating_point():
        raise ValueError(f"input of {x.dtype}: outputs would be rounded to it; give floating-point numbers, e.g. x.float()")
    x_TQ = x.reshape(-1, in_features)
    if torch.is_anomaly_enabled():
        bad_T = ~x_TQ.isfinite().all(dim=1)
        if bool(bad_T.any()):
            raise ValueError(
                f"input has {int(bad_T.sum())} of {len(x_TQ)} rows with NaN or infinite numbers, the first is row "
                f"{int(bad_T.nonzero()[0])}: they have no leaf; mend what made them"
            )
    return x_TQ
