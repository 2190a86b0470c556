"""Training methods by the name that a recipe gives them."""

from moetrain.methods.base import Estimate, Known, Method, Metrics, Out, Terms
from moetrain.methods.pretrain import CPT, PRETRAIN
from moetrain.methods.sft import SFT

METHODS: dict[str, Method] = {
    "pretrain": PRETRAIN,
    "cpt": CPT,
    "sft": SFT,
}

__all__ = ["METHODS", "Estimate", "Known", "Method", "Metrics", "Out", "Terms"]
