"""Tokens: the ids on disk, the sizes that follow from them, and what is refused. The tokenizer is a real one."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from distcond.config import Config, DataConfig, ModelConfig
from distcond.config.cost import model_cost
from distcond.config.shape import shape_without
from distcond.data import build_task
from distcond.data.corpus import in_turn
from distcond.data.mixture import Mixture
from distcond.data.tasks import bytes_per_token, open_source, shape_of
from distcond.data.text import TextFile, _open
from distcond.data.tokens import PIECE_BYTES, dtype_of, encoder, vocabulary_of
from distcond.data.windows import ByteTask
from distcond.errors import DataError
from distcond.nn.model import SUMS
from distcond.train.learner import learner_for
from distcond.train.metrics import quality
from tests.data.tokenizer import train_tokenizer
from tests.helpers import HANG_S

LINES = [f"line {number} of weights on trees, über {number % 7}\n" for number in range(6000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    train_tokenizer(folder / "tokenizer.json", "".join(LINES))
    for number in range(6):
        (folder / f"{number}.txt").write_text("".join(LINES[number * 1000 : (number + 1) * 1000]))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line[:-1]}) + "\n" for line in LINES))
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "huggingface"))


def settings(folder: Path, name: str = "text", **more: Any) -> DataConfig:
    given: dict[str, Any] = {"name": name, "tokenizer": str(folder / "tokenizer.json"), "cache_dir": str(folder / "cache")}
    given |= {"text": {"files": [str(folder / "*.txt")]}, "hub": {"path": "json", "files": [str(folder / "rows.jsonl")]}}.get(
        name, {}
    )
    if name == "mixture":
        texts = {"a": {"name": "text", "files": [str(folder / "*.txt")], "weight": 1}}
        given["sources"] = texts | {"b": {"name": "hub", "path": "json", "files": [str(folder / "rows.jsonl")], "weight": 1}}
    return DataConfig(**given | {"context": 16} | more)


@pytest.mark.parametrize("name", ["text", "hub"])
def test_tokens_read_back_are_the_text_as_bytes(name: str, folder: Path) -> None:
    tokens, text = open_source(settings(folder, name)), open_source(settings(folder, name, tokenizer=""))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for split in ("train", "validation"):
        ids = np.frombuffer(getattr(tokens, split).tobytes(), np.uint16)
        assert tokenizer.decode(ids.tolist()).encode() == getattr(text, split).tobytes()
        counts, of_bytes = tokens.manifest[split], text.manifest[split]
        assert counts["tokens"] == len(ids) < counts["bytes"] == of_bytes["bytes"] == of_bytes["tokens"]
        assert counts["documents"] == of_bytes["documents"]
    assert text.folder != tokens.folder


@pytest.mark.parametrize("text", ["one line\r" * 500, "a line\n" + "a long one " * 500])
def test_a_lone_file_that_ends_in_one_long_line_is_refused_with_a_way_out(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "lone.txt").write_bytes(text.encode())
    given = settings(folder, files=[str(tmp_path / "lone.txt")])
    with pytest.raises(DataError, match=r'has 0 tokens .*at the end of a line \("\\n"\).*break it into lines or add') as caught:
        build_task(given)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"lower data\.context"):
        build_task(dataclasses.replace(given, tokenizer="", context=10**6))


def test_long_texts_are_encoded_in_pieces_that_end_with_a_line(folder: Path) -> None:
    encode = encoder(str(folder / "tokenizer.json"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = ("x" * 1000 + "\n") * 200 + "y" * (3 * PIECE_BYTES) + "\nthe end"
    ids = encode(text.encode(), "a")
    assert tokenizer.decode(ids.tolist()) == text
    first = text[: text.rfind("\n", 0, PIECE_BYTES) + 1]
    expected = tokenizer.encode(first).ids
    assert ids[: len(expected)].tolist() == expected


@pytest.mark.parametrize(("vocabulary", "dtype"), [(50, "u1"), (256, "u1"), (257, "u2"), (2**16, "u2"), (2**16 + 1, "u4")])
def test_ids_take_as_few_bytes_as_the_vocabulary_needs(vocabulary: int, dtype: str) -> None:
    assert dtype_of(vocabulary) == np.dtype(dtype)


def test_special_tokens_truncation_and_padding_of_the_file_leave_the_text_alone(folder: Path, tmp_path: Path) -> None:
    file = train_tokenizer(tmp_path / "t.json", "".join(LINES), special=("<s>",))
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(file))
    ids = encoder(str(file))(LINES[0].encode(), "a")
    assert tokenizers.Tokenizer.from_file(str(file)).decode(ids.tolist(), skip_special_tokens=False) == LINES[0]


@pytest.mark.parametrize("model", ["transformer", "mlp", "rnn"])
@pytest.mark.parametrize("name", ["text", "mixture"])
def test_the_model_has_the_sizes_of_the_vocabulary(model: str, name: str, folder: Path) -> None:
    config = Config(model=ModelConfig(name=model, width=16), data=settings(folder, name))
    task = build_task(config.data)
    vocabulary = vocabulary_of(config.data.tokenizer)
    assert (task.input_size, task.output_size, task.num_classes) == (vocabulary,) * 3 == (300,) * 3
    assert shape_of(config.data) == shape_without(task)
    learner = learner_for(config, task)
    cost = model_cost(config.model, is_text=True, input_size=vocabulary, output_size=vocabulary, length=16)
    assert sum(parameter.numel() for parameter in learner.parameters()) == cost.dense_parameters
    batch = task.rows(0, 0, 4)
    assert batch.inputs.dtype == np.int32 and int(batch.inputs.max()) > 255 and batch.global_count == 4 * 16
    assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    loss, sums = learner(*(torch.from_numpy(part) for part in (batch.inputs, batch.targets, batch.lengths)))
    loss.backward()
    assert torch.isfinite(sums).all()


def test_bits_per_byte_of_a_uniform_guess_are_those_of_the_tokens_over_the_bytes(folder: Path) -> None:
    """log2(300) bits a token, spread over the bytes of the held-out text."""
    config = settings(folder)
    task = build_task(config)
    counts = open_source(config).manifest["validation"]
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    sums[SUMS.index("elements")] = counts["tokens"]
    sums[SUMS.index("nll")] = counts["tokens"] * math.log(300)
    figure = quality(sums, is_text=True, prefix="val", bytes_per_token=bytes_per_token(task, "validation"))["val/bpb"]
    text = open_source(settings(folder, tokenizer="")).validation
    assert figure == pytest.approx(counts["tokens"] * math.log2(300) / len(text), rel=1e-12)
    assert bytes_per_token(build_task(settings(folder, tokenizer="")), "validation") == 1.0


def test_bytes_per_token_of_a_mixture_are_the_mean_over_its_rows(folder: Path) -> None:
    task = build_task(settings(folder, "mixture"))
    assert isinstance(task, Mixture)
    parts = [part.bytes_per_token("validation") for part in task.tasks]
    assert parts[0] != parts[1] and task.bytes_per_token("validation") == pytest.approx(sum(parts) / 2, rel=1e-12)


@pytest.mark.thorough
def test_python_without_the_library_is_told_what_to_install(folder: Path) -> None:
    code = f"""
import sys
sys.modules["tokenizers"] = None
from distcond.cli import main
sys.exit(main(["train", "--dry-run", "data.tokenizer={folder}/tokenizer.json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "distcond: error: data.tokenizer needs the tokenizers library; run: pip install 'distcond[tokenizers]'\n"
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, r"none\.json cannot be read \(No such file"), ("{}", "is no tokenizer"), ("no json", "is no tokenizer")],
)
def test_a_file_that_is_no_tokenizer_is_refused(content: str | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "none.json").write_text(content)
    with pytest.raises(DataError, match=told) as caught:
        vocabulary_of(str(tmp_path / "none.json"))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf_8_is_named_and_nothing_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good\n" * 100)
    (tmp_path / "bad.txt").write_bytes(b"good\n" * 100 + b"caf\xe9\n")
    config = settings(folder, files=[str(tmp_path / "*.txt")], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"data\.tokenizer reads UTF-8, which bad\.txt is not .*caf\\xe9") as caught:
        open_source(config)
    assert "\n" not in str(caught.value) and list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_a_window_longer_than_the_text_counts_in_tokens(folder: Path) -> None:
    with pytest.raises(DataError, match=r"has \d+ tokens of .* text"):
        build_task(settings(folder, context=10**6))


def test_stdlib_has_tokens_too_though_some_of_its_files_are_not_utf_8(folder: Path) -> None:
    encode = encoder(str(folder / "tokenizer.json"), "replace")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(encode(b"caf\xe9 \xc3\xbc\n", "a").tolist()) == "caf\ufffd ü\n"
    small = [TextFile("a", str(folder / "bad"), 5, 0), TextFile("b", str(folder / "0.txt"), 1000, 0)]
    (folder / "bad").write_bytes(b"\xff\xff\n\n\n")
    corpus = _open("stdlib", small, settings(folder, "stdlib"), in_turn)
    assert {corpus.manifest[split]["bytes"] for split in ("train", "validation")} == {5, 1000}


def test_another_tokenizer_is_another_corpus(folder: Path, tmp_path: Path) -> None:
    other = train_tokenizer(tmp_path / "other.json", "".join(LINES), vocabulary=280)
    one, two = build_task(settings(folder)), build_task(settings(folder, tokenizer=str(other)))
    assert isinstance(one, ByteTask) and one.fingerprint()["tokenizer"] != two.fingerprint()["tokenizer"] != ""
    assert two.input_size == 280
