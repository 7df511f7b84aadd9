"""Random and mutated configurations through the real command line: a valid run, or exit status 2 and one line; no hang.

`pytest -m slow tests/test_fuzz.py` runs all of NUM_CASES, the default run every 60th and all DOCUMENTS.
"""

import math
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from distcond.cli import main
from distcond.compose import _types, compose, load_config, to_dict, to_yaml
from distcond.config import Config

ROOT = Path(__file__).parents[1]
SEED = 1406_7362
LIMIT_S = 10
"Processor time of one case; most take 0.05 s, the first one 2 s of imports."
NUM_EACH = 900
"Random cases of each kind."
QUICK = 60
"The default run takes every case whose number this divides."

LONG = "x" * 100_000
TEXTS = [
    *(
        "",
        " ",
        "null",
        "~",
        "true",
        "off",
        "0x10",
        "1_000",
        "1e3",
        "2020-01-01",
        "é",
        "\u202e",
        "\udcff",
        "\0",
        "\x1b[2J",
        "\n",
        "\t",
    ),
    *("${seed}", "${nope}", "${run.name}", "${", "${}", "${a.b.c}", "$${seed}", "\\${seed}", "${${run.name}}", "${..seed}"),
    *("${oc.env:HOME}", "${oc.env:NOPE,x}", "${oc.decode:'1'}", "${oc.select:seed}", "${oc.create:{a:1}}", "${nope:1}"),
    *("${now:%Y}", "${hydra:runtime.cwd}", "${oc.dict.keys:model}", "${eval:1}", "${python_version:}", "${oc.${run.name}:x}"),
    *(
        "/",
        "..",
        "../..",
        "a/b",
        "~root",
        "http://[",
        "https://u:p@h:1/",
        "'",
        '"',
        "[",
        "]",
        "{",
        "}",
        ",",
        "=",
        ":",
        "#",
        "*",
        "&a",
    ),
    *("!!python/object/apply:os.system [x]", "@", "%s", "{0}", "[bold]", LONG),
]
NUMBERS = [0, -1, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 10**400]
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308]
VALUES: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [1, 2],
    {"a": 1},
    {"_target_": "os.abort"},
    {1: 2},
    {"a.b": {"[0]": None}},
]
VALUES += [[1] * 1000, {"name": {}}, b"bytes", *TEXTS, *NUMBERS, *FLOATS]
PIECES = [
    "${seed}",
    "${",
    "}",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    ",",
    ":",
    "=",
    "\\",
    "&a",
    "*a",
    "<<",
    "!!",
    "-",
    "- ",
    "\n",
    "\t",
    "~",
    "+",
]
PIECES += [
    "null",
    "1e400",
    "nan",
    ".inf",
    "9" * 30,
    "\0",
    "\u2028",
    "ÿ",
    "?",
    "|",
    ">",
    "%",
    "@",
    "`",
    "#",
    "\r",
    "\x85",
    "..",
    "hydra",
]

LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
DOCUMENTS = [
    *("", "\0", "---\n---\n", "- 1\n", "3\n", "x\n", "null\n", "a: &a [*a]\n", "&a a: *a\n", "<<: &a {<<: *a}\n", "? [1]\n: 2\n"),
    *("seed: 1\nseed: 2\n", "seed: !!python/object/apply:os.getpid []\n", "run: !!python/name:os.abort\n", "seed: !!int x\n"),
    *("run: !!python/object:distcond.config.RunConfig {name: a}\n", "seed: !!binary x\n", "seed: !unknown 1\n", "!!set {seed}\n"),
    *(
        "seed: !!python/object/apply:pathlib.PosixPath [a]\n",
        "run:\n  name: !!python/object/apply:pathlib.Path [a]\n",
        "%YAML 3.0\n---\n",
    ),
    *("a0: &a0 [x]\n" + LAUGHS, "data: {files: &f [*f]}\n", "optim: {deepspeed: &d {a: *d}}\n", "sweep: &s {space: *s}\n"),
    *(
        "[" * 5000,
        "{a: " * 5000,
        "run: " + "[" * 3000 + "]" * 3000,
        "a:\n" * 3000,
        "optim: {deepspeed: " + "{a: " * 300 + "1" + "}" * 302,
    ),
    *(
        "ï»¿seed: 1\n",
        "seed: 1\n...\nseed: 2\n",
        "é: 1\n",
        "'a.b': 1\n",
        "'[0]': 1\n",
        "model.tree: {depth: 1}\n",
        "1: 2\n",
        "true: 1\n",
    ),
    *("null: 1\n", "seed: 1e400\n", "optim: {lr: 1e400}\n", f"seed: {'9' * 5000}\n", f"run: {{name: {LONG}}}\n", f"{LONG}: 1\n"),
    *(
        "defaults: [nope]\n",
        "defaults: 1\n",
        "defaults: [{a: {b: c}}]\n",
        "defaults:\n  - ${oc.env:HOME}\n",
        "hydra: {run: {dir: x}}\n",
    ),
    *(
        "run: {name: '${run.name}'}\n",
        "run: {name: '${run.dir}', dir: '${run.name}'}\n",
        "seed: ${train}\n",
        "run: ${model}\n",
        "model: ${.}\n",
    ),
    *(
        "_target_: os.abort\n",
        "model: {_target_: os.abort}\n",
        "data: {files: ['${data.files}']}\n",
        "data: {files: '${data.files}'}\n",
    ),
]


@dataclass(frozen=True)
class Case:
    """A command line after `distcond train --dry-run`, and the files that it reads; {here} is their folder."""

    argv: list[str]
    files: dict[str, bytes] = field(default_factory=dict)


def key_case(number: int) -> Case:
    """One key with one value, in a resolved file: the wrong types of sections among them."""
    key, value = list(_types())[number // len(VALUES)], VALUES[number % len(VALUES)]
    values = to_dict(Config())
    *path, last = key.split(".")
    section: Any = values
    for name in path:
        section = section[name]
    section[last] = value
    return file_case(yaml.dump(values).encode("utf-8", "surrogatepass"))


def file_case(text: bytes) -> Case:
    return Case(["--config", "{here}/config.yaml"], {"config.yaml": text})


def override_case(generator: random.Random) -> Case:
    """Words of a command line."""
    keys = [
        *_types(),
        "model",
        "data",
        "optim",
        "cluster",
        "experiment",
        "sweep",
        "nope",
        "model.nope",
        "data@x",
        "hydra.run.dir",
    ]
    words = [*VALUES, "rnn", "parity", "act", "lazy", "[1,2]", "{a:1}", "a,b", "range(3)", "glob(*)", "choice(a,b)"]
    lines = []
    for _ in range(generator.randint(1, 3)):
        key, value = generator.choice(keys), generator.choice(words)
        text = value if isinstance(value, str) else str(value).replace("None", "null")
        before, between = generator.choice(["", "", "", "+", "++", "~", "-"]), generator.choice(["=", "=", "=", "", "@"])
        line = f"{before}{key}{between}{text}".encode("utf-8", "surrogateescape")
        lines.append(mutated(generator, line) if generator.random() < 0.4 else line)
    # As the shell would hand them on: no NUL, and bytes that are no text as surrogates. An option is another matter.
    return Case([line.replace(b"\0", b"0").decode("utf-8", "surrogateescape").lstrip("-") for line in lines])


def mutated_file_case(generator: random.Random) -> Case:
    """A resolved file with bytes changed, or lines repeated, moved or cut."""
    return file_case(mutated(generator, generator.choice(bases()).encode()))


def group_case(generator: random.Random) -> Case:
    """A file of one's own, chosen through --config-dir."""
    group = generator.choice(["model", "data", "optim", "cluster", "sweep", "experiment"])
    values = yaml.safe_load(generator.choice(bases()))
    section = values if group == "experiment" else values[group]
    chosen = {name: section[name] for name in generator.sample(sorted(section), generator.randint(0, len(section)))}
    if generator.random() < 0.7:
        chosen[generator.choice([*section, "defaults", "hydra", "_target_", "nope", "a.b", "é", 1])] = generator.choice(VALUES)
    text = yaml.dump(chosen, allow_unicode=True).encode("utf-8", "surrogatepass")
    if generator.random() < 0.1:
        text = generator.choice(DOCUMENTS).encode()
    if group == "experiment":
        text = b"# @package _global_\n" + text
    if generator.random() < 0.5:
        text = mutated(generator, text)
    return Case(["--config-dir", "{here}", f"{group}=mine"], {f"{group}/mine.yaml": text})


def mutated(generator: random.Random, text: bytes) -> bytes:
    """Some bytes or lines of a text changed."""
    data = bytearray(text)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(data) + 1)
        match generator.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << generator.randrange(8)
            case 1:
                del data[place : place + generator.choice([1, 1, 5, 200])]
            case 2:
                data[place:place] = generator.randbytes(generator.randint(1, 3))
            case 3 | 4:
                data[place:place] = generator.choice(PIECES).encode()
            case _:
                lines = data.split(b"\n")
                lines.insert(generator.randrange(len(lines)), generator.choice(lines))
                data = bytearray(b"\n".join(lines))
    return bytes(data)


@cache
def bases() -> list[str]:
    """Texts of valid files."""
    words: list[list[str]] = [[], ["model=rnn", "data=parity"], ["experiment=graves_sort"], ["sweep=depth_x_penalty"]]
    return [to_yaml(compose(some)) for some in words]


RANDOM = (override_case, mutated_file_case, group_case)
NUM_KEYS = len(_types()) * len(VALUES)
NUM_CASES = len(DOCUMENTS) + NUM_KEYS + NUM_EACH * len(RANDOM)


def case_of(number: int) -> Case:
    """The same in every process: the documents above, every key with every value, then random ones."""
    if number < len(DOCUMENTS):
        return file_case(DOCUMENTS[number].encode("utf-8", "surrogatepass"))
    number -= len(DOCUMENTS)
    if number < NUM_KEYS:
        return key_case(number)
    return RANDOM[number % len(RANDOM)](random.Random(f"{SEED}/{number}"))


class Hang(BaseException):
    """Not an Exception, so that the command line cannot take it for a failure of its own."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise Hang after so many seconds of processor time, or twelve times as many of any."""

    def stop(number: int, frame: object) -> None:
        raise Hang

    limits = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 12 * seconds)}
    before = {number: signal.signal(number, stop) for number in limits}
    for timer, limit in limits.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in limits.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def written(case: Case, folder: Path) -> list[str]:
    """The arguments of a case whose files have been written."""
    for name, data in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return ["train", "--dry-run", *(word.replace("{here}", str(folder)) if "{here}" in word else word for word in case.argv)]


def complaint(status: int, out: str, err: str, folder: Path) -> str:
    """What is wrong about an answer; empty: nothing."""
    if status == 2:
        is_one_line = (
            err.startswith("distcond: error: ") and err.count("\n") == 1 and err.endswith("\n") and err.rstrip("\n").isprintable()
        )
        return "" if is_one_line and not out else "status 2, but not one line"
    if status != 0 or err:
        return f"status {status}"
    shown = folder / "shown.yaml"
    shown.write_text(out.partition("\ndense parameters ")[0])
    again = to_dict(load_config(shown))
    return "" if again == yaml.safe_load(shown.read_text()) else "what is shown is not what is read back"


def check(number: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Put a case to the command line; returns the exit status."""
    case = case_of(number)
    (folder / str(number)).mkdir()
    argv = written(case, folder / str(number))
    try:
        with time_limit(LIMIT_S):
            status = main(argv)
    except Hang:
        pytest.fail(f"case {number} takes longer than {LIMIT_S} s: {argv}")
    told = complaint(status, *capsys.readouterr(), folder / str(number))
    assert not told, f"case {number}: {told}: {argv}"
    return status


def check_all(numbers: range, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the cases fails, hangs or leaves a file behind, and there is something of either kind among them."""
    monkeypatch.chdir(tmp_path)
    for name in ("files", "work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    statuses = Counter(check(number, tmp_path / "files", capsys) for number in numbers)
    assert min(statuses[0], statuses[2]) > len(numbers) / 20
    assert not [*(tmp_path / "work").iterdir(), *(tmp_path / "temporary").iterdir()]


def test_a_configuration_is_run_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_all(range(0, NUM_CASES, QUICK), tmp_path, capsys, monkeypatch)


@pytest.mark.slow
def test_any_configuration_is_run_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_all(range(NUM_CASES), tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("number", range(len(DOCUMENTS)))
def test_a_document_that_is_no_run_is_told_in_one_line(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(number, tmp_path, capsys)


@pytest.mark.parametrize("number", [NUM_CASES - 1, NUM_CASES - 2, NUM_CASES - 3])
def test_a_process_of_its_own_answers_alike(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = written(case_of(number), tmp_path)
    command = [sys.executable, "-m", "distcond", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert not complaint(done.returncode, done.stdout, done.stderr, tmp_path)
    assert (main(argv), *capsys.readouterr()) == (done.returncode, done.stdout, done.stderr)
