"""What the weight table says of checkpoints, against Megatron's own modules."""

from typing import Any

from moetrain.engine import Engine
from moetrain.engine.checkpoint import model_state


def check_saved_parts(engine: Engine) -> None:
    """What the weight table says of a parameter's part of a checkpoint is what Megatron's own
    modules say, experts and sinks aside, which are not Megatron's, and but for the names of norms.
    """
    names = ("key", "local_shape", "global_shape", "global_offset", "axis_fragmentations")
    names += ("replica_id", "prepend_axis_num", "allow_shape_mismatch")

    def shown(part: Any) -> list[Any]:
        if hasattr(part, "build"):
            return [part.key, part.replica_id, *(shown(one) for one in part.build())]
        return [*(getattr(part, name) for name in names), float(part.data.detach().double().sum())]

    ours = model_state(engine.chunks, engine.model, engine.world)
    for i, chunk in enumerate(engine.chunks):
        theirs = chunk.sharded_state_dict()
        weights = {name for name in theirs if not name.endswith("_extra_state")}
        weights |= {name for name, _ in chunk.named_parameters() if ".experts." in name}
        assert weights == ours[f"model{i}"].keys()
        for name in weights:
            if ".experts." not in name and not name.endswith("softmax_offset"):
                saved, wanted = shown(ours[f"model{i}"][name]), shown(theirs[name])
                assert saved[1:] == wanted[1:], name
                assert saved[0] == wanted[0] or "norm" in name, name
