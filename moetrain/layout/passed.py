"""Where `router` and the fields of `megatron:` do something: by the layout, the model, the
backend.
"""

from moetrain.config.recipe import Recipe, RouterConfig
from moetrain.errors import ConfigError
from moetrain.models import Model

# Kernels that megatron-core has through Transformer Engine alone.
NEEDS_TE = ("moe_permute_fusion", "moe_router_fusion", "apply_rope_fusion")
NEEDS_GPU = ("bias_dropout_fusion", "gradient_accumulation_fusion")


def check_passed(recipe: Recipe, model: Model) -> None:
    """ConfigError for what this layout or this model does not read."""
    given, p, train = recipe.megatron, recipe.parallel, recipe.train
    if not model.moe and recipe.router != RouterConfig():
        raise ConfigError("router: this model has no experts. Leave the section out.")
    if recipe.adapter is not None and recipe.adapter.dropout:
        check_dropout(recipe)
    reads = {
        "recompute_method": (train.recompute == "full", "train.recompute=full"),
        "recompute_num_layers": (train.recompute == "full", "train.recompute=full"),
        "recompute_modules": (train.recompute == "selective", "train.recompute=selective"),
        "overlap_p2p_comm": (p.vpp is not None, "parallel.vpp"),
        "batch_p2p_comm": (p.pp > 1, "parallel.pp > 1"),
        "deallocate_pipeline_outputs": (p.pp > 1, "parallel.pp > 1"),
        "moe_flex_dispatcher_backend": (
            given.get("moe_token_dispatcher_type") == "flex",
            "megatron.moe_token_dispatcher_type=flex",
        ),
        "moe_flex_dispatcher_num_sms": (
            given.get("moe_token_dispatcher_type") == "flex",
            "megatron.moe_token_dispatcher_type=flex",
        ),
    }
    for key in given:
        is_read, needs = reads.get(key, (True, ""))
        if not is_read:
            raise ConfigError(
                f"megatron.{key} does nothing without {needs}. Give that, or leave it out."
            )
        if key.startswith("moe_") and not model.moe:
            raise ConfigError(
                f"megatron.{key} does nothing: this model has no experts. Leave it out."
            )
    if given.get("batch_p2p_comm") and p.vpp and given.get("overlap_p2p_comm", True):
        raise ConfigError(
            "megatron.batch_p2p_comm=true does not go with overlap_p2p_comm, which parallel.vpp"
            " turns on. Give megatron.overlap_p2p_comm=false too."
        )
    layers = model.num_layers // (p.pp * (p.vpp or 1))
    if given.get("recompute_num_layers", 0) > layers:
        raise ConfigError(
            f"megatron.recompute_num_layers={given['recompute_num_layers']}, and a stage has"
            f" {layers} layers. Give no more."
        )
    if "mlp" in given.get("recompute_modules", ()) and all(model.moe_layers):
        raise ConfigError(
            "megatron.recompute_modules: every layer of this model has experts, and mlp is a dense"
            " layer's. Use train.recompute=full."
        )


def check_dropout(recipe: Recipe) -> None:
    """ConfigError for what does not go with dropout before an adapter."""
    given = recipe.megatron
    if "mlp" in given.get("recompute_modules", ()):
        raise ConfigError(
            "megatron.recompute_modules: mlp is computed again without its layer, which"
            " adapter.dropout needs. Use train.recompute=full."
        )
    if given.get("moe_token_dispatcher_type") == "flex":
        raise ConfigError(
            "megatron.moe_token_dispatcher_type=flex cannot carry what adapter.dropout needs."
            " Use alltoall or allgather."
        )


def check_backend(recipe: Recipe, model: Model, backend: str, *, on_gpu: bool, fuses: bool) -> None:
    """ConfigError for a field that this backend or machine does not read; `fuses`: it has a kernel
    for `gradient_accumulation_fusion`.
    """
    given = recipe.megatron
    for key in NEEDS_TE:
        if given.get(key) and backend != "te":
            raise ConfigError(f"megatron.{key} needs Transformer Engine. Leave it out, or use te.")
    for key in NEEDS_GPU:
        if given.get(key) and not on_gpu:
            raise ConfigError(f"megatron.{key} does nothing without a GPU. Leave it out.")
    if given.get("gradient_accumulation_fusion") and not fuses:
        raise ConfigError(
            "megatron.gradient_accumulation_fusion needs Apex's fused_weight_gradient_mlp_cuda with"
            " backend torch. Leave it out, or use te."
        )
    if given.get("moe_token_dispatcher_type") == "flex" and not on_gpu:
        raise ConfigError(
            "megatron.moe_token_dispatcher_type=flex needs a GPU. Use alltoall or allgather."
        )
    if "layernorm" in given.get("recompute_modules", ()) and backend != "te":
        raise ConfigError(
            "megatron.recompute_modules: layernorm needs Transformer Engine. Use core_attn, mlp, or"
            " train.recompute=full."
        )
    unread = all(model.moe_layers) and not (model.moe and model.moe.shared)
    if given.get("bias_activation_fusion") and backend != "te" and unread:
        raise ConfigError(
            "megatron.bias_activation_fusion does nothing: with backend torch dense layers read it,"
            " and this model has experts throughout. Leave it out."
        )
