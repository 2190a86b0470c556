"""This process's device, and what makes Megatron run on it."""

import os

import torch

from moetrain.engine import compat_megatron, compat_torch, pickles
from moetrain.errors import ConfigError
from moetrain.ops.quiet import hush


def prepare() -> torch.device:
    """Choose the device and make Megatron ready for it. Call before the first import of a Megatron
    module.
    """
    hush()
    has_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        # Before Blackwell the GPU runs kernels of several queues in any order: with one queue, the
        # traffic of tensor and context parallelism starts before the matmuls that hide it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"Rank {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are "
                "visible. Start no more ranks than that, or look at CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(device)
    else:
        compat_torch.install(device)
    compat_megatron.install(on_gpu=has_gpu)
    pickles.install()
    return device


def ask_for_determinism() -> None:
    """Tell NCCL, cuBLAS and Transformer Engine to give the same bits every time. They look when
    they start: call before a world is opened. What the user has set stays.
    """
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


def numbers(values: torch.Tensor) -> list[float]:
    """The values of a small tensor [n], for the host to go on with: the one place where a step asks
    for some. On meta there are none, and ones stand in.
    """
    return [1.0] * values.numel() if values.is_meta else values.double().tolist()


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process on the device in GiB; on CPU its anonymous memory now (mapped
    files do not count).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 2**20
    return 0.0
