"""`distcond.load(DIR)`: an exported model as a torch module. Needs torch and safetensors alone.

Legend: B sequences, T positions, I input features, O outputs.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distcond.config import ModelConfig
from distcond.config.plugins import call
from distcond.config.shape import TaskShape
from distcond.deploy.card import AGAIN, WEIGHTS, model_config, read_card
from distcond.errors import RunError
from distcond.nn import FlatTree, PonderStats, TreeLinear
from distcond.nn.gates import Gate
from distcond.nn.halting import HaltingUnit
from distcond.nn.model import build_learner

BFLOAT16 = "bfloat16"


class Deployed(nn.Module):
    """A trained model in evaluation mode, and what it was trained for. Gives no gradients.

    shape: of its task; kind "bytes": inputs are bytes or tokens [B, T], and every position predicts what comes next; else
    vectors [B, T, I]. card: what `model.json` says of it; empty for a run's own model.
    """

    def __init__(self, body: nn.Module, shape: TaskShape, card: dict[str, Any]) -> None:
        super().__init__()
        self.body, self.shape, self.card = body, shape, card
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, PonderStats]:
        """Inputs, and lengths int64 [B] (None: all T) -> logits fp32 [B, T, O], and the steps of all B x T positions."""
        if lengths is None:
            lengths = torch.full((len(inputs),), inputs.shape[1], device=inputs.device)
        if inputs.is_floating_point():
            # The precision of the model, whatever its first parameter is: that of gates and halting units stays fp32.
            inputs = inputs.to(min((value.dtype for value in self.body.parameters()), key=lambda dtype: dtype.itemsize))
        logits, stats = self.body(inputs, lengths)
        return logits.float(), stats


def load(folder: str | Path) -> Deployed:
    """The model that `distcond export` wrote into a folder, on the CPU.

    Raises RunError, which names the file, where one is missing or altered or of another format; and ConfigError where the
    model is that of a package which is not installed here.
    """
    folder = Path(folder)
    card = read_card(folder)
    tensors = load_file(folder / WEIGHTS)
    shape = TaskShape(**{name: card["task"][name] for name in TaskShape.__dataclass_fields__})
    with torch.random.fork_rng(devices=[]):  # what a fresh model draws is not the caller's business
        body = build_body(model_config(card), shape)
    for name, num_leaves in card["flattened"].items():
        layer = body.get_submodule(name)
        assert isinstance(layer, TreeLinear)
        body.set_submodule(name, FlatTree(layer, num_leaves))
    if card["precision"] == BFLOAT16:
        to_bfloat16(body)
    try:
        body.load_state_dict(tensors)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise RunError(f"{folder / WEIGHTS} does not fit the model that is built here ({what}); {AGAIN}") from error
    return Deployed(body, shape, card)


def build_body(config: ModelConfig, shape: TaskShape) -> nn.Module:
    """A fresh model for a task. Raises ConfigError where its package is missing."""
    if not config.is_shipped:
        body: nn.Module = call("model", config.name, config, shape)
        return body
    sizes = {"input_size": shape.input_size, "output_size": shape.output_size, "num_classes": shape.num_classes}
    return build_learner(config, is_text=shape.kind == "bytes", **sizes).body


def to_bfloat16(body: nn.Module) -> None:
    """Weights in bf16, but for the few numbers that decide bits and steps; rows of tables stay fp32 in memory, as in training."""
    exact = [(module, name, value.detach().clone()) for module in body.modules() for name, value in _deciding(module)]
    body.bfloat16()
    for module, name, value in exact:
        getattr(module, name).data = value


def _deciding(module: nn.Module) -> list[tuple[str, Tensor]]:
    if not isinstance(module, Gate | HaltingUnit):
        return []
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
