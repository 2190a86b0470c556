"""Weights from the trainer's GPU to the servers' GPUs by vLLM's own transfer, a bucket at a time.
The tensors travel beside the HTTP calls that announce them. Written against the source of vLLM
0.32; what needs a GPU here has not run yet.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch import Tensor

from moetrain.ports import free_port
from moetrain.rollout.client import Client, ServerLost

# A bucket, and the buffer that vLLM packs it into. It must hold the largest tensor: the embedding
# of Qwen3-235B-A22B is 1.2 GB in bf16.
BUCKET_BYTES = 2 << 30
NUM_BUFFERS = 2
Bucket = list[tuple[str, Tensor]]


class Transfer(Protocol):
    """A way from GPU to GPU."""

    shares_the_gpu: bool

    def send(
        self, clients: Sequence[Client], weights: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        """Serve `weights` as `version` on all servers. Raises ServerLost."""
        ...


class Nccl:
    """Broadcast from the first rank to the workers of all servers, which have GPUs of their own.

    Args:
        ranks: GPUs of a server.
        timeout: seconds that a call may take.
    """

    shares_the_gpu = False

    def __init__(self, ranks: int, timeout: float):
        self.ranks, self.timeout = ranks, timeout
        self._group: Any = None
        self._members: list[tuple[str, int]] = []  # address and process of each server

    def send(
        self, clients: Sequence[Client], weights: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        members = [(c.address, int(c.get("/health")["pid"])) for c in clients]
        if members != self._members:  # NCCL's groups outlive no member
            self._join(clients)
            self._members = members
        _each(clients, "start", {}, self.timeout)
        schema: dict[str, list[int]] = {}
        for bucket in buckets(weights):
            schema |= {name: list(tensor.shape) for name, tensor in bucket}
            self._together(clients, "update", [described(bucket)], lambda b=bucket: self._cast(b))
        _each(clients, "finish", {"schema": schema, "version": version}, self.timeout)

    def _join(self, clients: Sequence[Client]) -> None:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        host = own_address(clients[0])
        port = free_port(host)
        world_size = 1 + self.ranks * len(clients)
        infos = [
            {
                "master_address": host,
                "master_port": port,
                "rank_offset": 1 + number * self.ranks,
                "world_size": world_size,
                "packed": True,
                "packed_buffer_size_bytes": BUCKET_BYTES,
                "packed_num_buffers": NUM_BUFFERS,
            }
            for number in range(len(clients))
        ]

        def join() -> None:
            import torch

            device = torch.cuda.current_device()
            self._group = stateless_init_process_group(host, port, 0, world_size, device)

        self._together(clients, "init", infos, join)

    def _cast(self, bucket: Bucket) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=iter(bucket),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1].cuda(),
            buffer_size_bytes=BUCKET_BYTES,
            num_buffers=NUM_BUFFERS,
        )

    def _together(
        self,
        clients: Sequence[Client],
        step: str,
        infos: Sequence[dict[str, Any]],
        do: Callable[[], None],
    ) -> None:
        """Announce and do what both sides wait for each other in. An announcement that fails ends
        the wait: the other side would never come, and NCCL waits for ever.
        """
        import torch

        device = torch.cuda.current_device()
        future: Future[None] = Future()

        def run() -> None:
            try:
                torch.cuda.set_device(device)  # threads begin at device 0
                do()
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

        with ThreadPoolExecutor(len(clients)) as pool:
            own_infos = infos if len(infos) == len(clients) else [infos[0]] * len(clients)
            threading.Thread(target=run, daemon=True).start()
            calls = [
                pool.submit(client.post, f"/transfer/{step}", {"info": info}, self.timeout)
                for client, info in zip(clients, own_infos, strict=True)
            ]
            for call in calls:
                call.result()
        try:
            future.result(self.timeout)
        except TimeoutError as error:
            raise ServerLost("timeout", f"NCCL did not end within {self.timeout:g} s") from error


class Ipc:
    """Through the memory of the GPU that the first rank and one server share."""

    shares_the_gpu = True

    def __init__(self, timeout: float):
        self.timeout = timeout

    def send(
        self, clients: Sequence[Client], weights: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        import base64
        import pickle

        import torch
        from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

        _each(clients, "init", {"info": {"packed": True}}, self.timeout)
        _each(clients, "start", {}, self.timeout)
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        schema: dict[str, list[int]] = {}
        for chunk in packed_ipc_producer(
            iterator=iter(weights),
            gpu_uuid=uuid,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=BUCKET_BYTES,
        ):
            schema |= dict(zip(chunk.names, chunk.shapes, strict=True))
            info = {
                "names": chunk.names,
                "dtype_names": chunk.dtype_names,
                "shapes": chunk.shapes,
                "tensor_sizes": chunk.tensor_sizes,
                "ipc_handles_pickled": base64.b64encode(pickle.dumps(chunk.ipc_handle)).decode(),
            }
            # The buffer is used again for the next chunk: the server has read it when this returns.
            _each(clients, "update", {"info": info}, self.timeout)
        _each(clients, "finish", {"schema": schema, "version": version}, self.timeout)
        torch.cuda.ipc_collect()


def _each(clients: Sequence[Client], step: str, body: dict[str, Any], timeout: float) -> None:
    with ThreadPoolExecutor(len(clients)) as pool:
        calls = [pool.submit(c.post, f"/transfer/{step}", body, timeout) for c in clients]
        for call in calls:
            call.result()


def buckets(weights: Iterable[tuple[str, Tensor]], size: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """The same tensors in the same order, cut where a bucket would pass `size` bytes."""
    bucket: Bucket = []
    filled = 0
    for name, tensor in weights:
        if bucket and filled + tensor.nbytes > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += tensor.nbytes
    if bucket:
        yield bucket


def described(bucket: Bucket) -> dict[str, Any]:
    """What a server must know of a bucket before it comes."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def own_address(client: Client) -> str:
    """The address of this machine that a server would reach."""
    with socket.create_connection(client.place, timeout=10) as connection:
        return str(connection.getsockname()[0])
