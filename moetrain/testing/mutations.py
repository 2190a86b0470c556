"""Wrong weight tables. Each is consistent both ways, so only logits can tell it from the right."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moetrain.models import Rule
from moetrain.models.sharding import Copy

Table = Mapping[str, Rule]


@dataclass(frozen=True)
class _Reversed(Copy):
    """Rows in the reverse order."""

    def pack(self, parts: tuple[Tensor, ...], tp_rank: int, tp_size: int) -> Tensor:
        return parts[0].flip(0)

    def unpack(self, local: Tensor, tp_rank: int, tp_size: int) -> tuple[Tensor, ...]:
        return (local.flip(0),)


def _each(table: Table, ending: str, change: Callable[[Rule], Rule]) -> dict[str, Any]:
    return {name: change(rule) if ending in name else rule for name, rule in table.items()}


def swapped_gate_up(table: Table) -> dict[str, Rule]:
    return _each(table, "experts.linear_fc1", lambda r: replace(r, hf=r.hf[::-1]))


def swapped_key_value(table: Table) -> dict[str, Rule]:
    return _each(table, "linear_qkv.weight", lambda r: replace(r, hf=(r.hf[0], r.hf[2], r.hf[1])))


def swapped_key_value_bias(table: Table) -> dict[str, Rule]:
    return _each(table, "linear_qkv.bias", lambda r: replace(r, hf=(r.hf[0], r.hf[2], r.hf[1])))


def swapped_dense_gate_up(table: Table) -> dict[str, Rule]:
    return _each(table, "mlp.linear_fc1", lambda r: replace(r, hf=r.hf[::-1]))


def wrong_router_order(table: Table) -> dict[str, Rule]:
    return _each(table, "mlp.router", lambda r: replace(r, sharding=_Reversed(r.sharding.shape)))


def off_by_one_expert(table: Table) -> dict[str, Rule]:
    """Megatron's expert e holds Hugging Face's expert e+1, the last one the first."""
    num = 1 + max(rule.expert for rule in table.values() if rule.expert is not None)

    def shifted(rule: Rule) -> Rule:
        if rule.expert is None:
            return rule
        other = rule.name.removesuffix(str(rule.expert)) + str((rule.expert + 1) % num)
        return replace(rule, hf=table[other].hf)

    return {name: shifted(rule) for name, rule in table.items()}


MUTATIONS: dict[str, Callable[[Table], dict[str, Rule]]] = {
    "swapped_gate_up": swapped_gate_up,
    "swapped_key_value": swapped_key_value,
    "wrong_router_order": wrong_router_order,
    "off_by_one_expert": off_by_one_expert,
    "none": lambda table: dict(table),
}
# The same of a dense family with biases.
DENSE_MUTATIONS: dict[str, Callable[[Table], dict[str, Rule]]] = {
    "swapped_dense_gate_up": swapped_dense_gate_up,
    "swapped_key_value": swapped_key_value,
    "swapped_key_value_bias": swapped_key_value_bias,
    "none": lambda table: dict(table),
}
