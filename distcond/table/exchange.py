"""One dispatch of tokens to the owners of their subtrees, one combine of the results back: uneven all-to-all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distcond.table.collective import Collective


@dataclass(slots=True)
class Route:
    """Where the tokens of one call go. A rank without tokens still takes part in every collective."""

    collective: Collective
    order_T: Tensor
    "int64, place in the send buffer -> token."
    send: list[int]
    receive: list[int]

    @classmethod
    def to(cls, owner_T: Tensor, collective: Collective) -> "Route":
        """Route each token to the rank that owns it; costs one all-to-all of the counts."""
        send_W = torch.bincount(owner_T, minlength=collective.size)
        ones = [1] * collective.size
        receive_W = collective.all_to_all(send_W, ones, ones)
        return cls(collective, torch.argsort(owner_T, stable=True), send_W.tolist(), receive_W.tolist())

    def dispatch(self, tensor_T: Tensor) -> Tensor:
        """Tokens to owners, [received, ...]."""
        return self.collective.all_to_all(tensor_T[self.order_T], self.send, self.receive)

    def dispatch_with_leaf(self, x_TQ: Tensor, leaf_T: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their int64 leaves in one message: the leaf travels as further columns of the same bits."""
        columns = leaf_T[:, None].view(x_TQ.dtype)
        both = self.dispatch(torch.cat([x_TQ, columns], dim=1))
        width = x_TQ.shape[1]
        columns = both[:, width:].clone(memory_format=torch.contiguous_format)  # a view might start at an odd address
        return both[:, :width].contiguous(), columns.view(torch.int64)[:, 0]

    def combine(self, tensor_R: Tensor) -> Tensor:
        """Results back to the tokens' ranks, in the tokens' order."""
        back_T = self.collective.all_to_all(tensor_R, self.receive, self.send)
        out_T = torch.empty_like(back_T)
        out_T[self.order_T] = back_T
        return out_T
