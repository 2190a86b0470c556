"""Pretraining corpora in Megatron's own format; the only file here that imports megatron.

Legend: t = data.seq_len, the tokens of a sample. A prefix names two files, prefix.bin (tokens) and
prefix.idx (documents).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moetrain.data import index_files
from moetrain.data import tokenizer as tokenizers
from moetrain.data.boundaries import Boundaries
from moetrain.data.cache import build_once, digest_files, key_of
from moetrain.errors import DataError
from moetrain.ops.packed import Packed, pack_one
from moetrain.ops.quiet import hush


class _Ids:
    """All that GPTDataset asks of a tokenizer. It has no pad.

    No token of a corpus is left out of the loss.
    """

    vocab_size = None
    eod = -2  # no token's id, and not what GPTDataset takes for a missing pad
    unique_identifiers = "moetrain"


class CorpusSet:
    """One or several indexed corpora, blended: epochs of `len` samples, each a `Packed` of [t].

    Every epoch is a GPTDataset (a BlendedDataset of several) of its own with the seed `seed` +
    epoch, so that what comes when does not depend on how long the run is. With `weights`, an epoch
    has as many samples as the corpora together, drawn in these shares; without, each sample once.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        weights: Sequence[float] | None,
        *,
        seq_len: int,
        seed: int,
        root: Path,
        held_out: bool = False,
        model_vocab: int | None = None,
        boundaries: Boundaries | None = None,
    ) -> None:
        self.boundaries = boundaries
        self.prefixes = [index_files.prefix_of(p) for p in prefixes]
        self.seq_len, self.seed, self.held_out, self.model_vocab = (
            seq_len,
            seed,
            held_out,
            model_vocab,
        )
        self._epochs: dict[int, Any] = {}
        files = [
            index_files.existing(p, suffix) for p in self.prefixes for suffix in (".idx", ".bin")
        ]
        self.num_samples = [index_files.num_samples(p, seq_len) for p in self.prefixes]
        for prefix in self.prefixes:
            index_files.check_tokens(prefix, model_vocab, root)
        indexes = [digest for _, digest in digest_files(files[::2], root)]
        index_files.check_once(self.prefixes, indexes)
        if weights is not None and len(weights) != len(prefixes):
            raise DataError(
                f"data.weights has {len(weights)} entries for {len(prefixes)} corpora: give one"
                " for each."
            )
        self.weights = list(weights) if weights is not None and len(prefixes) > 1 else None
        # Megatron names its cached orders by path, not by content: a folder per content keeps a re-
        # made index from being read in the order of the old one.
        content = [*indexes, *(f.stat().st_size for f in files[1::2])]
        self.fingerprint = key_of([content, self.weights, seq_len, seed, held_out])
        self._cache = root / "corpus" / self.fingerprint

    def __len__(self) -> int:
        return len(self.epoch(0))

    def epoch(self, number: int) -> Any:
        """The dataset of one epoch.

        In a process group every rank must come here together (Megatron's barrier).
        """
        if number not in self._epochs:
            folder = self._cache / f"epoch-{number}"
            if not torch.distributed.is_initialized():
                build_once(folder, lambda tmp: self._build(number, tmp))
            elif not folder.is_dir():
                # Nobody called `prepare`: Megatron's rank 0 writes and the others wait. A write
                # that is cut short would be believed later, so it is kept apart.
                folder = self._cache / "unprepared"
            self._epochs = {number: self._build(number, folder)} | {
                k: v for k, v in self._epochs.items() if k == 0
            }
        return self._epochs[number]

    def _build(self, number: int, cache: Path) -> Any:
        hush()
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split

        split = Split.valid if self.held_out else Split.train
        blends: list[Any] = [None] * len(Split)
        blends[split.value] = ([str(p) for p in self.prefixes], self.weights)
        sizes: list[Any] = [0] * len(Split)
        total = sum(self.num_samples)
        sizes[split.value] = total if self.weights else None
        # Rounding to whole samples can ask a corpus for a few more than its share: leave room for
        # one per corpus.
        smallest = min((w for w in self.weights or [1.0] if w > 0), default=1.0) / sum(
            self.weights or [1.0]
        )
        config = GPTDatasetConfig(
            random_seed=(self.seed + number) % 2**32,
            sequence_length=self.seq_len,
            blend_per_split=blends,
            path_to_cache=str(cache),
            tokenizer=_Ids(),  # pyright: ignore[reportArgumentType]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            mid_level_dataset_surplus=max(
                0.005, (len(self.prefixes) + 1) / max(1.0, total * smallest)
            ),
        )
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[
            split.value
        ]

    def get(self, epoch: int, number: int) -> Packed:
        """Sample `number` of an epoch: t tokens, all of them scored and one sequence where
        `boundaries` does not say otherwise.
        """
        sample = self.epoch(epoch)[number]
        tokens, labels = sample["tokens"], sample["labels"]
        # The index was looked at; these are the bytes that came.
        smallest = int(min(tokens.min(), labels.min()))
        largest = int(max(tokens.max(), labels.max()))
        where = f"{', '.join(map(str, self.prefixes))} epoch {epoch} sample {number}"
        if smallest < 0:
            raise DataError(f"The index behind {where} has a token {smallest}: make it again.")
        tokenizers.check_vocab(largest + 1, self.model_vocab, f"The index behind {where}")
        if self.boundaries is not None:
            return self.boundaries.pack(tokens, labels, where)
        return pack_one(tokens, labels, torch.ones(self.seq_len), id=where)
