"""Which files of a Hugging Face folder hold its weights: the one reading that loading, exports,
conversion and the doctor share.

`save_pretrained` of transformers 5 leaves an earlier save's files beside its own, and programs
differ in which they take: transformers the single file, vLLM what the index names, and where there
is no index every file. So a folder with two sets of weights is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from moetrain.errors import WeightsError
from moetrain.manifest import read_text

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
LONGEST_NAME = 255  # bytes, on all file systems that matter
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def has_weights(folder: Path) -> bool:
    """Whether there is anything that `weight_files` would look at."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file() or bool(_shards(folder))


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Each file of weights and the names that the index places there (None: all that it holds).

    Raises:
        WeightsError: no weights, a damaged index or one that leaves the folder, a shard missing,
            two sets of weights, or an adapter beside a model. It names what to remove.
    """
    single, index = folder / SINGLE, folder / INDEX
    strays = _shards(folder)
    if not single.is_file() and not index.is_file():
        lost = f" ({_some(strays)} without it)" if strays else ""
        raise WeightsError(
            f"{folder}: neither {SINGLE} nor its index is there{lost}. Check the path."
        )
    if (folder / ADAPTER).is_file():
        raise WeightsError(
            f"{folder} holds an adapter ({ADAPTER}) beside a model, and transformers would read"
            f" both. Move one of them to another folder."
        )
    if not index.is_file():
        if strays:
            raise _two_sets(folder, f"{_some(strays)}, which no index names", "those")
        return {single: None}
    files = _indexed(index)
    missing = sorted(path.name for path in files if not path.is_file())
    if single.is_file() and files.keys() != {single}:
        left = "" if len(missing) == len(files) else " and its shards"
        gone = f", of whose {len(files)} shards {len(missing)} are gone" if missing else ""
        raise _two_sets(folder, f"{INDEX}{gone}", f"{INDEX}{left}")
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing: {_some(missing)}. Copy"
            f" the model again."
        )
    return dict(files)


def _two_sets(folder: Path, other: str, second: str) -> WeightsError:
    return WeightsError(
        f"{folder} holds two sets of weights, {SINGLE} and {other}; programs differ in which they"
        f" read. Remove {SINGLE}, or {second}: the set that is not meant."
    )


def _shards(folder: Path) -> list[str]:
    """Files that are named as shards are."""
    found = [path.name for path in folder.glob("model-*.safetensors")]
    return sorted(name for name in found if _SHARD.fullmatch(name))


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
    files: dict[Path, list[str]] = {}
    for name, file in places.items():
        if not (0 < len(file.encode(errors="surrogatepass")) <= LONGEST_NAME) or "\0" in file:
            raise WeightsError(
                f"{index}: {name[:80]} is placed in a file whose name has {len(file)} characters,"
                f" which no file has. Fetch it again."
            )
        if Path(file).name != file or file in ("", ".", ".."):
            raise WeightsError(
                f"{index}: {name} is placed at {file!r}, outside the folder. Such an index is "
                f"refused."
            )
        files.setdefault(index.parent / file, []).append(name)
    return files


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
