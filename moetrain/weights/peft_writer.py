"""PEFT's adapter folders: their keys, and writing them.

PEFT (0.20) names modules as transformers 5 does. A parameter that is no module's `weight`, named in
`target_parameters`, is wrapped with its module: where both parameters of `mlp.experts` are, the
later one, down_proj, is outside and gate_up_proj is `mlp.experts.base_layer`. For E experts of one
parameter, lora_A is [E r, in], expert after expert, and lora_B [out, r E] has expert e in columns
e, e + E, ...
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain import files, manifest
from moetrain.errors import WeightsError
from moetrain.models.adapter import SUFFIX, AdapterTable, Matrix, all_matrices, is_parameter
from moetrain.models.model import Model
from moetrain.weights.adapter_init import whole
from moetrain.weights.folder import ADAPTER, ADAPTER_WEIGHTS
from moetrain.weights.ranks import ALONE, Ranks
from moetrain.weights.reader import Reader
from moetrain.weights.side_files import SideFiles
from moetrain.weights.writer import FAILURES, put_in_place, reason, save_tensors

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
            of them on the first rank, which keeps them in memory and writes. On the others they are
            passed over.
        base_name: what adapter_config.json calls the base.
        initial: what the adapter started from, for OLoRA and PiSSA alone: they are written as plain
            LoRA of rank 2r, A over A0 and B beside -B0, for the base as it was before.
        note: the tokenizer that the adapter was trained with, its template and what ends an answer,
            and the base's config.json.

    Raises:
        WeightsError: on every rank, when the folder cannot be written; what was there is untouched.
    """
    places = table.places
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:  # to make them may be collective: no rank stops early
        if ranks.rank == 0 and (name not in places or places[name].live):
            held[name] = tensor.detach().to("cpu", copy=True)
    problem = ""
    if ranks.rank == 0:
        wanted = {key for key, place in places.items() if place.live}
        wanted |= {HEAD} if table.model.heads.scalar else set()
        assert held.keys() == wanted, f"tensors {sorted(held.keys() ^ wanted)} are not as they must"
        try:
            with files.sibling_folder(folder) as aside:
                save_tensors(_to_peft(held, table, initial), aside / ADAPTER_WEIGHTS)
                text = json.dumps(config_of(table, base_name), indent=2)
                (aside / ADAPTER).write_text(text + "\n")
                if note is not None:
                    note[0].write(aside, note[1])
                manifest.write(aside, manifest.complete(aside, {}))
                put_in_place(aside, folder)
        except FAILURES as error:
            problem = reason(error)
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


def _to_peft(
    held: Mapping[str, Tensor], table: AdapterTable, initial: Reader | None
) -> dict[str, Tensor]:
    """PEFT's tensors, by PEFT's keys; experts are put together."""
    spec = table.spec
    assert spec.starts_at_base or initial is not None, f"{spec.init} needs what it started from"
    first = None if spec.starts_at_base else initial
    groups: dict[str, list[Matrix]] = {}
    for matrix in table.matrices.values():
        groups.setdefault(matrix.module, []).append(matrix)
    result: dict[str, Tensor] = {}
    for module, key in peft_keys(groups).items():
        pairs = [_pair(matrix, held, first) for matrix in groups[module]]
        result[key + SUFFIX["lora_A"]] = torch.cat([a for a, _ in pairs])
        # [E, out, r] -> [out, r, E] -> [out, r E]
        b = torch.stack([b for _, b in pairs]).permute(1, 2, 0).flatten(1)
        result[key + SUFFIX["lora_B"]] = b.contiguous()
        if spec.dora:
            name = groups[module][0].name + SUFFIX["lora_magnitude"]
            result[key + SUFFIX["lora_magnitude"]] = held[name]
    if table.model.heads.scalar:
        result[PREFIX + HEAD] = held[HEAD]
    return result


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
