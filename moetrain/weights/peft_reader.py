"""PEFT's adapter folders: reading them."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.errors import WeightsError
from moetrain.manifest import Manifest, say_unchecked
from moetrain.models.adapter import SUFFIX, AdapterSpec, Matrix, adapter_table, all_matrices
from moetrain.models.model import Model
from moetrain.weights.adapter_init import idle, table_shapes
from moetrain.weights.folder import ADAPTER, ADAPTER_WEIGHTS
from moetrain.weights.header import broken, read_header
from moetrain.weights.peft_config import PeftConfig, rank_of, read_config, scale_of
from moetrain.weights.peft_writer import HEAD, PREFIX
from moetrain.weights.reader import Reader, Slices


class PeftReader:
    """A PEFT folder under the names of its adapter's table; `spec` and `table` say what it is, and
    `head` is the scalar head beside it.

    Matrices of smaller rank than others are filled up with zeros, which stay zeros in training.

    Args:
        base: the untouched base, for the norms of rows that share a tensor with DoRA's.

    Raises:
        WeightsError: nothing there, a kind of adapter that is not held here, or one of another
            base: the first tensor that does not fit, and its dimension.
    """

    def __init__(self, folder: Path, model: Model, base: Reader):
        self.folder, self.base = Path(folder), base
        config = read_config(self.folder / ADAPTER)
        self._file = _open(self.folder / ADAPTER_WEIGHTS)
        keys = set(self._file.keys())
        self.head = self._head(keys, config, model)
        modules: dict[str, list[Matrix]] = {}
        for matrix in all_matrices(model):
            modules.setdefault(matrix.module, []).append(matrix)
        self._stems = self._find(keys, config, modules, model)
        ranks = self._check(keys, config, modules)
        rank = max(ranks.values())
        scale = self._one_scale(config, ranks)
        uniform = all(r == config.rank for r in ranks.values()) and not config.alphas
        self.spec = AdapterSpec(
            rank=rank,
            alpha=config.alpha if uniform else scale * (math.sqrt(rank) if config.rslora else rank),
            target=tuple(self._stems),
            rslora=config.rslora,
            dora=config.dora,
            init=config.init,
            dropout=config.dropout,
        )
        self.table = adapter_table(model, self.spec, loaded=True)
        self._shapes = table_shapes(self.table)
        self._num_experts = model.num_experts
        self._recent: dict[str, Tensor] = {}

    def __str__(self) -> str:
        return str(self.folder)

    def _head(self, keys: set[str], config: PeftConfig, model: Model) -> Tensor | None:
        """The scalar head [1, h] that lies beside the adapter; its key is taken off `keys`."""
        if config.scalar_head and not model.heads.scalar:
            raise WeightsError(
                f"{self.folder} is an adapter of a reward or classification model, this is a "
                f"language model. Is it an adapter of another base?"
            )
        if not config.scalar_head or PREFIX + HEAD not in keys:
            return None
        self._fits(PREFIX + HEAD, (1, model.hidden))
        keys.remove(PREFIX + HEAD)
        return self._file.get_tensor(PREFIX + HEAD)

    def _find(
        self,
        keys: Collection[str],
        config: PeftConfig,
        modules: Mapping[str, list[Matrix]],
        model: Model,
    ) -> dict[str, str]:
        """transformers' name of each adapted module -> what its keys start with."""
        stems: dict[str, str] = {}
        for key in sorted(keys):
            stem = _stem(key)
            if stem is None or not stem.startswith(PREFIX):
                raise WeightsError(f"{self.folder}: {key} is no LoRA tensor that is held here.")
            module = stem.removeprefix(PREFIX)
            block = module.removesuffix(".base_layer")
            if block.endswith(".experts"):
                both = f"{PREFIX}{block}.base_layer{SUFFIX['lora_A']}" in keys
                module = f"{block}.{config.expert_parameter(block, both, module != block)}"
            if module not in modules and self._has_weight(model, module):
                raise WeightsError(
                    f"{self.folder}: {key} adapts {module}, which has no adapter here. Merge the"
                    f" adapter with PEFT instead."
                )
            if module not in modules:
                raise WeightsError(
                    f"{self.folder}: {key} has no place in this model. Is it an adapter of another "
                    f"base ({config.base})?"
                )
            stems[module] = stem
        if not stems:
            raise WeightsError(f"{self.folder / ADAPTER_WEIGHTS}: holds no tensors.")
        return {module: stems[module] for module in modules if module in stems}

    def _has_weight(self, model: Model, module: str) -> bool:
        return any(
            f"{module}.weight" in rule.hf or module == rule.fused for rule in model.table.values()
        )

    def _check(
        self, keys: Collection[str], config: PeftConfig, modules: Mapping[str, list[Matrix]]
    ) -> dict[str, int]:
        """The rank of each module, all its tensors being there and fitting the model."""
        ranks: dict[str, int] = {}
        for module, stem in self._stems.items():
            num, (out, into) = len(modules[module]), modules[module][0].shape
            rank = ranks[module] = rank_of(config, module)
            wanted = {
                SUFFIX["lora_A"]: (num * rank, into),
                SUFFIX["lora_B"]: (out, num * rank),
            } | ({SUFFIX["lora_magnitude"]: (out,)} if config.dora else {})
            for suffix, shape in wanted.items():
                if stem + suffix not in keys:
                    raise WeightsError(
                        f"{self.folder / ADAPTER_WEIGHTS}: {stem}{suffix} is missing."
                    )
                self._fits(stem + suffix, shape)
        return ranks

    def _fits(self, key: str, wanted: tuple[int, ...]) -> None:
        saved = tuple(self._file.get_slice(key).get_shape())
        if saved == wanted:
            return
        where = [i for i, (a, b) in enumerate(zip(saved, wanted, strict=False)) if a != b]
        what = f"dimension {where[0]} is not" if where else "it has not the dimensions of"
        raise WeightsError(
            f"{self.folder}: {key} is {list(saved)}, this model asks for {list(wanted)}: {what} "
            f"this base's. Is it an adapter of another base?"
        )

    def _one_scale(self, config: PeftConfig, ranks: Mapping[str, int]) -> float:
        scales = {module: scale_of(config, module, rank) for module, rank in ranks.items()}
        first, scale = next(iter(scales.items()))
        for module, other in scales.items():
            if not math.isclose(other, scale, rel_tol=1e-6):
                raise WeightsError(
                    f"{self.folder}: {first} is scaled by {scale:g} and {module} by {other:g}; one "
                    f"scale is held here. Merge the adapter with PEFT instead."
                )
        return scale

    def names(self) -> Collection[str]:
        return self.table.places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        place = self.table.places[name]
        if not place.live:
            return torch.float32
        return self._tensor(self._stems[place.matrix.module] + SUFFIX[place.tensors]).dtype

    def read(self, name: str, slices: Slices) -> Tensor:
        return self._whole(name)[slices]

    def _whole(self, name: str) -> Tensor:
        place, shape = self.table.places[name], self._shapes[name]
        if not place.live:
            return idle(place, self.base, shape)
        matrix = place.matrix
        tensor = self._tensor(self._stems[matrix.module] + SUFFIX[place.tensors])
        if place.tensors == "lora_magnitude":
            return tensor
        num = 1 if matrix.expert is None else self._num_experts
        expert = matrix.expert or 0
        if place.tensors == "lora_A":
            rank = tensor.shape[0] // num
            tensor = tensor[expert * rank : (expert + 1) * rank]
        else:
            tensor = tensor[slice(*place.rows), expert::num]
        if tuple(tensor.shape) == shape:
            return tensor
        padded = tensor.new_zeros(shape)
        padded[: tensor.shape[0], : tensor.shape[1]] = tensor
        return padded

    def _tensor(self, key: str) -> Tensor:
        """Of the file; the last ones are kept, which hold the next expert too."""
        if key not in self._recent:
            while len(self._recent) >= 4:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = self._file.get_tensor(key)
        return self._recent[key]


def _stem(key: str) -> str | None:
    """What comes before a LoRA tensor's own name."""
    for suffix in SUFFIX.values():
        if key.endswith(suffix):
            return key.removesuffix(suffix)
    return None


def _open(path: Path) -> Any:
    if not path.is_file():
        raise WeightsError(
            f"{path} is not there. Give a folder that PEFT's save_pretrained or convert adapter "
            f"wrote, with safetensors."
        )
    manifest = Manifest.of(path.parent)
    if manifest is None:
        say_unchecked(path.parent)
    else:
        manifest.all_there()
        manifest.check(path)
    read_header(path, manifest)
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise broken(path, str(error)) from None
