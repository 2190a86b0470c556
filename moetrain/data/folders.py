"""What of a folder's files are records, and of which split.

The names that people give the parts of a data set (`data/train-00000-of-00003.parquet`,
`test_prefs-00000-of-00001.parquet`, `validation/`) say what is to be learned from and what not.
"""

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from moetrain.data.splits import DOUBTFUL, KINDS, kinds_of
from moetrain.errors import DataError

# What tools and people put beside records, as it is called and as its name ends.
METADATA = tuple(
    f"{name}.json"
    for name in "dataset_infos dataset_info dataset_dict state croissant metadata meta manifest"
    " schema datapackage config".split()
)
METADATA_ENDS = ".manifest.json"  # of `moetrain sample`
PROSE = re.compile(r"(readme|licen[sc]e|citation|notice|changelog)(?![a-z])", re.IGNORECASE)
# Any of these makes a folder one written by `datasets.save_to_disk`.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class Group:
    """Files that belong together: the shards of one split of one configuration."""

    name: str  # for a person, e.g. data/train_prefs
    kind: str  # one of KINDS, "" where the names say nothing, or DOUBTFUL
    paths: tuple[Path, ...]
    at: Path | None  # the folder that is all of it


def parts_of(folder: Path, suffixes: Iterable[str], prose: Iterable[str]) -> list[Path]:
    """Files of records with these endings, and saved data sets, in name order.

    Files with an ending in `prose` are records too, but not what describes records beside it.
    """
    paths = list(_walk(folder, frozenset(suffixes)))
    texts = [path for path in paths if path.suffix in prose]
    if len(texts) < len(paths):
        described = {path for path in texts if PROSE.match(path.name)}
        paths = [path for path in paths if path not in described]
    return paths


def _walk(folder: Path, suffixes: frozenset[str]) -> Iterable[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if (path / SAVED).is_file():
                yield path
            else:
                yield from _walk(path, suffixes)
        elif path.suffix in suffixes and not _is_metadata(path) and path.is_file():
            yield path


def _is_metadata(path: Path) -> bool:
    return path.name.lower() in METADATA or path.name.lower().endswith(METADATA_ENDS)


def chosen(folder: Path, parts: Sequence[Path], prose: Iterable[str], held_out: bool) -> list[Path]:
    """Of a folder's parts those of its train split, or of the one held out.

    All where no name says otherwise. DataError when there are several, or only the other one.
    """
    saved = (folder / SAVED_SPLITS).is_file()
    records = [path for path in parts if path.suffix not in prose or path.is_dir()]
    groups = _groups(folder, records, saved)
    of = {
        kind: [group for group in groups if group.kind == kind] for kind in ("", DOUBTFUL, *KINDS)
    }
    if of[DOUBTFUL]:
        raise DataError(
            f"{folder} holds {_names(of[DOUBTFUL])}, which may be held-out data or not. Name what"
            f" is meant, one or several as a list: {', '.join(map(_as_path, groups))}."
        )
    if saved and len(of[""]) == len(groups) > 1:
        raise _which(folder, "splits", groups)
    if held_out and len(of[""]) < len(groups):
        other = of["validation"] or of["test"]
        if not other:
            raise DataError(
                f"{folder} has no held-out split, only {_names(groups)}. Name the files to"
                " evaluate on."
            )
        return _only(folder, "held-out splits", other)
    if of["train"] and not held_out:
        return _only(folder, "splits to train on", of["train"] + ([] if saved else of[""]))
    if groups and not of[""]:
        raise DataError(
            f"{folder} holds held-out data alone ({_names(groups)}). To learn from it all the same,"
            f" name it: {_as_path(groups[0])}."
        )
    out = {path for kind in KINDS for group in of[kind] for path in group.paths}
    return [path for path in parts if path not in out]


def _only(folder: Path, what: str, groups: list[Group]) -> list[Path]:
    if len(groups) > 1:
        raise _which(folder, what, groups)
    return list(groups[0].paths)


def _which(folder: Path, what: str, groups: list[Group]) -> DataError:
    return DataError(
        f"{folder} holds several {what}: {_names(groups)}. Name one, or several as a list:"
        f" {', '.join(map(_as_path, groups))}."
    )


def _names(groups: list[Group]) -> str:
    return ", ".join(group.name for group in groups)


def _groups(folder: Path, parts: Sequence[Path], saved: bool) -> list[Group]:
    """In the order of their first files; what is saved as a split is one, whatever its name."""
    groups: dict[tuple[str, str, Path | None], list[Path]] = {}
    relative = {path: path.relative_to(folder) for path in parts}
    kinds = kinds_of(
        [_stem(path) for path in relative.values()]
        + [place.name for path in relative.values() for place in path.parents]
    )
    for path, inner in relative.items():
        if saved:
            key = (str(inner), kinds[_stem(inner)], path)
        else:
            key = _key(folder, inner, kinds)
        groups.setdefault(key, []).append(path)
    return [Group(name, kind, tuple(files), at) for (name, kind, at), files in groups.items()]


def _stem(path: Path) -> str:
    return path.name.removesuffix(path.suffix)


def _key(folder: Path, path: Path, kinds: Mapping[str, str]) -> tuple[str, str, Path | None]:
    """(group's name, kind, the folder that is it): by the file's own name, else by that of the
    nearest folder which says what it holds.
    """
    stem = _stem(path)
    if kind := kinds[stem]:
        return str(path.parent / _without_shard(stem)), kind, None
    for place in path.parents:
        if kind := kinds[place.name]:
            return str(place), kind, folder / place
    return "other files", "", None


def _without_shard(stem: str) -> str:
    """`train_prefs` of `train_prefs-00001-of-00003-9f2a81c0d1e2f3a4` and `train` of `train_07`."""
    stem = re.sub(r"-\d{5}-of-\d{5}(-[0-9a-f]{8,})?$", "", stem)
    return re.sub(r"[-_.]?(part|shard|chunk)?[-_.]?\d+$", "", stem) or stem


def _as_path(group: Group) -> str:
    """What a recipe says for it: its file or folder, or a pattern that means just its files."""
    paths = [str(path) for path in group.paths]
    if group.at is not None or len(paths) == 1:
        return str(group.at or paths[0])
    letters = zip(min(paths), max(paths), strict=False)
    same = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], letters))
    pattern = f"{same.rstrip('0')}*{group.paths[0].suffix}"
    return pattern if sorted(glob.glob(pattern)) == sorted(paths) else ", ".join(paths)
