"""`distcond explain RUN`: why a model says what it says at one position: nodes, bits and steps, each changed for real.

Legend: T positions, I input features, G targets of a position.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from distcond.deploy.attribution import attribute
from distcond.deploy.changes import Change, Flip, Outcome, ponder_of, run_changed
from distcond.deploy.predict import judged
from distcond.deploy.served import Served, check_answer, parse_json, prompt_of, serve_run, vectors_of
from distcond.errors import ConfigError, DataError, RunError
from distcond.nn import FixedComputation, TreeLinear
from distcond.nn.tree_parts import path_of
from distcond.opened import open_run
from distcond.train.table_files import tree_layers

MAX_INPUT = 2**20
"Bytes; a model sees the last few hundred."
SUFFIXES = (".txt", ".md", ".py", ".json", ".jsonl", ".csv", ".html")
"Of the names of files."
MORE_STEPS = 2
"Steps beyond the position's own that are forced on it, too."
MOST_FORCED = 32
"Steps that are forced, at the most."
LIKELIEST = 5
"Predictions that are shown."


@dataclass(frozen=True, slots=True)
class Question:
    """What is explained: what a model makes of one position of an input."""

    inputs: Tensor
    "Ids int64 [T] or vectors [T, I], up to the position: what comes after it, a model does not see."
    first: int
    "The place of the first of them in what was given: a model sees its last max_length."
    targets: Tensor | None
    "What is right there, int64 [G]; below 0 where nothing is asked; None: not known."

    @property
    def position(self) -> int:
        """In `inputs`: the last one."""
        return len(self.inputs) - 1


def question_of(served: Served, given: str, position: int | None) -> Question:
    """A text, of which the last byte or token is the target unless a position is chosen; or vectors as JSON.

    Raises DataError for what the model cannot read.
    """
    where = "--input"
    if served.unit == "vectors":
        value = parse_json(given, where)
        inputs = vectors_of(value, served.model.shape.input_size, where)
        place = _place(len(inputs) - 1 if position is None else position, len(inputs), "time steps")
        targets = value.get("targets") if isinstance(value, dict) else None
        return Question(inputs[: place + 1], 0, None if targets is None else _targets(served, targets, place, len(inputs)))
    value = parse_json(given, where) if served.unit == "ids" else given
    ids = torch.tensor(prompt_of(served, value, where))
    place = _place(max(0, len(ids) - 2) if position is None else position, len(ids), served.unit)
    first = max(0, place + 1 - served.model.shape.max_length)
    return Question(ids[first : place + 1], first, ids[place + 1 : place + 2] if place + 1 < len(ids) else None)


def read_input(given: str) -> tuple[str, str]:
    """A text, or that of a file of this name, or of standard input (-); and which it was, for the user.

    Raises DataError for an empty, binary or huge one, and for the name of a file that is not there.
    """
    if given == "-":
        text = _decoded(sys.stdin.buffer.read(MAX_INPUT + 1), given)
        return text, f"standard input, {len(text.encode()):,} bytes"
    file = Path(given)
    try:
        is_file = file.is_file()
    except OSError:  # too long for a name
        is_file = False
    if is_file:
        with file.open("rb") as stream:
            text = _decoded(stream.read(MAX_INPUT + 1), given)
        return text, f"file {file}, {len(text.encode()):,} bytes"
    if not given:
        raise DataError("--input is empty; give a text, or a file's name.")
    if _looks_like_a_path(given):
        raise DataError(
            f"--input {given} is no file; give the name of one. If it is the text itself: "
            f"printf %s {shlex.quote(given)} | distcond explain RUN --input -"
        )
    return given, f"text of {len(given.encode('utf-8', 'surrogateescape')):,} bytes"


def _looks_like_a_path(text: str) -> bool:
    is_json = text[0] in '[{"'
    return not is_json and not any(map(str.isspace, text)) and ("/" in text or text.endswith(SUFFIXES))


def _decoded(data: bytes, name: str) -> str:
    if not data:
        raise DataError(f"--input {name} is empty; give a text, or another file.")
    if len(data) > MAX_INPUT:
        raise DataError(f"--input {name} has over {MAX_INPUT:,} bytes, of which a model sees a few hundred; cut out fewer.")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"--input {name} is not UTF-8 ({error.reason}, byte {error.start}); give a text in UTF-8.") from error
    if "\0" in text:
        raise DataError(f"--input {name} is binary (byte {text.index(chr(0))} is 0); give a text.")
    return text


def explain(run: Path, given: str, *, layer: str = "", position: int | None = None, step: int | None = None) -> dict[str, Any]:
    """What a run's model makes of a position of an input, as `explain_position`; given: as `question_of`.

    step: which checkpoint. Raises RunError as `open_run` does, and for a model of another package.
    """
    opened = open_run(run, step)
    if not opened.config.model.is_shipped:
        raise RunError(f"{run} has a model of another package ({opened.config.model.name}); explain reads those of distcond.")
    served = serve_run(opened)
    return {"run": str(run), **explain_position(served, question_of(served, given, position), layer)}


def explain_position(served: Served, question: Question, layer: str = "") -> dict[str, Any]:
    """What a model makes of a position, and what would change it. Raises ConfigError where it has no such layer.

    prediction: the likeliest outputs, the loss (nats) where the target is known, the executed steps.
    passes: for each ponder step the path in the tree layer: what each node adds to its output (norms, signed shares that sum
    to 1 with those of the biases), and the gates. flips: what comes out with one bit changed at one step. forced: what comes
    out where the position halts at another step (halting.kind=fixed: where all positions take that many).
    """
    body = served.model.body
    name, tree = _chosen_layer(body, layer)
    base = run_changed(body, tree, question.inputs, question.position, [Change()])[0]
    check_answer(base.logits)
    result: dict[str, Any] = {
        "layer": name,
        "position": question.first + question.position,
        "given": served.text_of(question.inputs.tolist()) if served.unit != "vectors" else question.inputs.tolist(),
        "target": None if question.targets is None else _shown_targets(served, question.targets),
        "prediction": _prediction(served, base, question),
    }
    if tree is not None:
        seen = zip(base.inputs, base.outputs, strict=True)
        result["passes"] = [_pass(tree, number, x_Q, y_P) for number, (x_Q, y_P) in enumerate(seen, 1)]
        result["flips"] = _flips(served, tree, base, question)
    result["forced"] = _forced(served, tree, base, question)
    return result


# ---- the parts of an explanation -------------------------------------------------------------------------------------


def _pass(layer: TreeLinear, step: int, x_Q: Tensor, y_P: Tensor) -> dict[str, Any]:
    """The path of the position at one ponder step, and what its nodes add."""
    parts = attribute(layer, x_Q[None])
    shares, bias_shares = parts.shares(parts.matrix_TMLP)[0], parts.shares(parts.bias_TMLP)[0]
    gates_MK, leaves = layer.gates(x_Q[None])[0], layer.leaf(x_Q[None])[0].tolist()
    norms = parts.matrix_TMLP[0].norm(dim=2)
    nodes = [
        {
            "tree": tree,
            "level": level,
            "node": node,
            "bit": None if level == 0 else int(gates_MK[tree, level - 1] > 0),
            "gate": None if level == 0 else float(gates_MK[tree, level - 1]),
            "norm": float(norms[tree, level]),
            "share": float(shares[tree, level]),
            "bias_share": float(bias_shares[tree, level]),
        }
        for tree, leaf in enumerate(leaves)
        for level, node in enumerate(path_of(leaf, layer.depth))
    ]
    return {
        "step": step,
        "leaves": leaves,
        "output_norm": float(y_P.double().norm()),
        "error": float((parts.output[0] - y_P).abs().max()),
        "share_per_level": (shares + bias_shares).sum(0).tolist(),
        "nodes": nodes,
    }


def _flips(served: Served, layer: TreeLinear, base: Outcome, question: Question) -> list[dict[str, Any]]:
    steps = range(1, len(base.inputs) + 1)
    flips = [Flip(step, tree, level) for step in steps for tree in range(layer.num_trees) for level in range(1, layer.depth + 1)]
    changes = [Change(flip=flip) for flip in flips]
    outcomes = run_changed(served.model.body, layer, question.inputs, question.position, changes)
    rows = []
    for flip, outcome in zip(flips, outcomes, strict=True):
        before, after = base.outputs[flip.step - 1].double(), outcome.outputs[flip.step - 1].double()
        change = float((after - before).norm() / before.norm().clamp(min=1e-30))
        where = {"step": flip.step, "tree": flip.tree, "level": flip.level, "output_change": change}
        rows.append({**where, **_changed(served, base, outcome, question)})
    return rows


def _forced(served: Served, layer: TreeLinear | None, base: Outcome, question: Question) -> list[dict[str, Any]]:
    """The outcome for each number of steps up to a few more than the position's own."""
    body = served.model.body
    ponder = ponder_of(body)
    if isinstance(ponder, FixedComputation):
        most = ponder.num_steps + MORE_STEPS if ponder.num_steps > 1 else 1
        numbers = list(range(1, min(most, MOST_FORCED) + 1))
        outcomes = [_with_steps(body, ponder, number, question) for number in numbers]
    else:
        numbers = list(range(1, min(base.steps + MORE_STEPS, ponder.max_steps, MOST_FORCED) + 1))
        changes = [Change(halt_at=number) for number in numbers]
        outcomes = run_changed(body, layer, question.inputs, question.position, changes, natural=base.steps)
    return [
        {"steps": number, "is_own": number == base.steps, **_changed(served, base, outcome, question)}
        for number, outcome in zip(numbers, outcomes, strict=True)
    ]


def _with_steps(body: nn.Module, ponder: FixedComputation, number: int, question: Question) -> Outcome:
    own, ponder.num_steps = ponder.num_steps, number
    try:
        return run_changed(body, None, question.inputs, question.position, [Change()])[0]
    finally:
        ponder.num_steps = own


def _changed(served: Served, base: Outcome, outcome: Outcome, question: Question) -> dict[str, Any]:
    """What came out, beside what the model says unchanged."""
    return _prediction(served, outcome, question, most=1, base=base)


def _prediction(
    served: Served, outcome: Outcome, question: Question, most: int = LIKELIEST, base: Outcome | None = None
) -> dict[str, Any]:
    """The likeliest outputs with their probabilities, loss and steps; and how far from those of `base`, in nats."""
    classes = served.model.shape.num_classes
    shown: dict[str, Any] = {}
    if served.unit == "vectors":
        answer, probability = judged(outcome.logits, classes)
        shown |= {"outputs": answer.tolist(), "probabilities": probability.tolist()}
    else:
        probability, answer = outcome.logits.softmax(0).topk(min(most, classes))
        shown |= {"outputs": [served.text_of([one]) for one in answer.tolist()], "probabilities": probability.tolist()}
    shown |= {"loss": _loss(outcome.logits, question.targets, classes), "ponder_steps": outcome.steps}
    if base is not None:
        before = _loss(base.logits, question.targets, classes)
        shown["loss_change"] = None if before is None else shown["loss"] - before
        shown["divergence"] = _divergence(base.logits, outcome.logits, classes)
    return shown


def _loss(logits: Tensor, targets: Tensor | None, classes: int) -> float | None:
    """Negative log-likelihood of the targets in nats."""
    if targets is None:
        return None
    if classes == 1:
        return float(binary_cross_entropy_with_logits(logits.double(), targets.double(), reduction="sum"))
    asked = targets >= 0
    return float(cross_entropy(logits.view(-1, classes)[asked].double(), targets[asked], reduction="sum"))


def _divergence(before: Tensor, after: Tensor, classes: int) -> float:
    """Kullback-Leibler divergence of what is said from what was said, over all targets, in nats."""
    both = []
    for logits in (before.double(), after.double()):
        rows = logits.view(-1, classes) if classes > 1 else torch.stack([torch.zeros_like(logits), logits], dim=1)
        both.append(rows.log_softmax(1))
    return max(0.0, float((both[0].exp() * (both[0] - both[1])).sum()))


# ---- what is asked ---------------------------------------------------------------------------------------------------


def _chosen_layer(body: nn.Module, name: str) -> tuple[str | None, TreeLinear | None]:
    layers = tree_layers(body)
    if name and name not in layers:
        raise ConfigError(f"--layer {name}: the tree layers of the model are {', '.join(layers) or 'none'}; choose one of them.")
    chosen = name or next(iter(layers), None)
    return chosen, None if chosen is None else layers[chosen]


def _place(position: int, size: int, unit: str) -> int:
    if not 0 <= position < size:
        raise ConfigError(f"--position {position}: the input has {size} {unit}; give 0 to {size - 1}.")
    return position


def _targets(served: Served, targets: Any, place: int, length: int) -> Tensor:
    """The targets of one time step. Raises DataError where they are none of the model's."""
    shape = served.model.shape
    number = shape.output_size // shape.num_classes if shape.num_classes > 1 else shape.output_size
    least, most = 0 if shape.num_classes == 1 else -(2**31), max(2, shape.num_classes)  # below 0: a class that is not asked for
    rows = [targets] if isinstance(targets, list) and targets and not isinstance(targets[0], list) else targets
    ok = isinstance(rows, list) and len(rows) == length and isinstance(rows[place], list) and len(rows[place]) == number
    if not ok or not all(type(one) in {int, float} and least <= one < most and one == int(one) for one in rows[place]):
        numbers = "numbers that are 0 or 1" if least == 0 else f"numbers below {most}"
        raise DataError(f"--input: targets must hold {length} lists (one a time step) of {number} {numbers}.")
    return torch.tensor(rows[place]).long()


def _shown_targets(served: Served, targets: Tensor) -> Any:
    return targets.tolist() if served.unit == "vectors" else served.text_of(targets.tolist())
