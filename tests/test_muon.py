"""Muon: its iteration against singular values and its authors' formula, and its steps at every
layout against the same formula on Hugging Face matrices.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_groups import grouped, rates, replay
from test_parity import sequences

from moetrain.config.load import recipe_from
from moetrain.errors import ConfigError
from moetrain.layout.memory import checkpoint_bytes, static_bytes
from moetrain.layout.mesh import plan_mesh
from moetrain.models import read_model
from moetrain.ops.orthogonal import orthogonal, scale_of
from moetrain.testing import optimizing
from moetrain.testing.gloo import Workers
from moetrain.testing.tiny import CONFIGS

Tiny = Callable[..., tuple[str, Any]]


def published(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """zeropower_via_newtonschulz5 of https://kellerjordan.github.io/posts/muon, in fp32."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = g / (g.norm() + 1e-7)
    if g.size(0) > g.size(1):
        x = x.mT
    for _ in range(steps):
        s = x @ x.mT
        y = b * s + c * s @ s
        x = a * x + y @ x
    return x.mT if g.size(0) > g.size(1) else x


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (1, 5)])
def test_the_iteration(shape: tuple[int, int]) -> None:
    """It keeps the singular vectors, and brings the values that are not tiny near 1."""
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    found = orthogonal(matrix, 5, torch.float32)
    torch.testing.assert_close(found, published(matrix), rtol=1e-5, atol=1e-6)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ found @ v.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4
    assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.25)).all()
    low = orthogonal(matrix, 5, torch.bfloat16)
    assert low.dtype == torch.float32 and (low - found).abs().max() < 0.05
    assert not orthogonal(torch.zeros(3, 4), 5, torch.float32).any()


def test_scales() -> None:
    assert scale_of(48, 12, "spectral") == scale_of(12, 48, "spectral") == 48**0.5
    assert (scale_of(48, 12, "shape_scaling"), scale_of(12, 48, "shape_scaling")) == (2.0, 1.0)
    assert (scale_of(48, 12, "unit_rms_norm"), scale_of(12, 48, "unit_rms_norm")) == (2.0, 0.5)


def test_who_is_stepped_by_muon() -> None:
    found = rates(**grouped({"match": "mlp.gate", "name": "adamw"}, name="muon"))
    assert {rate.optimizer for rate in found.values()} == {"muon"}
    layer = {name.partition(".1.")[2] for name in found if name.startswith("decoder.layers.1.")}
    assert {name for name in layer if "experts" not in name} == {
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
    }
    assert sum("experts" in name for name in layer) == 2 * CONFIGS["qwen3_moe"]["num_experts"]
    assert not any(name.startswith(("embedding", "output")) for name in found)


def test_a_plan_knows_that_matrices_have_one_moment() -> None:
    hf = CONFIGS["qwen3_moe"]
    model = read_model(hf)
    matrices = sum(
        rule.num_params
        for rule in model.table.values()
        if rule.layer is not None and len(rule.hf_shapes[0]) == 2
    )
    content: dict[str, Any] = {
        "run_dir": "r", "model": {"hf": hf}, "method": "sft", "data": {"train": ["a"]},
        "train": {"steps": 1},
    }  # fmt: skip
    found: dict[str, list[int]] = {}
    for name in ("adamw", "muon"):
        recipe = recipe_from(content | {"optim": {"name": name}})
        (stage,) = static_bytes(model, plan_mesh(recipe.parallel, 1), recipe)
        found[name] = [stage.optimizer, checkpoint_bytes(model.table, recipe, model.table)]
    assert [a - b for a, b in zip(found["adamw"], found["muon"], strict=True)] == [4 * matrices] * 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"optim": {"name": "muon"}, "adapter": {}}, "optim.name.*factors.*adamw trains them"),
    ({"optim": {"name": "muon", "state_dtype": "bf16"}}, "optim.state_dtype.*momentum is fp32"),
    ({"optim": {"name": "muon", "offload": 0.5}}, "optim.offload"),
    ({"optim": {"muon_momentum": 0.9}}, "optim.muon_momentum.*optim.name=muon reads it"),
    (grouped({"match": "experts", "name": "adamw"}), "name is for optim.name=muon"),
    ({"optim": {"name": "muon"}, "trainable": ["norm", "lm_head"]}, "no matrix of a layer is left"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
def test_muon_is_refused_where_it_does_nothing(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rates(**sections)


# Steps


class Reference(torch.optim.Optimizer):
    """Muon as published for matrices of layers, AdamW for the rest; no layout is known here."""

    def __init__(self, params: dict[str, torch.nn.Parameter], adamw: Callable[[str], bool]):
        own = {name: p for name, p in params.items() if not adamw(name) and ".layers." in name}
        self.matrices = [p for p in own.values() if p.dim() == 2]
        ids = {id(p) for p in self.matrices}
        rest = [p for p in params.values() if id(p) not in ids]
        plain = [p for p in rest if p.dim() > 1], [p for p in rest if p.dim() == 1]
        groups = [{"params": p, "weight_decay": d} for p, d in zip(plain, (0.5, 0.0), strict=True)]
        self.rest = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
        super().__init__(self.matrices, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.rest.step()
        for param in self.matrices:
            grad, state = param.grad, self.state[param]
            assert grad is not None
            buffer = state.setdefault("momentum", torch.zeros_like(param))
            buffer.lerp_(grad, 1 - 0.9)
            moved = grad.lerp(buffer, 0.9)
            # Of length 1, so that the 1e-7 there shortens no small gradient.
            update = published(moved / moved.norm().clamp(min=1e-30), 4)
            param.mul_(1 - 1e-3 * 0.5)
            param.sub_(update, alpha=1e-3 * 0.3 * max(param.shape) ** 0.5)


MUON = {
    "optim": {
        "name": "muon", "lr": 1e-3, "weight_decay": 0.5, "muon_momentum": 0.9,
        "muon_num_ns_steps": 4, "muon_extra_scale_factor": 0.3,
        "groups": [{"match": "mlp.gate", "name": "adamw"}],
    },
    "train": {"global_batch": 2},
}  # fmt: skip
LAYOUTS: dict[str, tuple[str, int, dict[str, int]]] = {
    "one": ("qwen3_moe", 1, {}),
    "dp2": ("qwen3_moe", 2, {}),
    "tp2-ep2": ("qwen3_moe", 2, {"tp": 2, "ep": 2}),
    "pp2-vpp2": ("qwen3_moe", 2, {"pp": 2, "vpp": 2}),
    "cp2, experts etp2": ("qwen3_moe", 2, {"cp": 2, "etp": 2}),
    "tp2, dp2": ("qwen3_moe", 4, {"tp": 2}),
    "a shared expert, tp2": ("qwen2_moe", 2, {"tp": 2}),
    "experts with biases, tp2-ep2": ("gpt_oss", 2, {"tp": 2, "ep": 2}),
    "dense, tied, tp2": ("qwen3", 2, {"tp": 2}),
}


@pytest.mark.gloo
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_step_is_the_papers_at_every_layout(
    workers: Workers, tiny: Tiny, tmp_path: Path, case: str
) -> None:
    """And a run that is resumed is the same, bit for bit; at another layout to a rounding."""
    family, world, parallel = LAYOUTS[case]
    folder, _ = tiny(family, parallel)
    made = tmp_path / "checkpoint"
    arguments = (sequences(), MUON if "moe" in family else dense(MUON), made)
    before, found = workers.run(world, optimizing.steps, folder, parallel, *arguments)[0]
    params = {name: torch.nn.Parameter(weight.clone()) for name, weight in before.items()}
    replay(params, Reference(params, lambda name: name.endswith("mlp.gate.weight")), found)
    again = workers.run(world, optimizing.resumed, folder, parallel, *arguments)[0]
    assert all(torch.equal(again[name], weight) for name, weight in found[-1][1].items())
    names = (made / ".metadata").read_bytes()
    written = set(re.findall(rb"state\.(exp_avg\w*)\.\S*?(\w+)\.weight", names))
    assert {moment for moment, name in written if name == b"linear_proj"} == {b"exp_avg"}
    assert {moment for moment, name in written if name == b"word_embeddings"} == {
        b"exp_avg", b"exp_avg_sq",
    }  # fmt: skip
    if case == "tp2-ep2":
        (other,) = workers.run(1, optimizing.resumed, folder, {}, *arguments)
        for name, weight in found[-1][1].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=2e-6)


def dense(sections: dict[str, Any]) -> dict[str, Any]:
    """Without the group of the router."""
    return sections | {"optim": {k: v for k, v in sections["optim"].items() if k != "groups"}}
