"""Which tasks there are, and what every one of them can do."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from distcond.config import TEXTS, DataConfig, DataName
from distcond.config.plugins import call, refusal
from distcond.config.shape import Shape, TaskShape, shape_without
from distcond.data.addition import addition
from distcond.data.batch import Batch
from distcond.data.corpus import Corpus, Run, in_turn
from distcond.data.generated import GeneratedTask
from distcond.data.graves import logic, parity
from distcond.data.hub import hub_files, open_hub
from distcond.data.mixture import Mixture, allotted
from distcond.data.sort import sort
from distcond.data.text import BUILDERS, local_files, open_stdlib, open_text
from distcond.data.tokens import vocabulary_of
from distcond.data.windows import ByteTask


class Task(Shape, Protocol):
    """Examples addressed by index: what a row is depends on the arguments alone, never on what was asked before."""

    def rows(self, seed: int, step: int, size: int, part: slice = slice(None)) -> Batch:
        """Rows `part` of the global batch `step`, which has `size` rows."""

    def validation_rows(self, start: int, size: int) -> Batch:
        """Rows start..start+size of the fixed validation set."""

    def fingerprint(self) -> dict[str, Any]:
        """What the data is, as JSON, for `environment.json`."""


TextTask = ByteTask | Mixture

GENERATED: dict[str, Callable[[DataConfig], GeneratedTask]] = {
    DataName.parity: lambda config: parity(
        config.num_bits,
        scattered=config.scattered,
        set_bits=config.set_bits,
        validation_set_bits=config.validation_set_bits,
        one_hot=config.one_hot,
        uniform_ones=config.uniform_ones,
    ),
    DataName.logic: lambda config: logic(config.max_length, config.max_gates),
    DataName.addition: lambda config: addition(config.max_length, config.max_digits),
    DataName.sort: lambda config: sort(config.max_length),
}
"The tasks that need no files."


def build_task(config: DataConfig) -> Task:
    """The task that `data.name` names; a text is prepared on first use and opened at once later.

    Raises DataError if there is no text, or too little, and ConfigError if the task of another package fails.
    """
    if config.name not in {*DataName}:
        return _entry_point(config)
    if config.name in GENERATED:
        return GENERATED[config.name](config)
    if config.name != DataName.mixture:
        return ByteTask(open_source(config), config.context, config.validation_examples)
    parts = config.parts()
    shares = np.array([share for share, _ in parts.values()])
    counts = allotted(shares, config.validation_examples)
    texts = [text for _, text in parts.values()]
    tasks = [ByteTask(open_source(text), text.context, count) for text, count in zip(texts, counts, strict=True)]
    return Mixture(list(parts), shares, tasks)


def bytes_per_token(task: Task, split: str) -> float:
    """Bytes of text that an element of a text stands for, so that bits can be told per byte; 1 for bytes and vectors."""
    return task.bytes_per_token(split) if isinstance(task, TextTask) else 1.0


def texts_of(config: DataConfig) -> list[DataConfig]:
    """The texts that are read: those of a mixture, or this one; none where examples are generated."""
    if config.name == DataName.mixture:
        return [text for _, text in config.parts().values()]
    return [config] if config.name in TEXTS else []


def check_files(config: DataConfig) -> None:
    """Look for the local files of all texts, and open none. Raises DataError as `open_source` does where there are none."""
    for text in texts_of(config):
        if text.name == DataName.text:
            local_files(text.files)
        elif text.name == DataName.hub and text.path in BUILDERS:  # of a folder, which is there, all files would be looked up
            hub_files(text)


def open_source(config: DataConfig, run: Run = in_turn) -> Corpus:
    """The corpus that `data.name` names, prepared by `run` on first use. Raises DataError as `open_corpus` does."""
    match config.name:
        case DataName.stdlib:
            return open_stdlib(config, run)
        case DataName.text:
            return open_text(config, run)
        case _:
            return open_hub(config, run)


def shape_of(config: DataConfig) -> TaskShape:
    """The shape of the task that `data.name` names; no text is opened."""
    if config.name in TEXTS:
        vocabulary = vocabulary_of(config.tokenizer)
        return TaskShape("bytes", vocabulary, vocabulary, vocabulary, config.context)
    key = repr(config)
    if key not in _SHAPES:
        _SHAPES[key] = shape_without(build_task(config))
    return _SHAPES[key]


_SHAPES: dict[str, TaskShape] = {}
"Of configurations that were asked for: tasks of other packages may take long to open."


def _entry_point(config: DataConfig) -> Task:
    """The task of another package, after a look at what it is and at a row of it."""
    task: Task = call("data", config.name, config)
    try:
        fault = _fault(task)
    except Exception as error:
        raise refusal("data", config.name, f"returned {type(task).__name__}: {type(error).__name__}: {error}") from error
    if fault:
        raise refusal("data", config.name, f"returned {type(task).__name__}: {fault}")
    return task


def _fault(task: Task) -> str:
    """What is wrong with a task, if anything. Whatever it lacks raises AttributeError."""
    shape = shape_without(task)
    if shape.kind not in {"bytes", "vectors"}:
        return f"its kind is {shape.kind!r}; needed is bytes or vectors"
    if shape.kind == "bytes" and not shape.input_size == shape.output_size == shape.num_classes >= 2:
        return f"{shape} is no task of bytes or tokens, whose three sizes are one: 256, or the vocabulary"
    if min(shape.input_size, shape.output_size, shape.num_classes, shape.max_length) < 1:
        return f"{shape} has a size below 1"
    if shape.output_size % shape.num_classes:
        return f"num_classes={shape.num_classes} does not divide output_size={shape.output_size}"
    task.fingerprint()
    for rows in (task.rows(0, 0, 2, slice(1, 2)), task.validation_rows(0, 1)):
        if fault := _row_fault(rows, shape):
            return fault
    return ""


def _row_fault(rows: Batch, shape: TaskShape) -> str:
    is_text, length = shape.kind == "bytes", shape.max_length
    ids = np.uint8 if shape.input_size <= 256 else np.int32
    groups, kind = (
        (shape.output_size, np.float32) if shape.num_classes == 1 else (shape.output_size // shape.num_classes, np.int64)
    )
    needed: dict[str, tuple[tuple[int, ...], type]] = {
        "inputs": ((1, length), ids) if is_text else ((1, length, shape.input_size), np.float32),
        "targets": ((1, length), ids) if is_text else ((1, length, groups), kind),
        "lengths": ((1,), np.int64),
    }
    for name, (size, dtype) in needed.items():
        array = getattr(rows, name)
        if array.shape != size or array.dtype != dtype:
            return f"one row has {name} {array.dtype}{list(array.shape)}; needed is {np.dtype(dtype)}{list(size)}"
    return ""
