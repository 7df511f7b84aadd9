"""Random and mutated configurations for tests/test_fuzz.py: command lines, and the files that they read."""

import math
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import yaml  # type: ignore[import-untyped]

from distcond.compose import _types, compose, to_dict, to_yaml
from distcond.config import Config

SEED = 1406_7362
NUM_EACH = 900
"Random cases of each kind."

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
