"""Gates: the bits that choose a leaf, and how a gating unit learns from them.

Legend: T tokens, Q in, K bits.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distcond.table import Collective

KINDS = ("linear", "hash", "sign")
MOMENTUM = 0.99
"Weight of the old running mean at a commit."


class Gate(nn.Module):
    """K gating units over the input; bit k is 1 where its pre-activation exceeds the running mean.

    Subtracting the mean keeps bits balanced without an auxiliary loss. The mean is a statistic of the global batch:
    backward passes stage a sum, and `commit` folds the pooled mean in once per applied step (by itself, without `RowAdam`:
    before the next forward pass in training, be that of the same step). Everything here is
    computed in fp32 at least, whatever the precision of the model: a bit is a sign, and ranks must agree on it.

    kind: "linear", learned units; "hash", fixed random hyperplanes (the control); "sign", the first K inputs themselves,
    whose threshold is 0 and stays so. learns: whether linear units are parameters; those that no gradient reaches are
    none, or weight decay would shrink them. Raises ValueError for other kinds, and for "sign" with fewer than K inputs.
    """

    running_mean: Tensor
    num_commits: Tensor
    weight: Tensor

    def __init__(self, in_features: int, num_bits: int, kind: str, *, learns: bool = True) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"gate={kind!r} is unknown; use one of {KINDS}")
        if kind == "sign" and num_bits > in_features:
            raise ValueError(f"gate='sign' takes its {num_bits} bits from as many inputs, but there are {in_features}")
        self.kind, self.num_bits = kind, num_bits
        if kind != "sign":
            weight_KQ = torch.randn(num_bits, in_features) / in_features**0.5
            if kind == "linear" and learns:
                self.weight = nn.Parameter(weight_KQ)
            else:
                self.register_buffer("weight", weight_KQ)
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("running_mean", torch.zeros(num_bits, dtype=exact))
        self.register_buffer("num_commits", torch.zeros((), dtype=torch.int64))
        self.staged = torch.zeros(num_bits + 1, dtype=torch.float64)
        self.is_due = False
        "Whether a backward pass was the last of what is staged, so that the next forward pass commits it."

    def forward(self, x_TQ: Tensor) -> Tensor:
        """Centred pre-activations, [T, K], fp32 (fp64 for an fp64 input)."""
        dtype = torch.promote_types(x_TQ.dtype, torch.float32)
        if self.kind == "sign":
            return x_TQ[:, : self.num_bits].to(dtype)
        raw_TK = nn.functional.linear(x_TQ.to(dtype), self.weight.to(dtype))
        return raw_TK - self.running_mean.to(dtype)

    def statistics(self, centred_TK: Tensor) -> Tensor:
        """Sum of the pre-activations and their number, float64 [K + 1]."""
        number = len(centred_TK)
        sum_K = centred_TK.detach().double().sum(0) + number * self.running_mean.double()
        return torch.cat([sum_K, sum_K.new_tensor([float(number)])])

    def stage(self, statistics: Tensor) -> None:
        """Add to what the next commit folds in."""
        self.staged = self.staged.to(statistics.device) + statistics

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """The running mean follows to another device, and to fp64; never below fp32, where a slow drift would be lost."""
        mean_K = self.running_mean
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.running_mean.dtype.itemsize < mean_K.dtype.itemsize:
            self.running_mean = mean_K.to(self.running_mean.device)
        return self

    def take_statistics(self) -> Tensor:
        """What was staged, float64 [K + 1]; forgets it."""
        statistics, self.staged, self.is_due = self.staged, torch.zeros_like(self.staged), False
        return statistics

    def commit(self, statistics: Tensor) -> None:
        """Fold the pooled statistics of one applied step into the running mean; a bit's first commit initialises it.

        A step without rows commits nothing, nor does one with NaN or infinite gates: the mean would never recover.
        """
        num_commits, running_mean = self._after(statistics)
        self.num_commits.copy_(num_commits)
        self.running_mean.copy_(running_mean)

    def _after(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Number of commits and running mean once these statistics are folded in."""
        if statistics[-1] == 0 or not bool(statistics.isfinite().all()):
            return self.num_commits, self.running_mean
        if self.kind == "sign":
            return self.num_commits + 1, self.running_mean
        mean_K = (statistics[:-1] / statistics[-1]).to(self.running_mean)
        moved_K = torch.lerp(self.running_mean, mean_K, 1.0 - MOMENTUM)
        # 0 is what a bit begins with, be it of a new layer or of the levels that a tree was given later.
        return self.num_commits + 1, torch.where(self.running_mean == 0, mean_K, moved_K)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As the next forward pass will find it, by what was staged on this rank."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_due:
            destination[f"{prefix}num_commits"], destination[f"{prefix}running_mean"] = self._after(self.staged)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.take_statistics()  # of another state


def pooled(statistics: Tensor) -> Tensor:
    """Their sum over the ranks, in a forward pass of `DistributedDataParallel`; elsewhere the same.

    A collective call there, as of `SyncBatchNorm`: ranks must run the same layers. Under `join`, where some ranks have no
    more inputs, each keeps its own.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or ddp._join_config.enable:
        return statistics
    return Collective(ddp.process_group).sum_(statistics)
