"""Whether two models answer alike: hidden states go through both side by side, with one layer of
one of them in memory, all in fp32 of the values that are stored.

Legend: t tokens, h hidden width, v rows of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.models.rules import EMBEDDING, HEAD
from moetrain.weights import convert
from moetrain.weights.compare import NO_ADAPTERS, Adapters
from moetrain.weights.one_layer import embedded, one_layer, outputs
from moetrain.weights.opening import Opened, config_for, open_model
from moetrain.weights.reader import Reader, RowsReader, Slices
from moetrain.weights.rows import Rows
from moetrain.weights.stream import Report

NORM = "model.norm.weight"
ROWS = 2048  # of the head, whose logits [t, rows] are compared at a time
# Of what a place itself adds: above what rounding to bf16 moves (0.002 to 0.012 here, in random
# models of 24 layers), below what gate and up swapped in one layer do (0.025 to 0.27). The largest
# is no measure: a token on the edge between two experts takes the other.
TOLERANCE = 0.02
LISTED = 10  # tensors that differ

type Sequences = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Distance:
    """How far apart two models are at one place, relative to the first: of each token the norm of
    the difference; of all tokens the largest and the mean.
    """

    place: str
    largest: float
    mean: float
    alone: float  # mean of what this place itself adds, both being given the first model's input

    def __str__(self) -> str:
        return f"{self.place:12}{self.largest:12.3g}{self.mean:12.3g}{self.alone:12.3g}"

    def is_within(self, tolerance: float) -> bool:
        """Of what is not a number nothing is."""
        return self.alone <= tolerance and self.mean < torch.inf


def relative(gaps: Tensor, sizes: Tensor) -> tuple[float, float]:
    """(largest, mean) of norms [t] of differences over what they are relative to."""
    result = torch.where(gaps == 0, 0.0, gaps / sizes)  # 0 / 0 is no difference
    return float(result.max()), float(result.mean())


@dataclass(frozen=True)
class Answers:
    """The distributions of the next token after each of `num` tokens."""

    distance: Distance  # of log-probs less their mean
    largest: float  # difference of any word's log-prob
    agreeing: int  # tokens after which the most likely word is the same
    num: int
    unmet: int = 0  # experts of all layers that no token went through

    def __str__(self) -> str:
        unmet = f"\n{self.unmet} experts met no token: only their tensors were compared"
        return (
            f"log-probs differ by up to {self.largest:.3g}; the most likely next token is the same"
            f" after {self.agreeing} of {self.num} tokens ({self.agreeing / self.num:.1%})"
            f"{unmet if self.unmet else ''}"
        )


def verify(
    a: Path,
    b: Path,
    num_tokens: int,
    *,
    tolerance: float | None = None,
    data: Path | None = None,
    workers: int = 1,
    config: Path | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> int:
    """Compare the tensors of two models, and what they make of `num_tokens` tokens. Returns 0 when
    they answer alike within `tolerance`, whatever their tensors are; else 1.

    Args:
        data: text or tokens to take; by default tokens are drawn from the vocabulary.
        config: of a checkpoint of Megatron-LM's; by default that of the other folder.
        adapters: merged into them as they are read.
    """
    first = open_model(a, config_for(a, config or b), adapters[0])
    second = open_model(b, config_for(b, config or a), adapters[1])
    _check(first, second)
    sequences = _sequences(first, second, num_tokens, data)
    tolerance = TOLERANCE if tolerance is None else tolerance
    convert.verify(a, b, workers, config, LISTED, adapters)
    print(f"\n{'':12}{'largest':>12}{'mean':>12}{'alone':>12}  relative difference")
    beyond: list[Distance] = []
    report = convert.Progress("verify, layers")
    for step in compare(first, second, sequences, report):
        distance = step.distance if isinstance(step, Answers) else step
        report.close()
        print(distance, flush=True)
        if isinstance(step, Answers):
            print(step)
        if not distance.is_within(tolerance):
            beyond.append(distance)
    if beyond:
        num = f"{len(beyond)} place{'s' if len(beyond) > 1 else ''}"
        print(f"alone beyond --tolerance {tolerance:g} in {num}, the first: {beyond[0].place}")
        return 1
    print(f"{a} and {b} answer alike: no layer alone is further apart than {tolerance:g}")
    return 0


def compare(
    a: Opened, b: Opened, sequences: Sequences, report: Report | None = None
) -> Iterator[Distance | Answers]:
    """After the embedding, after each layer, and of the answers."""
    readers = _Noting(a.rows), _Noting(b.rows)
    x, y = (embedded(reader, sequences, torch.float32) for reader in readers)
    largest, mean = _apart(x, y)
    yield Distance("embedding", largest, mean, mean)
    size = 8 * sum(rule.num_params for rule in a.model.table.values() if rule.layer is not None)
    for number in range(a.model.num_layers):
        before, x = x, outputs(layer(a, readers[0], number), x)
        made = layer(b, readers[1], number)  # the first model's is gone
        as_before = all(map(torch.equal, before, y))
        y = outputs(made, y)
        alone = y if as_before else outputs(made, before)
        del made
        added = torch.cat(x) - torch.cat(before)
        _, part = relative((torch.cat(x) - torch.cat(alone)).norm(dim=1), added.norm(dim=1))
        yield Distance(f"layer {number}", *_apart(x, y), part)
        if report is not None:
            report(size * (number + 1) // a.model.num_layers, size)
    met = readers[0].read_names | readers[1].read_names
    unmet = {(rule.layer, rule.expert) for rule in a.model.table.values()
             if rule.expert is not None and rule.hf[0] not in met}  # fmt: skip
    yield answers(a, b, torch.cat(x), torch.cat(y), len(unmet))


def layer(source: Opened, reader: Reader, number: int) -> Any:
    """A layer as a transformers model that computes in fp32."""
    return one_layer(source.hf, source.model, reader, number, torch.float32, holds_experts=False)[0]


def _apart(x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[float, float]:
    first, second = torch.cat(list(x)), torch.cat(list(y))
    return relative((first - second).norm(dim=1), first.norm(dim=1))


class _Noting(RowsReader):
    """A reader that knows what was asked of it."""

    def __init__(self, rows: Rows):
        super().__init__(rows)
        self.read_names: set[str] = set()

    def read(self, name: str, slices: Slices) -> Tensor:
        self.read_names.add(name)
        return super().read(name, slices)


def answers(a: Opened, b: Opened, x: Tensor, y: Tensor, unmet: int = 0) -> Answers:
    """Of the hidden states [t, h] that leave the last layers. Words are met some at a time and
    once: what is needed of them are sums.
    """
    vocab = a.model.heads.vocab
    heads = _Head(a, x), _Head(b, y)
    sums = torch.zeros(4, len(x), dtype=torch.float64)  # of l, l^2, d and d^2; d = l - l of b
    high, low = x.new_full((len(x),), -torch.inf), x.new_full((len(x),), torch.inf)
    for start in range(0, vocab, ROWS):
        p, q = (head.logits(start, min(start + ROWS, vocab)).double() for head in heads)
        gap = p - q
        for into, each in zip(sums, (p, p.square(), gap, gap.square()), strict=True):
            into += each.sum(1)
        high, low = torch.maximum(high, gap.amax(1)), torch.minimum(low, gap.amin(1))
    first, second = heads
    shift = first.total - second.total
    largest = torch.maximum((high - shift).abs(), (low - shift).abs()).max()
    spread, gaps = ((sums[i + 1] / vocab - (sums[i] / vocab).square()).clamp_min(0).sqrt()
                    for i in (0, 2))  # fmt: skip
    apart = relative(gaps, spread)
    alone = apart[1] if torch.equal(x, y) else answers(a, b, x, x).distance.mean
    distance = Distance("output", *apart, alone)
    agreeing = int((first.best == second.best).sum())
    return Answers(distance, float(largest), agreeing, len(x), unmet)


class _Head:
    """The output layer of a model at the tokens of `hidden` [t, h]; what its logits sum up to is
    known when all have been asked for.
    """

    def __init__(self, source: Opened, hidden: Tensor):
        self.reader, self.model = RowsReader(source.rows), source.model
        width = self.model.hidden
        norm = self.reader.read(NORM, (slice(0, width),)).float()
        self.hidden = torch.nn.functional.rms_norm(hidden, (width,), norm, self.model.norm_eps)
        self.total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float64)
        self._highest, self.best = self.total.clone(), torch.zeros(len(hidden), dtype=torch.long)

    def logits(self, start: int, stop: int) -> Tensor:
        """[t, stop - start], of the words from `start` on."""
        name = EMBEDDING if self.model.heads.tied else HEAD
        rows = self.reader.read(name, (slice(start, stop), slice(0, self.model.hidden))).float()
        result = self.hidden @ rows.T
        self.total = torch.logaddexp(self.total, result.double().logsumexp(1))
        highest, word = result.max(1)
        self.best = torch.where(highest > self._highest, word + start, self.best)
        self._highest = torch.maximum(self._highest, highest)
        return result


def _check(a: Opened, b: Opened) -> None:
    """ConfigError where there is nothing to compare layer by layer."""

    def sizes(one: Opened) -> dict[str, object]:
        model = one.model
        return {"architecture": model.architecture, "num_hidden_layers": model.num_layers,
                "hidden_size": model.hidden, "vocab_size": model.heads.vocab}  # fmt: skip

    for one in (a, b):
        if one.model.heads.scalar:
            raise ConfigError(
                f"{one.folder} has a head of one number, no logits. verify without --logits"
                f" compares its tensors."
            )
    of_b = sizes(b)
    for name, value in sizes(a).items():
        if of_b[name] != value:
            raise ConfigError(
                f"--logits compares models of one kind: {a.folder} has {name} {value}, {b.folder}"
                f" has {of_b[name]}. verify without --logits lists the tensors that differ."
            )


def _sequences(a: Opened, b: Opened, num_tokens: int, data: Path | None) -> list[list[int]]:
    """`num_tokens` tokens: drawn, in one sequence, or the first of a file's."""
    vocab, positions = a.model.heads.vocab, min(a.model.max_positions, b.model.max_positions)
    if data is None:
        if num_tokens > positions:
            raise ConfigError(
                f"--logits {num_tokens} is more than the {positions} positions of {a.folder}. Give"
                f" at most {positions}, or texts with --data FILE."
            )
        drawn = torch.randint(vocab, (num_tokens,), generator=torch.Generator().manual_seed(0))
        return [drawn.tolist()]
    from moetrain.weights.calibration import read_sequences

    result: list[list[int]] = []
    for ids in read_sequences(data, a.beside, vocab):
        ids = ids[: min(positions, num_tokens - sum(map(len, result)))]
        result += [ids] if ids else []
    num = sum(map(len, result))
    if num < num_tokens:
        raise ConfigError(f"{data} has {num} tokens, --logits asks for {num_tokens}. Give fewer.")
    return result
