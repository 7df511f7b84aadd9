"""distcond predict: an answer a line, in order, whatever is computed together; and lines that cannot be answered."""

import copy
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distcond.cli import main
from distcond.config import Config
from distcond.config.shape import TaskShape
from distcond.data.tokens import vocabulary_of
from distcond.deploy.explain import explain_position, question_of
from distcond.deploy.export import ExportOptions, write_model
from distcond.deploy.predict import PredictOptions, predict
from distcond.deploy.reader import Reader
from distcond.deploy.served import Served, serve
from distcond.errors import DataError, RunError
from tests.data.tokenizer import train_tokenizer
from tests.deploy.models import VECTORS, inputs_for, model_config, random_model

PROMPTS = ["def main(", "x", "a prompt that is longer than the context", "über", "", "x"]


@pytest.fixture(scope="module")
def text() -> Served:
    return Served(random_model(model_config("transformer", "act")), "bytes")


@pytest.fixture(scope="module")
def vectors() -> Served:
    return Served(random_model(model_config("rnn", "act"), VECTORS), "vectors")


def answers(served: Served, lines: list[str], **options: Any) -> list[dict[str, Any]]:
    source = io.BytesIO("\n".join(lines).encode())
    return list(predict(served, source, "here", PredictOptions(**options)))


@pytest.mark.parametrize("max_new", [3, 17])  # the context is of 12
def test_a_prompt_is_continued_by_the_likeliest_bytes(text: Served, max_new: int) -> None:
    for answer, prompt in zip(answers(text, PROMPTS, max_new=max_new), filter(None, PROMPTS), strict=True):
        ids, steps = list(prompt.encode()), []
        for _ in range(max_new):
            logits, stats = text.model(torch.tensor([ids[-12:]]))
            ids.append(int(logits[0, -1].argmax()))
            steps.append(int(stats.steps[-1]))
        completion = bytes(ids[len(prompt.encode()) :]).decode("utf-8", "replace")
        assert answer["prompt"] == prompt
        assert (answer["completion"], answer["steps"]) == (completion, steps)


@pytest.mark.parametrize("name", ["transformer", "mlp"])
@pytest.mark.parametrize("halting", ["none", "act", "ponder", "fixed"])
def test_a_reader_says_what_the_model_says_of_the_whole_window(name: str, halting: str) -> None:
    model = random_model(model_config(name, halting, tree__num_trees=2))
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(256, (size,), generator=random).tolist() for size in (1, 5, 11, 12, 13)]
    reader, windows = Reader(model, texts, 9), list[int]()
    handle = model.body.register_forward_pre_hook(lambda body, given: windows.append(len(given[0])))
    for _ in range(9):
        windows.clear()
        logits, steps = reader.read(texts)
        assert windows == [sum(len(text) > 12 for text in texts)] or name == "mlp"
        for text, said, taken in zip(texts, logits, steps, strict=True):
            expected, stats = model(torch.tensor([text[-12:]]))
            # fp32: other numbers of rows in a product, logits of size 1, at most 4 steps.
            torch.testing.assert_close(said, expected[0, -1], rtol=0, atol=1e-5)
            assert taken == int(stats.steps[-1])
            text.append(int(torch.randint(256, (), generator=random)))
    handle.remove()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_depend_on_their_line_alone(text: Served, temperature: float) -> None:
    options = {"max_new": 3, "temperature": temperature, "seed": 3}
    one, together = (answers(text, PROMPTS, batch_size=size, **options) for size in (1, 4))
    assert one == together
    assert [answer["line"] for answer in one] == [1, 2, 3, 4, 6]
    assert (one[1]["completion"] == one[4]["completion"]) == (temperature == 0)  # the same prompt, drawn anew
    other = answers(text, PROMPTS, **{**options, "seed": 4})
    assert (one == other) == (temperature == 0)


def test_drawn_bytes_follow_the_softmax_at_the_temperature(text: Served) -> None:
    logits, _ = text.model(torch.tensor([list(b"ab")]))
    expected = (logits[0, -1].double() / 0.2).softmax(0)
    found = answers(text, ["ab"] * 2000, max_new=1, temperature=0.2, batch_size=500)
    best = int(expected[:128].argmax())
    share = sum(answer["completion"] == chr(best) for answer in found) / 2000
    # Four standard deviations of a share.
    assert share == pytest.approx(float(expected[best]), abs=4 * (0.25 / 2000) ** 0.5)


def test_json_lines_may_hold_newlines(text: Served) -> None:
    (answer,) = answers(text, [json.dumps("a\nb")], json_lines=True, max_new=3)
    assert answer["prompt"] == "a\nb" and len(answer["steps"]) == 3


def test_ids_without_a_text_are_lists(tmp_path: Path) -> None:
    served = Served(random_model(model_config("mlp", "none"), TaskShape("bytes", 10, 10, 10, 6)), "ids")
    (answer,) = answers(served, ["[1, 2, 9]"], max_new=4)
    assert answer["prompt"] == [1, 2, 9] and len(answer["completion"]) == 4 and max(answer["completion"]) < 10
    with pytest.raises(DataError, match="here, line 1: needed is a list of ids, each from 0 to 9"):
        answers(served, ["[1, 10]"])


def test_vectors_are_answered_by_classes_probabilities_and_steps(vectors: Served) -> None:
    inputs, lengths = inputs_for(VECTORS)
    logits, stats = vectors.model(inputs, lengths)
    lines = [json.dumps({"inputs": row[:length].tolist()}) for row, length in zip(inputs, lengths.tolist(), strict=True)]
    probability = logits.view(*logits.shape[:2], 2, 3).softmax(-1)
    for row, answer in enumerate(answers(vectors, lines, batch_size=4)):
        length = int(lengths[row])
        assert answer["outputs"] == probability[row, :length].argmax(-1).tolist()
        assert answer["steps"] == stats.steps.view(6, 4)[row, :length].tolist()
        torch.testing.assert_close(torch.tensor(answer["probabilities"]), probability[row, :length].amax(-1))


def test_one_vector_is_a_sequence_of_one_and_binary_targets_are_0_or_1() -> None:
    served = Served(random_model(model_config("mlp", "fixed"), TaskShape("vectors", 3, 2, 1, 1)), "vectors")
    logits, _ = served.model(torch.tensor([[[1.0, 0.0, -1.0]]]))
    (answer,) = answers(served, ["[1, 0, -1]"])
    assert answer["outputs"] == [(logits[0, 0] > 0).int().tolist()] and answer["steps"] == [4]
    expected = torch.where(logits > 0, logits.sigmoid(), 1 - logits.sigmoid())[0, 0]
    torch.testing.assert_close(torch.tensor(answer["probabilities"][0]), expected)


class Typist:
    """A source that gives a piece at a time, and notes when."""

    def __init__(self, pieces: list[bytes], events: list[str]) -> None:
        self.pieces, self.events = pieces, events

    def read1(self, size: int, /) -> bytes:
        self.events.append("read")
        return self.pieces.pop(0) if self.pieces else b""


def test_a_line_is_answered_before_the_next_one_is_read(text: Served) -> None:
    events: list[str] = []
    for answer in predict(text, Typist([b"one\ntw", b"o\n", b"three"], events), "here", PredictOptions(max_new=1)):
        events.append(answer["prompt"])
    assert events == ["read", "one", "read", "two", "read", "read", "three"]


@pytest.mark.parametrize(
    ("lines", "told", "answered"),
    [
        (b"", "standard input is empty; give a line", 0),
        (b"\n \n", "standard input is empty", 0),
        (b"a\nb\xff\nc", "line 2 is not UTF-8 (invalid start byte, byte 1)", 1),
        (b"a\nb\nc\0", "line 3 is binary (byte 1 is 0)", 2),
        (b"a\n" + b"x" * (2**20 + 1), "line 2 has more than 1,048,576 bytes", 1),
    ],
)
def test_text_that_cannot_be_answered_is_one_line_after_the_answers_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text_run: Config, lines: bytes, told: str, answered: int
) -> None:
    err, out = refused(capsys, monkeypatch, lines, "predict", str(Path(text_run.run.dir) / "run"), "--max-new", "1")
    assert told in err and out.count("\n") == answered


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1, 2", "here, line 1 is no JSON"),
        ("[" * 100000, "here, line 1 is no JSON"),
        ("[1, 2]", "time step 0 is 2 values; needed is a vector of 5 finite numbers"),
        ("[[1, 2, 3, 4, 5], [1, 2, 3, 4, true]]", "time step 1 is 5 values; needed is a vector of 5 finite numbers"),
        ("[1, 2, 3, 4, NaN]", "NaN is no number"),
        ("[1, 2, 3, 4, 1e999]", "needed is a vector of 5 finite numbers"),
        (f"[1, 2, 3, 4, {10**400}]", "needed is a vector of 5 finite numbers"),
        ("[[1, 2, 3, 4, 5], 6]", "time step 1 is 6"),
        ('{"input": []}', "needed is a vector of 5 numbers, or a list of such"),
        ("[]", "needed is a vector of 5 numbers, or a list of such"),
    ],
)
def test_a_vector_that_is_none_is_named(vectors: Served, line: str, told: str) -> None:
    with pytest.raises(DataError) as error:
        answers(vectors, [line])
    assert told in str(error.value)


@pytest.mark.parametrize(("line", "told"), [("abc", "is no JSON"), ("[1]", "needed is a text"), ('"\\ud800"', "is no text")])
def test_a_prompt_that_is_no_json_text_is_named(text: Served, line: str, told: str) -> None:
    with pytest.raises(DataError, match=f"here, line 2.*{told}"):
        answers(text, ['"a"', line], json_lines=True, max_new=1)


def test_a_model_that_answers_nan_is_told(text: Served, vectors: Served) -> None:
    told = r"the model answers with numbers that are NaN or infinite; use an earlier checkpoint \(--step N\), or train"
    for served, line, options in ((text, "a", {"temperature": 1.0}), (text, "a", {}), (vectors, "[1, 2, 3, 4, 5]", {})):
        broken = copy.deepcopy(served)
        for parameter in broken.model.body.head.parameters():
            parameter.data.fill_(math.nan)
        with pytest.raises(RunError, match=told):
            answers(broken, [line], **options)
        with pytest.raises(RunError, match=told):
            explain_position(broken, question_of(broken, line, None))


def test_a_file_of_100_mb_is_refused_before_it_is_read_as_a_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text_run: Config, tmp_path: Path
) -> None:
    run = str(Path(text_run.run.dir) / "run")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(100 * 2**20)  # zeros, which take no room
    for verb in (["predict", run, str(tmp_path / "huge")], ["explain", run, "--input", str(tmp_path / "huge")]):
        err, out = refused(capsys, monkeypatch, b"", *verb)
        assert "huge" in err and "1,048,576" in err and out == ""


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("predict", "required: DIR|RUN"),
        ("predict no/such", "no/such is neither a run"),
        ("predict {run} no/file", "no/file is no file"),
        ("predict {run} --batch-size 0", "0 is no number from 1 on"),
        ("predict {run} --temperature hot", "hot is no number above 0"),
        ("predict {run} --step 7", "has no checkpoint of step 7"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text_run: Config, argv: str, told: str
) -> None:
    assert told in refused(capsys, monkeypatch, b"", *argv.format(run=Path(text_run.run.dir) / "run").split())[0]


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: bytes, *argv: str) -> tuple[str, str]:
    """The line that says why, and what was answered before."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(given))))  # type: ignore[arg-type]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("distcond: error: ") and err.count("\n") == 1
    return err, out


def test_a_run_answers_like_its_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text_run: Config, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(Path(text_run.run.dir) / "run")
    Path("prompts").write_text("the deep\ntree\n")
    answered: list[list[str]] = []
    make: list[Callable[[], int]] = [
        lambda: main(["predict", run, "prompts", "--max-new", "4", "--batch-size", "1"]),
        lambda: main(["export", run, "--out", "model"]),
        lambda: main(["predict", "model", "prompts", "--max-new", "4"]),
    ]
    for call in make:
        assert call() == 0
        answered.append(capsys.readouterr().out.splitlines())
    assert answered[0] == answered[2] and [json.loads(line)["prompt"] for line in answered[0]] == ["the deep", "tree"]


def test_tokens_are_texts_again_and_their_tokenizer_is_exported(tmp_path: Path) -> None:
    file = train_tokenizer(tmp_path / "mine.json", "the deep node of a deep tree " * 20)
    size = vocabulary_of(str(file))
    config = model_config("mlp", "none")
    model = random_model(config, TaskShape("bytes", size, size, size, 6))
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", model, config, ExportOptions(), {}, str(file))
    file.unlink()
    served = serve(tmp_path / "out")
    prompt = "the deep node "
    ids = served.ids_of(prompt)
    assert len(ids) < len(prompt) and served.text_of(ids) == prompt
    (answer,) = answers(served, [prompt], max_new=1)
    logits, _ = model(torch.tensor([ids[-6:]]))
    assert answer["completion"] == served.text_of([int(logits[0, -1].argmax())]) and answer["prompt"] == prompt
