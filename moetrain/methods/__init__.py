"""Training methods by the name that a recipe gives them."""

from moetrain.methods.base import Estimate, Known, Method, Metrics, Out, Terms
from moetrain.methods.chord import CHORD
from moetrain.methods.chord_sft import CHORD_SFT
from moetrain.methods.cispo import CISPO
from moetrain.methods.dft import DFT
from moetrain.methods.distill import DISTILL, GKD
from moetrain.methods.dpo import DPO, HINGE, IPO, ROBUST
from moetrain.methods.grpo import DAPO, DR_GRPO, GRPO
from moetrain.methods.gspo import GSPO
from moetrain.methods.kto import KTO
from moetrain.methods.on_policy_distill import ON_POLICY_DISTILL
from moetrain.methods.orpo import ORPO
from moetrain.methods.ppo import PPO
from moetrain.methods.pretrain import CPT, PRETRAIN
from moetrain.methods.reinforce import REINFORCE_PP, REINFORCE_PP_BASELINE, RLOO
from moetrain.methods.reward import REWARD
from moetrain.methods.sapo import SAPO
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
    "robust": ROBUST,
    "kto": KTO,
    "orpo": ORPO,
    "simpo": SIMPO,
    "reward": REWARD,
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "sapo": SAPO,
    "rloo": RLOO,
    "reinforce_pp": REINFORCE_PP,
    "reinforce_pp_baseline": REINFORCE_PP_BASELINE,
    "ppo": PPO,
    "chord": CHORD,
    "distill": DISTILL,
    "on_policy_distill": ON_POLICY_DISTILL,
    "gkd": GKD,
}

__all__ = ["METHODS", "Estimate", "Known", "Method", "Metrics", "Out", "Terms"]
