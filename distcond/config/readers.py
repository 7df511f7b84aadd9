"""Which kinds of data and model read which of their keys: a key that was typed for nobody is refused, not ignored."""

from collections.abc import Collection, Mapping

from distcond.config.check import need
from distcond.config.choices import TEXTS, DataName, ModelName
from distcond.config.run import Config

_LOCAL = (DataName.text, DataName.hub, DataName.mixture)
_HUB = (DataName.hub, DataName.mixture)
_TEXT = tuple(name for name in DataName if name in TEXTS)
_PARITY = (DataName.parity,)

READERS: Mapping[str, Mapping[str, Collection[str]]] = {
    "data": {
        "files": _LOCAL,
        "path": _HUB,
        "subset": _HUB,
        "column": _HUB,
        "tokenizer": _TEXT,
        "context": _TEXT,
        "validation_fraction": _TEXT,
        "num_bits": _PARITY,
        "scattered": _PARITY,
        "set_bits": _PARITY,
        "validation_set_bits": _PARITY,
        "one_hot": _PARITY,
        "uniform_ones": _PARITY,
        "max_length": (DataName.logic, DataName.addition, DataName.sort),
        "max_gates": (DataName.logic,),
        "max_digits": (DataName.addition,),
    },
    "model": {
        "heads": (ModelName.transformer,),
        "feed_forward": (ModelName.transformer,),
        "cell": (ModelName.rnn,),
        "window": (ModelName.mlp,),
    },
}
"""Section -> key -> names that read it. Other keys are everybody's, or say where things are, which a script may say of every run
(cache_dir, shard_mib); entry points of other packages read what they like."""


def check_read(config: Config, typed: Collection[str]) -> None:
    """Refuse typed keys that what was chosen does not read, unless they say what holds anyway. Raises ConfigError.

    Whoever types `data.name=parity` instead of `data=parity` spells a configuration out, as the lines that distcond prints
    do: there, keys that nothing reads may stand.
    """
    for section, chosen, shipped in (("data", config.data, tuple(DataName)), ("model", config.model, tuple(ModelName))):
        if f"{section}.name" in typed or chosen.name not in shipped:
            continue
        for key, readers in READERS[section].items():
            value = getattr(chosen, key)
            need(
                chosen.name in readers or f"{section}.{key}" not in typed or value == getattr(type(chosen)(), key),
                f"{section}.{key}={value} is read by {section}={', '.join(readers)}, not by {section}={chosen.name}; "
                f"use {section}={next(iter(readers))}, or leave {section}.{key} out.",
            )
