"""What a push leaves on disk, and what a reader makes of it: always the weights of the trainer."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from moetrain.errors import RolloutError
from moetrain.rollout import pushed
from moetrain.rollout.pushed import Pushed
from moetrain.rollout.remote.moetrain_weights import Folders, loaded_with, names_in, unseen

Weights = dict[str, Tensor]
NAMES = ("norm", "square", "wide")


def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    norm, square, wide = torch.ones(6), *torch.randn(2, 8, 8, generator=generator)
    return {"norm": norm, "square": square.bfloat16(), "wide": wide.view(2, 32)}


def served(push: Pushed) -> Weights:
    held = Folders(str(link.folder) for link in push.links)
    return {name: held.read(name) for name in held.names()}


def same(found: Weights, wanted: Weights) -> bool:
    """To the bit: NaN is NaN, and -0.0 is not 0.0."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        for name, tensor in wanted.items()
    )


def test_bytes_of_a_push(tmp_path: Path) -> None:
    """A number is 4 bytes of place and itself, a row a place and its numbers, a checksum 8; never
    more than the tensor.
    """
    now = weights()
    push = Pushed(tmp_path, {})
    assert push.write(now.items(), 0, whole=True) == 24 + 128 + 256 == push.whole_bytes
    assert push.write(now.items(), 1, whole=False) == 0
    now["square"][3, 4] = -0.0
    assert push.write(now.items(), 2, whole=False) == 8 + 4 + 2
    now["square"][3, 4] = 0.0
    assert push.write(now.items(), 3, whole=False) == 8 + 4 + 2
    now["square"][5] += 1
    assert push.write(now.items(), 4, whole=False) == 8 + 4 + 16
    now["wide"][0, 0] = float("nan")
    now["norm"] *= 2  # 6 places and 6 numbers are more than the tensor
    assert push.write([(n, now[n]) for n in ("norm", "wide")], 5, whole=False) == 8 + 4 + 4 + 24
    assert same(served(push), now) and push.whole_bytes == 408
    assert names_in(str(push.links[-1].folder)) == {"norm": True, "wide": False}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_pushes_give_the_trainer_s_weights(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """To a reader of all folders, to one that reads what is new to it, and to one that begins in
    the middle.
    """
    push = Pushed(tmp_path_factory.mktemp("weights"), {})
    now = weights()
    push.write(now.items(), 0, whole=True)
    held, version = dict(served(push)), 0
    for number in range(1, 8):
        changed = data.draw(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 64)))
        for name, count in changed.items():
            flat = now[name].view(-1)
            flat[:count] += 1
        push.write([(name, now[name]) for name in changed], number, whole=False)
        if data.draw(st.booleans()):  # a server of the push before, that was not asked each time
            folders = unseen(push.message(version), version)
            fresh = Folders(str(link.folder) for link in push.links)
            held |= {name: fresh.read(name) for f in folders for name in names_in(f)}
            version = number
            assert same(held, now)
        if data.draw(st.integers(0, 4)) == 0:
            whole = push.whole()
            assert same({n: Folders([str(whole)]).read(n) for n in NAMES}, now)
        push.tidy()
        assert same(served(push), now)


def test_a_folder_that_says_nothing_more_goes(tmp_path: Path) -> None:
    """With an adapter the same matrices come whole every time: a base, and the last of them."""
    push, now = Pushed(tmp_path, {}), weights()
    push.write(now.items(), 0, whole=True)
    for number in range(1, 5):
        now["wide"] += 1
        push.write([("wide", now["wide"])], number, whole=False)
        push.tidy()
        assert [link.version for link in push.links] == [0, number]
        assert len(list(tmp_path.iterdir())) == 2
    for tensor in now.values():
        tensor += 1
    push.write(now.items(), 5, whole=False)
    assert [link.version for link in push.links] == [5], "everything moved: a base of its own"
    assert same(served(push), now)


def test_folders_that_are_many_or_large_make_room_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past twice the weights, or past a number of folders."""
    monkeypatch.setattr(pushed, "MOST_LINKS", 5)
    sizes: dict[str, list[int]] = {"large": [], "many": []}
    for case, found in sizes.items():
        push, now = Pushed(tmp_path / case, {}), weights()
        if case == "many":
            now = {f"norm{i}": torch.ones(6) for i in range(10)}
        for number in range(8):
            whole = push.held is None
            if case == "many":
                now[f"norm{number}"] += 1
            else:
                now["norm"] += number == 1
                now["wide"][0, :20] += 1
            found.append(push.write(now.items(), number, whole=whole))
            push.tidy()
            files = push.folder.glob("*/*.safetensors")
            size = sum(t.nbytes for file in files for t in load_file(file).values())
            assert size == sum(link.size for link in push.links) <= 3 * push.whole_bytes
            assert same(served(push), now)
    row = 8 + 4 + 128
    assert sizes["large"] == [408, 24 + row, row, row, 408, row, row, row]
    assert sizes["many"] == [240, 24, 24, 24, 24, 24, 240, 24]


def test_what_is_new_to_a_server(tmp_path: Path) -> None:
    links = [{"version": v, "folder": str(v)} for v in (3, 5, 6)]
    assert unseen({"links": links, "since": 5}, 5) == ["6"]
    assert unseen({"links": links, "since": 4}, 4) == ["5", "6"], "what of 4 was left out is in 5"
    for held in (None, 4, 6):  # it began anew, or somebody else pushed to it
        assert unseen({"links": links, "since": 5}, held) == ["3", "5", "6"]
    assert unseen({"links": links, "since": None}, None) == ["3", "5", "6"]


def test_a_part_of_what_was_never_whole_is_refused(tmp_path: Path) -> None:
    push, now = Pushed(tmp_path, {}), weights()
    push.write(now.items(), 0, whole=True)
    now["wide"][0, 0] += 1
    push.write(now.items(), 1, whole=False)
    with pytest.raises(ValueError, match=r"parts of .*wide.*, which no folder has whole"):
        Folders([str(push.links[1].folder)])


def test_parts_on_another_base_are_refused(tmp_path: Path) -> None:
    """Of a push too small for the proof to see."""
    push, now = Pushed(tmp_path, {}), weights()
    push.write(now.items(), 0, whole=True)
    for number in (1, 2):
        now["wide"][0, number] += 1e-6
        push.write(now.items(), number, whole=False)
    base, _, last = (str(link.folder) for link in push.links)
    with pytest.raises(ValueError, match="parts of wide do not give what the trainer has"):
        Folders([base, last]).read("wide")
    shutil.rmtree(push.links[1].folder)
    now["wide"] += 1
    with pytest.raises(RolloutError, match=r"parts of wide .* were changed: start again"):
        push.write(now.items(), 3, whole=False)
    shard = push.links[0].folder / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(RolloutError, match="were changed: start again"):
        push.whole()
    shutil.rmtree(push.links[0].folder)
    with pytest.raises(RolloutError, match="which no folder has whole"):
        push.write([("norm", now["norm"])], 3, whole=False)


def test_what_vllm_loads_together() -> None:
    """Of a layer with a tensor that moved: all experts, or all but experts."""
    layer = "model.layers.10."
    names = {
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        layer + "self_attn.q_proj.weight": layer,
        layer + "mlp.gate.weight": layer,
        layer + "mlp.shared_experts.up_proj.weight": layer,
        layer + "mlp.shared_expert_gate.weight": layer,
        layer + "mlp.experts.3.up_proj.weight": layer + "experts",
        layer + "mlp.experts.gate_up_proj": layer + "experts",
        layer + "block_sparse_moe.experts.0.w1.weight": layer + "experts",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: loaded_with(name) for name in names} == names
