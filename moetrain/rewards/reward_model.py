"""A reward model that was trained here (or anywhere): a scalar for a conversation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetrain import manifest
from moetrain.config.rewards import RewardConfig, RewardModelOptions
from moetrain.data import tokenizer
from moetrain.data.chat import Chat
from moetrain.data.messages import FormatError
from moetrain.errors import ConfigError
from moetrain.rewards.base import Completion, Grade, RewardKind, Shape
from moetrain.rewards.conversations import tokens_of
from moetrain.rewards.reward_servers import RewardServers, remotes_of

DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}


class RewardModel:
    """A sequence-classification model with one label, resident in this process."""

    def __init__(self, configs: Sequence[RewardConfig]):
        (config,) = configs
        self.label = config.label
        self.options = RewardModelOptions.model_validate(config.options)
        folder = Path(self.options.path).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"rewards: {self.label}: {folder} has no config.json. Give the folder of a model"
                " that `method: reward` trained, such as runs/reward/hf."
            )
        manifest.check(folder)
        import torch

        self.chat = Chat(tokenizer.load(folder), self.options.chat_template)
        device = self.options.device
        if device == "auto":
            device = "cuda" if torch.accelerator.is_available() else "cpu"
        self.device = torch.device(device)
        self.model = _load(folder, self.options.dtype).to(self.device).eval()

    def grade(self, completions: Sequence[Completion]) -> Iterator[tuple[int, Grade]]:
        numbers: list[int] = []
        rows: list[list[int]] = []
        for completion in completions:
            try:
                rows.append(self.tokens(completion))
                numbers.append(completion.number)
            except FormatError as error:
                yield completion.number, self._fault(str(error))
        if rows:
            for number, score in zip(numbers, self.scores(rows), strict=True):
                if math.isfinite(score):
                    yield number, Grade({self.label: score})
                else:
                    yield number, self._fault(f"the score is {score}")

    def _fault(self, detail: str) -> Grade:
        return Grade({self.label: None}, "error", detail=f"{self.label}: {detail}")

    def tokens(self, completion: Completion) -> list[int]:
        """What the model reads of it. Raises FormatError."""
        return tokens_of(completion, self.chat, self.options.max_tokens)

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The scalar at the last token of each row."""
        import torch

        # transformers looks for the last token that is not padding: so padding has to be a token
        # that ends no row.
        ends = {row[-1] for row in rows}
        pad = next(i for i in range(len(ends) + 1) if i not in ends)
        self.model.config.pad_token_id = pad
        size = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (size - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows])
        with torch.inference_mode():
            out = self.model(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
            )
        return out.logits[:, 0].float().tolist()


def _load(folder: Path, dtype: str) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.num_labels != 1:
        raise ConfigError(
            f"rewards: {folder} has {config.num_labels} labels, and a reward model has one. Give"
            " the folder of a model that `method: reward` trained."
        )
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        local_files_only=True,
        output_loading_info=True,
        use_safetensors=True,  # no pickles
    )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(
            f"rewards: {folder} lacks {missing}: it is not a reward model, or is damaged. Give the"
            " folder of a model that `method: reward` trained."
        )
    return model


def _shape(options: Mapping[str, Any], recipe: Shape) -> Shape:
    own = RewardModelOptions.model_validate(options)
    if own.address:
        # Each is asked of all servers before it is given up.
        longest = sum(remote.longest for remote in remotes_of(own))
        seconds, start = longest + 10.0, 4.0 * longest + 60.0
        return replace(recipe, num_workers=1, batch=4096, seconds=seconds, start_seconds=start)
    return replace(
        recipe,
        num_workers=1,
        batch=own.batch_size,
        seconds=own.seconds,
        start_seconds=own.start_seconds,
    )


def _made(configs: Sequence[RewardConfig]) -> RewardModel | RewardServers:
    is_served = bool(RewardModelOptions.model_validate(configs[0].options).address)
    return RewardServers(configs) if is_served else RewardModel(configs)


REWARD_MODEL = RewardKind(_made, _shape)
