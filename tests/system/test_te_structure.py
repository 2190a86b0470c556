"""The te backend's whole model on the meta device, made of Transformer Engine's own modules, at
every rank of every layout of the parity tests: names, shapes, marks and places in a checkpoint.
"""

from typing import Any

import pytest

from moetrain.testing import te_structure
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import CONFIGS
from tests.test_parity import LAYOUTS, MORE

ADAPTER = {"adapter": {"rank": 4, "target": "all-linear"}}


def cases(adapted: bool) -> list[te_structure.Case]:
    """One of a kind: what a case of the parity tests changes in values alone is left out."""
    found: dict[str, te_structure.Case] = {}
    plain: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
        ("qwen3_moe", {}, *layout) for layout in LAYOUTS.values()
    ]
    for family, changes, size, parallel in plain + [case[:4] for case in MORE.values()]:
        hf = {**CONFIGS[family], **changes}
        kept = {name: value for name, value in hf.items() if name != "rope_parameters"}
        sections = dict(ADAPTER) if adapted else {}
        found[str((kept, size, parallel))] = (hf, size, parallel, sections)
    return list(found.values())


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_parameters_are_what_the_table_says(te_workers: Workers, adapted: bool) -> None:
    """And the two backends read each other's checkpoints, which are Megatron's own."""
    given = cases(adapted)
    num, problems = te_workers.run(1, te_structure.check, given)[0]
    te_workers.close()  # a process that had a meta world trains nothing afterwards
    assert not problems, "\n".join(problems[:20])
    print(f"{num} parameters of {len(given)} layouts")
    assert num > 3000 and len(given) > 20


def test_a_wrong_rule_is_found(te_workers: Workers) -> None:
    given: list[te_structure.Case] = [(CONFIGS["qwen3_moe"], 2, {"tp": 2}, {})]
    problems = te_workers.run(1, te_structure.check_wrong, given)[0]
    te_workers.close()
    assert all(problems.values()), problems
