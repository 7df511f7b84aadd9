"""Small models of every kind, untrained but with numbers in every node, as a run would give them."""

from typing import Any

import torch
from torch import Tensor, nn

from distcond.config import HaltingConfig, HaltingKind, ModelConfig, TreeConfig
from distcond.config.shape import TaskShape
from distcond.deploy.load import Deployed, build_body
from distcond.nn import TreeLinear
from tests.helpers import changed
from tests.trees import fill, seed_cpu

TEXT, VECTORS = TaskShape("bytes", 256, 256, 256, 12), TaskShape("vectors", 5, 6, 3, 4)
"Bytes; and vectors of 5 numbers with two targets of 3 classes."


def model_config(name: str = "transformer", halting: str = "act", **changes: Any) -> ModelConfig:
    """A model of width 8, `changes` as in `changed`; at most 4 steps, and about two at first."""
    config = ModelConfig(
        name=name,
        width=8,
        heads=2,
        feed_forward=12,
        window=4,
        tree=TreeConfig(depth=3),
        halting=HaltingConfig(kind=HaltingKind(halting), max_steps=4, halting_bias=-0.5),
    )
    made: ModelConfig = changed(config, **changes)
    return made


def random_model(config: ModelConfig, shape: TaskShape = TEXT) -> Deployed:
    """A model whose nodes hold normal numbers, and whose halting depends on the input."""
    seed_cpu(0)
    body = build_body(config, shape)
    with torch.no_grad():
        for module in body.modules():
            if isinstance(module, TreeLinear):
                fill(module, most_levels=3)
        for name, parameter in body.named_parameters():
            if name.endswith("halting.weight"):
                parameter.normal_(std=3.0)
    return Deployed(body, shape, {})


def inputs_for(shape: TaskShape, count: int = 6, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random inputs [B, T] or [B, T, I], and their lengths, which differ for vectors."""
    random = torch.Generator().manual_seed(seed)
    if shape.kind == "bytes":
        return torch.randint(shape.input_size, (count, shape.max_length), generator=random), torch.full(
            (count,), shape.max_length
        )
    lengths = torch.arange(count) % shape.max_length + 1
    return torch.randn(count, shape.max_length, shape.input_size, generator=random), lengths


def tree_of(model: Deployed) -> TreeLinear:
    """Its one tree layer."""
    (layer,) = (module for module in model.modules() if isinstance(module, TreeLinear))
    return layer


def starts_of(layer: TreeLinear) -> Tensor:
    """First leaf of each tree, int64 [trees]."""
    return torch.arange(layer.num_trees) * 2**layer.depth


def loads_of(model: Deployed, inputs: Tensor, lengths: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Leaves that inputs visit in each tree layer, and how often."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda layer, given: seen.setdefault(name, []).append(layer.leaf(given[0]).flatten(0, -2) + starts_of(layer))

    layers: dict[str, nn.Module] = {name: one for name, one in model.body.named_modules() if isinstance(one, TreeLinear)}
    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    model(inputs, lengths)
    for handle in handles:
        handle.remove()
    return {name: torch.unique(torch.cat(parts), return_counts=True) for name, parts in seen.items()}
