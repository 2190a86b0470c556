"""The `rewards` list of a recipe: names, own files, weights and options."""

import re
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from moetrain.config.reward_code import CodeOptions, Count, Seconds, web_address
from moetrain.config.section import Paths, Section
from moetrain.errors import nearest

JUDGE_PROMPT = """You grade an answer. Be strict; do not reward length.

Question:
{prompt}

Answer:
{completion}

Write one sentence of reasons, then a last line `Score: N` with N from 0 to 10."""


class NoOptions(Section):
    """Nothing to set."""


class FormatOptions(Section):
    """Of `format`."""

    pattern: str | None = Field(
        default=None,
        description="a regular expression for the whole completion; default: think and answer tags",
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return value


class TagCountOptions(Section):
    """Of `tag_count`."""

    tags: list[str] = Field(
        default=["think", "answer"], min_length=1, description="names that stand in <…> and </…>"
    )
    newlines: bool = Field(
        default=False,
        description="count a tag with a newline on each side alone (not before the first nor behind"
        " the last), as open-r1 does",
    )

    @field_validator("tags")
    @classmethod
    def _bare(cls, value: list[str]) -> list[str]:
        odd = next((tag for tag in value if not tag.strip() or set(tag) & set("<>/")), None)
        if odd is not None:
            raise ValueError(f"has {odd!r}: give names without brackets, such as [think, answer]")
        return value


class CodeFormatOptions(Section):
    """Of `code_format`."""

    code_language: str = Field(
        default="python", min_length=1, description="of the block, where no column language says it"
    )


class ReasoningStepsOptions(Section):
    """Of `reasoning_steps`."""

    steps: Count = Field(default=3, description="marks of a step that are enough")


class LengthOptions(Section):
    """Of `length`."""

    target: Count = Field(default=200, description="characters of the best length")


class CosineLengthOptions(Section):
    """Of `cosine_length`."""

    max_length: Count = Field(default=1000, description="characters from which length is the same")
    right_short: float = Field(default=1.0, description="a right answer of no length")
    right_long: float = Field(default=0.5, description="a right answer of max_length")
    wrong_short: float = Field(default=-1.0, description="a wrong answer of no length")
    wrong_long: float = Field(default=-0.5, description="a wrong answer of max_length")


class CosineOptions(Section):
    """Of `cosine`; open-r1's names (its training script has min_value_wrong 0.0)."""

    min_value_wrong: float = Field(
        default=-1.0, description="a wrong answer of no length (open-r1's cosine_min_value_wrong)"
    )
    max_value_wrong: float = Field(default=-0.5, description="a wrong answer of max_len")
    min_value_correct: float = Field(default=0.5, description="a right answer of max_len")
    max_value_correct: float = Field(default=1.0, description="a right answer of no length")
    max_len: Count = Field(default=1000, description="from which length is the same")
    unit: Literal["characters", "tokens"] = Field(
        default="characters", description="of max_len; ms-swift counts tokens"
    )


class RepetitionOptions(Section):
    """Of `repetition`."""

    n: Count = Field(default=3, description="words that are compared together")
    max_penalty: float = Field(
        default=1.0, ge=0, description="subtracted where nothing but repetition is"
    )


class RepetitionPenaltyOptions(Section):
    """Of `repetition_penalty`."""

    ngram_size: Count = Field(
        default=3, description="words, as blanks part them, that are compared together"
    )
    max_penalty: float = Field(
        default=-1.0, le=0, description="added where nothing but repetition is"
    )


Script = Literal[
    "LATIN", "CJK", "JAPANESE", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI", "GREEK", "HEBREW",
    "THAI",
]  # fmt: skip


class LanguageOptions(Section):
    """Of `language`."""

    script: Script | None = Field(default=None, description="of the answer; default: the prompt's")
    score: Literal["most", "share"] = Field(
        default="most",
        description="1 or 0 by most of the letters; the share of words in it (DeepSeek-R1)",
    )
    of: Literal["all", "thought"] = Field(
        default="all", description="the completion, or its thought alone (DeepSeek-R1)"
    )


def _servers(value: list[str]) -> list[str]:
    """Their roots: /classify has no /v1 before it."""
    return [web_address(one).rstrip("/").removesuffix("/v1") for one in value]


class RewardModelOptions(Section):
    """Of `reward_model`."""

    path: str = Field(
        description="a Hugging Face folder with a sequence classification head; with address its"
        " tokenizer alone is read"
    )
    address: Annotated[Paths, AfterValidator(_servers)] = Field(
        default=[],
        description="servers of the model, such as http://HOST:8000, among which answers are dealt:"
        " `moetrain serve MODEL --reward-model`, or `vllm serve FOLDER --runner pooling`",
    )
    model: str | None = Field(
        default=None,
        description="with address: the name they serve it under; default: the first they list",
    )
    key_env: str = Field(
        default="REWARD_MODEL_API_KEY",
        description="with address: the environment variable that holds their key, if any",
    )
    concurrency: Count = Field(
        default=32, description="with address: answers that a server is asked at a time"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: as it was saved"
    )
    batch_size: Count = Field(default=8, description="answers at a time")
    max_tokens: Count = Field(
        default=4096, description="a longer conversation loses its first tokens"
    )
    chat_template: str | None = Field(
        default=None, description="text or file; default: the tokenizer's"
    )
    seconds: Seconds = Field(default=120.0, description="for a batch; with address: for an answer")
    start_seconds: Seconds = Field(default=600.0, description="to load the model")

    @model_validator(mode="after")
    def _all_used(self) -> "RewardModelOptions":
        served, own = ("model", "key_env", "concurrency"), ("device", "dtype", "batch_size")
        idle = (*own, "start_seconds") if self.address else served
        fields = type(self).model_fields
        given = next((n for n in idle if getattr(self, n) != fields[n].default), None)
        if given is not None and self.address:
            raise ValueError(f"{given} does nothing with address: the server decides it")
        if given is not None:
            raise ValueError(f"{given} does nothing without address: it is about servers")
        return self


class JudgeOptions(Section):
    """Of `judge`."""

    url: str = Field(description="of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1")
    model: str = Field(description="its name for the model")
    prompt: str = Field(
        default=JUDGE_PROMPT,
        description="{prompt}, {completion} and {COLUMN} stand for the sample's",
    )
    pattern: str = Field(
        default=r"[Ss]core\W*?([-\u2212]?(?:\d+(?:\.\d+)?|\.\d+))",
        description="finds the number in the judge's words; the last match counts",
    )
    low: float = Field(default=0.0, description="the number that gives 0")
    high: float = Field(default=10.0, description="the number that gives 1")
    max_tokens: Count = Field(default=512, description="of the judge's words")
    temperature: float = Field(default=0.0, ge=0, description="of the judge")
    seconds: Seconds = Field(default=60.0, description="for one request")
    retries: int = Field(
        default=3, ge=0, description="of a request that failed for a passing fault"
    )
    concurrency: Count = Field(default=8, description="requests at a time")
    key_env: str = Field(
        default="MOETRAIN_JUDGE_KEY", description="the environment variable with the server's key"
    )

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        return web_address(value)

    @model_validator(mode="after")
    def _usable(self) -> "JudgeOptions":
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError("pattern must have one group, which is the number")
        if "{completion}" not in self.prompt:
            raise ValueError("prompt must have {completion} in it")
        if self.low == self.high:
            raise ValueError("low and high must differ")
        return self


OPTIONS: dict[str, type[Section]] = {
    "accuracy": NoOptions,
    "exact": NoOptions,
    "agent": NoOptions,
    "format": FormatOptions,
    "code_format": CodeFormatOptions,
    "tag_count": TagCountOptions,
    "reasoning_steps": ReasoningStepsOptions,
    "length": LengthOptions,
    "cosine_length": CosineLengthOptions,
    "cosine": CosineOptions,
    "len_reward": NoOptions,
    "repetition": RepetitionOptions,
    "repetition_penalty": RepetitionPenaltyOptions,
    "language": LanguageOptions,
    "code": CodeOptions,
    "reward_model": RewardModelOptions,
    "judge": JudgeOptions,
}
"""Every reward of moetrain, and its options: NoOptions where it has none."""


class RewardConfig(Section):
    """One part of the reward; the whole is their weighted sum."""

    name: str = Field(description="a reward of moetrain, or FILE.py:FUNCTION")
    weight: float = Field(default=1.0, description="of this part in the sum")
    options: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="keyword arguments of the reward"
    )
    label: str = Field(default="", description="in the ledger; default: the name or the function's")
    batch_size: Count | None = Field(
        default=None,
        description="completions that FILE.py:FUNCTION is called with; default: a prompt's",
    )

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, value: Any) -> Any:
        """With the reward's options checked and complete, and a label."""
        if not isinstance(value, dict):
            return value
        given = dict(cast(dict[str, Any], value))
        name: object = given.get("name")
        options: object = given.get("options") or {}
        if not isinstance(name, str) or not isinstance(options, dict):
            return given
        given["options"] = _checked(name, cast(dict[str, Any], options))
        given["label"] = given.get("label") or name.rpartition(":")[2]
        if given.get("batch_size") is not None and ":" not in name:
            raise ValueError(
                f"rewards: batch_size is for FILE.py:FUNCTION; {name} sees each completion alone"
                " (reward_model has the option batch_size)."
            )
        return given


# Rewards of open-r1, TRL and ms-swift that have another name here.
_FOREIGN = {
    "cf_code": "code with compare: words, language: record, scoring: weighted_sum, no_code: -1 and"
    " no_compile: -0.1",
    "binary_code": "code",
    "ioi_code": "code, for problems that read and write text",
    "soft_overlong": "method.soft_length and method.max_length",
    "soft_overlong_punishment": "method.soft_length and method.max_length",
    "accuracy_reward": "accuracy",
    "format_reward": "format",
    "tag_count_reward": "tag_count",
    "reasoning_steps_reward": "reasoning_steps",
    "cosine_scaled_reward": "cosine",
    "repetition_penalty_reward": "repetition_penalty",
}


def _checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    if ":" in name:  # of a user's own file: its keyword arguments
        return options
    if name not in OPTIONS:
        raise ValueError(
            f"rewards: {name!r} is not known; there are {', '.join(OPTIONS)}, and"
            f" FILE.py:FUNCTION.{_near(name)}"
        )
    section = OPTIONS[name]
    try:
        return section.model_validate(options).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(section.model_fields) or "none"
            raise ValueError(
                f"rewards: {name} has no option {key!r}.{nearest(key, section.model_fields)}"
                f" It has: {allowed}."
            ) from None
        if first["type"] == "missing":
            raise ValueError(f"rewards: {name} needs the option {key!r}.") from None
        message = str(first["msg"]).removeprefix("Value error, ")
        where = f"option {key}: " if key else ""
        raise ValueError(f"rewards: {name}: {where}{message[0].lower()}{message[1:]}.") from None


def _near(name: str) -> str:
    return f" Here it is {_FOREIGN[name]}." if name in _FOREIGN else nearest(name, OPTIONS)


def _as_reward(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


Reward = Annotated[RewardConfig, BeforeValidator(_as_reward)]


def _distinct(rewards: list[RewardConfig]) -> list[RewardConfig]:
    labels = [reward.label for reward in rewards]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"two are called {twice!r}: give one of them another label")
    return rewards


Rewards = Annotated[list[Reward], AfterValidator(_distinct)]


class RewardList(Section):
    """Rewards without a recipe."""

    rewards: Rewards
