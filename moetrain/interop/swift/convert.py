"""Both directions over the one table."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel

from moetrain import files
from moetrain.config.load import recipe_from
from moetrain.config.method import MethodConfig
from moetrain.config.recipe import Recipe
from moetrain.config.yaml_text import dump_content
from moetrain.errors import ConfigError
from moetrain.interop.swift.codecs import (
    Keys,
    Note,
    Reading,
    Words,
    Writing,
    same,
    shown,
)
from moetrain.interop.swift.decides import DECIDES
from moetrain.interop.swift.files import read_arguments
from moetrain.interop.swift.methods import METHOD, check_methods
from moetrain.interop.swift.near import Near
from moetrain.interop.swift.notes import (
    CHANGES,
    NO_FLAG,
    WHY_KEYS,
    implied,
    why_not,
)
from moetrain.interop.swift.policy import defaults
from moetrain.interop.swift.shell import Command, read_command
from moetrain.interop.swift.table import OLD_NAMES, TABLE


@dataclass(frozen=True)
class Imported:
    """A recipe's content, and what should be known of how it came about."""

    content: dict[str, Any]
    notes: tuple[Note, ...]

    def yaml(self) -> str:
        """The recipe's file, with the notes that matter at its head."""
        lines = ["# Written by `moetrain swift import`."]  # a note is one line, whatever it names
        lines += [f"# {note}" for note in self.notes if note.kind != "implied"]
        return "\n".join(lines) + "\n" + dump_content(self.content)


@dataclass(frozen=True)
class Exported:
    """A command's text, and what it does not say."""

    text: str
    notes: tuple[Note, ...]


def command_text(given: str) -> tuple[str, Path | None]:
    """What a user gave: the command itself, the path of a script, or - for stdin; and the script's
    path. Raises ConfigError.
    """
    if given == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8"), None
        except UnicodeDecodeError as error:
            raise ConfigError(f"stdin: not UTF-8 text at byte {error.start}.") from None
    if len(given.split()) > 1 and not _is_file(given):
        if not given.isprintable() and re.search("[\ud800-\udfff]", given):  # bytes of the shell's
            raise ConfigError("The command is not UTF-8 text. Give it as a script in UTF-8.")
        return given, None
    try:
        return Path(given).read_text(encoding="utf-8"), Path(given)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{given}: not UTF-8 text at byte {error.start}. Save it so.") from None
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{given}: {reason}. Give a script's path, or the command in quotes."
        ) from None


def _is_file(given: str) -> bool:
    try:
        return os.path.isfile(given)
    except ValueError:
        return False


def write_text(path: Path, text: str) -> None:
    """Raises ConfigError for a path that cannot be written."""
    try:
        files.write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Give another --out.") from None


def from_swift(
    text: str, steps: int | None = None, script: Path | None = None, number: int | None = None
) -> Imported:
    """The recipe of a `megatron sft|pt|rlhf` command, or of a script that holds one.

    steps: of the run, where what the command says hangs on it. script: its path, beside which the
    files that it names may be. number: of several commands the one to read, from 1.

    Raises ConfigError, also where the command decides what is learned by something that no recipe
    says.
    """
    return from_command(read_command(text, script and str(script), number), steps, script)


def from_command(command: Command, steps: int | None, script: Path | None) -> Imported:
    """As `from_swift`, of a command that was read already."""
    near = Near(script)
    reading = Reading(_given(command, near), steps=steps, near=near, decides=frozenset(DECIDES))
    check_methods(reading.given)
    for entry in TABLE:
        entry.read(reading)
    for name in sorted(reading.keys.keys() & reading.assumed):
        if reading.keys[name] == default_of(name, reading.keys):
            del reading.keys[name]
    _left_over(command, reading)
    if reading.refused:
        raise ConfigError(
            f"{'; '.join(reading.refused)}. Without it another thing would be learned; drop it "
            f"from the command if that is meant"
        )
    notes = [*reading.notes]
    notes += [
        Note("changed", change.what, change.why) for change in CHANGES if change.when(reading.keys)
    ]
    unread: dict[str, str] = {}
    try:
        recipe_from(_nested(reading.keys), unread=unread)
    except ConfigError as error:
        notes.append(Note("check", "recipe", str(error).removeprefix("recipe: ")))
    for key in [name for name in reading.keys if name in unread]:
        notes.append(Note("implied", f"{key}={reading.keys.pop(key)}", unread[key]))
    content = _nested(reading.keys)
    return Imported(content, tuple(sorted(notes, key=_order)))


def to_swift(content: Mapping[str, Any]) -> Exported:
    """The command that a recipe stands for. `content` is `Recipe.model_dump(mode="json")`.

    Raises ConfigError for a method that Megatron-SWIFT does not have.
    """
    writing = Writing(keys_of(content))
    for entry in TABLE:
        entry.write(writing)
    if "action" not in writing.flags:
        raise ConfigError(
            f"method.name={writing.keys.get('method.name')}: `megatron` has no such method; it has "
            f"{', '.join(str(one.value) for one in METHOD.options if not one.read_only)}"
        )
    notes = writing.notes + [
        Note("not carried", f"{key}={value}", WHY_KEYS.get(key, NO_FLAG))
        for key, value in writing.keys.items()
        if key not in writing.covered and value != default_of(key, writing.keys)
    ]
    notes += [
        Note("changed", change.what, change.why)
        for change in CHANGES
        if not change.coming and change.when(writing.keys)
    ]
    return Exported(_text(writing.flags), tuple(sorted(notes, key=_order)))


_KINDS = ("check", "not carried", "changed", "implied")


def _order(note: Note) -> int:
    return _KINDS.index(note.kind)


# `swift` without Megatron has other defaults, under names that both have.
_HF_DEFAULTS = {"tuner_type": ("lora",), "num_train_epochs": ("3",)}
# Its own names, which say the same only together with the number of processes, or nearly.
_HF_NAMES = {
    "adam_epsilon": "adam_eps",
    "deepspeed": "drop it",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_checkpointing": "recompute_granularity",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_decay_style",
    "max_grad_norm": "clip_grad",
    "max_steps": "train_iters",
    "per_device_eval_batch_size": "drop it",
    "per_device_train_batch_size": "micro_batch_size",
    "warmup_ratio": "lr_warmup_fraction",
    "warmup_steps": "lr_warmup_iters",
}


def _given(command: Command, near: Near) -> dict[str, Words]:
    """Flags under their newest names, with the action, and the variables in capitals. What the
    command line says goes before what its files say.
    """
    flags: dict[str, Words] = {}
    env: dict[str, str] = {}
    named = [("the arguments' file", name) for name in command.files]
    named += [("--config", name) for name in command.flags.get("config", ())]
    for flag, name in named:
        own, variables = read_arguments(near, flag, name)
        flags |= own
        env |= variables
    flags |= {flag: words for flag, words in command.flags.items() if flag != "config"}
    if "train_gpus" in env:
        env["NPROC_PER_NODE"] = env.pop("train_gpus")
    env |= command.env
    given: dict[str, Words] = {name: (value,) for name, value in env.items() if name.isupper()}
    given |= {OLD_NAMES.get(flag, flag): words for flag, words in flags.items()}
    given["action"] = (command.action,)
    if command.action == "rlhf":
        given.setdefault("rlhf_type", ("dpo",))
        if same(given["rlhf_type"], "grpo"):
            given.setdefault("loss_type", ("grpo",))
    if "NNODES" in command.open:
        given["NNODES?"] = ()
    if command.program == "swift":
        _check_hf(given)
        given = {**_HF_DEFAULTS, **defaults(given), **given}
    return given


def _check_hf(given: Mapping[str, Words]) -> None:
    """Refuse what only `swift` without Megatron knows: it cannot be told what that would mean."""
    hf_names = [name for name in given if name in _HF_NAMES]
    if hf_names:
        mended = ", ".join(f"--{name} -> {_mended(name)}" for name in hf_names)
        raise ConfigError(
            f"of `swift` only the flags that `megatron` has too are read. Write the command as "
            f"`megatron` has it: {mended}"
        )


def _mended(name: str) -> str:
    return _HF_NAMES[name] if " " in _HF_NAMES[name] else f"--{_HF_NAMES[name]}"


def _left_over(command: Command, reading: Reading) -> None:
    """A note on every flag that no entry took, and on what matters besides."""
    notes = reading.notes
    for flag, words in reading.given.items():
        if flag in reading.used or flag in ("action", "rlhf_type", "tuner_type", "NNODES?"):
            continue
        why = implied(flag, words)
        if flag.isupper():
            why = why or "a variable: set it where moetrain is started"
        if why is None:
            reading.lost(flag, why_not(flag))
        else:
            notes.append(Note("implied", shown(flag, words), why))
    if same(reading.given.get("loss_type"), "bnpo"):
        why = "dapo's mean is over the tokens of the whole batch, bnpo's over a micro-batch's"
        notes.append(Note("changed", "--loss_type bnpo", why))
    for path in reading.near.found:
        notes.append(Note("implied", str(path), "was read"))
    if command.folder is not None:
        why = "the script goes there first: start moetrain in it, as paths are relative"
        notes.append(Note("changed", f"cd {command.folder}", why))
    if command.repeated:
        why = "the command is in a loop, and a recipe is one run"
        notes.append(Note("changed", "loop", why))
    if "max_length" not in reading.given:
        why = "ms-swift takes the model's longest without it, the recipe data.seq_len's default"
        notes.append(Note("changed", "max_length", why))
    text = " ".join(reading.given.get("dataset", ()))
    if "self-cognition" in text and {"model_name", "model_author"} & {*reading.given}:
        why = "put the names in for {{NAME}} and {{AUTHOR}} in the file that you make of it"
        notes.append(Note("changed", "swift/self-cognition", why))
    notes += [Note("implied", name, "open until the run starts") for name in sorted(command.open)]


def keys_of(content: Mapping[str, Any]) -> Keys:
    """Dotted keys of a recipe's content, without those that are None."""
    keys: Keys = {}
    for name, value in content.items():
        if name == "method" and isinstance(value, str):
            keys["method.name"] = value
        elif isinstance(value, Mapping) and name != "megatron":
            section = cast(Mapping[str, Any], value)
            keys |= {f"{name}.{key}": leaf for key, leaf in section.items() if leaf is not None}
        elif value is not None:
            keys[name] = value
    return keys


def _nested(keys: Keys) -> dict[str, Any]:
    """A recipe's content, sections in the order in which recipes have them."""
    content: dict[str, Any] = {}
    for section in Recipe.model_fields:
        nested = {
            key.partition(".")[2]: value
            for key, value in keys.items()
            if key.partition(".")[0] == section and value is not None
        }
        if nested:
            content[section] = nested[""] if list(nested) == [""] else nested
    if list(content.get("method", {})) == ["name"]:
        content["method"] = content["method"]["name"]
    return content


def default_of(key: str, keys: Keys) -> object:
    """What a recipe with these keys takes where `key` is not given; None where it must be."""
    section, _, name = key.partition(".")
    field = Recipe.model_fields[section]
    if name:
        model = _section(section, keys)
        if model is None or name not in model.model_fields:
            return None
        field = model.model_fields[name]
    return None if field.is_required() else field.get_default(call_default_factory=True)


def _section(section: str, keys: Keys) -> type[BaseModel] | None:
    annotation: object = Recipe.model_fields[section].annotation
    parts: tuple[Any, ...] = (annotation, *get_args(annotation))
    if section == "method":
        parts = get_args(get_args(MethodConfig)[0])
    for part in parts:
        if isinstance(part, type) and issubclass(part, BaseModel):
            name_field = part.model_fields.get("name")
            if section != "method" or (
                name_field and name_field.default == keys.get("method.name")
            ):
                return part
    return None


def _text(flags: Mapping[str, Words]) -> str:
    """The command over several lines."""
    lines = [f"{name}={' '.join(words)}" for name, words in flags.items() if name.isupper()]
    lines.append(f"megatron {' '.join(flags['action'])}")
    for name, words in flags.items():
        if not name.isupper() and name != "action":
            lines.append(" ".join([f"    --{name}", *map(shlex.quote, words)]))
    return " \\\n".join(lines) + "\n"
