"""Configuration of the data."""

from dataclasses import dataclass, field, replace
from typing import Any

from distcond.config.check import need
from distcond.config.choices import DataName
from distcond.config.mixture import checked_sources
from distcond.config.plugins import check_name
from distcond.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where examples come from. The global batch of step t is a pure function of (seed, t)."""

    name: str = DataName.stdlib.value
    """stdlib: Python's own sources. text: local files. hub: a Hugging Face data set. mixture: several. parity, logic, addition,
    sort: Graves 2016. Any other: an entry point of the group distcond.tasks."""
    options: dict[str, Any] = field(default_factory=dict)
    "What an entry point reads beside the other keys; those that ship have none."
    files: list[str] = field(default_factory=list)
    "text, hub: paths or globs of local files."
    path: str = ""
    "hub: name of a data set, or a builder for local files (json, parquet, arrow, csv, text)."
    subset: str = ""
    "hub: which of a data set's configurations, e.g. wikitext-103-raw-v1; empty: the only or default one."
    column: str = "text"
    "hub: the column that holds the text."
    cache_dir: str = "~/.cache/distcond"
    "Where prepared corpora are kept."
    tokenizer: str = ""
    "A tokenizer.json of the `tokenizers` library, whose tokens are then what is read and predicted; empty: bytes."
    shard_mib: int = 64
    "Size of the shards that a corpus is prepared in, MiB of text; >= 1. `distcond prepare` writes several at once."
    global_batch_size: int = 32
    "Examples per optimiser step, over all ranks and accumulation steps; >= 1."
    sources: dict[str, Any] = field(default_factory=dict)
    "mixture: of each text its weight (share of examples), name, files, path, subset, column, validation_fraction."
    context: int = 128
    "Bytes, or tokens, of context per example; >= 1 (text of any kind)."
    validation_fraction: float = 0.05
    "Share of the files (text, stdlib) or rows (hub) held out, chosen by a hash of their path or number; in (0, 1)."
    validation_examples: int = 256
    "Examples of the fixed validation set; >= 1."
    num_bits: int = 64
    "Length of a parity vector; >= 1."
    scattered: bool = True
    "parity: the entries that are not 0 stand anywhere in the vector; false: they are the first ones, as in data=parity."
    set_bits: list[int] = field(default_factory=list)
    "parity: fewest and most entries that are not 0, e.g. [1,32]; empty: 1 to num_bits."
    validation_set_bits: list[int] = field(default_factory=list)
    "parity: the same for the validation set, e.g. [33,48] to see whether a run extrapolates; empty: as set_bits."
    one_hot: bool = False
    "parity: an entry is two inputs, whether it is 1 and whether it is -1; false: it is one, which is 1, -1 or 0."
    uniform_ones: bool = False
    "parity: any number of the entries that are not 0 is 1 in training, each as often; false: each is by the toss of a coin."
    max_length: int = 10
    "Most vectors of a sequence (logic, >= 1), numbers to add (addition, 1 to 10) or to sort (sort, >= 2)."
    max_gates: int = 10
    "Most logic gates per vector; 1 to 10."
    max_digits: int = 5
    "Most digits of a number to add; 1 to 17."

    def parts(self) -> dict[str, tuple[float, "DataConfig"]]:
        """mixture: share of the examples, and configuration, of every source whose weight is not 0. Else nothing.

        Raises ConfigError where `sources` make no mixture.
        """
        if self.name != DataName.mixture:
            return {}
        settings = checked_sources(self.sources)
        total = sum(weight for weight, _ in settings.values())
        parts = {}
        for source, (weight, given) in settings.items():
            try:
                text = replace(self, sources={}, **given)
            except ConfigError as error:
                raise ConfigError(f"data.sources.{source}: {error}") from error
            if weight:
                parts[source] = (weight / total, text)
        return parts

    def __post_init__(self) -> None:
        check_name("data", self.name, tuple(DataName), self.options)
        for name in ("global_batch_size", "context", "shard_mib", "validation_examples", "num_bits", "max_length"):
            value = getattr(self, name)
            need(value >= 1, f"data.{name}={value} is below 1; use 1 or more.")
        for name in ("set_bits", "validation_set_bits"):
            bits = getattr(self, name)
            need(
                not bits or (len(bits) == 2 and 1 <= bits[0] <= bits[1] <= self.num_bits),
                f"data.{name}={bits}: needed are two numbers, 1 <= fewest <= most <= data.num_bits={self.num_bits}, e.g. [1,32].",
            )
        need(1 <= self.max_gates <= 10, f"data.max_gates={self.max_gates} is outside 1..10; Graves 2016 has ten gates.")
        need(1 <= self.max_digits <= 17, f"data.max_digits={self.max_digits} is outside 1..17; sums are 64-bit integers.")
        need(
            self.name != DataName.addition or self.max_length <= 10,
            f"data.max_length={self.max_length} numbers may sum up to more than max_digits + 1 digits; use 10 or fewer.",
        )
        need(
            self.name != DataName.sort or self.max_length >= 2,
            f"data.max_length={self.max_length} leaves nothing to sort; use 2 or more.",
        )
        need(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction={self.validation_fraction} is outside (0, 1); e.g. 0.05 holds out a twentieth.",
        )
        need(self.name != DataName.text or bool(self.files), "data.files is empty; name files, e.g. data.files=[corpus/*.txt].")
        need(
            self.name != DataName.hub or bool(self.path),
            "data.path is empty; name a data set, e.g. data.path=roneneldan/TinyStories.",
        )
        need(self.name == DataName.mixture or not self.sources, "data.sources are of a mixture; use data=mixture.")
        self.parts()
