"""Parallelisms met together: every method at ten layouts, and what a recipe may add to them, give
one process's log-probs, losses, gradient norms and weights.
"""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_methods_engine as offline
import test_online_engine as online
import torch

from moetrain.errors import ConfigError
from moetrain.ops.packed import Packed, concat
from moetrain.testing import layouts
from moetrain.testing.gloo import Workers
from moetrain.testing.layouts import Case, Found, differences
from moetrain.testing.ranks import recipe_for
from moetrain.testing.tiny import layers_for, save_model

pytestmark = pytest.mark.gloo
LONG = pytest.mark.skipif(
    "LONG" not in os.environ, reason="six minutes: the rest of the table of docs/parallelism.md"
)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {}),
    "pp2-ep2": (4, {"pp": 2, "ep": 2}),
    "tp2-cp2": (4, {"tp": 2, "cp": 2}),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "etp2": (2, {"etp": 2}),
    "cp2-ep2": (2, {"cp": 2, "ep": 2}),
    "pp2, one layer first": (2, {"pp": 2, "first_stage_layers": 1}),
    "pp4": (4, {"pp": 4}),
    "dp2-tp2": (4, {"tp": 2}),
    "dp2-cp2": (4, {"cp": 2}),
    "dp2-pp2": (4, {"pp": 2}),
    "pp2-cp2": (4, {"pp": 2, "cp": 2}),
    "pp2-vpp2-cp2": (4, {"pp": 2, "vpp": 2, "cp": 2}),
    "tp2-pp2-ep2": (4, {"tp": 2, "pp": 2, "ep": 2}),
    "tp2-etp2-ep2": (4, {"tp": 2, "etp": 2, "ep": 2}),
    "tp2-no-sp": (2, {"tp": 2, "sp": False}),
    "tp4": (4, {"tp": 4}),
}
EVERYWHERE = LAYOUTS | MORE
DENSE = ("tp2-no-sp", "tp4")  # the model of the nine methods, with its experts, does not fit

# Clipping takes part, the router's losses too. A larger eps than AdamW's own keeps weights without
# a gradient from following the last bit of one.
COMMON: dict[str, Any] = {
    "optim": {"lr": 3e-3, "schedule": "constant", "clip_grad": 0.1, "eps": 1e-4},
    "router": {"aux_loss": 0.01, "z_loss": 0.001},
}
METHODS = ["pretrain", "sft", "dft", "dpo", "kto", "grpo", "chord", "reward", "ppo"]
Model = tuple[str, Any]  # folder, transformers model


class Cases:
    """Makes cases over tiny models; a model is written once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.made: dict[str, Model] = {}

    def model(self, family: str, changes: dict[str, Any]) -> Model:
        key = f"{family} {changes}"
        if key not in self.made:
            path = self.folder / str(len(self.made))
            self.made[key] = (str(path), save_model(family, path, **changes))
        return self.made[key]

    def headed(self, model: Model) -> str:
        """The folder of the same model with a scalar head."""
        from transformers import AutoModelForSequenceClassification

        path = f"{model[0]}-headed"
        if not Path(path).exists():
            torch.manual_seed(1)
            made = AutoModelForSequenceClassification.from_pretrained(
                model[0], num_labels=1, dtype=torch.float32, pad_token_id=0
            )
            made.score.weight.data.normal_(0, 0.3)
            made.save_pretrained(path)
        return path

    def case(
        self,
        method: str,
        family: str = "qwen3_moe",
        changes: dict[str, Any] | None = None,
        sections: dict[str, Any] | None = None,
        *,
        routes: bool = False,
        num_packs: int = 4,
    ) -> Case:
        model = self.model(family, changes or {})
        common = COMMON if family in ("qwen3_moe", "mixtral") else {"optim": COMMON["optim"]}
        own, packs = _of(method, model, num_packs)
        folder = self.headed(model) if method == "reward" else model[0]
        packs = [with_routes(pack, model[1]) for pack in packs] if routes else packs
        return Case(method, folder, packs, common | own | (sections or {}))


def _of(method: str, model: Model, num_packs: int) -> tuple[dict[str, Any], list[Packed]]:
    """What a method adds to a recipe, and packs to learn from."""
    if method in (*online.SETTINGS, "ppo"):
        make = online.ppo_packs if method == "ppo" else online.packs_of
        packs = make(online.groups(model[1]), method, seq_len=60, min_packs=num_packs)
        own = online.section_of(online.SETTINGS.get(method, {"name": "ppo"}))
        return own | {"data": {"train": ["none"], "seq_len": 64} | own["data"]}, packs
    packs = offline.packed(offline.groups(labelled=method == "kto"), shared=method != "pretrain")
    return offline.section(method), [concat(packs[i::num_packs]) for i in range(num_packs)]


def with_routes(pack: Packed, model: Any) -> Packed:
    """With experts that nobody would choose."""
    rng, config = random.Random(pack.num_tokens), model.config
    num_layers = sum(1 for name, _ in model.named_modules() if name.endswith("mlp.gate"))
    one, k = range(1, config.num_experts + 1), config.num_experts_per_tok
    table = [[rng.sample(one, k) for _ in range(num_layers)] for _ in range(pack.num_tokens)]
    routes = torch.tensor(table, dtype=torch.int16)
    return replace(pack, per_token=pack.per_token | {"routes": routes})


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("composed"))


EveryMethod = Callable[[int], tuple[list[Case], list[Found]]]


@pytest.fixture(scope="module")
def every_method(cases: Cases, workers: Workers) -> EveryMethod:
    """The nine methods in so many packs, and what one process makes of them."""

    @cache
    def made(num_packs: int) -> tuple[list[Case], list[Found]]:
        made = [cases.case(method, num_packs=num_packs) for method in METHODS]
        return made, workers.run(1, layouts.run, {}, made)[0]

    return made


def test_one_process_learns(every_method: EveryMethod) -> None:
    """So that nothing is compared with nothing: every loss moves, every gradient is clipped but
    one."""
    for num_packs in (2, 4):
        for case, found in zip(*every_method(num_packs), strict=True):
            assert abs(found.losses[1] - found.losses[0]) > 1e-3, case.name
            assert found.norms[0] > (0.05 if case.name == "dft" else 0.1), case.name
            moved = [(a - b).abs().max() for a, b in zip(*halves(found.logps), strict=True)]
            assert case.name == "reward" or min(moved) > 1e-2, case.name


def enough(layout: str) -> int:
    """Packs: where neither stages nor replicas share them, two show what four would."""
    world, parallel = EVERYWHERE[layout]
    shared = "pp" in parallel or world > parallel.get("tp", 1) * parallel.get("cp", 1)
    return 4 if shared else 2


def halves(both: list[Any]) -> tuple[list[Any], list[Any]]:
    return both[: len(both) // 2], both[len(both) // 2 :]


@pytest.mark.parametrize(
    "layout",
    [
        *list(LAYOUTS)[1:],
        *(pytest.param(n, marks=LONG) for n in MORE if "sp" not in n and n != "tp4"),
    ],
)
def test_methods_are_the_same_at_every_layout(
    workers: Workers, every_method: EveryMethod, layout: str
) -> None:
    world, parallel = EVERYWHERE[layout]
    made, wanted = every_method(enough(layout))
    said: set[str] = set()
    for answers in workers.run(world, layouts.run, parallel, made, timeout=400):
        for case, one, found in zip(made, wanted, answers, strict=True):
            said |= {f"{case.name}: {each}" for each in differences(one, found)}
    assert not said


TIED = {"tie_word_embeddings": True}
FULL = {"train": {"recompute": "full"}}
DEEP = {"num_hidden_layers": 4}  # also where no stages share them
LORA = {"adapter": {"rank": 4, "alpha": 8, "target": "all-router"}}
LORA_DENSE = {"adapter": {"rank": 4, "alpha": 8}}
DORA = {"adapter": {"rank": 4, "alpha": 8, "type": "dora", "target": ["q_proj", "o_proj"]}}
DENSE_FIRST = {"num_hidden_layers": 5, "mlp_only_layers": [0, 1]}
# name: (method, family, changes of its config, sections, replayed routes, layouts, those of LONG)
COMPOSED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], bool, str, str]] = {
    "tied": ("sft", "qwen3_moe", TIED, {}, False, "pp2-ep2", "pp2-vpp2 tp2-pp2-ep2 pp4 dp2-pp2"),
    "tied, dense": ("sft", "qwen3", {}, {}, False, "tp2-no-sp pp2", "pp2-vpp2 cp2 dp2-tp2"),
    "tied, value head": ("ppo", "qwen3", {}, {}, False, "tp2-no-sp", "pp2 tp2 dp2-pp2"),
    "tied, scalar head": ("reward", "qwen3", {}, {}, False, "pp2-vpp2", "tp2 pp2"),
    "recomputed, replayed": ("grpo", "qwen3_moe", {}, FULL, True, "tp2-pp2-ep2", "tp2-cp2 cp2"),
    "recomputed, replayed, dense layers first": (
        "grpo", "qwen3_moe", DENSE_FIRST, FULL, True, "pp2-vpp2", "tp2-ep2 pp2"
    ),
    "recomputed, value head": ("ppo", "qwen3_moe", {}, FULL, False, "tp2-ep2", "pp2-vpp2"),
    "recomputed, adapter": ("sft", "qwen3_moe", {}, FULL | LORA, False, "tp2-etp2-ep2", "tp2-cp2"),
    "adapter, DoRA": ("sft", "qwen3_moe", {}, DORA, False, "tp2-cp2", "tp2 pp2 dp2"),
    "adapter, value head": ("ppo", "qwen3_moe", {}, LORA, False, "pp2-ep2", "tp2 ep2"),
    "adapter of one layer": (
        "sft", "qwen3_moe", {}, {"adapter": {"rank": 4, "target": ["layers.0"]}}, False, "dp2-pp2",
        "pp2-vpp2 dp2",
    ),
    "one layer trained": (
        "sft", "qwen3_moe", DEEP, {"trainable": ["layers.3"]}, False, "tp2-pp2-ep2", "pp2-vpp2 tp2"
    ),
    "tied embeddings trained": (
        "sft", "qwen3", {}, {"trainable": ["embed_tokens"]}, False, "pp2", "tp2-no-sp"
    ),
    "five layers, three packs": (
        "sft", "qwen3_moe", {"num_hidden_layers": 5}, {}, False, "dp2-pp2", "pp2-vpp2 dp2-cp2"
    ),
    "two packs at once": (
        "dpo", "qwen3_moe", {}, {"train": {"micro_batch": 2}}, False, "tp2-cp2", "dp2 pp2-vpp2"
    ),
    "biases, few KV heads, adapter": (
        "sft", "qwen2", {"num_key_value_heads": 2}, FULL | LORA_DENSE, False, "tp2-no-sp",
        "tp4 pp2-vpp2 cp2",
    ),
    "two layers recomputed at a time": (
        "sft", "qwen3_moe", DEEP, FULL | {"megatron": {"recompute_num_layers": 2}}, False,
        "tp2-ep2", "pp2 cp2",
    ),
    "attention recomputed": (
        "grpo", "qwen3_moe", {}, {"train": {"recompute": "selective"}}, True, "tp2-cp2", "pp2-vpp2"
    ),
    "gathered by all experts": (
        "sft", "qwen3_moe", {}, {"megatron": {"moe_token_dispatcher_type": "allgather"}}, False,
        "tp2-etp2-ep2", "tp2-ep2 cp2-ep2",
    ),
    "activations freed when sent": (
        "sft", "qwen3_moe", {}, {"megatron": {"deallocate_pipeline_outputs": True}}, False, "pp4",
        "dp2-pp2",
    ),
    "sinks, windows, biases": ("dpo", "gpt_oss", {}, {}, False, "tp2-ep2", "cp2-ep2 pp2-vpp2-cp2"),
    "mixtral": ("pretrain", "mixtral", {}, {}, False, "cp2-ep2", "tp2-etp2-ep2 pp2-vpp2-cp2"),
}  # fmt: skip


def composed() -> list[Any]:
    params: list[Any] = []
    for name, case in COMPOSED.items():
        for layout in (*case[-2].split(), *case[-1].split()):
            marks = [] if layout in case[-2].split() else [LONG]
            params.append(pytest.param(name, layout, id=f"{name}, {layout}", marks=marks))
    return params


@pytest.mark.parametrize(("name", "layout"), composed())
def test_what_a_recipe_adds_is_the_same_at_every_layout(
    workers: Workers, cases: Cases, name: str, layout: str
) -> None:
    method, family, changes, sections, routes, _, _ = COMPOSED[name]
    num_packs = 3 if "three packs" in name else 4 if "two packs" in name else enough(layout)
    world, parallel = EVERYWHERE[layout]
    changes = {"num_hidden_layers": layers_for(parallel)} | changes
    make: Callable[[dict[str, Any]], Case] = lambda more: cases.case(  # noqa: E731
        method, family, changes, more, routes=routes, num_packs=num_packs
    )
    plain = {key: own for key, own in sections.items() if key not in ("train", "megatron")}
    wanted = workers.run(1, layouts.run, {}, [make(plain)])[0][0]
    said: set[str] = set()
    for (found,) in workers.run(world, layouts.run, parallel, [make(sections)]):
        said |= set(differences(wanted, found))
    assert not said


# wrong: (layout, changes of the model, what is found to differ)
SEEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "sequence-parallel norms are not summed": ("tp2", {}, "input_layernorm.weight"),
    "tied embeddings are not summed": ("pp2", TIED, "embed_tokens.weight"),
    "the norm counts replicated weights once a rank": ("tp2", {}, "gradient norm of step 1"),
    "keys keep their own gradients": ("cp2", {}, "k_proj.weight"),
    "counts of one replica": ("dp2", {}, "loss of step 1"),
    "one batch to both neighbours": ("pp2-vpp2", {}, "gradient norm of step 1"),
}


@pytest.mark.parametrize("wrong", SEEN)
def test_a_wrong_reduction_is_seen(workers: Workers, cases: Cases, wrong: str) -> None:
    """The last of them is megatron-core's own, which a recipe cannot ask for: when it is right, the
    refusal may go.
    """
    layout, changes, seen = SEEN[wrong]
    world, parallel = LAYOUTS[layout]
    changes = {"num_hidden_layers": layers_for(parallel)} | changes
    case = cases.case("sft", changes=changes, num_packs=3)
    wanted = workers.run(1, layouts.run, {}, [case])[0][0]
    answers = workers.run(world, layouts.run_wrong, wrong, parallel, [case])
    said = [each for (found,) in answers for each in differences(wanted, found)]
    assert any(seen in each for each in said), said
    assert not [e for (f,) in workers.run(world, layouts.run, parallel, [case])
                for e in differences(wanted, f)]  # fmt: skip


def test_one_batch_to_both_neighbours_is_refused() -> None:
    asked = {"megatron": {"batch_p2p_comm": True, "overlap_p2p_comm": False}}
    with pytest.raises(ConfigError, match=r"wrong gradients with parallel\.vpp at"):
        recipe_for("none", {"pp": 2, "vpp": 2}, **asked)
    recipe_for("none", {"pp": 2}, **asked)
    recipe_for("none", {"pp": 4, "vpp": 2}, **asked)
