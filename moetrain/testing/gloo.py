"""Real gloo processes for tests: started once, used by every test, since importing Megatron costs
seconds.
"""

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, popen_forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import SimpleNamespace
from typing import Any

from moetrain.errors import MoetrainError
from moetrain.ports import free_port


def _serve(rank: int, pipe: Connection) -> None:
    # Daemonic to the parent, so that they end with it; but Megatron's save starts a process itself.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    share_server()
    import torch

    torch.set_num_threads(1)
    os.environ["MOETRAIN_TIMEOUT_MINUTES"] = "2"
    from moetrain.engine import device

    device.prepare()
    from moetrain.engine.world import leave

    gc.freeze()  # what is imported stays, and is not looked through again
    while True:
        job = pipe.recv()
        if job is None:
            return
        world, port, function, args = job
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            answer: tuple[bool, Any] = (True, function(*args))
        except BaseException as error:  # the boundary of the worker process
            answer = (
                False,
                (error if isinstance(error, Exception) else None, traceback.format_exc()),
            )
        try:
            leave()
        finally:
            try:
                pipe.send(answer)
            except Exception:  # an exception that does not pickle
                pipe.send((False, (None, answer[1][1])))
        # An engine is a circle, and what it holds of a world is 12 threads of gloo and more.
        del answer, job, function, args
        gc.collect()


def server_of(preload: str) -> forkserver.ForkServer:
    """One whose processes have imported the module `preload` before they start."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([preload])
    return server


_server = server_of("moetrain.testing.preload")


@contextmanager
def own_server(server: forkserver.ForkServer = _server) -> Iterator[None]:
    """Processes start from a server of our own: the one that a process has by default may serve
    others too, who want nothing imported.
    """
    starter: Any = popen_forkserver
    everyones = starter.forkserver
    ours = SimpleNamespace(
        connect_to_new_process=server.connect_to_new_process, read_signed=forkserver.read_signed
    )
    starter.forkserver = ours
    try:
        yield
    finally:
        starter.forkserver = everyones


def share_server() -> None:
    """Let what this process starts come from the server that it comes from itself: processes that
    grade, which otherwise import for a second each. So ensure_running's description has it, but
    Python 3.12 starts another server.
    """
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = resource_tracker.ensure_running


class _FromServer(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with own_server():
            return ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]


class FromServer(ForkServerContext):
    """A context whose processes have imported everything before they start, for code that would
    spawn its own.
    """

    Process: Any = _FromServer


# Megatron's DDP is in a circle through C++ that Python's collector does not see, so that every
# engine leaves its process groups behind: three threads of gloo each, of which one wakes up a
# hundred times a second for as long as the rank waits for its next job. A new rank costs a tenth of
# a second.
RUNS_OF_A_RANK = 4
MANY_THREADS = 100


class Workers:
    """A pool of ranks. `run(world, function, *args)` calls function on each of `world` ranks and
    returns their answers.
    """

    starts = staticmethod(own_server)  # what is around the start of one

    def __init__(self) -> None:
        self.ranks: list[tuple[Any, Connection]] = []
        self._num_runs = 0

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 180
    ) -> list[Any]:
        """Raise what the first failing rank raised, with its traceback; a hang fails after
        `timeout` seconds.
        """
        self._num_runs += 1
        context = multiprocessing.get_context("forkserver")
        while len(self.ranks) < world:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(len(self.ranks), theirs), daemon=True)
            with self.starts():
                process.start()
            theirs.close()  # else the end of the rank would not be heard
            self.ranks.append((process, ours))
        port = free_port()
        for _, pipe in self.ranks[:world]:
            pipe.send((world, port, function, args))
        answers = self._answers(world, timeout)
        failures = [(rank, *answer) for rank, (ok, answer) in answers.items() if not ok]
        if failures:
            self.close()  # the others may wait for the failed rank for ever
            # A rank that gives up breaks the connections of others, which may be heard of first.
            rank, error, trace = min(failures, key=lambda f: not isinstance(f[1], MoetrainError))
            if error is not None:
                error.add_note(f"rank {rank} of {world}:\n{trace}")
                raise error
            raise RuntimeError(f"rank {rank} of {world}: {trace}")
        threads = max(_num_threads(process.pid) for process, _ in self.ranks)
        if self._num_runs >= RUNS_OF_A_RANK or threads > MANY_THREADS:
            self.close()
        return [answers[rank][1] for rank in range(world)]

    def _answers(self, world: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        """What each rank said, in the order in which they did. Once one has failed, the others,
        which may wait for it, have 5 seconds.
        """
        answers: dict[int, tuple[bool, Any]] = {}
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self.ranks[:world])}
        end = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), max(end - time.monotonic(), 0))
            if not ready:
                if all(ok for ok, _ in answers.values()):
                    late = min(pending.values())
                    answers[late] = (False, (None, f"did not answer in {timeout} s"))
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    process = self.ranks[rank][0]
                    process.join(5)
                    answers[rank] = (False, (None, f"died with exit code {process.exitcode}"))
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + 5)
        return answers

    def close(self) -> None:
        """Kill all ranks; the next run starts new ones."""
        for process, _ in self.ranks:
            process.kill()
        self.ranks = []
        self._num_runs = 0


def _num_threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:  # it has ended
        return 0


def apart[R](function: Callable[..., R], *args: Any, timeout: float = 180) -> R:
    """What `function` returns in a process of its own, which need not import anything."""
    pool = Workers()
    try:
        return pool.run(1, function, *args, timeout=timeout)[0]
    finally:
        pool.close()
