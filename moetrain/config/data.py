"""The `data` section: what to train and evaluate on."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from moetrain.config.section import Count, Folder, Fraction, Location, Paths, Section

# The template call's own arguments, which neither a recipe nor a record may replace.
TEMPLATE_CALL = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversations",
    "messages",
    "return_assistant_tokens_mask",
    "tokenize",
    "tools",
)


class DataConfig(Section):
    """What to train and evaluate on."""

    train: Paths = Field(
        min_length=1,
        description="path or list; index prefixes for pretrain and cpt; builtin:NAME too",
    )
    weights: list[float] | None = Field(
        default=None, description="blend weights of data.train, for pretrain and cpt"
    )
    eval: Paths = Field(default_factory=list, description="held-out data, as data.train")
    eval_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the records of each data.train path, one at least, that is held out"
        " and evaluated on, in place of data.eval; not for corpora",
    )
    take: list[Count | None] | None = Field(
        default=None,
        description="records of each data.train path that are used, chosen by the seed (without"
        " data.shuffle: the first); null: all; more than there are: some again; not for corpora",
    )
    demonstrations: Paths = Field(
        default_factory=list,
        description="worked answers, as for sft, that chord learns from in addition to its own",
    )
    seq_len: Count = Field(
        default=4096, description="tokens of a pack, and the most of one sequence"
    )
    too_long: Literal["truncate", "keep_end", "reject"] = Field(
        default="truncate",
        description="of records over data.seq_len: truncate keeps their start, keep_end their end;"
        " the rejected are in rejected.jsonl",
    )
    max_rejected: Fraction = Field(
        default=0.05, description="stop when a larger share of records is unusable"
    )
    pack: bool = Field(
        default=True,
        description="several records in one pack, which do not see each other; not for corpora",
    )
    document_mask: bool = Field(
        default=False,
        description="documents of a corpus that share a pack do not see each other, and positions"
        " begin anew in each (Megatron's reset_attention_mask with reset_position_ids)",
    )
    eod_mask_loss: bool = Field(
        default=False,
        description="do not learn what follows an end-of-document token: the next document's first"
        " token, in a corpus",
    )
    share_prompt: bool = Field(
        default=True,
        description="compute a preference record's prompt once; false: two whole sequences",
    )
    cache: Folder | None = Field(
        default=None, description="default: MOETRAIN_CACHE, else ~/.cache/moetrain"
    )
    reference: Folder | None = Field(
        default=None,
        description="folder of reference log-probs made elsewhere; default: computed, and cached",
    )
    shuffle: bool = Field(
        default=True, description="a new order every epoch; pretrain and cpt always shuffle"
    )
    chat_template: Location | None = Field(
        default=None, description="a template file to use in place of the tokenizer's"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="given to the chat template, as {enable_thinking: false}; a record's own win",
    )
    system: str | None = Field(
        default=None, description="the system message of records that have none"
    )
    empty_thoughts: bool = Field(
        default=True,
        description="learn the empty thought that a template writes where a turn has no reasoning",
    )
    special_tokens_in_text: Literal["keep", "escape", "reject"] = Field(
        default="reject",
        description="a record whose own words have a control token such as <|im_end|>: keep it as"
        " that token, escape it (its letters), or reject the record",
    )
    num_workers: int | None = Field(
        default=None,
        ge=0,
        description="processes that tokenize records; 0: none but this one; not set: one for each"
        " 16 MB of the files, as many as there are cores, at most 8",
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _for_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(set(value) & set(TEMPLATE_CALL)):
            raise ValueError(f"data.chat_template_kwargs must not name {', '.join(taken)}")
        return value

    @model_validator(mode="after")
    def _weight_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.train)} data.train "
                f"paths"
            )
        if self.take is not None and len(self.take) != len(self.train):
            raise ValueError(
                f"data.take has {len(self.take)} numbers for {len(self.train)} data.train paths"
            )
        if self.eval and self.eval_share:
            raise ValueError("data.eval and data.eval_share exclude each other: leave one out")
        if any(weight < 0 for weight in self.weights or ()):
            raise ValueError(f"data.weights holds a negative number: {self.weights}")
        return self
