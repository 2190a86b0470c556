"""What lies beside weights and is read with them: the tokenizer, its chat template, and what ends
an answer, in each of the places where programs look for it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.data.tokenizer_files import tokenizer_files
from moetrain.errors import WeightsError
from moetrain.manifest import read_bytes, read_text
from moetrain.weights.folder import NAMED

GENERATION = "generation_config.json"
LARGEST_ID = 2**31 - 1  # of a token
CONFIG, SPECIALS = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
SHARED = ".huggingface-shared-blobs"
# What a template was in before chat_template.jinja, or is beside it under further names.
OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates")


@dataclass(frozen=True)
class SideFiles:
    """What goes beside exported weights.

    Args:
        tokenizer: its folder.
        model: the folder whose generation_config.json counts.
        template: the chat template that turns were learned with, in place of the tokenizer's.
        ends: id -> text of the tokens that end a turn, the first the usual one; empty: as it was.
    """

    tokenizer: Path | None = None
    model: Path | None = None
    template: str | None = None
    ends: Mapping[int, str] = field(default_factory=dict[int, str])

    @classmethod
    def of(cls, folder: Path) -> "SideFiles":
        """All from one folder, as it is."""
        return cls(folder, folder)

    def config(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of the exported model. Code that came with the source is not shipped, and
        files have the usual names, so that `auto_map` and a file's name would point nowhere.
        """
        config = {key: value for key, value in hf.items() if key not in ("auto_map", NAMED)}
        if not self.ends.keys() <= set(_ids(hf)):
            config["eos_token_id"] = _one_or_all([*self.ends])
        return config

    def write(self, folder: Path, hf: Mapping[str, Any]) -> None:
        """Put it all into `folder`; `hf` is the model's config as it was."""
        check_exported(self.tokenizer)
        self._write_tokenizer(folder)
        source = self.model / GENERATION if self.model else None
        given = _json(source) if source is not None and source.is_file() else None
        if given is None and not self.ends:
            return
        kept = ("bos_token_id", "pad_token_id")
        content = given or {key: hf[key] for key in kept if hf.get(key) is not None}
        if self.ends.keys() <= set(_ids(content)):
            assert source is not None
            _copy(source, folder / GENERATION)
        else:
            before = _ids(content) if content.get("eos_token_id") is not None else _ids(hf)
            content["eos_token_id"] = _one_or_all(list(dict.fromkeys([*self.ends, *before])))
            content.pop("_from_model_config", None)  # it is not the config's any more
            _dump(content, folder / GENERATION)

    def _write_tokenizer(self, folder: Path) -> None:
        source = self.tokenizer
        if source is None:
            return
        for file in tokenizer_files(source):
            _copy(file, folder / file.name)
        more = source / OTHER_TEMPLATES[1]
        if more.is_dir() and self.template is None:
            (folder / more.name).mkdir(exist_ok=True)
            for file in sorted(path for path in more.iterdir() if path.is_file()):
                _copy(file, folder / more.name / file.name)
        if self.template is not None:
            (folder / OTHER_TEMPLATES[0]).unlink(missing_ok=True)
            (folder / TEMPLATE).write_text(self.template, encoding="utf-8")
        if self.ends and not (folder / CONFIG).is_file():
            _dump({"tokenizer_class": "PreTrainedTokenizerFast"}, folder / CONFIG)
        for name in (CONFIG, SPECIALS):
            if (folder / name).is_file():
                self._mend(folder / name)

    def _mend(self, path: Path) -> None:
        """The tokenizer's own note of its template and of what ends a sequence."""
        before = _json(path)
        content = {key: value for key, value in before.items() if key != "auto_map"}
        if self.template is not None:
            content.pop("chat_template", None)
        if self.ends and _text(content.get("eos_token")) not in self.ends.values():
            content["eos_token"] = next(iter(self.ends.values()))
        if content != before:
            _dump(content, path)


def side_files_of_adapter(base: Path, adapter: Path) -> SideFiles:
    """Of a base with an adapter put in: what lies beside the adapter was trained with it."""
    is_own = bool(tokenizer_files(adapter))
    tokenizer = adapter if is_own else base
    ends: dict[int, str] = {}
    if is_own:
        from moetrain.data.tokenizer import load

        loaded = load(adapter)
        known: set[int] = set()
        for name in (GENERATION, "config.json"):
            if (base / name).is_file():
                known |= set(_ids(_json(base / name)))
        given = adapter / GENERATION
        ids = [loaded.eos_token_id, *(_ids(_json(given)) if given.is_file() else [])]
        new = [i for i in dict.fromkeys(ids) if i is not None and i not in known]
        ends = {i: str(loaded.convert_ids_to_tokens(i)) for i in new}
    return SideFiles(tokenizer, base, ends=ends)


def _ids(config: Mapping[str, Any]) -> list[int]:
    """The ids that end a sequence, as config.json and generation_config.json have them."""
    given = config.get("eos_token_id")
    if given is None:
        return []
    ids = list(given) if isinstance(given, list) else [given]
    if not all(type(i) is int and 0 <= i <= LARGEST_ID for i in ids):
        raise WeightsError(f"model config: eos_token_id = {given!r} is no token id or list of them")
    return ids


def _one_or_all(ids: list[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else ids


def _text(token: Any) -> str | None:
    """A token as tokenizer_config.json has it: a text, or a mapping that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(_inside(path)))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise WeightsError(f"{path}: not JSON ({reason}). Restore the file.") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: a mapping is wanted, not {type(content).__name__}.")
    return content


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(read_bytes(_inside(source)))


def check_exported(folder: Path | None) -> None:
    """WeightsError for what an export from `folder` would meet in the end: a link that leads
    elsewhere, a file that is not what its name says.
    """
    if folder is None:
        return
    more = folder / OTHER_TEMPLATES[1]
    for path in [*tokenizer_files(folder), folder / GENERATION, *more.glob("*")]:
        _inside(path)
    for path in (folder / name for name in (GENERATION, CONFIG, SPECIALS)):
        content = _json(path) if path.is_file() else {}
        if path.name == GENERATION:
            _ids(content)


def _inside(path: Path) -> Path:
    """`path`, unless it is a link that leads out of its folder: what lies there was not given to
    be exported. The Hub's cache keeps the files of its snapshots beside them, in `blobs`, and from
    huggingface_hub 1.33 on large ones in `blobs` of the whole cache, which has a mark.
    """
    if not path.is_symlink():
        return path
    folder, target = path.parent.resolve(), Path(os.path.realpath(path))  # a circle too
    homes = [folder]
    for snapshot in (folder, folder.parent):  # templates lie one deeper
        if snapshot.parent.name == "snapshots":
            repository = snapshot.parent.parent
            homes.append(repository / "blobs")
            if (repository.parent / "blobs" / SHARED).is_file():
                homes.append(repository.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise WeightsError(
            f"{path} is a link to {target}, outside of its folder, and would be exported. Put the"
            f" file itself there (cp --remove-destination {target} {path})."
        )
    return path


def _dump(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
