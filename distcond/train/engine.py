"""The engine, which with deepspeed_start.py alone knows DeepSpeed: node tables beside it, the dense part as plain tensors.

DeepSpeed trains the ordinary parameters (ZeRO 0 to 3). The lazy node tables live outside it, on its expert-parallel
process groups: they join its global gradient norm, are updated when it applied a step, and rest when it skipped one.

NOTE: written against DeepSpeed 0.19. Two private hooks are used, `scaled_global_norm` (ZeRO 1, 2) and `_get_norm_groups`
(ZeRO 3); tests/train/test_engine.py compares every stage with a single process, so a release that moves them is noticed.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distcond.train.deepspeed_start import compiling_late, start_process_group

# isort: split
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from distcond.config import Config, Precision
from distcond.errors import ConfigError
from distcond.nn.halting import Pondering
from distcond.optim import RowAdam
from distcond.optim.sharded import ShardedRows
from distcond.table import Collective
from distcond.train.deepspeed_options import deepspeed_options
from distcond.train.table_files import load_tables, write_tables

MOMENTS = ("exp_avg", "exp_avg_sq")


def initialize(
    *,
    model: nn.Module,
    config: Mapping[str, Any] | str,
    expert_parallel_size: int | None = None,
    shard_level: int | None = None,
    rebalance_every: int | None = None,
    **options: Any,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` for a model with `TreeLinear`s: (engine, optimizer, dataloader, scheduler).

    The engine is DeepSpeed's own; its `step` also updates the node tables, with the learning rate, betas, eps and weight
    decay of the first parameter group, and its `save_checkpoint` and `load_checkpoint` carry them. Lazy tables are
    sharded over `expert_parallel_size` ranks (None: all) and their gradients clipped jointly with the dense ones. After
    every `rebalance_every` steps (None: never) subtrees move so that ranks serve equally many tokens.
    `engine.tables` is the `ShardedRows`. options: further arguments of `deepspeed.initialize`.
    Raises ConfigError for fp16, whose loss scale the tables do not follow.
    """
    ds_config = json.loads(Path(config).read_text()) if isinstance(config, str) else dict(config)
    if ds_config.get("fp16", {}).get("enabled"):
        raise ConfigError("fp16 is not supported with node tables; use bf16: {enabled: true} or fp32.")
    clip = float(ds_config.get("gradient_clipping", 0.0))
    stage = int(ds_config.get("zero_optimization", {}).get("stage", 0))
    if stage == 0:
        ds_config["gradient_clipping"] = 0.0  # NOTE: DeepSpeed's own norm leaves the rows out; `_Stepper` clips instead
    start_process_group()
    with compiling_late():
        engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config=ds_config, **options)
    engine.tables = _shard_tables(engine, model, expert_parallel_size, shard_level, rebalance_every)
    lockstep = engine.tables.is_sharded or stage == 3
    for module in model.modules():
        if isinstance(module, Pondering) and lockstep:
            module.lockstep = engine.tables.world
    _Stepper(engine, stage, clip).install()
    _carry_tables(engine)
    return engine, optimizer, loader, scheduler


def _shard_tables(
    engine: Any, model: nn.Module, expert_parallel_size: int | None, shard_level: int | None, rebalance_every: int | None
) -> ShardedRows:
    size = expert_parallel_size or dist.get_world_size()
    if dist.get_world_size() % size:
        raise ConfigError(f"expert_parallel_size={size} does not divide the {dist.get_world_size()} ranks.")
    groups._create_expert_and_data_parallel(size)
    name = f"ep_size_{size}"
    group = engine.optimizer.param_groups[0] if engine.optimizer is not None else {}
    rows = RowAdam(
        model,
        lr=group.get("lr", 1e-3),
        betas=tuple(group.get("betas", (0.9, 0.999))),
        eps=group.get("eps", 1e-8),
        weight_decay=group.get("weight_decay", 0.0),
    )
    return ShardedRows(
        model,
        rows,
        world=Collective(None, deepspeed.comm),
        expert=Collective(groups._get_expert_parallel_group(name), deepspeed.comm),
        replica=Collective(groups._get_expert_data_parallel_group(name), deepspeed.comm),
        shard_level=shard_level,
        rebalance_every=rebalance_every,
    )


def _carry_tables(engine: Any) -> None:
    """Make the engine's own checkpoints hold the tables: files of theirs beside DeepSpeed's."""
    save, load, tables = engine.save_checkpoint, engine.load_checkpoint, engine.tables

    def save_checkpoint(
        save_dir: str, tag: str | None = None, client_state: Any = None, save_latest: bool = True, **options: Any
    ) -> Any:
        tag = str(tag or f"global_step{engine.global_steps}")
        # NOTE: DeepSpeed would name the checkpoint in `latest` before the tables are there.
        answer = save(save_dir, tag, client_state or {}, save_latest=False, **options)
        write_tables(Path(save_dir) / tag, engine.module, tables)
        if save_latest and tables.world.rank == 0:
            (Path(save_dir) / "latest").write_text(tag)
        return answer

    def load_checkpoint(load_dir: str, *args: Any, **options: Any) -> Any:
        path, client_state = load(load_dir, *args, **options)
        if path is not None:
            place = {"rank": tables.expert.rank, "size": tables.expert.size}
            tables.optimizer.log_decay = load_tables(Path(path).parent, engine.module, **place)
        return path, client_state

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


class _Stepper:
    """Makes one engine's `step` carry the tables: joint norm before, row update after."""

    def __init__(self, engine: Any, stage: int, clip: float) -> None:
        self.engine, self.stage, self.clip = engine, stage, clip
        self.rows: ShardedRows = engine.tables
        self.row_norm = torch.zeros(())
        self.norm = 0.0
        self.deepspeed_step = engine.step

    def install(self) -> None:
        """Hook into the engine."""
        self.engine.step = self.step
        if self.stage in (1, 2):
            dense_norm = self.engine.optimizer.scaled_global_norm

            def joint_norm(norm_type: int = 2) -> Tensor:
                dense = torch.as_tensor(dense_norm(norm_type))
                self.norm = float(dense) if dense < 0 else float((dense.double() ** 2 + self.row_norm.double() ** 2).sqrt())
                return torch.full_like(dense, self.norm)

            self.engine.optimizer.scaled_global_norm = joint_norm
        if self.stage == 3:
            dense_groups = self.engine.optimizer._get_norm_groups

            def joint_groups() -> list[Any]:
                norms = [*dense_groups(), self.row_norm]
                self.norm = float(sum(float(norm) ** 2 for norm in norms) ** 0.5)
                return norms

            self.engine.optimizer._get_norm_groups = joint_groups

    def step(self, *args: Any, **kwargs: Any) -> None:
        """`engine.step`; at an accumulation boundary also the step of the tables."""
        if not self.engine.is_gradient_accumulation_boundary():
            self.deepspeed_step(*args, **kwargs)
            return
        lr = float(self.engine.get_lr()[0])  # NOTE: read before the step, whose scheduler moves it on
        self.row_norm = self.rows.reduce_gradients().sqrt().to(self.engine.device)
        if self.stage == 0:
            self.engine.optimizer.overflow = not self._clip_dense()  # DeepSpeed then counts the step as skipped
        self.deepspeed_step(*args, **kwargs)
        self.engine.joint_grad_norm = self.norm if self.engine.was_step_applied() else math.inf
        if self.engine.was_step_applied():
            self.rows.step(lr, min(1.0, self.clip / (self.norm + 1e-6)) if self.clip else 1.0)
        else:
            self.rows.discard()

    def _clip_dense(self) -> bool:
        """ZeRO 0: joint norm of the averaged gradients, and clipping; gradients that are not finite are dropped."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        dense = sum((g.double().square().sum() for g in gradients), torch.zeros((), dtype=torch.float64))
        self.norm = float((dense.cpu() + self.row_norm.double().cpu() ** 2).sqrt())
        if not torch.isfinite(torch.tensor(self.norm)):
            for parameter in self.engine.module.parameters():
                parameter.grad = None
            return False
        if self.clip and self.norm > self.clip:
            for gradient in gradients:
                gradient.mul_(self.clip / (self.norm + 1e-6))
        return True


class Engine:
    """A DeepSpeed engine with tables, as the training loop sees it.

    weights: dense parameters to start from by name (a checkpoint's), before ZeRO makes its copies.
    """

    def __init__(self, model: nn.Module, config: Config, weights: Mapping[str, Tensor] | None = None) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if weights is not None:
                    parameter.copy_(weights[name])
        self.stage = config.optim.zero_stage
        self.dtype = torch.bfloat16 if config.optim.precision == Precision.bf16 else torch.float32
        self.model = model
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._engine, self._optimizer, _, _ = initialize(
            model=model,
            config=deepspeed_options(config),
            expert_parallel_size=config.cluster.expert_parallel_size,
            shard_level=config.cluster.shard_level,
            rebalance_every=config.cluster.rebalance_every,
            model_parameters=list(model.parameters()),
        )
        self._make_moments()

    @property
    def tables(self) -> ShardedRows:
        """The node tables of the model."""
        return self._engine.tables  # type: ignore[no-any-return]

    @property
    def step_is_applied(self) -> bool:
        """Whether the last `step` changed the weights; false where the gradient was not finite."""
        return bool(self._engine.was_step_applied())

    @property
    def grad_norm(self) -> float:
        """Global norm of the last mean gradient, dense part and rows together, before clipping; inf if it was not applied."""
        return float(self._engine.joint_grad_norm)

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward pass; vectors are cast to the precision of the dense part."""
        return self._engine(*(value.to(self.dtype) if value.is_floating_point() else value for value in inputs))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a micro-batch's loss."""
        self._engine.backward(loss)

    def step(self, lr: float) -> None:
        """After every micro-batch; the last one of a step updates everything."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def close(self) -> None:
        """Give back the memory of the model, its tables and their optimiser states; none is of use afterwards.

        NOTE: DeepSpeed's hooks keep its ZeRO engines alive for good, by cycles through C++ that no collector sees.
        """
        self._engine.destroy()
        base = self._base_optimizer()
        modules, parameters = list(self.model.modules()), list(self.model.parameters())
        for tensor in (*parameters, *(tensor for group in base.param_groups for tensor in group["params"])):
            tensor.data, tensor.grad = tensor.data.new_empty(0), None
        base.state.clear()
        for holder in (self._optimizer, *parameters, *modules):
            vars(holder).clear()

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Meanwhile a module's own parameters are not partitioned (ZeRO 3), to be read. Collective."""
        with deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)), enabled=self.stage == 3):
            yield

    # ---- the dense part as full tensors by name: any world size and ZeRO stage can load it ----------------------------

    def dense_state(self) -> dict[str, Tensor]:
        """Weights and moments, fp32, under `<parameter>/weight`, `/exp_avg`, `/exp_avg_sq`, as they are now. Collective.

        On a CPU they may share memory with the engine's.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        base = self._base_optimizer()
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if self.stage == 0:
                values = {"weight": parameter.detach(), **{key: base.state[parameter][key] for key in MOMENTS}}
            else:
                values = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                values["weight"] = safe_get_full_fp32_param(parameter)
            state |= {f"{name}/{key}": value.detach().cpu() for key, value in values.items()}
        return state

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers, under `buffers/<name>`; on a CPU they share memory."""
        return {f"buffers/{name}": value.detach().cpu() for name, value in self.model.named_buffers()}

    def load_dense_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Restore what `dense_state` gave after `step` updates; the weights were given to the constructor."""
        base = self._base_optimizer()
        for moments in base.state.values():
            moments["step"].fill_(float(step))
        for name, parameter in self.model.named_parameters():
            if self.stage == 0:
                for key in MOMENTS:
                    base.state[parameter][key].copy_(state[f"{name}/{key}"])
                continue
            for key in ("weight", *MOMENTS):
                set_value = _set_partition if self.stage == 3 else _set_full
                set_value(parameter, key, state[f"{name}/{key}"].to(self.device))

    def _make_moments(self) -> None:
        """Optimiser state of zeros. ZeRO has none before the first step, but it is read and set at any time."""
        base = self._base_optimizer()
        tensors = [tensor for group in base.param_groups for tensor in group["params"]]
        if self.stage == 3:
            tensors = self._optimizer.fp32_partitioned_groups_flat
        for tensor in tensors:
            base.state[tensor] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _base_optimizer(self) -> Any:
        base = self._optimizer
        while hasattr(base, "optimizer"):
            base = base.optimizer
        return base


def _set_full(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if key == "weight":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _set_partition(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """ZeRO 3; the full setters fail where a tensor does not divide by the ranks (stage3.py of 0.19.8)."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    world, rank = dist.get_world_size(), dist.get_rank()
    part = nn.functional.pad(value.flatten(), (0, -value.numel() % world)).chunk(world)[rank]
    if key == "weight":
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)
