"""`distcond predict`: lines in, JSON lines out, batched and in order, each answered as soon as its batch is.

Legend: B lines of a batch, T positions, I input features, C classes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distcond.deploy.lines import Line, Source, groups_of_lines
from distcond.deploy.reader import Reader
from distcond.deploy.served import Served, check_answer, parse_json, prompt_of, vectors_of
from distcond.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions:
    """How lines are answered."""

    batch_size: int = 32
    "Lines that are computed together, where so many are there."
    max_new: int = 64
    "Bytes or tokens that a prompt is continued by."
    temperature: float = 0.0
    "Of the softmax that they are drawn from; 0: always the likeliest."
    seed: int = 0
    "Of what is drawn; each line has random numbers of its own, whatever it is computed with."
    json_lines: bool = False
    "Prompts are JSON strings, so that they may hold newlines; else lines as they stand."


def predict(served: Served, source: Source, name: str, options: PredictOptions) -> Iterator[dict[str, Any]]:
    """One answer for each line that is not blank; `line` is its number.

    Text: prompt, completion, and the steps executed for each byte or token of it. Else: outputs of each time step (0 or 1,
    or a class), the probability that the model gives each of them, and the steps. Raises DataError, naming the line, once
    those before it have been answered.
    """
    for group in groups_of_lines(source, name, options.batch_size):
        parsed: list[tuple[Line, Any]] = []
        refused: DataError | None = None
        for line in group:
            try:
                parsed.append((line, _parsed(served, line, f"{name}, line {line.number}", options)))
            except DataError as error:
                refused = error
                break
        if parsed:
            yield from _answers(served, parsed, options)
        if refused is not None:
            raise refused


def _parsed(served: Served, line: Line, where: str, options: PredictOptions) -> Any:
    if served.unit == "vectors":
        return vectors_of(parse_json(line.text, where), served.model.shape.input_size, where)
    is_json = options.json_lines or served.unit == "ids"
    return prompt_of(served, parse_json(line.text, where) if is_json else line.text, where)


def _answers(served: Served, parsed: list[tuple[Line, Any]], options: PredictOptions) -> Iterator[dict[str, Any]]:
    if served.unit == "vectors":
        answers = _outputs(served, [inputs for _, inputs in parsed])
        yield from ({"line": line.number, **answer} for (line, _), answer in zip(parsed, answers, strict=True))
        return
    drawn_by = [_generator(options.seed, line.number) for line, _ in parsed]
    prompts = [ids for _, ids in parsed]
    for (line, ids), (new, steps) in zip(parsed, _complete(served, prompts, drawn_by, options), strict=True):
        yield {"line": line.number, "prompt": served.text_of(ids), "completion": served.text_of(new), "steps": steps}


def _generator(seed: int, line: int) -> torch.Generator:
    # NOTE: of a seed, torch's generator on the CPU takes 32 bits.
    digest = hashlib.sha256(f"{seed} {line}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))


@torch.no_grad()
def _outputs(served: Served, inputs: list[Tensor]) -> Iterator[dict[str, Any]]:
    lengths = torch.tensor([len(one) for one in inputs])
    logits, stats = served.model(torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True), lengths)
    check_answer(logits)
    answer, probability = judged(logits, served.model.shape.num_classes)
    steps_BT = stats.steps.view(logits.shape[:2])
    for row, length in enumerate(lengths.tolist()):
        parts = {"outputs": answer, "probabilities": probability, "steps": steps_BT}
        yield {name: part[row, :length].tolist() for name, part in parts.items()}


def judged(logits: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The likeliest 0 or 1, or class, of each target, int64 [..., G], and its probability: logits are [..., G x C]."""
    if num_classes == 1:
        return (logits > 0).long(), torch.sigmoid(logits.abs())
    probability, answer = logits.unflatten(-1, (-1, num_classes)).softmax(-1).max(-1)
    return answer, probability


@torch.no_grad()
def _complete(
    served: Served, prompts: list[list[int]], drawn_by: list[torch.Generator], options: PredictOptions
) -> list[tuple[list[int], list[int]]]:
    """What each prompt is continued by, and the steps that each place of it took."""
    reader = Reader(served.model, prompts, options.max_new)
    texts = [list(ids) for ids in prompts]
    steps: list[list[int]] = [[] for _ in texts]
    for _ in range(options.max_new):
        logits, taken = reader.read(texts)
        for row, last in enumerate(logits):
            texts[row].append(_chosen(last, drawn_by[row], options.temperature))
            steps[row].append(taken[row])
    return [(text[len(prompt) :], spent) for text, prompt, spent in zip(texts, prompts, steps, strict=True)]


def _chosen(logits_C: Tensor, drawn_by: torch.Generator, temperature: float) -> int:
    check_answer(logits_C)
    if temperature == 0:
        return int(logits_C.argmax())
    return int(torch.multinomial((logits_C.double() / temperature).softmax(0), 1, generator=drawn_by))
