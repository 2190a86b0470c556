"""Which files of a Hugging Face folder hold its weights: the one reading that loading, exports,
conversion and the doctor share.

`save_pretrained` of transformers 5 leaves an earlier save's files beside its own, and programs
differ in which they take: transformers the single file, vLLM what the index names, and where there
is no index every file. So a folder with two sets of weights is refused.

Mistral's folders hold its own format beside Hugging Face's, in `consolidated*.safetensors`: the
same weights under other names, which vLLM 0.32 takes in their place. They are left alone.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from moetrain.errors import WeightsError
from moetrain.manifest import read_text
from moetrain.weights.checks import some
from moetrain.weights.header import read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, CONFIG = "adapter_config.json", "config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NAMED = "transformers_weights"  # of config.json: the file that transformers 5 reads in their place
CONSOLIDATED = "consolidated"
LONGEST_NAME = 255  # bytes, on all file systems that matter
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def has_weights(folder: Path) -> bool:
    """Whether there is anything that `weight_files` would look at."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file() or bool(_shards(folder))


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Each file of weights and the names that the index places there (None: all that it holds).

    Raises:
        WeightsError: no weights, a damaged index or one that leaves the folder, a shard missing,
            two sets of weights, a file that some programs read and others do not, or an adapter
            beside a model. It names what to remove.
    """
    single, index = folder / SINGLE, folder / INDEX
    strays = _shards(folder)
    if not single.is_file() and not index.is_file():
        lost = f" ({some(strays)} without it)" if strays else ""
        raise WeightsError(
            f"{folder}: neither {SINGLE} nor its index is there{lost}. Check the path."
        )
    if (folder / ADAPTER).is_file():
        raise WeightsError(
            f"{folder} holds an adapter ({ADAPTER}) beside a model, and transformers would read"
            f" both. Move one of them to another folder."
        )
    _check_named(folder, single.name if single.is_file() else index.name)
    if not index.is_file():
        if strays:
            raise _two_sets(folder, f"{some(strays)}, which no index names", "those")
        _check_others(folder)
        _check_consolidated(folder, set(read_header(single, None)))
        return {single: None}
    files = _indexed(index)
    missing = sorted(path.name for path in files if not path.is_file())
    if single.is_file() and files.keys() != {single}:
        left = "" if len(missing) == len(files) else " and its shards"
        gone = f", of whose {len(files)} shards {len(missing)} are gone" if missing else ""
        raise _two_sets(folder, f"{INDEX}{gone}", f"{INDEX}{left}")
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing: {some(missing)}. Copy"
            f" the model again."
        )
    _check_consolidated(folder, {name for names in files.values() for name in names})
    return dict(files)


def _check_named(folder: Path, read: str) -> None:
    """config.json may say which file transformers reads."""
    try:
        named = json.loads(read_text(folder / CONFIG))[NAMED]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # the reader of config.json reports what is wrong with it
    if named not in (None, read):
        raise WeightsError(
            f"{folder}: {CONFIG} says {NAMED}={named!r}, which transformers reads in place of"
            f" {read}. Take {NAMED} out, and the file that is not meant."
        )


def _check_others(folder: Path) -> None:
    """Without an index vLLM reads every file, the last of two values of a weight."""
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name != SINGLE)
    others = [name for name in names if not name.startswith(CONSOLIDATED)]
    if others:
        raise WeightsError(
            f"{folder} holds {some(others)} beside {SINGLE}, and no index says what the model is:"
            f" transformers reads {SINGLE} alone, vLLM all of them. Move {some(others)} to another"
            " folder."
        )


def _check_consolidated(folder: Path, names: set[str]) -> None:
    """A file of that name with the model's own tensors is a second set of them."""
    for path in sorted(folder.glob(f"{CONSOLIDATED}*.safetensors")):
        try:
            both = sorted(names & read_header(path, None).keys())
        except WeightsError:
            continue  # damaged, or not fetched: nothing here reads it
        if both:
            raise WeightsError(
                f"{folder}: {both[0]} stands in {path.name}, which vLLM reads, and in the files"
                f" that transformers does. Move {path.name} to another folder."
            )


def _two_sets(folder: Path, other: str, second: str) -> WeightsError:
    return WeightsError(
        f"{folder} holds two sets of weights, {SINGLE} and {other}; programs differ in which they"
        f" read. Remove {SINGLE}, or {second}: the set that is not meant."
    )


def _shards(folder: Path) -> list[str]:
    """Files that are named as shards are."""
    names = [path.name for path in folder.glob("model-*.safetensors")]
    return sorted(name for name in names if _SHARD.fullmatch(name))


def _indexed(index: Path) -> Mapping[Path, list[str]]:
    """The files that an index names, with their tensors' names."""
    try:
        places = json.loads(read_text(index))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{index}: not a safetensors index ({error}). Fetch it again.") from None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise WeightsError(
            f"{index}: not a safetensors index (weight_map is no mapping of names to files). Fetch "
            f"it again."
        )
    files: dict[str, list[str]] = {}
    for name, file in places.items():
        files.setdefault(file, []).append(name)
    for file, names in files.items():
        if not (0 < len(file.encode(errors="surrogatepass")) <= LONGEST_NAME) or "\0" in file:
            raise WeightsError(
                f"{index}: {names[0][:80]} is placed in a file whose name has {len(file)}"
                f" characters, which no file has. Fetch it again."
            )
        if Path(file).name != file or file in ("", ".", ".."):
            raise WeightsError(
                f"{index}: {names[0]} is placed at {file!r}, outside the folder. Such an index is "
                f"refused."
            )
    return {index.parent / file: names for file, names in files.items()}
