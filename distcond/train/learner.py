"""The model of a run, and what it costs; models of other packages come in here."""

import torch
from torch import Tensor, nn

from distcond.config import Config, GateName, ModelConfig, TreeConfig
from distcond.config.cost import ModelCost, model_cost, tree_cost
from distcond.config.plugins import call, refusal
from distcond.config.run import check_reads
from distcond.config.shape import Shape, TaskShape, shape_without
from distcond.nn import FixedComputation, TreeLinear
from distcond.nn.halting import Pondering, PonderStats
from distcond.nn.model import Learner, build_learner, with_loss


def learner_for(config: Config, task: Shape) -> Learner:
    """The model of a configuration for a task, with fresh parameters from torch's generator."""
    is_text, num_classes = task.kind == "bytes", task.num_classes
    check_reads(config.model.name, config.data.name, is_text=is_text)
    if not config.model.is_shipped:
        body = _entry_point(config.model, shape_without(task))
        return with_loss(body, config.model, is_text=is_text, num_classes=num_classes)
    sizes = {"input_size": task.input_size, "output_size": task.output_size, "num_classes": num_classes}
    return build_learner(config.model, is_text=is_text, **sizes)


def cost_for(config: ModelConfig, task: Shape, body: nn.Module) -> ModelCost:
    """Closed-form cost of a model on a task; of one from another package, that of its linear layers and trees.

    Each of those is taken to be applied once to every position, and once a ponder step inside of a halting module.
    """
    if config.is_shipped:
        sizes = {"input_size": task.input_size, "output_size": task.output_size, "length": task.max_length}
        return model_cost(config, is_text=task.kind == "bytes", **sizes)
    pondering = [module for module in body.modules() if isinstance(module, Pondering | FixedComputation)]
    in_steps = {layer for module in pondering for layer in module.modules()}
    costs = {module: _layer_cost(module) for module in body.modules() if isinstance(module, nn.Linear | TreeLinear)}
    return ModelCost(
        dense_parameters=sum(parameter.numel() for parameter in body.parameters()),
        node_parameters=sum(rows for rows, _ in costs.values()),
        macs_per_step=sum(macs for layer, (_, macs) in costs.items() if layer in in_steps),
        macs_per_position=sum(macs for layer, (_, macs) in costs.items() if layer not in in_steps),
    )


def _layer_cost(layer: nn.Linear | TreeLinear) -> tuple[int, int]:
    """Parameters in a node table, and MACs per row."""
    if isinstance(layer, nn.Linear):
        return 0, layer.in_features * layer.out_features
    tree = TreeConfig(
        depth=layer.depth,
        full_depth=layer.full_depth,
        rank=layer.rank,
        num_trees=layer.num_trees,
        gate=GateName(layer.gate.kind if layer.gate is not None else "linear"),
        max_nodes=layer.layout.growth.max_nodes,
    )
    cost = tree_cost(layer.in_features, layer.out_features, tree, has_bias=layer.has_bias)
    return (0 if layer.table is None else cost.node_parameters), cost.macs


def _entry_point(config: ModelConfig, shape: TaskShape) -> nn.Module:
    """The model of another package, after a look at what it makes of one example."""
    body = call("model", config.name, config, shape)
    if not isinstance(body, nn.Module):
        raise refusal("model", config.name, f"returned {type(body).__name__}; needed is a torch.nn.Module")
    size = (1, shape.max_length) if shape.kind == "bytes" else (1, shape.max_length, shape.input_size)
    inputs = torch.zeros(size, dtype=torch.uint8 if shape.kind == "bytes" else torch.float32)
    answer = _asked(config, body, inputs, torch.full((1,), shape.max_length))
    given = f"returned a {type(body).__name__}, which gives"
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], PonderStats)):
        raise refusal("model", config.name, f"{given} {type(answer).__name__}; needed is a tuple (logits, PonderStats)")
    logits, stats = answer
    needed = (1, shape.max_length, shape.output_size)
    if not isinstance(logits, Tensor) or logits.shape != needed:
        seen = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise refusal("model", config.name, f"{given} logits {seen} for inputs {list(size)}; needed is {list(needed)}")
    for name in ("steps", "remainder", "ponder_cost"):
        if len(part := getattr(stats, name)) != shape.max_length:
            raise refusal(
                "model", config.name, f"{given} stats.{name} [{len(part)}]; needed is one a position, {shape.max_length}"
            )
    return body


def _asked(config: ModelConfig, body: nn.Module, inputs: Tensor, lengths: Tensor) -> object:
    """What a model answers in evaluation, which changes nothing in it."""
    body.eval()
    try:
        with torch.no_grad():
            return body(inputs, lengths)
    except Exception as error:
        why = f"returned a {type(body).__name__}, which fails with {type(error).__name__}: {error}"
        raise refusal("model", config.name, why) from error
    finally:
        body.train()
