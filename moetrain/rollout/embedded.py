"""Sampling in the trainer's own process: a transformers model on the CPU, for tests and small
models.

Legend: b answers drawn together, s tokens of a forward pass, v vocabulary, l MoE layers, k experts
    of a token.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from moetrain import files
from moetrain.data import tokenizer as tokenizers
from moetrain.data.samples import Kept, Prompt, Sample
from moetrain.errors import RolloutError
from moetrain.pulse import beat
from moetrain.rollout.base import (
    PROBE_TOKENS,
    Probe,
    Request,
    Sampling,
    stopped_at,
    text_of_answer,
)
from moetrain.rollout.follow_ups import FollowUps
from moetrain.rollout.shaping import shaped

BATCH = 64  # answers drawn together
ROUTERS = ("mlp.gate", "mlp.router")  # what transformers calls routers


class Embedded:
    """A copy of the model as transformers has it; `push` makes it anew.

    Args:
        hf: content of config.json.
        tokenizer: its folder.
    """

    def __init__(self, hf: dict[str, Any], tokenizer: Path):
        self.hf = hf
        self.tokenizer: Any = tokenizers.load(tokenizer)
        self.counts: Counter[str] = Counter()
        self.model: Any = None
        self.version = -1
        self._tensors: dict[str, Tensor] = {}  # of the last push, by Hugging Face name

    def generate(
        self,
        requests: Sequence[Request],
        on_sample: Callable[[Sample], None],
        follow_ups: FollowUps | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> None:
        """Draw all, batch by batch; then the next turns of all of them, so that what is drawn
        together does not depend on how fast replies come.

        Where it stops at `enough`, all batches are drawn a token each in turn; answers of several
        turns stop between rounds of turns alone.
        """
        if not requests and follow_ups is not None:
            requests = follow_ups.take_round()
        while requests and not (enough is not None and enough()):
            if enough is not None and follow_ups is None:
                self._draw_until(requests, on_sample, enough)
            else:
                for together in self._alike(requests):
                    for sample in self._draw(together):
                        on_sample(sample)
            requests = [] if follow_ups is None else follow_ups.take_round()

    def batches(
        self, requests: Sequence[Request], *, stops: bool = False
    ) -> Iterable[Sequence[Request]]:
        """Those that are drawn one way, with prompts of like length together."""
        return [requests] if stops and requests else self._alike(requests)

    def _alike(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        ways: dict[Sampling, list[Request]] = {}
        for request in requests:
            ways.setdefault(request.sampling, []).append(request)
        for alike in ways.values():
            yield from batched(sorted(alike, key=lambda r: len(r.given)), BATCH)

    def _draw(self, requests: Sequence[Request]) -> list[Sample]:
        drawing = _Drawing(self.model, self.tokenizer, requests)
        while drawing.open_rows:
            drawing.step()
        return [drawing.sample(row, self.version) for row in range(len(requests))]

    def _draw_until(
        self,
        requests: Sequence[Request],
        on_sample: Callable[[Sample], None],
        enough: Callable[[], bool],
    ) -> None:
        drawings = [_Drawing(self.model, self.tokenizer, alike) for alike in self._alike(requests)]
        while any(drawing.open_rows for drawing in drawings) and not enough():
            for drawing in drawings:
                for row in drawing.step() if drawing.open_rows else ():
                    on_sample(drawing.sample(row, self.version))
        for drawing in drawings:
            for row in sorted(drawing.open_rows):
                if drawing.lengths[row]:
                    on_sample(drawing.sample(row, self.version))

    @property
    def held(self) -> int | None:
        return self.version if self._tensors else None

    def push(
        self, weights: Iterable[tuple[str, Tensor]], version: int, since: int | None = None
    ) -> dict[str, float]:
        """Through a folder, so that transformers itself says which name belongs where."""
        from transformers import AutoModelForCausalLM

        started = time.perf_counter()
        new = {name: tensor.to("cpu", copy=True) for name, tensor in weights}
        self._tensors = tensors = new if since is None else self._tensors | new
        gathered = time.perf_counter()
        with files.scratch() as folder:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps(self.hf))
            loader: Any = AutoModelForCausalLM
            dtype = next(iter(tensors.values())).dtype
            with _quiet():
                self.model, info = loader.from_pretrained(
                    str(folder), dtype=dtype, output_loading_info=True
                )
        wrong = [key for kind in ("missing_keys", "unexpected_keys") for key in info[kind]]
        if wrong:
            raise RolloutError(f"transformers does not know what to do with {wrong[:3]}.")
        self.model.eval()
        self.version = version
        return {
            "export_s": gathered - started,
            "load_s": time.perf_counter() - gathered,
            "bytes": float(sum(tensor.nbytes for tensor in new.values())),
            "whole_bytes": float(sum(tensor.nbytes for tensor in tensors.values())),
        }

    def reload(self) -> None:
        self._tensors = {}

    def probe(self, sequences: Sequence[tuple[int, ...]]) -> Probe:
        """Score what is given, and greedy answers to it with the log-probs of drawing them."""
        greedy = Sampling(max_tokens=PROBE_TOKENS, temperature=0.0)
        requests = [
            Request(Prompt(str(i), tuple(sequence), {}), 0, 0, greedy)
            for i, sequence in enumerate(sequences)
        ]
        samples: list[Sample] = []
        self.generate(requests, samples.append)
        samples.sort(key=lambda sample: int(sample.prompt_id))
        return Probe.of(sequences, self._score(sequences), samples)

    @torch.inference_mode()
    def _score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-prob of each token after the first. What fills short ones up comes behind them,
        where a causal model does not see it.
        """
        longest = max(map(len, sequences))
        ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences])
        logp = torch.log_softmax(self.model(ids).logits[:, :-1].float(), -1)
        rows = logp.gather(2, ids[:, 1:, None])[:, :, 0].tolist()
        return [row[: len(tokens) - 1] for row, tokens in zip(rows, sequences, strict=True)]

    def sleep(self) -> None:
        """There is no memory to give back that `push` would not take again."""

    def wake(self) -> None:
        """Ready as it is."""

    def close(self) -> None:
        """Nothing was started."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar for every push."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


class _Drawing:
    """b answers drawn together from left-padded prompts and one key-value cache. An answer that has
    ended is drawn on, and not kept.
    """

    def __init__(self, model: Any, tokenizer: Any, requests: Sequence[Request]):
        self.model, self.tokenizer, self.requests = model, tokenizer, requests
        self.sampling = requests[0].sampling
        assert all(r.sampling == self.sampling for r in requests), "a batch is drawn one way"
        self.prompts = [request.given for request in requests]
        self.longest = max(map(len, self.prompts))
        self.ids = torch.zeros(len(requests), self.longest, dtype=torch.int64)
        self.mask = torch.zeros_like(self.ids)
        for row, prompt in enumerate(self.prompts):
            self.ids[row, self.longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, self.longest - len(prompt) :] = 1
        self.generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.lengths = [0] * len(requests)
        self.open_rows = set(range(len(requests)))
        self.cut_rows = set[int]()  # that max_tokens ended
        self.kept: list[list[Any]] = [[] for _ in requests]  # ids, of each token of an answer
        self.seen = torch.zeros(0)  # [b, v] bool, from the first step on
        self._chosen: list[Tensor] = []  # [b, s, l, k] of each pass
        self._cache: Any = None

    @torch.inference_mode()
    def step(self) -> list[int]:
        """One token more for every answer; the rows that it ended."""
        beat()  # no client watches it, as one does a server
        sampling = self.sampling
        new = self.ids if self._cache is None else self.ids[:, -1:]
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -new.size(1) :]
        with _Listening(self.model, new.shape, self._chosen if sampling.routes else None):
            out = self.model(
                input_ids=new,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = out.past_key_values
        logp = shaped(out.logits[:, -1].float(), self._seen(out.logits.size(-1)), sampling)
        drawn = logp.argmax(-1)
        if sampling.temperature:
            # Gumbel's trick with a generator a row: an answer does not depend on the others.
            noise = torch.stack([torch.rand(logp.size(1), generator=g) for g in self.generators])
            drawn = (logp - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))).argmax(-1)
        ended: list[int] = []
        for row, token in enumerate(drawn.tolist()):
            self.tokens[row].append(token)
            self.logprobs[row].append(float(logp[row, token]))
            if row in self.open_rows:
                self.lengths[row] += 1
                if sampling.kept:
                    self.kept[row].append(logp[row].isfinite().nonzero()[:, 0].int().numpy())
                if self._ends(row, token, sampling):
                    ended.append(row)
                elif self.lengths[row] >= self.requests[row].room:
                    ended.append(row)
                    self.cut_rows.add(row)
        self.open_rows.difference_update(ended)
        self.seen.scatter_(1, drawn[:, None], True)
        self.ids = torch.cat([self.ids, drawn[:, None]], 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return ended

    def sample(self, row: int, version: int) -> Sample:
        """An answer as far as it is, with what there was of it before."""
        request, sampling, is_open = self.requests[row], self.sampling, row in self.open_rows
        return Sample(
            prompt_id=request.prompt.id,
            index=request.index,
            tokens=tuple(self.answer_tokens(row)),
            logprobs=tuple(self.logprobs[row][: self.lengths[row]]),
            text=self.text(row, sampling),
            finish="open" if is_open else "length" if row in self.cut_rows else "stop",
            version=version,
            routes=self.routes(row) if sampling.routes and not is_open else None,
            kept=Kept.of(self.kept[row]) if sampling.kept else None,
        ).behind(request.begun)

    def _seen(self, vocab: int) -> Tensor:
        """[b, vocab] bool: tokens of each prompt and of its answer so far."""
        if not len(self.seen):
            self.seen = torch.zeros(len(self.prompts), vocab, dtype=torch.bool)
            for row, prompt in enumerate(self.prompts):
                self.seen[row, list(prompt)] = True
        return self.seen

    def _ends(self, row: int, token: int, sampling: Sampling) -> bool:
        if token in sampling.stop_ids:
            return True
        return bool(sampling.stop) and stopped_at(self.text(row), sampling.stop) is not None

    def text(self, row: int, sampling: Sampling | None = None) -> str:
        """What an answer says so far; with `sampling` up to where it ended."""
        stops = (sampling.stop_ids, sampling.stop) if sampling else ((), ())
        begun = self.prompts[row][len(self.requests[row].prompt.tokens) :]
        return text_of_answer(self.tokenizer, [*begun, *self.answer_tokens(row)], *stops)

    def answer_tokens(self, row: int) -> list[int]:
        """The tokens that were drawn for an answer, to its end."""
        return self.tokens[row][: self.lengths[row]]

    def routes(self, row: int) -> np.ndarray[Any, np.dtype[np.int16]]:
        """[prompt + answer - 1, l, k]."""
        whole = torch.cat([part[row] for part in self._chosen])
        start = self.longest - len(self.prompts[row])
        end = self.longest + self.lengths[row] - 1
        return whole[start:end].to(torch.int16).numpy()


class _Listening:
    """Collects the experts that all routers choose meanwhile: [b, s, l, k] appended to `chosen`."""

    def __init__(self, model: Any, shape: torch.Size, chosen: list[Tensor] | None):
        self.model, self.shape, self.chosen = model, shape, chosen
        self._found: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        if self.chosen is None:
            return
        gates = [m for name, m in self.model.named_modules() if name.endswith(ROUTERS)]
        for gate in gates:
            hook = gate.register_forward_hook(lambda m, a, out: self._found.append(out[-1]))
            self._hooks.append(hook)

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if self.chosen is not None and self._found:
            layers = [layer.view(*self.shape, -1) for layer in self._found]
            self.chosen.append(torch.stack(layers, 2))
