"""The `rollout` section: who samples answers, how many, and how its weights are kept true."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moetrain.config.section import Section

Count = Annotated[int, Field(ge=1)]
Folder = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(str(path))))]


class RolloutConfig(Section):
    """Sampling answers to learn from."""

    engine: Literal["embedded"] = Field(
        default="embedded",
        description="embedded: a transformers model in the first rank, for small models",
    )
    prompts_per_step: Count = Field(default=8, description="prompts of a batch of rollouts")
    group_size: Count = Field(default=8, description="answers to each prompt")
    max_tokens: Count = Field(default=512, description="of an answer")
    temperature: float = Field(
        default=1.0, gt=0, description="of sampling; training uses the same distribution"
    )
    steps_off: int = Field(
        default=0,
        ge=0,
        description="batches that are sampled ahead of the step in hand; 0: synchronous",
    )
    replay: Folder | None = Field(
        default=None, description="learn from another run's rollouts folder, without an engine"
    )
    eval_prompts: Count | None = Field(
        default=None, description="held-out prompts that are answered; default: all"
    )
    eval_temperature: float = Field(
        default=0.0, ge=0, description="of answers to held-out prompts; 0: greedy"
    )
    routing_replay: bool = Field(
        default=False, description="train with the experts that were chosen at rollout"
    )
    tolerance: float | None = Field(
        default=None,
        gt=0,
        description="largest difference of a log-prob between trainer and rollout engine after a"
        " push; default: 1e-3 in fp32, 0.25 in bf16",
    )
    reward_workers: Count = Field(default=2, description="processes that grade")
    reward_seconds: float = Field(
        default=10.0, gt=0, description="that an answer's grading may take"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.replay is not None and self.steps_off:
            raise ValueError("rollout.replay reads what is there; leave rollout.steps_off out")
        return self
