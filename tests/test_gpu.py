"""The engine on one CUDA device, against transformers on CPU and against itself.

Sizes are multiples of 16 bytes, which CUDA's grouped matmul asks for in bf16; the CPU tests keep
the odd ones.
"""

import importlib.util
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.testing.tiny import save_model

# Read once, when cuBLAS makes its workspace; without it torch refuses to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HAS_GPU = torch.cuda.is_available()
HAS_TE = HAS_GPU and importlib.util.find_spec("transformer_engine") is not None
BACKENDS = ["torch", "te"]
ALIGNED = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32}


def proves(claim: str) -> Callable[[Any], Any]:
    """Mark a GPU test; where there is no GPU, the reason for skipping is what stays unproven."""
    skip = pytest.mark.skipif(not HAS_GPU, reason=f"no GPU, so this stays unproven: {claim}")
    return lambda test: pytest.mark.gpu(skip(test))


def need(backend: str) -> None:
    """Skip a case whose backend this machine lacks."""
    if backend == "te" and not HAS_TE:
        pytest.skip("no Transformer Engine, so this stays unproven: the te backend")


def sequences(seed: int, count: int = 6) -> list[list[int]]:
    """Token sequences of different lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(200) for _ in range(rng.randrange(6, 24))] for _ in range(count)]


def on_gpu(function: Callable[..., Any], *args: Any) -> Any:
    """Call one of testing.ranks' functions in this process, alone in its own process group."""
    from moetrain.engine.world import leave

    try:
        return function(*args)
    finally:
        leave()
        torch.use_deterministic_algorithms(False)


def setup(backend: str, dtype: str, **train: Any) -> dict[str, Any]:
    """Recipe sections of a run on the GPU."""
    return {"model": {"backend": backend, "dtype": dtype}, "train": train}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder: Path = tmp_path_factory.mktemp("aligned")
    return str(folder), save_model("qwen3_moe", folder, **ALIGNED)


@proves("fp32 gradients on CUDA equal transformers' on CPU")
def test_gradients_equal_transformers(model: tuple[str, Any]) -> None:
    from moetrain.testing import ranks
    from tests.test_parity import reference_gradients

    folder, reference = model
    data = sequences(0)
    wanted_loss, wanted = reference_gradients(reference, data)
    loss, _, found = on_gpu(ranks.gradients, folder, {}, data, 2, setup("torch", "fp32"))
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert set(found) == set(wanted)
    for name, grad in found.items():
        assert (grad.cpu() - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-7, name


@proves("bf16 training on CUDA follows fp32 training, with the torch and te backends")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_losses_follow_fp32(model: tuple[str, Any], backend: str) -> None:
    from moetrain.testing import ranks

    need(backend)
    steps = [sequences(0)] * 20
    exact = on_gpu(ranks.losses, model[0], {}, steps, 2, setup("torch", "fp32"))
    rough = on_gpu(ranks.losses, model[0], {}, steps, 2, setup(backend, "bf16"))
    assert exact[-1][0] < 0.7 * exact[0][0], "the model did not learn what it saw 20 times"
    for (wanted, _, _), (found, _, _) in zip(exact, rough, strict=True):
        assert found == pytest.approx(wanted, rel=0.03)


@proves("deterministic mode gives the same bits twice on CUDA, with the torch and te backends")
@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_mode_repeats_itself(model: tuple[str, Any], backend: str) -> None:
    from moetrain.testing import ranks

    need(backend)
    sections = setup(backend, "bf16", deterministic=True)
    runs = [
        on_gpu(ranks.losses, model[0], {}, [sequences(i) for i in range(5)], 2, sections)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@proves("recomputation and micro-batch size change no loss on CUDA")
@pytest.mark.parametrize("train", [{"recompute": "full"}, {"micro_batch": 2}], ids=str)
def test_memory_savers_change_nothing(model: tuple[str, Any], train: dict[str, Any]) -> None:
    from moetrain.testing import ranks

    steps = [sequences(i) for i in range(3)]
    plain = on_gpu(ranks.losses, model[0], {}, steps, 2, setup("torch", "fp32"))
    saved = on_gpu(ranks.losses, model[0], {}, steps, 2, setup("torch", "fp32", **train))
    for (wanted, norm, _), (found, found_norm, _) in zip(plain, saved, strict=True):
        assert (found, found_norm) == pytest.approx((wanted, norm), rel=1e-5)


@proves("a checkpoint written on CUDA resumes to the same bits, optimizer included, Muon's too")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_restored_engine_goes_on_as_if_never_stopped(
    model: tuple[str, Any], backend: str, optimizer: str, tmp_path: Path
) -> None:
    from moetrain.engine import Engine
    from moetrain.methods import METHODS
    from moetrain.testing import ranks

    need(backend)
    sections = setup(backend, "bf16", deterministic=True) | {"optim": {"name": optimizer}}
    recipe = ranks.recipe_for(model[0], {}, **sections)
    packs = [ranks.packs_of(sequences(i), 2) for i in range(6)]

    def train(restore: bool) -> list[float]:
        engine = Engine(recipe)
        if restore:
            engine.restore(tmp_path / "saved")
        rest = packs[3:] if restore else packs
        losses: list[float] = []
        for i, batch in enumerate(rest):
            if not restore and i == 3:
                engine.save(tmp_path / "saved", {})
            losses.append(engine.step(batch, METHODS["sft"]).loss)
        return losses[-3:]

    assert on_gpu(train, False) == on_gpu(train, True)


@proves("weights loaded to CUDA come back bit for bit")
@pytest.mark.parametrize("backend", BACKENDS)
def test_round_trip_is_bit_exact(model: tuple[str, Any], backend: str) -> None:
    from safetensors.torch import load_file

    from moetrain.engine import Engine
    from moetrain.testing import ranks

    need(backend)

    def export() -> dict[str, torch.Tensor]:
        recipe = ranks.recipe_for(model[0], {}, **setup(backend, "fp32"))
        return {name: w.cpu() for name, w in Engine(recipe, train=False).export()}

    wanted = load_file(f"{model[0]}/model.safetensors")
    found = on_gpu(export)
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


@proves("the optimizer's state on the host gives the losses of the state on the GPU")
def test_offloaded_optimizer_changes_nothing(model: tuple[str, Any]) -> None:
    from moetrain.testing import ranks

    steps = [sequences(i) for i in range(4)]
    sections = setup("torch", "bf16")
    here = on_gpu(ranks.losses, model[0], {}, steps, 2, sections)
    there = on_gpu(ranks.losses, model[0], {}, steps, 2, sections | {"optim": {"offload": 1.0}})
    for (wanted, _, _), (found, _, _) in zip(here, there, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
