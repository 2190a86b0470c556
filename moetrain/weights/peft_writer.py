"""PEFT's adapter folders: their keys, and writing them.

PEFT (0.20) names modules as transformers 5 does. A parameter that is no module's `weight`, named in
`target_parameters`, is wrapped with its module: where both parameters of `mlp.experts` are, the
later one, down_proj, is outside and gate_up_proj is `mlp.experts.base_layer`. For E experts of one
parameter, lora_A is [E r, in], expert after expert, and lora_B [out, r E] has expert e in columns
e, e + E, ...
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain import files, manifest
from moetrain.errors import WeightsError
from moetrain.models.adapter import SUFFIX, AdapterTable, Matrix, all_matrices, is_parameter
from moetrain.models.model import Model
from moetrain.weights.adapter_init import whole
from moetrain.weights.dtypes import NAMES
from moetrain.weights.folder import ADAPTER, ADAPTER_WEIGHTS
from moetrain.weights.hf_files import Target, shards
from moetrain.weights.ranks import ALONE, Ranks
from moetrain.weights.reader import Reader
from moetrain.weights.side_files import SideFiles
from moetrain.weights.writer import FAILURES, Share, put_in_place, reason, write_share

PREFIX = "base_model.model."
HEAD = "score.weight"  # a scalar head, saved whole beside the adapter


def peft_keys(modules: Collection[str]) -> dict[str, str]:
    """By transformers' name of each adapted module or expert parameter: where PEFT puts its
    tensors.
    """
    result: dict[str, str] = {}
    for module in modules:
        block, _, leaf = module.rpartition(".")
        if not block.endswith(".experts"):
            result[module] = PREFIX + module
        elif leaf == "gate_up_proj" and f"{block}.down_proj" in modules:
            result[module] = f"{PREFIX}{block}.base_layer"
        else:
            result[module] = PREFIX + block
    return result


def write_peft(
    tensors: Iterable[tuple[str, Tensor]],
    dtypes: Mapping[str, torch.dtype],
    folder: Path,
    table: AdapterTable,
    base_name: str,
    initial: Reader | None = None,
    note: tuple[SideFiles, Mapping[str, Any]] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write an adapter as PEFT reads it; collective.

    Args:
        tensors: (name in the table's rules, whole tensor), and a scalar head as `score.weight`; all
            of them on the first rank, which keeps those of a module in memory until it is whole,
            and writes. On the others they are passed over.
        dtypes: theirs, on the first rank; A over A0 and B beside -B0 are fp32.
        base_name: what adapter_config.json calls the base.
        initial: what the adapter started from, for OLoRA and PiSSA alone: they are written as plain
            LoRA of rank 2r, A over A0 and B beside -B0, for the base as it was before.
        note: the tokenizer that the adapter was trained with, its template and what ends an answer,
            and the base's config.json.

    Raises:
        WeightsError: on every rank, when the folder cannot be written; what was there is untouched.
    """
    problem, rest = "", iter(tensors)
    if ranks.rank == 0:
        try:
            with files.sibling_folder(folder) as aside:
                written = _write_tensors(rest, dtypes, aside, table, initial)
                text = json.dumps(config_of(table, base_name), indent=2)
                (aside / ADAPTER).write_text(text + "\n")
                if note is not None:
                    note[0].write(aside, note[1])
                manifest.write(aside, manifest.complete(aside, written.entries))
                put_in_place(aside, folder)
        except FAILURES as error:
            problem = reason(error)
    for _ in rest:  # to make them may be collective: no rank stops early
        pass
    problem = ranks.share(problem)
    if problem:
        raise WeightsError(
            f"Writing {folder} failed: {problem}. What was there before is untouched. Make room "
            f"there or give another folder."
        )


def config_of(table: AdapterTable, base_name: str) -> dict[str, Any]:
    """The content of adapter_config.json."""
    spec = table.spec
    rank, alpha = spec.rank, spec.alpha
    if not spec.starts_at_base:  # rank 2r at the same scale
        rank, alpha = 2 * rank, alpha * (math.sqrt(2) if spec.rslora else 2)
    modules, parameters = targets(table)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if table.model.heads.scalar else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        # PEFT 0.20 opens no adapter of parameters that has dropout.
        "lora_dropout": 0.0 if parameters else spec.dropout,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": [HEAD.removesuffix(".weight")] if table.model.heads.scalar else None,
    }


def targets(table: AdapterTable) -> tuple[list[str], list[str]]:
    """PEFT's target_modules and target_parameters: one short name where it means all of a kind that
    the model has, else full names.
    """
    chosen: dict[tuple[bool, str], list[str]] = {}
    counts: dict[tuple[bool, str], int] = {}
    modules = {m.module: m for m in table.matrices.values()}
    for module, matrix in {m.module: m for m in all_matrices(table.model)}.items():
        short = _short(matrix, table.model)
        counts[short] = counts.get(short, 0) + 1
        if module in modules:
            chosen.setdefault(short, []).append(_full(matrix, table.model))
    result: tuple[list[str], list[str]] = ([], [])
    for short, names in chosen.items():
        result[short[0]].extend([short[1]] if len(names) == counts[short] else names)
    return sorted(result[0]), sorted(result[1])


def _full(matrix: Matrix, model: Model) -> str:
    """As PEFT names it among its targets."""
    weight = is_parameter(matrix, model) and matrix.kind != "experts"
    return matrix.module + (".weight" if weight else "")


def _short(matrix: Matrix, model: Model) -> tuple[bool, str]:
    """(whether it is a parameter, the end of its name that is the same in all layers)."""
    if is_parameter(matrix, model):
        return True, _full(matrix, model).split(".", 3)[3]
    return False, matrix.module.rpartition(".")[2]


@dataclass
class _Module:
    """What PEFT has one pair of tensors for: a matrix, or those of all experts."""

    key: str  # PEFT's, without the ends of its tensors' names
    matrices: list[Matrix]
    missing: set[str]  # names of tensors that have not come
    held: dict[str, Tensor]

    def targets(self, table: AdapterTable, dtypes: Mapping[str, torch.dtype]) -> Iterator[Target]:
        """Of its tensors."""
        spec, (out, into) = table.spec, self.matrices[0].shape
        rank = len(self.matrices) * spec.rank * (1 if spec.starts_at_base else 2)
        own = dtypes[self.matrices[0].name + SUFFIX["lora_A"]]
        dtype = NAMES[own if spec.starts_at_base else torch.float32]
        yield Target(self.key + SUFFIX["lora_A"], dtype, (rank, into))
        yield Target(self.key + SUFFIX["lora_B"], dtype, (out, rank))
        if spec.dora:
            yield Target(self.key + SUFFIX["lora_magnitude"], dtype, (out,))

    def tensors(self, table: AdapterTable, initial: Reader | None) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor), once nothing is missing; experts are put together."""
        pairs = [_pair(matrix, self.held, initial) for matrix in self.matrices]
        yield self.key + SUFFIX["lora_A"], torch.cat([a for a, _ in pairs])
        # [E, out, r] -> [out, r, E] -> [out, r E]
        b = torch.stack([b for _, b in pairs]).permute(1, 2, 0).flatten(1)
        yield self.key + SUFFIX["lora_B"], b.contiguous()
        if table.spec.dora:
            name = self.matrices[0].name + SUFFIX["lora_magnitude"]
            yield self.key + SUFFIX["lora_magnitude"], self.held[name]


def _modules(table: AdapterTable) -> dict[str, _Module]:
    """By name of the module."""
    groups: dict[str, list[Matrix]] = {}
    for matrix in table.matrices.values():
        groups.setdefault(matrix.module, []).append(matrix)
    keys = peft_keys(groups)
    result = {module: _Module(keys[module], own, set(), {}) for module, own in groups.items()}
    for name, place in table.places.items():
        if place.live:
            result[place.matrix.module].missing.add(name)
    return result


def _write_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    dtypes: Mapping[str, torch.dtype],
    aside: Path,
    table: AdapterTable,
    initial: Reader | None,
) -> Share:
    """Write PEFT's file of tensors."""
    spec, modules = table.spec, _modules(table)
    assert spec.starts_at_base or initial is not None, f"{spec.init} needs what it started from"
    started = None if spec.starts_at_base else initial
    wanted = [one for module in modules.values() for one in module.targets(table, dtypes)]
    if table.model.heads.scalar:
        wanted.append(Target(PREFIX + HEAD, NAMES[dtypes[HEAD]], (1, table.model.heads.hidden)))
    (group,) = shards(wanted, 1 << 62)
    return write_share(_to_peft(tensors, table, modules, started), aside, {ADAPTER_WEIGHTS: group})


def _to_peft(
    tensors: Iterable[tuple[str, Tensor]],
    table: AdapterTable,
    modules: Mapping[str, _Module],
    initial: Reader | None,
) -> Iterator[tuple[str, Tensor]]:
    """PEFT's tensors, by PEFT's keys, each module's once all of it has come."""
    for name, tensor in tensors:
        if name == HEAD:
            yield PREFIX + HEAD, tensor
            continue
        module = modules.get(table.places[name].matrix.module)
        if module is not None and name in module.missing:
            module.missing.remove(name)
            module.held[name] = tensor.detach().to("cpu", copy=True)
            if not module.missing:
                yield from module.tensors(table, initial)
                module.held.clear()


def _pair(
    matrix: Matrix, held: Mapping[str, Tensor], initial: Reader | None
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a matrix, or both of twice the rank with `initial` taken off."""
    a_name = matrix.name + SUFFIX["lora_A"]
    b_names = [key.removesuffix(".weight") + SUFFIX["lora_B"] for key in matrix.weights]
    a, b = held[a_name], torch.cat([held[name] for name in b_names])
    if initial is None:
        return a, b
    b0 = torch.cat([whole(initial, name) for name in b_names])
    return torch.cat([a.float(), whole(initial, a_name)]), torch.cat([b.float(), -b0], 1)
