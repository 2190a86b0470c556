"""Training methods by the name that a recipe gives them."""

from moetrain.methods.base import Estimate, Known, Method, Metrics, Out, Terms
from moetrain.methods.chord_sft import CHORD_SFT
from moetrain.methods.dft import DFT
from moetrain.methods.dpo import DPO, HINGE, IPO
from moetrain.methods.kto import KTO
from moetrain.methods.orpo import ORPO
from moetrain.methods.pretrain import CPT, PRETRAIN
from moetrain.methods.reward import REWARD
from moetrain.methods.sft import SFT
from moetrain.methods.simpo import SIMPO

METHODS: dict[str, Method] = {
    "pretrain": PRETRAIN,
    "cpt": CPT,
    "sft": SFT,
    "dft": DFT,
    "chord_sft": CHORD_SFT,
    "dpo": DPO,
    "ipo": IPO,
    "hinge": HINGE,
    "kto": KTO,
    "orpo": ORPO,
    "simpo": SIMPO,
    "reward": REWARD,
}

__all__ = ["METHODS", "Estimate", "Known", "Method", "Metrics", "Out", "Terms"]
