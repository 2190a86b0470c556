"""The package that speaks to Megatron Core. `Engine` is its door; importing this module alone
imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetrain.engine.engine import Engine
    from moetrain.engine.step import StepResult

__all__ = ["Engine", "StepResult"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from moetrain.engine import device

        device.prepare()
        from moetrain.engine import engine, step

        return getattr(engine if name == "Engine" else step, name)
    raise AttributeError(name)
