"""Every field of TransformerConfig that `megatron:` takes changes what a step does, and every other
one is refused with the key to use instead.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.config.load import recipe_from
from moetrain.config.megatron import DOES_NOTHING, FIELDS, SET_HERE, Passed
from moetrain.config.recipe import Recipe
from moetrain.engine.layers import block
from moetrain.errors import ConfigError
from moetrain.layout.passed import check_backend
from moetrain.models import read_model
from moetrain.testing import footprint
from moetrain.testing.gloo import Workers
from moetrain.testing.ranks import recipe_for
from moetrain.testing.tiny import CONFIGS, save_model

DATA = [[3, 14, 15, 92, 65, 35, 89], [79, 32, 38, 46], [26, 43, 38, 32, 79, 50], [1, 2, 3, 4, 5]]
# A step of two recomputed layers a stage, dense and with experts.
FULL = {"train": {"global_batch": 4, "recompute": "full"}}
HALF = {"train": {"global_batch": 4, "recompute": "selective"}}
PLAIN = {"train": {"global_batch": 4}}
PP = {"parallel": {"pp": 2}} | PLAIN
VPP = {"parallel": {"pp": 2, "vpp": 2}} | PLAIN

# (ranks, what the recipe says beside, fields, the part of a step that changes)
SEEN: dict[str, tuple[int, dict[str, Any], list[tuple[dict[str, Any], str]]]] = {
    "one rank": (
        1,
        PLAIN,
        [
            ({"moe_token_dispatcher_type": "allgather"}, "calls"),
            ({"bias_activation_fusion": True}, "calls"),
        ],
    ),
    "recomputed": (
        1,
        FULL,
        [
            ({"recompute_num_layers": 2}, "operations"),
            ({"recompute_method": "block"}, "operations"),
        ],
    ),
    "recomputed in part": (1, HALF, [({"recompute_modules": ["mlp"]}, "operations")]),
    "pipelined": (
        2,
        PP,
        [
            ({"batch_p2p_comm": False}, "calls"),
            ({"deallocate_pipeline_outputs": True}, "operations"),
        ],
    ),
    "interleaved": (2, VPP, [({"overlap_p2p_comm": False}, "calls")]),
}
# Those that a machine without a GPU refuses.
ON_A_GPU: dict[str, Any] = {
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "apply_rope_fusion": True,
    "bias_dropout_fusion": True,
    "gradient_accumulation_fusion": True,
    "moe_flex_dispatcher_backend": "hybridep",
    "moe_flex_dispatcher_num_sms": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Dense and expert layers in turn."""
    folder: Path = tmp_path_factory.mktemp("mixed")
    save_model("qwen3_moe", folder, decoder_sparse_step=2)
    return str(folder)


def test_every_field_is_here() -> None:
    seen = {name for _, _, cases in SEEN.values() for fields, _ in cases for name in fields}
    assert seen.isdisjoint(ON_A_GPU)
    assert seen | ON_A_GPU.keys() == Passed.model_fields.keys()
    groups = (SET_HERE.keys(), DOES_NOTHING.keys(), Passed.model_fields.keys())
    assert sum(map(len, groups)) == len(FIELDS) > 300


@pytest.mark.gloo
@pytest.mark.parametrize("where", SEEN)
def test_a_field_that_passes_changes_a_step(workers: Workers, model: str, where: str) -> None:
    world, base, cases = SEEN[where]
    others = [{"megatron": fields} for fields, _ in cases]
    found = workers.run(world, footprint.differences, model, DATA, base, others)[0]
    for (fields, part), changed in zip(cases, found, strict=True):
        assert part in changed, f"{fields} changed only {changed}"


@pytest.mark.parametrize("field", sorted(FIELDS - Passed.model_fields.keys()))
def test_any_other_field_is_refused(field: str) -> None:
    """Also with the value that it has anyway."""
    for value in (None, True, 1, "a"):
        with pytest.raises(ConfigError) as caught:
            recipe_for("-", {}, megatron={field: value})
        message = str(caught.value)
        assert f"megatron.{field} " in message and "\n" not in message
    key = message.split("The key is ")[1].split(" ")[0].rstrip(".:,")
    known = {name for section in ("", "megatron.") for name in _keys(section)}
    assert key in known, f"{key}: no key of a recipe"


def _keys(section: str) -> set[str]:
    if section:
        return {f"{section}{name}" for name in FIELDS}
    keys = set(Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                keys |= {f"{name}.{leaf}" for leaf in kind.model_fields}  # type: ignore[attr-defined]
    return keys


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU refuses")
@pytest.mark.gloo
@pytest.mark.parametrize("field", ON_A_GPU)
def test_what_needs_a_gpu_is_refused_without(workers: Workers, model: str, field: str) -> None:
    """That it changes a step with one is for test_gpu.py to see."""
    given = {field: ON_A_GPU[field]}
    if "flex" in field:
        given["moe_token_dispatcher_type"] = "flex"
    with pytest.raises(ConfigError, match=r"needs a GPU|without a GPU|Transformer Engine"):
        workers.run(1, footprint.footprint, model, DATA, PLAIN | {"megatron": given})


@pytest.mark.parametrize("wrong", [ImportError("no module"), OSError("libcudnn.so: no"),
                                   RuntimeError("nvrtc shared object not found.")])  # fmt: skip
def test_a_transformer_engine_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, wrong: Exception
) -> None:
    """On a GPU: backend auto goes without it, and te says why in one line."""

    class Finder:
        @staticmethod
        def find_spec(name: str, *rest: Any) -> None:
            if name.startswith("transformer_engine"):
                raise wrong

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    gpu = torch.device("cuda", 0)
    assert block.choose_backend("auto", gpu) == block.choose_backend("torch", gpu) == "torch"
    with pytest.raises(ConfigError, match=f"does not import here: {wrong}") as caught:
        block.choose_backend("te", gpu)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no GPU"):
        block.choose_backend("te", torch.device("cpu"))


def test_fusion_without_a_kernel_for_it() -> None:
    """On a GPU, the torch backend has Apex's or none."""
    recipe = recipe_for("-", {}, megatron={"gradient_accumulation_fusion": True})
    model = read_model(CONFIGS["qwen3_moe"])
    check_backend(recipe, model, "te", on_gpu=True, fuses=True)
    with pytest.raises(ConfigError, match="needs Apex's fused_weight_gradient_mlp_cuda"):
        check_backend(recipe, model, "torch", on_gpu=True, fuses=False)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"megatron": {"recompute_method": "block"}}, "nothing without train.recompute=full"),
        ({"megatron": {"recompute_modules": ["mlp"]}}, "without train.recompute=selective"),
        ({"megatron": {"batch_p2p_comm": False}}, "without parallel.pp > 1"),
        ({"megatron": {"overlap_p2p_comm": True}}, "without parallel.vpp"),
        ({"megatron": {"moe_flex_dispatcher_num_sms": 4}}, "moe_token_dispatcher_type=flex"),
        ({"megatron": {"recompute_modules": ["layernorm"]}} | HALF, "Transformer Engine"),
        (
            {"megatron": {"recompute_num_layers": 9}} | FULL,
            "a stage has 4 layers",
        ),
    ],
)
def test_a_field_that_this_layout_does_not_read(
    workers: Workers, model: str, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        workers.run(1, footprint.footprint, model, DATA, sections)


@pytest.mark.gloo
def test_a_field_that_this_model_does_not_read(workers: Workers, tiny: Any, tmp_path: Path) -> None:
    dense, experts = tiny("qwen3")[0], tiny("qwen3_moe")[0]
    for folder, fields, words in (
        (dense, {"moe_token_dispatcher_type": "allgather"}, "no experts"),
        (experts, {"bias_activation_fusion": True}, "experts throughout"),
    ):
        with pytest.raises(ConfigError, match=words):
            workers.run(1, footprint.footprint, folder, DATA, {"megatron": fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"recompute_num_layers": "two"}, "recompute_num_layers is 'two'"),
        ({"recompute_num_layers": 0}, "greater than or equal to 1"),
        ({"moe_token_dispatcher_type": "ring"}, "'allgather', 'alltoall' or 'flex'"),
        ({"recompute_modules": ["moe_act"]}, "recompute_modules.0 is 'moe_act'"),
        ({"bias_activation_fusion": "perhaps"}, "valid boolean"),
    ],
)
def test_values_are_checked(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe_for("-", {}, megatron=fields)


def test_null_is_not_given() -> None:
    content = recipe_for("-", {}).model_dump(mode="json")
    content["megatron"] = {"recompute_num_layers": None}
    assert recipe_from(content).megatron == {}
