"""DeepSpeed's own configuration, derived from that of a run; needs no DeepSpeed."""

from typing import Any

from distcond.config import Config, Precision
from distcond.errors import ConfigError

DERIVED_KEYS = {
    "train_batch_size": "data.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.global_batch_size and cluster.num_workers",
    "gradient_accumulation_steps": "optim.accumulation",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim.lr, optim.betas, optim.eps, optim.weight_decay",
    "scheduler": "optim.schedule and optim.warmup_steps",
    "bf16": "optim.precision",
    "fp16": "optim.precision",
    "torch_autocast": "optim.precision",  # NOTE: DeepSpeed imports the modules that it names, and so runs their code
}
"What a run decides elsewhere, and where."


def deepspeed_options(config: Config) -> dict[str, Any]:
    """DeepSpeed's options for a run; `optim.deepspeed` is merged in. Raises ConfigError for keys distcond derives."""
    optim, passed = config.optim, config.optim.deepspeed
    for key, source in DERIVED_KEYS.items():
        if key in passed:
            raise ConfigError(f"optim.deepspeed.{key} is derived by distcond; set {source} instead.")
    zero = passed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"optim.deepspeed.zero_optimization={zero}: needed is a mapping, e.g. {{overlap_comm: true}}.")
    if "stage" in zero:
        raise ConfigError("optim.deepspeed.zero_optimization.stage is derived by distcond; set optim.zero_stage instead.")
    parts = config.cluster.num_workers * optim.accumulation
    adam = {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay}
    return {
        "steps_per_print": 10**9,
        **passed,
        "train_micro_batch_size_per_gpu": config.data.global_batch_size // parts,
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": optim.precision == Precision.bf16},
        "zero_optimization": {**zero, "stage": optim.zero_stage},
        # torch's own AdamW: DeepSpeed's would be compiled on first use.
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True, "adam_w_mode": True}},
    }
