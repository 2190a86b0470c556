"""The optimizer: Megatron's DDP and distributed AdamW, and the learning-rate schedule as a pure
function.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moetrain.config.optim import OptimConfig
from moetrain.config.recipe import Recipe
from moetrain.engine import muon
from moetrain.engine.model import DTYPES, PackedGPT
from moetrain.engine.params import by_parameter
from moetrain.engine.world import World
from moetrain.errors import ConfigError
from moetrain.models import Model
from moetrain.models.rates import Rate


def learning_rate(
    step: int, cfg: OptimConfig, num_steps: int, limits: tuple[float, float] | None = None
) -> float:
    """The rate of optimizer step `step` (from 1) of `num_steps`: linear warm-up, then the schedule
    down towards min_lr. `limits` are the highest and last rate of a group that has its own.

    After the warm-up it is the rate that transformers' schedulers and Megatron-LM give that step:
    they count from 0, so that the last step still moves, and min_lr is where a step after it would
    be. The warm-up counts from 1, so that the first step moves too. wsd (arXiv 2404.06395) holds lr
    and decays over the last `decay_steps`, a tenth of the run when not given.
    """
    lr, min_lr = limits or (cfg.lr, cfg.min_lr)
    warmup = warmup_steps(cfg, num_steps)
    if step <= warmup:
        return lr * step / warmup
    if cfg.schedule == "constant":
        return lr
    span = max(num_steps - warmup, 1)
    if cfg.schedule == "wsd":
        decay = cfg.decay_steps or max(span // 10, 1)
        shape, start = cfg.wsd_decay, num_steps - decay
    else:
        decay = cfg.decay_steps or span
        shape, start = cfg.schedule, warmup
    return min_lr + (lr - min_lr) * _shape(shape, (step - 1 - start) / decay)


def warmup_steps(cfg: OptimConfig, num_steps: int) -> int:
    """Steps of the warm-up; a share of the run is rounded up, as in transformers."""
    return math.ceil(cfg.warmup * num_steps - 1e-9) if cfg.warmup < 1 else int(cfg.warmup)


def _shape(kind: str, progress: float) -> float:
    """1 at progress 0 and below, 0 at 1 and above; wsd's are Megatron-LM's."""
    x = min(max(progress, 0.0), 1.0)
    match kind:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * x))
        case "exponential":
            return 2 * 0.5**x - 1
        case "minus_sqrt":
            return 1 - math.sqrt(x)
        case _:
            return 1.0 - x


def wrap(
    chunks: list[PackedGPT], config: TransformerConfig, recipe: Recipe
) -> list[DistributedDataParallel]:
    """Megatron's DDP around each chunk: gradients accumulate in one buffer, reduced over the
    data-parallel group.
    """
    overlap = recipe.train.overlap
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=recipe.optim.grad_dtype == "fp32",
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    config.no_sync_func = [w.no_sync for w in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    if overlap:
        # Parameters are gathered by the hooks of the modules that read them, each in its turn.
        starts = [partial(_start_grad_sync, w) for w in wrapped]
        config.grad_sync_func = starts if len(starts) > 1 else starts[0]
    return wrapped


def _start_grad_sync(model: DistributedDataParallel, *unused: Any) -> None:
    """As megatron-core 0.19.2's start_grad_sync, which forgets `force_all_reduce`."""
    for group in model.bucket_groups + model.expert_parallel_bucket_groups:
        group.start_grad_sync(force_all_reduce=model.force_all_reduce)


def finalize_gradients(models: Any, num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's, without its divisor `num_tokens`: ours was applied in the loss."""
    finalize_model_grads(models, None, **kwargs)


@contextmanager
def gathered(wrapped: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """All weights are whole in here: outside, an overlapped parameter gather may still be due.

    With overlap, the gather after an optimizer step is left to the hooks of the next training
    forward; reading weights in between, or running another forward, would see old ones.
    """
    overlapped = [w for w in wrapped if w.ddp_config.overlap_param_gather]
    for model in overlapped:
        model.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for model in overlapped:
            model.enable_forward_pre_hook()


def make_optimizer(
    wrapped: list[DistributedDataParallel],
    recipe: Recipe,
    backend: str,
    world: World,
    model: Model,
    rates: Mapping[str, Rate],
) -> Any:
    """Megatron's distributed AdamW, with Muon in it where the recipe says so. Norm weights and
    biases take no weight decay; parameters whose canonical names are in `rates` have their own.
    """
    cfg, dtype, on_gpu = recipe.optim, DTYPES[recipe.model.dtype], world.kind == "nccl"
    chunks = [chunk.module for chunk in wrapped]
    extra: dict[str, Any] = {}
    if cfg.state_dtype != "fp32":
        if backend != "te":
            raise ConfigError(
                f"optim.state_dtype={cfg.state_dtype} needs Transformer Engine's FusedAdam. Use "
                f"fp32, or backend te."
            )
        low = {"bf16": torch.bfloat16, "fp8": torch.uint8}[cfg.state_dtype]
        extra = dict(use_precision_aware_optimizer=True, exp_avg_dtype=low, exp_avg_sq_dtype=low)
    if cfg.offload and on_gpu:
        # Without the precision-aware path the fp32 main weights would stay on the device too.
        extra |= dict(
            optimizer_cpu_offload=True,
            optimizer_offload_fraction=cfg.offload,
            use_precision_aware_optimizer=True,
        )
    config = OptimizerConfig(
        optimizer="adam",
        lr=cfg.lr,
        min_lr=cfg.min_lr,
        weight_decay=cfg.weight_decay,
        adam_beta1=cfg.beta1,
        adam_beta2=cfg.beta2,
        adam_eps=cfg.eps,
        clip_grad=cfg.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=wrapped[0].ddp_config.overlap_param_gather,
        **extra,
    )
    overrides = get_standard_config_overrides(config)
    overrides |= _overrides(by_parameter(chunks, world, rates))
    optimizer = get_megatron_optimizer(
        config, wrapped, config_overrides=overrides, use_gloo_process_groups=on_gpu
    )
    if not on_gpu:  # on the host torch's AdamW goes over memory ten times, fused once
        for inner in _stepping(optimizer):
            for group in inner.param_groups:
                group["fused"] = all(not param.is_cuda for param in group["params"])
    if cfg.name == muon.NAME:
        names = {name for name, rate in rates.items() if rate.optimizer == muon.NAME}
        matrices = muon.locals_of(chunks, world, model.table, names)
        for part in _parts(optimizer):
            muon.install(part, matrices, cfg, dtype)
    return optimizer


def _overrides(rates: Mapping[Tensor, Rate]) -> dict[ParamKey, Any]:
    """What Megatron tells groups apart by."""
    result: dict[ParamKey, Any] = {}
    for number, rate in enumerate(sorted(set(rates.values()), key=repr)):
        params = {id(param) for param, other in rates.items() if other == rate}
        fields: dict[str, Any] = {"max_lr": rate.lr, "min_lr": rate.min_lr}
        if rate.weight_decay is not None:
            fields["start_wd"] = rate.weight_decay
        if rate.optimizer is not None:
            fields["stepped_by"] = rate.optimizer
        is_own = partial(_is_in, params)
        result[ParamKey(predicate=ParamPredicate(name=f"rate{number}", fn=is_own))] = fields
    return result


def _is_in(ids: set[int], param: Tensor) -> bool:
    return id(param) in ids


def start_state(optimizer: Any) -> None:
    """Give torch's AdamW an empty state, so that a checkpoint can be read into it.

    megatron-core 0.19.2 asks for every parameter's `step` before loading, which its own
    init_state_fn forgets. Apex's and Transformer Engine's Adam keep it elsewhere, and begin by
    themselves; with Muon in them they do not know which moments there are. An optimizer that
    is partly on the host has parameters of its own, which a step on noise makes; what is loaded
    then replaces them and the weights.
    """
    kinds = (torch.optim.AdamW, HybridDeviceOptimizer, muon.MuonSteps)
    for inner in (p.optimizer for p in _parts(optimizer) if isinstance(p.optimizer, kinds)):
        if isinstance(inner, HybridDeviceOptimizer):
            inner.dummy_step()
            continue
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    muon.start(inner, param)
                    if group.get("optimizer") != muon.NAME:
                        inner.state[param]["exp_avg_sq"] = torch.zeros_like(param.data)


def forget_state(optimizer: Any) -> None:
    """As if no step had been taken: torch's optimizers make their state anew in the next one."""
    for inner in _stepping(optimizer):
        inner.state.clear()


def part_steps(optimizer: Any) -> None:
    """Give each parameter a `step` of its own again after loading.

    megatron-core 0.19.2 hands all of them one tensor, which AdamW then counts up once for every
    parameter: the bias correction, and with it the run, would silently differ from the
    uninterrupted one.
    """
    for inner in _stepping(optimizer):
        for state in inner.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def sharded_state(
    optimizer: Any, content: dict[str, Any], step: int, metadata: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """The optimizer's part of a checkpoint, for `content`; collective."""
    with _counted(optimizer, step), muon.second_moments(_parts(optimizer)):
        state = optimizer.sharded_state_dict(content, is_loading=loading, metadata=metadata)
    parts = _parts(optimizer)
    for part, part_state in zip(parts, [state] if len(parts) == 1 else state.values(), strict=True):
        muon.leave_out_second_moments(part, part_state["param_state"])
    return state


@contextmanager
def _counted(optimizer: Any, step: int) -> Iterator[None]:
    """Inside, torch's AdamW knows its `step` on a rank that holds no parameter too.

    megatron-core 0.19.2 reads the step off the parameters, of which a rank has none when fewer are
    trained than ranks share them, and fails there.
    """
    empty = [inner for inner in _stepping(optimizer) if not inner.state]
    for inner in empty:
        inner.state["none"] = {"step": torch.tensor(float(step))}  # type: ignore[index]
    try:
        yield
    finally:
        for inner in empty:
            inner.state.pop("none", None)  # type: ignore[call-overload]


def _parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers: of dense weights, and of experts."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _stepping(optimizer: Any) -> list[Any]:
    """The inner optimizers that keep a `step` per parameter: torch's, and those on the host."""
    kinds = (torch.optim.AdamW, HybridDeviceOptimizer)
    return [part.optimizer for part in _parts(optimizer) if isinstance(part.optimizer, kinds)]


def set_rates(optimizer: Any, step: int, cfg: OptimConfig, num_steps: int) -> float:
    """The learning rate of `step`, after setting every group's, and its weight decay.

    Megatron only marks the groups that take no decay (`wd_mult`) or have limits of their own; to
    heed the marks is its scheduler's, which is not used here.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg, num_steps, (group["max_lr"], group["min_lr"]))
        decay = group.get("start_wd")
        group["weight_decay"] = (cfg.weight_decay if decay is None else decay) * group["wd_mult"]
    return learning_rate(step, cfg, num_steps)


def clip_and_step(optimizer: Any, grad_norm: float, clip: float) -> None:
    """Update the weights from gradients that are ready, scaled to a norm of at most `clip` (0: as
    they are).
    """
    for part in _parts(optimizer):
        if clip and grad_norm > clip and part.get_parameters():
            _scale_gradients(part, clip / (grad_norm + 1e-6))
    optimizer.step_with_ready_grads()


def _scale_gradients(part: Any, factor: float) -> None:
    """Multiply the optimizer's gradients by `factor`, wherever it keeps them."""
    for param in part.get_parameters():
        for grad in (param.grad, getattr(param, "decoupled_grad", None)):
            if grad is not None:
                grad.mul_(factor)
