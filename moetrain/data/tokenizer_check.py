"""Whether transformers reads a tokenizer as its tokenizer.json says.

From version 5 on, transformers chooses a class by `tokenizer_class` or by the `model_type` beside
it, and the class replaces how text is cut before merging: a byte-level tokenizer.json under
LlamaTokenizerFast, as distilled models ship it, loses every space and says nothing.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from moetrain import files
from moetrain.data.tokenizer_files import tokenizer_files
from moetrain.errors import DataError

# What classes are known to cut in their own way: spaces, digits, contractions, line ends, scripts.
PROBE = (
    "Hello world",
    " 12345 + 6.78 = 12,351.78",
    "I don't, they'll, we'VE; snake_case camelCase",
    "\tdef f(x):\n\n    return x  # two  spaces\r\n",
    "naïve café Ωμέγα привет 你好\uff0c世界 答案是42。 한국어 \uff11\uff12 e\u0301 🙂",
)
SAFE = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is
_known: dict[tuple[str, tuple[int, ...]], DataError | None] = {}


def check_read_as_written(loaded: Any, folder: Path) -> None:
    """DataError when `loaded`, which is `folder`'s, makes other tokens than its tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        return
    deciding = [*tokenizer_files(folder), *folder.glob("config.json")]
    key = (str(folder), tuple(file.stat().st_mtime_ns for file in deciding))
    if key not in _known:
        _known[key] = _problem(loaded, folder)
    if (problem := _known[key]) is not None:
        raise problem


def _problem(loaded: Any, folder: Path) -> DataError | None:
    try:
        text = difference(loaded, folder)
    except Exception as error:  # tokenizers has no type of its own
        return DataError(
            f"The tokenizer in {folder} cannot encode every text: {error}. Restore its"
            f" tokenizer.json, or give it an unk_token that is in its vocabulary."
        )
    if text is None:
        return None
    cut = loaded(text, add_special_tokens=False)["input_ids"]
    return DataError(
        f"{_library(loaded)} reads the tokenizer in {folder} as {type(loaded).__name__} and not as"
        f" its tokenizer.json says: {text!r} becomes {len(cut)} tokens, {loaded.decode(cut)!r}."
        f" {_remedy(folder)}"
    )


def _library(loaded: Any) -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def difference(loaded: Any, folder: Path) -> str | None:
    """A text that becomes other tokens than by `folder`'s tokenizer.json; None where none does."""
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in PROBE:
        cut = loaded(text, add_special_tokens=False, verbose=False)["input_ids"]
        if cut != written.encode(text, add_special_tokens=False).ids:
            return text
    return None


def _remedy(folder: Path) -> str:
    """What makes transformers read it as written, tried out."""
    config = folder / "config.json"
    kind = _json(config).get("model_type")
    if misreading_class(folder, kind, {"tokenizer_class": SAFE}) is None:
        return f'Write "tokenizer_class": "{SAFE}" into its tokenizer_config.json.'
    return (
        f"It does so beside every config.json of model_type {kind}: copy the tokenizer's files into"
        " a folder without one and name that with model.tokenizer."
    )


def check_for_export(folder: Path, kind: str | None) -> str | None:
    """What is to be said of the tokenizer in `folder` beside a model of this model_type, where an
    export puts it and vLLM reads it. DataError when it would be read wrongly and need not be.
    """
    if kind is None or not (folder / "tokenizer.json").is_file():
        return None
    if _json(folder / "config.json").get("model_type") == kind:
        return None  # as it lies there it has been looked at
    read_as = misreading_class(folder, kind, {})
    if read_as is None:
        return None
    message = (
        f"beside a config.json of model_type {kind}, as an export has it, transformers reads the"
        f" tokenizer in {folder} as {read_as} and not as its tokenizer.json says"
    )
    if misreading_class(folder, kind, {"tokenizer_class": SAFE}) is None:
        raise DataError(
            f'{message[0].upper()}{message[1:]}. Write "tokenizer_class": "{SAFE}" into its'
            " tokenizer_config.json."
        )
    return f"{message}: serve an export with --tokenizer {folder}"


def misreading_class(folder: Path, kind: str | None, changes: dict[str, str]) -> str | None:
    """The class that reads the tokenizer wrongly when it lies beside a model of this model_type and
    with `changes` in its tokenizer_config.json; None where it is read as written.
    """
    from transformers import AutoTokenizer

    with files.scratch() as place:
        for file in tokenizer_files(folder):
            shutil.copyfile(file, place / file.name)
        config = place / "tokenizer_config.json"
        config.write_text(json.dumps(_json(config) | changes))
        if kind is not None:
            (place / "config.json").write_text(json.dumps({"model_type": kind}))
        try:
            loaded = AutoTokenizer.from_pretrained(
                str(place), local_files_only=True, trust_remote_code=False
            )
        except Exception:  # a class that is not there, or wants other files
            return "nothing"
        return None if difference(loaded, place) is None else type(loaded).__name__


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
