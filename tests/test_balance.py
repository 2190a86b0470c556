"""A balance of experts over all tokens of a step: transformers' loss of the whole batch, and its
gradients, whatever the packs, micro-batches and ranks.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_parity import as_on_disk, sequences

from moetrain.testing import ranks
from moetrain.testing.gloo import Workers

Tiny = Callable[[str], tuple[str, Any]]
WEIGHT = 0.7
ROUTER = {"router": {"aux_loss": WEIGHT, "balance": "global"}}
LAYOUTS: dict[str, tuple[int, dict[str, int], int, dict[str, Any]]] = {
    # name: (world, layout, packs, sections)
    "one": (1, {}, 2, {}),
    "more packs, recompute": (1, {}, 3, {"train": {"recompute": "full"}}),
    "one micro-batch": (1, {}, 2, {"train": {"micro_batch": 2}}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}, 2, {}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}, 2, {}),
    "cp2": (2, {"cp": 2}, 2, {}),
    "dp2": (2, {}, 4, {"train": {"global_batch": 4}}),
}


@pytest.mark.gloo
def test_the_loss_and_its_gradients_are_of_the_whole_step(workers: Workers, tiny: Tiny) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    folder, model = tiny("qwen3_moe")
    model.zero_grad()
    count, data = sum(len(one) - 1 for one in sequences()), sequences()
    outs = [model(torch.tensor([one]), output_router_logits=True) for one in data]
    logp = [torch.log_softmax(out.logits[0, :-1], -1) for out in outs]
    total = -torch.stack(
        [
            each.gather(1, torch.tensor(one[1:])[:, None]).sum()
            for each, one in zip(logp, data, strict=True)
        ]
    ).sum()
    num_experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    balance = []
    for layer in zip(*(out.router_logits for out in outs), strict=True):
        # transformers (5.19) adds the k choices of a token up, Megatron takes their mean.
        loss = load_balancing_loss_func((torch.cat(layer),), num_experts, top_k)
        balance.append(loss / top_k)
    (total / count + WEIGHT * torch.stack(balance).sum()).backward()
    wanted = as_on_disk(model, {n: p.grad.clone() for n, p in model.named_parameters()})
    for name, (world, parallel, packs, sections) in LAYOUTS.items():
        given = (folder, parallel, data, packs, ROUTER | sections)
        loss, _, grads = workers.run(world, ranks.gradients, *given)[0]
        assert loss == pytest.approx(total.item() / count, rel=1e-5), name
        for key, grad in grads.items():
            assert (grad - wanted[key]).norm() <= 1e-4 * wanted[key].norm() + 1e-9, (name, key)
    steps = workers.run(1, ranks.losses, folder, {}, [data], 2, ROUTER)[0]
    found = steps[0][2]["aux_loss"]
    assert found == pytest.approx(torch.stack(balance).mean().item(), rel=1e-6)
    apart = workers.run(1, ranks.losses, folder, {}, [data], 2, {"router": {"aux_loss": WEIGHT}})[0]
    assert apart[0][2]["aux_loss"] > found * 1.01, "sequences are less even than a batch of them"
