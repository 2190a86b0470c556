"""vLLM servers behind the protocol of a rollout engine: one or many, started here or given by
address. A server that is dead, hung or out of its mind is started again with the weights that it
should have, and its unfinished requests are dealt out again.
"""

import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.data import tokenizer as tokenizers
from moetrain.data.samples import Kept, Sample, decode_routes
from moetrain.errors import RolloutError
from moetrain.rollout.base import PROBE_TOKENS, Probe, Request, text_of_answer
from moetrain.rollout.client import QueueFull, ServerLost
from moetrain.rollout.dealing import Deal, as_json
from moetrain.rollout.follow_ups import FollowUps
from moetrain.rollout.pushed import Pushed
from moetrain.rollout.servers import Server
from moetrain.rollout.transfer import Transfer

FULL_SECONDS = 0.5  # between two looks at a full queue
MAX_LOSSES = 3  # of one server while it draws one batch


class Fleet:
    """All servers of a run.

    Args:
        servers: at least one.
        folder: takes the weights of pushes through files; every server must see it.
        hf: content of config.json.
        tokenizer: its folder.
        start_timeout: seconds that a start or a push may take.
        transfer: how weights go to running servers; None: through files.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        folder: Path,
        hf: dict[str, Any],
        tokenizer: Path,
        start_timeout: float,
        transfer: Transfer | None,
    ):
        self.servers, self.pushed = servers, Pushed(folder, hf)
        self.tokenizer: Any = tokenizers.load(tokenizer)
        self.start_timeout, self.transfer = start_timeout, transfer
        self.counts: Counter[str] = Counter()
        self.version = -1
        self._from_folder = False  # the next push starts the servers from files
        self._closed = False
        self._lock = threading.Lock()
        self._starts: Counter[int] = Counter()  # of each server, by its identity
        self._locks = {id(server): threading.Lock() for server in servers}

    # Sampling

    def batches(
        self, requests: Sequence[Request], *, stops: bool = False
    ) -> Iterable[Sequence[Request]]:
        """Servers batch as requests come: each is drawn by itself."""
        return ((request,) for request in requests)

    def generate(
        self,
        requests: Sequence[Request],
        on_sample: Callable[[Sample], None],
        follow_ups: FollowUps | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> None:
        """Draw all, on all servers; nothing that has come is drawn again. `follow_ups` are drawn
        beside the rest, by a thread more where all are busy. Once there is `enough`, servers say
        how far the others are.
        """
        if enough is not None and enough():
            return
        deal = Deal(requests, len(self.servers), more_may_come=follow_ups is not None)
        results: queue.SimpleQueue[Sample | BaseException | None] = queue.SimpleQueue()
        threads: list[threading.Thread] = []

        def begin(server: Server) -> None:
            args = (server, deal, results)
            thread = threading.Thread(target=self._work, args=args, daemon=True, name="rollout")
            threads.append(thread)
            thread.start()

        for server in self.servers:
            begin(server)
        next_server = cycle(self.servers)
        if follow_ups is not None:
            follow_ups.listener = lambda: results.put(None)
        num_open = len(requests)
        try:
            while num_open or (follow_ups is not None and follow_ups.is_open):
                one = results.get()
                if isinstance(one, BaseException):
                    raise one
                if one is not None:
                    num_open -= 1
                    on_sample(one)
                elif follow_ups is not None and (more := follow_ups.take()):
                    num_open += len(more)
                    if not deal.add(more):
                        begin(next(next_server))
                if enough is not None and enough():
                    for late in self._stopped(deal, threads, results) if num_open else ():
                        on_sample(late)
                    return
        finally:
            deal.end()

    def _stopped(
        self,
        deal: Deal,
        threads: Sequence[threading.Thread],
        results: "queue.SimpleQueue[Sample | BaseException | None]",
    ) -> list[Sample]:
        """What is being drawn, as far as it is. Of a server that is lost now nothing comes; the
        next push finds it.
        """
        deal.stop()

        def stop(server: Server) -> None:
            try:
                server.client.post("/stop", {"draw": deal.name})
            except ServerLost as lost:
                self._count(lost.fault)

        self._each(stop)
        for thread in threads:
            thread.join()
        late: list[Sample] = []
        while not results.empty():
            one = results.get()
            if isinstance(one, BaseException):
                raise one
            if one is not None:
                late.append(one)
        return late

    def _work(self, server: Server, deal: Deal, results: "queue.SimpleQueue[Any]") -> None:
        """A server's thread. What it raises is raised by `generate`."""
        losses = 0
        room: int | None = None
        try:
            while numbers := deal.take(room):
                room = None
                start = self._starts[id(server)]
                try:
                    self._draw(server, deal, numbers, results)
                except QueueFull as full:
                    self._count("queue_full")
                    room = full.room or None
                    time.sleep(0 if room else FULL_SECONDS)
                except ServerLost as lost:
                    if deal.is_stopped:
                        self._count(lost.fault)
                        return
                    losses += 1
                    if losses > MAX_LOSSES:
                        raise RolloutError(
                            f"A rollout server was lost {losses} times in one batch; the last time:"
                            f" {lost}. What was sampled is on disk; start again to go on."
                        ) from lost
                    self._recover(server, lost, start)
        except BaseException as error:
            if not self._closed:
                results.put(error)

    def _draw(
        self, server: Server, deal: Deal, numbers: Sequence[int], results: "queue.SimpleQueue[Any]"
    ) -> None:
        """Draw `numbers`; what has not come when the server fails or is full is given back."""
        body = {
            "version": self.version,
            "draw": deal.name,
            "requests": [as_json(number, deal.requests[number]) for number in numbers],
        }
        waiting = set(numbers)
        try:
            for answer in server.client.stream("/generate", body):
                if deal.over and not deal.is_stopped:
                    return
                if "error" in answer:
                    raise RolloutError(f"vLLM refuses a prompt: {answer['error']}.")
                try:
                    number = answer["number"]
                    sample = self._sample(deal.requests[number], answer)
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    text = f"{server.client.address} says {str(answer)[:80]}, which is no answer"
                    raise ServerLost("dead", text) from error
                waiting.discard(number)
                if deal.finish(number) and sample is not None:
                    results.put(sample)
            if waiting:
                raise ServerLost("dead", f"{server.client.address} left {len(waiting)} answers out")
        except (QueueFull, ServerLost):
            deal.give_back(numbers)
            raise

    def _sample(self, request: Request, answer: dict[str, Any]) -> Sample | None:
        """None of one that was stopped before its first token."""
        tokens, sampling = tuple(answer["tokens"]), request.sampling
        is_open = answer["finish"] == "abort"
        if is_open and not tokens:
            return None
        whole = (*request.given, *tokens)[len(request.prompt.tokens) :]
        return Sample(
            prompt_id=request.prompt.id,
            index=request.index,
            tokens=tokens,
            logprobs=tuple(answer["logprobs"]),
            text=text_of_answer(self.tokenizer, whole, sampling.stop_ids, sampling.stop),
            finish="open" if is_open else "length" if answer["finish"] == "length" else "stop",
            version=self.version,
            routes=decode_routes(answer["routes"]) if sampling.routes and not is_open else None,
            kept=Kept.from_json(answer["kept"]) if sampling.kept else None,
        ).behind(request.begun)

    def _recover(self, server: Server, lost: ServerLost, start: int) -> None:
        """Start a server that was lost after its start number `start` again, with the weights of
        now. Of several threads that it was lost to, one does.
        """
        with self._locks[id(server)]:
            if self._starts[id(server)] == start:
                self._count(lost.fault)
                self._restart(server)
                self._starts[id(server)] += 1

    def _restart(self, server: Server) -> None:
        if self._closed:
            raise RolloutError("The rollout servers were closed.")
        if self.pushed.version != self.version:
            server.close()
            raise RolloutError(
                "A rollout server was lost, and its weights went from GPU to GPU, so it cannot be"
                " started again before the next push. What was sampled is on disk; start again to"
                " go on, or set rollout.push=file."
            )
        server.fresh(self.pushed.whole(), self.version)
        self._count("restarts")

    def _count(self, fault: str) -> None:
        with self._lock:
            self.counts[f"server/{fault}"] += 1

    # Weights

    @property
    def held(self) -> int | None:
        """Pushes from GPU to GPU take everything: no folder has what did not move."""
        return None if self.transfer is not None or self._from_folder else self.pushed.held

    def push(
        self, weights: Iterable[tuple[str, Tensor]], version: int, since: int | None = None
    ) -> dict[str, float]:
        """Through files into all servers, or from GPU to GPU."""
        if self.transfer is not None and not self._from_folder:
            return self._push_directly(self.transfer, weights, version)
        started = time.perf_counter()
        sent = self.pushed.write(weights, version, whole=since is None)
        written = time.perf_counter()
        self._each(lambda server: self._load(server, since))
        self.pushed.tidy()
        self.version, self._from_folder = version, False
        return {
            "export_s": written - started,
            "load_s": time.perf_counter() - written,
            "bytes": float(sent),
            "whole_bytes": float(self.pushed.whole_bytes),
        }

    def _push_directly(
        self, transfer: Transfer, weights: Iterable[tuple[str, Tensor]], version: int
    ) -> dict[str, float]:
        started = time.perf_counter()
        self._each(lambda server: None if server.running else server.begin())
        begun = time.perf_counter()
        sent: list[int] = []

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                sent.append(tensor.nbytes)
                yield name, tensor

        try:
            transfer.send([server.client for server in self.servers], counted(), version)
        except ServerLost as lost:
            raise RolloutError(f"A push did not arrive: {lost}. Start again to go on.") from lost
        self.pushed.clear()
        self.version = version
        return {
            "start_s": begun - started,
            "transfer_s": time.perf_counter() - begun,
            "bytes": float(sum(sent)),
            "whole_bytes": float(sum(sent)),
        }

    def _load(self, server: Server, since: int | None) -> None:
        version = self.pushed.version
        assert version is not None, "a push has written it"
        if server.running and not self._from_folder:
            try:
                server.client.post("/push", self.pushed.message(since), self.start_timeout)
                return
            except ServerLost as lost:
                self._count(lost.fault)
                self._count("restarts")
        server.fresh(self.pushed.whole(), version)

    def _each(self, do: Callable[[Server], None]) -> None:
        with ThreadPoolExecutor(len(self.servers)) as pool:
            for done in [pool.submit(do, server) for server in self.servers]:
                done.result()

    def reload(self) -> None:
        """Start the servers from files at the next push."""
        self._from_folder = True
        self._count("reloads")

    # The proof

    def probe(self, sequences: Sequence[tuple[int, ...]]) -> Probe:
        """What every server says, one after the other."""
        body = {"sequences": sequences, "num_tokens": PROBE_TOKENS}
        given: list[tuple[int, ...]] = []
        scored: list[list[float]] = []
        answers: list[Sample] = []
        for server in self.servers:
            message = self._proved(server, body)
            given += sequences
            scored += message["scored"]
            answers += [
                Sample(str(i), 0, tuple(a["tokens"]), tuple(a["logprobs"]), "", "length", 0)
                for i, a in enumerate(message["answers"])
            ]
        return Probe.of(given, scored, answers)

    def _proved(self, server: Server, body: dict[str, Any]) -> dict[str, Any]:
        for _ in range(MAX_LOSSES):
            try:
                return server.client.post("/probe", body)
            except ServerLost as lost:  # since the push
                self._recover(server, lost, self._starts[id(server)])
        raise RolloutError(f"A rollout server was lost {MAX_LOSSES} times while it was probed.")

    def sleep(self) -> None:
        """Free the GPU that servers share with the trainer; others keep what they have."""
        self._tell("/sleep")

    def wake(self) -> None:
        """Take the memory again; weights are pushed after it."""
        self._tell("/wake")

    def _tell(self, path: str) -> None:
        if self.transfer is None or not self.transfer.shares_the_gpu:
            return
        for server in self.servers:
            try:
                if server.running:
                    server.client.post(path, timeout=self.start_timeout)
            except ServerLost as lost:  # the next push begins it again
                self._count(lost.fault)
                server.close()

    def close(self) -> None:
        self._closed = True
        for server in self.servers:
            server.close()
        shutil.rmtree(self.pushed.folder, ignore_errors=True)
