"""Dropout before an adapter: its masks, what they are drawn from, and PEFT's gradients with the
same masks at every layout.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import sequences

from moetrain.config.load import recipe_from
from moetrain.engine.dropout import number_of
from moetrain.errors import ConfigError
from moetrain.layout.passed import check_passed
from moetrain.models import read_model
from moetrain.ops.dropout import drop, kept, token_keys
from moetrain.ops.packed import concat, from_tokens, pad_to
from moetrain.testing import optimizing, ranks
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import CONFIGS

Tiny = Callable[[str], tuple[str, Any]]

# Masks


def keys_of(tokens: list[int], *salt: int) -> torch.Tensor:
    return token_keys(from_tokens(tokens), salt)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_a_mask_is_as_good_as_drawn(p: float) -> None:
    torch.manual_seed(1)
    keys = keys_of(torch.randint(0, 50, (400,)).tolist(), 7, 1)
    mask = kept(keys, 3, range(0, 300), p).float()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * deviation / mask.numel() ** 0.5
    for dim in (0, 1):  # every row and column has its share
        size = mask.size(dim)
        assert (mask.mean(dim) - (1 - p)).abs().max() < 5 * deviation / size**0.5
    centred = (mask - mask.mean()) / deviation
    moved = [((1, 0), (0, 1)), ((0, 1), (0, 1)), ((1, 1), (0, 1)), ((0, 16), (0, 1))]
    others = [mask.roll(*by) for by in moved]
    others.append(kept(keys, 4, range(300), p).float())
    others.append(kept(keys_of([1] * 400, 7, 1), 3, range(300), p).float())
    for other in others:
        other = (other - other.mean()) / other.std()
        assert abs((centred * other).mean()) < 5 / mask.numel() ** 0.5


def test_a_key_is_of_a_tokens_past_the_step_and_the_seed() -> None:
    one = keys_of([5, 6, 7, 8], 1, 1)
    assert torch.equal(keys_of([5, 6, 7, 9], 1, 1)[:3], one[:3])
    every = [one, *(keys_of([5, 6, 7, 8], *salt) for salt in ((1, 2), (2, 1)))]
    every.append(keys_of([6, 5, 7, 8], 1, 1))
    assert len({int(keys[3]) for keys in every}) == 4
    pack = pad_to(concat([from_tokens([1, 2]), from_tokens([5, 6, 7, 8])]), 11)
    assert torch.equal(token_keys(pack, (1, 1))[2:6], one)
    # A prompt that stands once before two answers.
    from dataclasses import replace

    parts = [from_tokens([5, 6]), from_tokens([7, 8]), from_tokens([7, 9])]
    parts[1:] = [replace(part, position_ids=part.position_ids + 2) for part in parts[1:]]
    shared = replace(concat(parts), prefix=torch.tensor([-1, 0, 0], dtype=torch.int32))
    found = token_keys(shared, (1, 1))
    assert torch.equal(found[:4], one) and found[4] == one[2] and found[5] != one[3]


def test_what_is_kept_is_scaled_and_so_is_its_gradient() -> None:
    x = torch.randn(4, 1, 6, requires_grad=True)
    keys = keys_of([5, 6, 7, 8], 1, 1)
    out = drop(x, keys, 9, 0, 0.25)
    mask = kept(keys, 9, range(6), 0.25)[:, None]
    assert torch.equal(out, torch.where(mask, x / 0.75, 0.0))
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(mask, 1 / 0.75, 0.0).expand_as(x))
    right = drop(x[..., 4:], keys, 9, 4, 0.25)
    assert torch.equal(right, out[..., 4:]), "a rank with the last columns"


# Layouts

ADAPTER = {"rank": 4, "alpha": 8, "target": "all-router", "dropout": 0.4}
CASES: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    # name: (world, layout, packs, sections)
    "other packs": (1, {}, 3, {}),
    "micro-batches": (1, {}, 4, {"train": {"micro_batch": 2, "global_batch": 4}}),
    "recompute": (1, {}, 2, {"train": {"recompute": "full"}}),
    "tp2-sp": (2, {"tp": 2}, 2, {}),
    "ep2": (2, {"ep": 2}, 2, {}),
    "ep2, allgather": (2, {"ep": 2}, 2, {"megatron": {"moe_token_dispatcher_type": "allgather"}}),
    "etp2": (2, {"etp": 2}, 2, {}),
    "cp2": (2, {"cp": 2}, 2, {}),
    "pp2-vpp2, recompute": (2, {"pp": 2, "vpp": 2}, 2, {"train": {"recompute": "full"}}),
    "tp2-etp2-ep2": (4, {"tp": 2, "etp": 2, "ep": 2}, 2, {}),
}


DORA = ADAPTER | {"type": "dora", "target": ["q_proj", "v_proj", "o_proj"]}
SOME = {name: CASES[name] for name in ("recompute", "tp2-sp")}


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("family", "adapter", "cases"),
    [
        ("qwen3_moe", ADAPTER, CASES),
        ("qwen2_moe", ADAPTER, {"tp2-etp2-ep2": CASES["tp2-etp2-ep2"]}),
        ("qwen3_moe", DORA, SOME),
    ],
    ids=["qwen3_moe", "qwen2_moe", "dora"],
)
def test_masks_are_the_same_at_every_layout(
    workers: Workers, tiny: Tiny, family: str, adapter: dict[str, Any], cases: dict[str, Any]
) -> None:
    folder, _ = tiny(family)

    def step(world: int, parallel: dict[str, Any], packs: int, sections: dict[str, Any]) -> Any:
        given = {"adapter": adapter} | sections
        return workers.run(
            world, ranks.adapter_gradients, folder, parallel, sequences(), packs, given
        )[0]

    loss, norm, wanted, _, _ = step(1, {}, 2, {})
    without = step(1, {}, 2, {"adapter": adapter | {"dropout": 0.0}})
    assert abs(loss - without[0]) > 1e-3
    for case, arguments in cases.items():
        own_loss, own_norm, grads, _, _ = step(*arguments)
        assert own_loss == pytest.approx(loss, rel=1e-5), case
        assert own_norm == pytest.approx(norm, rel=1e-4), case
        for name, grad in wanted.items():
            error = (grads[name] - grad).norm() / grad.norm().clamp(min=1e-12)
            assert error <= 1e-4, (case, name, error)


class Masked(torch.nn.Module):
    """In the place of a PEFT layer's dropout."""

    keys: torch.Tensor

    def __init__(self, module: str):
        super().__init__()
        self.number = number_of(module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return drop(x[0], Masked.keys, self.number, 0, 0.4)[None]


@pytest.mark.gloo
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_with_the_same_masks_peft_has_the_same_gradients(
    workers: Workers, tiny: Tiny, kind: str
) -> None:
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = tiny("qwen3_moe")
    target = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = {"type": kind, "rank": 4, "alpha": 8, "target": target, "dropout": 0.4}
    loss, _, grads, values, _ = workers.run(
        1, ranks.adapter_gradients, folder, {}, sequences(), 2, {"adapter": adapter}
    )[0]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=target, lora_dropout=0.4)
    config.use_dora = kind == "dora"
    model = PeftModel(plain, config).train()
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            layer = name.split("layers.")[1].split(".")[0]
            own = "linear_proj" if name.endswith("o_proj") else "linear_qkv"
            stem = f"decoder.layers.{layer}.self_attention.{own}.weight"
            module.lora_dropout = torch.nn.ModuleDict({"default": Masked(stem)})
    known = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace("vector.weight", "vector"): param
        for name, param in model.named_parameters()
        if param.requires_grad
    }
    assert known.keys() == grads.keys()
    for name, param in known.items():
        param.data.copy_(values[name])
    count = sum(len(one) - 1 for one in sequences())
    total = torch.zeros(())
    for one in sequences():
        Masked.keys = keys_of(one, 1234, 1)
        logits = model(torch.tensor([one])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(one[1:]), reduction="sum"
        )
    (total / count).backward()
    assert loss == pytest.approx(total.item() / count, rel=1e-5)
    for name, param in known.items():
        assert param.grad is not None
        assert (grads[name] - param.grad).norm() <= 1e-4 * param.grad.norm(), name


@pytest.mark.gloo
def test_only_training_drops_and_a_resumed_run_drops_the_same(
    workers: Workers, tiny: Tiny, tmp_path: Path
) -> None:
    folder, _ = tiny("qwen3_moe")
    sections = {"adapter": ADAPTER}
    loss, logp, learned = workers.run(1, optimizing.unlearned, folder, sequences(), sections)[0]
    off = {"adapter": ADAPTER | {"dropout": 0.0}}
    plain = workers.run(1, optimizing.unlearned, folder, sequences(), off)[0]
    assert loss == plain[0] == pytest.approx(plain[2], rel=1e-6) and learned != plain[2]
    assert all(torch.equal(a, b) for a, b in zip(logp, plain[1], strict=True))
    before, after, resumed = workers.run(
        2, ranks.trained_and_resumed, folder, {"ep": 2}, sequences(), tmp_path, sections
    )[0]
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"adapter": {"dropout": 1.0}}, r"adapter\.dropout"),
    ({"adapter": {"dropout": 0.1}, "train": {"steps": 1, "recompute": "selective"},
      "megatron": {"recompute_modules": ["mlp"]}}, "recompute_modules: mlp is computed again"),
    ({"adapter": {"dropout": 0.1}, "megatron": {"moe_token_dispatcher_type": "flex"}}, "flex"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_dropout_is_refused_where_it_would_be_wrong(sections: dict[str, Any], message: str) -> None:
    content: dict[str, Any] = {
        "run_dir": "r", "model": {"hf": CONFIGS["qwen3_moe"]}, "method": "sft",
        "data": {"train": ["a"]}, "train": {"steps": 1},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        check_passed(recipe_from(content | sections), read_model(CONFIGS["qwen3_moe"]))
