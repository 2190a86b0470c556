"""Models: a Hugging Face config to parts, and one weight table for both directions.

Imports no torch.
"""

import json
import re
from difflib import SequenceMatcher
from functools import lru_cache

from moetrain.errors import ConfigError, nearest
from moetrain.models import config
from moetrain.models.config import HfConfig, architecture_of, vocab_head
from moetrain.models.families import FAMILIES
from moetrain.models.model import Model
from moetrain.models.rules import Rule

__all__ = ["FAMILIES", "HfConfig", "Model", "Rule", "read_model", "with_scalar_head"]


def read_model(hf: HfConfig, *, value_head: bool = False) -> Model:
    """The model of a config.json; with `value_head` also PPO's. One object for equal configs.

    Raises ConfigError.
    """
    try:
        text = json.dumps(hf, sort_keys=True, default=repr)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"model config: it cannot be written as JSON ({error})") from None
    return _read(text, value_head)


@lru_cache(maxsize=8)
def _read(text: str, value_head: bool) -> Model:
    hf: HfConfig = json.loads(text)
    model = FAMILIES[architecture(hf)].build(hf)
    return model.with_value_head() if value_head else model


def with_scalar_head(hf: HfConfig) -> dict[str, object]:
    """The config of the same model that ends in one number per token. Raises ConfigError."""
    return config.with_scalar_head(hf, architecture(hf))


def architecture(hf: HfConfig) -> str:
    """The key in FAMILIES of a config.json: by `architectures`, or by `model_type` where that is
    absent. Raises ConfigError.
    """
    known = ", ".join(FAMILIES)
    name = architecture_of(hf)
    if name is not None:
        if vocab_head(name) not in FAMILIES:
            raise ConfigError(
                f"model config: architecture {name!r} is unknown; known: {known}."
                f"{_misspelt(name, hf)}"
            )
        return vocab_head(name)
    model_type = hf.get("model_type")
    for key, family in FAMILIES.items():
        if family.model_type == model_type:
            return key
    raise ConfigError(
        f"model config: architectures is missing and model_type = {model_type!r} is unknown; "
        f"give architectures: [one of {known}]"
    )


def _misspelt(name: str, hf: HfConfig) -> str:
    """The known architecture that is meant, where it is not another family's that is spelt alike:
    such a one has another model_type, or another number or word in its name.
    """
    model_type = hf.get("model_type")
    meant = [known for known in FAMILIES if _alike(known, name)]
    if model_type is not None:
        meant = [known for known in meant if FAMILIES[known].model_type == model_type]
    return "" if name.startswith("Mistral") else nearest(name, meant)


def _alike(known: str, name: str) -> bool:
    words, others = (re.findall(r"[A-Z]+[a-z]*|\d+", n) for n in (known, name))
    return len(words) == len(others) and all(
        a == b or (a.isalpha() and SequenceMatcher(None, a, b).ratio() > 0.7)
        for a, b in zip(words, others, strict=True)
    )
