"""`train.sample_prompts`: a few prompts that a run without rollouts answers at its evaluations."""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from moetrain.config.recipe import Recipe
from moetrain.data import assets
from moetrain.data.cache import cache_root
from moetrain.data.messages import FormatError
from moetrain.data.prompts import read_prompt
from moetrain.data.rejects import Reject, noted
from moetrain.data.run_tokenizer import chat_of
from moetrain.data.samples import Prompt
from moetrain.data.selection import rows_of
from moetrain.errors import DataError, plural
from moetrain.models.lookup import find_model

MOST = 32  # of a file: they are drawn on the first rank, while the others wait
KEY = "train.sample_prompts"


def read_sample_prompts(recipe: Recipe) -> tuple[list[Prompt], list[str]]:
    """(the prompts, each once, what there is to say of them); both empty without the key. Raises
    DataError for a record that is no prompt: the file is short, and its answers are for people.
    """
    if recipe.train.sample_prompts is None:
        return [], []
    longest = find_model(recipe.model).hf.get("max_position_embeddings")
    tokens = recipe.train.sample_tokens
    room = longest - tokens if isinstance(longest, int) else None
    if room is not None and room < 1:
        raise DataError(
            f"train.sample_tokens={tokens} leaves no room for a prompt in the model's {longest}"
            " positions (max_position_embeddings). Give less."
        )
    chat = chat_of(recipe)
    prompts: dict[str, Prompt] = {}
    notes: Counter[str] = Counter()

    def read(record: Mapping[str, Any]) -> None:
        prompt, own = read_prompt(record, chat, room)
        prompts.setdefault(prompt.id, prompt)
        notes.update(own)

    num = _each(recipe, read)
    line = f"{KEY}: {'the first ' * (num == MOST)}{plural(num, 'prompt')}, answered at each"
    line += f" evaluation: moetrain show {recipe.run_dir}"
    return list(prompts.values()), [line, *noted(chat.notes(), notes)]


def _each(recipe: Recipe, read: Callable[[Mapping[str, Any]], object]) -> int:
    """Read the first MOST records of the file; how many there are. Raises DataError."""
    given = recipe.train.sample_prompts
    assert given is not None
    num = 0
    try:
        path = assets.resolve(given, cache_root(recipe.data.cache))
        for row in islice(rows_of([str(path)]), MOST):
            num += 1
            try:
                if isinstance(row, Reject):
                    raise FormatError(row.reason)
                read(row.value)
            except FormatError as error:
                raise DataError(
                    f"{row.file}:{row.line}: {error}. Mend the record, or take it out."
                ) from None
    except DataError as error:
        raise DataError(f"{KEY}: {error}") from None
    if not num:
        raise DataError(f"{KEY}={given} holds no record.")
    return num
