"""What a recipe's `megatron:` section may hold: how a model is computed, where no key says it.

What is computed is the model's: an exported folder could not tell what was changed here.
"""

from typing import Any, Literal

from pydantic import ValidationError

from moetrain.config.megatron_fields import OWNED, UNREAD
from moetrain.config.section import Count, Section
from moetrain.errors import nearest


class Passed(Section):
    """The TransformerConfig fields that pass through; `moetrain.layout.passed` says where each does
    something.
    """

    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Count | None = None
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm"]] | None = None
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] | None = None
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep", "ncclep"] | None = None
    moe_flex_dispatcher_num_sms: Count | None = None
    moe_permute_fusion: bool | None = None
    moe_router_fusion: bool | None = None
    apply_rope_fusion: bool | None = None
    bias_activation_fusion: bool | None = None
    bias_dropout_fusion: bool | None = None
    gradient_accumulation_fusion: bool | None = None
    overlap_p2p_comm: bool | None = None
    batch_p2p_comm: bool | None = None
    deallocate_pipeline_outputs: bool | None = None


def _by_name(groups: dict[str, str]) -> dict[str, str]:
    return {name: instead.strip() for instead, names in groups.items() for name in names.split()}


SET_HERE, DOES_NOTHING = _by_name(OWNED), _by_name(UNREAD)
FIELDS = SET_HERE.keys() | DOES_NOTHING.keys() | Passed.model_fields.keys()


def passed_through(fields: dict[str, Any]) -> dict[str, Any]:
    """The section as given; ValueError for a field that is not Megatron's, that is moetrain's, or
    that would do nothing.
    """
    for key in fields:
        if key not in FIELDS:
            raise ValueError(
                f"megatron.{key} is not a TransformerConfig field.{nearest(key, FIELDS)}"
            )
        if key in SET_HERE:
            raise ValueError(
                f"megatron.{key} is set by moetrain from the model and the layout. Remove it. The"
                f" key is {SET_HERE[key]}."
            )
        if key in DOES_NOTHING:
            raise ValueError(
                f"megatron.{key} would do nothing here. Remove it. The key is {DOES_NOTHING[key]}."
            )
    if "moe" in (fields.get("recompute_modules") or []):
        raise ValueError(
            "megatron.recompute_modules cannot hold 'moe' here. Use train.recompute=full."
        )
    try:
        return Passed.model_validate(fields).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"megatron.{where} is {first['input']!r}: {first['msg']}") from None
