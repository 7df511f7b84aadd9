"""The closed choices of a configuration, with what each one means."""

from enum import StrEnum


class ModelName(StrEnum):
    """The model families."""

    transformer = "transformer"
    rnn = "rnn"
    mlp = "mlp"


class CellName(StrEnum):
    """The recurrent cells of `model=rnn`."""

    tanh = "tanh"
    lstm = "lstm"
    gru = "gru"


class GateName(StrEnum):
    """How a tree layer computes its bits (design: `TreeLinear`)."""

    linear = "linear"
    hash = "hash"
    sign = "sign"


class GateGradient(StrEnum):
    """How the gating units learn."""

    straight_through = "straight_through"
    sampled = "sampled"
    magnitude = "magnitude"
    flip = "flip"
    flip_sampled = "flip_sampled"
    none = "none"


class Storage(StrEnum):
    """Where the node matrices live: plain parameters, or a table that grows with the visits, beside the layer or on the host."""

    dense = "dense"
    lazy = "lazy"
    host = "host"


class HaltingKind(StrEnum):
    """Who decides the number of ponder steps."""

    none = "none"
    fixed = "fixed"
    act = "act"
    ponder = "ponder"


class DataName(StrEnum):
    """The data sets."""

    stdlib = "stdlib"
    text = "text"
    hub = "hub"
    mixture = "mixture"
    parity = "parity"
    logic = "logic"
    addition = "addition"
    sort = "sort"


TEXTS = frozenset({DataName.stdlib, DataName.text, DataName.hub, DataName.mixture})
"Text; the others are generated."


class Search(StrEnum):
    """Who decides what a sweep tries."""

    random = "random"
    optuna = "optuna"


class Precision(StrEnum):
    """Arithmetic of the dense part; node tables, gates and halting sums are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"


class TrackingMode(StrEnum):
    """What wandb does. `auto` is online where a key is present, else offline."""

    auto = "auto"
    offline = "offline"
    online = "online"
    disabled = "disabled"


class Kernels(StrEnum):
    """What computes the products of tokens with trees on a CPU."""

    torch = "torch"
    native = "native"


class ClusterName(StrEnum):
    """Where `distcond submit` sends a run. `local` is this machine."""

    local = "local"
    ray = "ray"
    slurm = "slurm"
    kuberay = "kuberay"
