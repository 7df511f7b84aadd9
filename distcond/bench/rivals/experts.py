"""The same tree as expert parameters of DeepSpeed under ZeRO-1, beside the one whose table stands outside it.

What a module must look like for ZeRO to take its parameters for experts: it is a `MoE`, it names its group, and the
parameters lie under `deepspeed_moe.experts.deepspeed_experts` and carry that name.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distcond.bench.report import Row
from distcond.bench.timing import time_in_turn
from distcond.nn import TreeLinear

NAME = "this tree, as DeepSpeed experts"
GROUP = "ep_size_1"
TOKENS, WIDTH, DEPTH, QUICK_DEPTH = 64, 64, 13, 4
"16,383 nodes of 64 x 64 (31 of them)."


def against_experts(quick: bool) -> Iterator[Row]:
    """A whole step of an engine: forward, backward, clipping, update."""
    from distcond.train.engine import initialize

    depth = QUICK_DEPTH if quick else DEPTH
    torch.manual_seed(0)
    outside = _Sums(_tree(depth, "lazy"))
    engine = initialize(model=outside, config=_options(), model_parameters=list(outside.parameters()))[0]
    times = time_in_turn({"rival": _step(_rival_engine(depth)), "tree": _step(engine)})
    yield {
        "rival": NAME,
        "passes": "forward, backward, update: an engine's step, ZeRO-1",
        "tokens": TOKENS,
        "nodes": 2 ** (depth + 1) - 1,
        "numbers a node": WIDTH * (WIDTH + 1),
        "ms": times["rival"].median,
        "from": times["rival"].low,
        "to": times["rival"].high,
        "tree ms": times["tree"].median,
        "rival / tree": times["rival"].median / times["tree"].median,
    }


class _Sums(nn.Module):
    """A layer between two sums, so that the model has dense parameters, too, and a loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(WIDTH, WIDTH), layer

    def forward(self, x_TQ: Tensor) -> Tensor:
        """[T, Q] -> scalar."""
        y_TP: Tensor = self.layer(self.first(x_TQ))
        return y_TP.square().mean()


def _tree(depth: int, storage: str) -> TreeLinear:
    return TreeLinear(WIDTH, WIDTH, depth, gate="hash", gate_gradient="none", storage=storage)


def _options() -> dict[str, Any]:
    adam = {"lr": 1e-5, "torch_adam": True, "adam_w_mode": True, "fused": True}
    return {
        "train_micro_batch_size_per_gpu": TOKENS,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": adam},
        "steps_per_print": 10**9,
    }


def _rival_engine(depth: int) -> Any:
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.utils import groups

    tree = _tree(depth, "dense")

    class TreeExperts(MoE):  # type: ignore[misc]
        """A dense tree whose nodes are the parameters of one expert."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = self.ep_size = self.num_local_experts = 1
            self.expert_group_name = GROUP
            for parameter in tree.parameters():
                parameter.allreduce, parameter.group_name = False, GROUP  # type: ignore[attr-defined]
            experts = nn.Module()
            experts.deepspeed_experts = nn.ModuleList([tree])
            self.deepspeed_moe = nn.Module()
            self.deepspeed_moe.experts = experts

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            if GROUP not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(1)

        def forward(self, x_TQ: Tensor) -> Tensor:
            return tree(x_TQ)  # type: ignore[no-any-return]

    model = _Sums(TreeExperts())
    named = [{"params": list(model.parameters()), "name": "all"}]
    parameters = split_params_into_different_moe_groups_for_optimizer(named)
    return deepspeed.initialize(model=model, config=_options(), model_parameters=parameters)[0]


def _step(engine: Any) -> Callable[[], None]:
    x = torch.randn(TOKENS, WIDTH)

    def step() -> None:
        engine.backward(engine(x))
        engine.step()

    return step
