"""What a benchmark is: a file of questions, and how they are asked and scored. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from moetrain.config.answering import BENCH
from moetrain.config.load import explain, read_content
from moetrain.config.rewards import Reward, RewardConfig
from moetrain.config.rollout import CUTS, RolloutConfig
from moetrain.config.section import Section
from moetrain.errors import ConfigError

Count = Annotated[int, Field(ge=1)]


class BenchConfig(Section):
    """A benchmark."""

    name: str = Field(min_length=1, description="what the report calls it")
    data: str = Field(description="file of records, from the folder of this one; or builtin:NAME")
    source: str = Field(default="", description="where to get the file; shown when it is missing")
    question: str = Field(default="question", description="column of the question")
    answer: str | None = Field(
        default=None, description="column of the right answer; scorers see it as `answer`"
    )
    where: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="only records with these values"
    )
    prompt: str = Field(
        default="{question}",
        description="what is asked; {question} and {COLUMN} stand for the record's",
    )
    system: str | None = Field(default=None, description="a system message before it")
    scorer: Reward = Field(description="a reward: accuracy, exact, judge, code, FILE.py:FUNCTION")
    rewards: list[Reward] = Field(
        default_factory=list[RewardConfig],
        description="other rewards of each answer, by which --best-of ranks",
    )
    right: float = Field(default=1.0, description="least score of a right answer")
    ungraded: Literal["wrong", "leave_out"] = Field(
        default="wrong",
        description="what an answer is that the scorer failed on, or gave None; wrong: 0",
    )
    scale: tuple[float, float] | None = Field(
        default=None, description="tell the mean score as a number from the first to the second"
    )
    samples: Count = Field(default=1, description="answers to each question")
    pass_at: list[Count] = Field(
        default=[1], description="k of pass@k; none: only the mean score is reported"
    )
    vote: bool = Field(default=True, description="majority vote, where there are several answers")
    limit: Count | None = Field(default=None, description="first questions only, for a quick look")
    seed: int = Field(default=1234, ge=0, lt=2**32, description="of the answers")
    rollout: RolloutConfig = Field(
        default=RolloutConfig(), description="who answers; eval_temperature is the temperature"
    )

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        labels = [self.scorer.label]
        for reward in self.rewards:
            if reward.label in labels:
                raise ValueError(
                    f"scorer and rewards: two are called {reward.label!r}: give one of them another"
                    " label"
                )
            if reward.weight != 1.0:
                raise ValueError(
                    f"rewards: the weight of {reward.label} does nothing, since rewards here rank"
                    " answers one by one: leave it out"
                )
            labels.append(reward.label)
        return self

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.pass_at and max(self.pass_at) > self.samples:
            raise ValueError(
                f"pass_at {max(self.pass_at)} needs as many answers; samples is {self.samples}"
            )
        if self.samples > 1 and self.rollout.eval_temperature == 0:
            raise ValueError(
                f"samples={self.samples} greedy answers are one and the same: set"
                " rollout.eval_temperature"
            )
        plain = RolloutConfig()
        given = [n for n in CUTS if getattr(self.rollout, n) != getattr(plain, n)]
        if given and self.rollout.eval_temperature == 0:
            raise ValueError(
                f"rollout.{given[0]} does nothing for greedy answers: set"
                f" rollout.eval_temperature, or leave {given[0]} out"
            )
        return self


def load_bench(path: Path, overrides: Sequence[str] = ()) -> BenchConfig:
    """Read a benchmark's YAML and lay overrides over it. Raises ConfigError."""
    content = read_content(path, overrides, "a benchmark")
    content.setdefault("name", path.stem)
    try:
        bench = BenchConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, BenchConfig)}") from None
    BENCH.check(f"rollout.{key}" for key in sorted(bench.rollout.model_fields_set))
    return bench
