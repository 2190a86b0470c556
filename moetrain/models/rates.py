"""Which weights learn at a rate of their own: a recipe's `optim.groups`, and LoRA+."""

from collections.abc import Mapping
from typing import NamedTuple

from moetrain.config.optim import OptimGroup
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError
from moetrain.models.adapter import AdapterTable
from moetrain.models.patterns import selected
from moetrain.models.rules import Rule


class Rate(NamedTuple):
    """Highest and last learning rate, the decay of matrices (None: the recipe's), and "muon" where
    that is what steps it.
    """

    lr: float
    min_lr: float
    weight_decay: float | None
    optimizer: str | None = None


def own_rates(
    recipe: Recipe, trained: Mapping[str, Rule], adapters: AdapterTable | None
) -> dict[str, Rate]:
    """By canonical name, of the trained weights that learn otherwise than `optim` says.

    Raises ConfigError for a group of the recipe that nothing is in, or whose decay nothing reads.
    """
    optim = recipe.optim
    plus = 1.0 if recipe.adapter is None else recipe.adapter.loraplus_lr_ratio
    names = _names(recipe, trained, adapters)
    group_of: dict[str, int] = {}
    for number, group in enumerate(optim.groups):
        key = f"optim.groups[{number}].match"
        group_of |= dict.fromkeys(selected(key, names, group.match), number)
    plain = Rate(optim.lr, optim.min_lr, None)
    result: dict[str, Rate] = {}
    for name in names:
        number = group_of.get(name)
        group = None if number is None else optim.groups[number]
        # PEFT's create_loraplus_optimizer multiplies the rate of vectors too.
        ratio = plus if ".lora_B" in name or ".lora_magnitude" in name else 1.0
        high, low = (rate * ratio for rate in optim.rates_of(group))
        decay = None if group is None else group.weight_decay
        rate = Rate(high, low, decay, _stepped_by(recipe, trained[name], group))
        if rate != plain:
            result[name] = rate
    _check_effect(recipe, trained, group_of)
    if optim.name == "muon" and not any(rate.optimizer for rate in result.values()):
        raise ConfigError(
            "optim.name=muon: no matrix of a layer is left to it by what is trained and by"
            " optim.groups. Use optim.name=adamw."
        )
    return result


def by_muon(recipe: Recipe, trained: Mapping[str, Rule]) -> dict[str, Rule]:
    """The part of the table that Muon steps, and which has no second moment."""
    if recipe.optim.name != "muon":
        return {}
    rates = own_rates(recipe, trained, None)
    return {name: trained[name] for name, rate in rates.items() if rate.optimizer}


def _stepped_by(recipe: Recipe, rule: Rule, group: OptimGroup | None) -> str | None:
    """As K. Jordan has it, Muon is for the matrices of layers: embeddings and heads are tables."""
    is_matrix = rule.layer is not None and len(rule.hf_shapes[0]) == 2
    is_left = group is not None and group.name == "adamw"
    return "muon" if recipe.optim.name == "muon" and is_matrix and not is_left else None


def _names(
    recipe: Recipe, trained: Mapping[str, Rule], adapters: AdapterTable | None
) -> dict[str, list[str]]:
    """Canonical name -> Hugging Face names of what it trains."""
    result: dict[str, list[str]] = {}
    for name, rule in trained.items():
        if recipe.router.freeze and ".mlp.router." in name:
            continue
        live = adapters.parts(name) if adapters and name in adapters else [True] * len(rule.hf)
        result[name] = [key for key, is_live in zip(rule.hf, live, strict=True) if is_live]
    return result


def _check_effect(recipe: Recipe, trained: Mapping[str, Rule], group_of: Mapping[str, int]) -> None:
    for number, group in enumerate(recipe.optim.groups):
        rules = [trained[name] for name, other in group_of.items() if other == number]
        key = f"optim.groups[{number}]"
        if not rules:
            raise ConfigError(
                f"{key}: later groups take all that {', '.join(group.match)} matches. Leave the"
                " group out, or put it behind them."
            )
        if group.weight_decay is not None and all(len(rule.hf_shapes[0]) == 1 for rule in rules):
            raise ConfigError(
                f"{key}.weight_decay does nothing: norms and biases have no decay, and"
                f" {', '.join(group.match)} matches nothing else. Leave it out."
            )
