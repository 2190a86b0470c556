"""Weights with a learning rate of their own: which they are, and what an optimizer step makes of
them at every layout, against torch's and PEFT's optimizers on the same gradients.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import sequences

from moetrain.config.load import recipe_from
from moetrain.errors import ConfigError
from moetrain.models import read_model
from moetrain.models.adapter import AdapterSpec, adapter_table, trained_table
from moetrain.models.rates import Rate, own_rates
from moetrain.testing import optimizing
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import CONFIGS

Tiny = Callable[[str], tuple[str, Any]]


def rates(value_head: bool = False, **sections: Any) -> dict[str, Rate]:
    """By canonical name, of a tiny mixture of experts."""
    content: dict[str, Any] = {
        "run_dir": "/nonexistent",
        "model": {"hf": CONFIGS["qwen3_moe"]},
        "method": "sft",
        "data": {"train": ["none"]},
        "train": {"steps": 5},
    }
    recipe = recipe_from(content | sections)
    model = read_model(CONFIGS["qwen3_moe"], value_head=value_head)
    adapters = recipe.adapter and adapter_table(model, AdapterSpec.of(recipe.adapter))
    return own_rates(recipe, trained_table(model, recipe.trainable, adapters), adapters)


def grouped(*groups: dict[str, Any], **optim: Any) -> dict[str, Any]:
    return {"optim": {"lr": 1e-3, "min_lr": 1e-4, "groups": list(groups)} | optim}


def test_the_last_group_that_matches_counts() -> None:
    found = rates(
        value_head=True,
        **grouped(
            {"match": ["layers.1", "value_head"], "lr": 3e-3},
            {"match": "mlp.gate", "lr_scale": 0.1, "weight_decay": 0.0},
            {"match": "o_proj", "weight_decay": 0.5},
        ),
    )
    assert found["value_head.weight"] == (3e-3, pytest.approx(3e-4), None, None)
    assert found["decoder.layers.1.self_attention.linear_qkv.weight"].lr == 3e-3
    assert found["decoder.layers.1.mlp.router.weight"] == (1e-4, 1e-5, 0.0, None)
    assert found["decoder.layers.2.self_attention.linear_proj.weight"] == (1e-3, 1e-4, 0.5, None)
    assert "decoder.layers.2.self_attention.linear_qkv.weight" not in found
    frozen = grouped({"match": "value_head", "lr": 2e-3}, lr=0.0, min_lr=0.0)
    assert rates(value_head=True, **frozen) == {"value_head.weight": (2e-3, 0.0, None, None)}


def test_loraplus_multiplies_what_a_group_has() -> None:
    adapter = {"rank": 4, "target": ["q_proj", "experts"], "loraplus_lr_ratio": 16}
    found = rates(adapter=adapter, **grouped({"match": "q_proj", "lr": 1e-2}))
    stem = "decoder.layers.0.self_attention.linear_qkv."
    assert found[f"{stem}lora_A"].lr == 1e-2 and found[f"{stem}lora_B"].lr == 0.16
    experts = "decoder.layers.0.mlp.experts.linear_fc1."
    assert f"{experts}lora_A3" not in found
    assert found[f"{experts}lora_B3"] == (pytest.approx(16e-3), pytest.approx(16e-4), None, None)


NEXT = grouped({"match": "layers.1", "lr": 1.0}, {"match": "layers", "lr": 2.0})
GATE, ONE, KEYS = (
    grouped({"match": match, "lr": 1.0}) for match in ("mlp.gate", "layers.1", "k_proj")
)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (grouped({"match": "q_prj", "lr": 1.0}), r"groups\[0\].match: 'q_prj' matches nothing.*q_proj"),
    (grouped({"match": "q_proj", "lr": 1.0}), r"cannot be taken without.*k_proj"),
    (grouped({"match": "experts.2", "lr": 1.0}), r"cannot be taken without.*experts"),
    (grouped({"match": "norm", "weight_decay": 1.0}), r"groups\[0\].weight_decay does nothing"),
    (NEXT, r"optim.groups\[0\]: later groups take all that layers.1 matches"),
    (GATE | {"router": {"freeze": True}}, "matches nothing"),
    (ONE | {"trainable": ["layers.2"]}, "matches nothing"),
    (KEYS | {"adapter": {"target": ["q_proj"]}}, "matches nothing"),
    (grouped({"match": "norm"}), r"changes nothing: give lr, lr_scale, weight_decay or name"),
    (grouped({"match": "norm", "lr": 1.0, "lr_scale": 1.0}), r"give one of them"),
    (grouped({"match": [], "lr": 1.0}), r"optim.groups"),
    (grouped({"match": "norm", "learning_rate": 1.0}), r"optim.groups"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_groups_that_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        rates(**sections)
    assert "\n" not in str(caught.value).removesuffix("\n")


# Steps


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def replay(
    params: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, found: Any
) -> None:
    """Hold each step's weights against those that `optimizer` makes of the same gradients."""
    for number, (grads, after) in enumerate(found):
        assert grads.keys() == after.keys() == params.keys()
        for name, param in params.items():
            param.grad = grads[name].clone()
        optimizer.step()
        for name, param in params.items():
            text = f"step {number}, {name}"
            torch.testing.assert_close(
                after[name], param.data, rtol=1e-6, atol=1e-6, msg=lambda m, t=text: f"{t}: {m}"
            )


LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),
    "pp2": (2, {"pp": 2}),
}
GROUPS = grouped(
    {"match": ["layers.1", "*norm"], "lr": 5e-3},
    {"match": "mlp.gate", "lr_scale": 0.1, "weight_decay": 0.0},
    {"match": "experts", "weight_decay": 2.0},
    weight_decay=0.5,
    min_lr=0.0,
)


@pytest.mark.gloo
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_group_learns_at_its_rate(
    workers: Workers, tiny: Tiny, tmp_path: Path, layout: str
) -> None:
    folder, _ = tiny("qwen3_moe")
    world, parallel = LAYOUTS[layout]
    made = tmp_path / "checkpoint"
    before, found = workers.run(
        world, optimizing.steps, folder, parallel, sequences(), GROUPS, made
    )[0]
    params = {name: torch.nn.Parameter(weight.clone()) for name, weight in before.items()}

    def group_of(name: str) -> tuple[float, float]:
        lr, decay = (5e-3 if ".layers.1." in name or "norm" in name else 1e-3), 0.5
        if ".mlp.gate." in name:
            lr, decay = 1e-4, 0.0
        if ".experts." in name:
            lr, decay = 1e-3, 2.0
        return lr, decay if before[name].dim() > 1 else 0.0

    groups = [
        {"params": [param], "lr": group_of(name)[0], "weight_decay": group_of(name)[1]}
        for name, param in params.items()
    ]
    replay(params, adamw(groups), found)
    again = workers.run(world, optimizing.resumed, folder, parallel, sequences(), GROUPS, made)[0]
    assert all(torch.equal(again[name], weight) for name, weight in found[-1][1].items())


@pytest.mark.gloo
def test_loraplus_is_that_of_peft(workers: Workers, tiny: Tiny) -> None:
    from peft import LoraConfig, PeftModel
    from peft.optimizers import create_loraplus_optimizer

    folder, _ = tiny("qwen3_moe")
    target = ["q_proj", "o_proj"]
    sections = grouped(weight_decay=0.2, min_lr=0.0) | {
        "adapter": {"rank": 4, "target": target, "loraplus_lr_ratio": 7.0}
    }
    before, found = workers.run(2, optimizing.steps, folder, {"tp": 2}, sequences(), sections)[0]
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel(plain, LoraConfig(r=4, target_modules=target))
    known = {
        name.removeprefix("base_model.model.").replace(".default", ""): param
        for name, param in model.named_parameters()
        if param.requires_grad
    }
    live = {name: before[name] for name in known}
    for name, param in known.items():
        param.data.copy_(live[name])
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=7.0, loraplus_weight_decay=0.2,
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    replay(known, optimizer, [[{n: part[n] for n in known} for part in step] for step in found])
