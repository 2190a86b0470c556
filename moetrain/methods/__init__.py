"""Training methods by the name that a recipe gives them."""

from moetrain.methods.base import Method, Metrics, Out, Reduce
from moetrain.methods.pretrain import CPT, PRETRAIN
from moetrain.methods.sft import SFT

METHODS: dict[str, Method] = {
    "pretrain": PRETRAIN,
    "cpt": CPT,
    "sft": SFT,
}

__all__ = ["METHODS", "Method", "Metrics", "Out", "Reduce"]
