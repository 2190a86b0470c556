"""Where megatron-core 0.19.2 does not run without a GPU or Transformer Engine, mended in one place.

Each mend says what breaks without it. tests/test_compat.py fails when one is no longer needed.
"""

import contextlib
import queue
from collections.abc import Iterator
from typing import Any

import torch

_installed = False


def install(*, on_gpu: bool) -> None:
    """Mend megatron-core where it needs it. Call after compat_torch.install, before building a
    model.
    """
    global _installed
    if _installed:
        return
    _installed = True
    if not on_gpu:
        _without_gpu()
    _with_torch_adam()
    _save_in_this_process()
    _fail_together()


def fuse_without_apex() -> None:
    """Let a head be made where Transformer Engine's layers add gradients to the buffer inside their
    matmuls.

    Upstream asks for Apex's kernel as soon as one of its own layers is made. The one that there is
    beside Transformer Engine's is the head, a weight that no forward of its class multiplies.
    """
    import megatron.core.tensor_parallel.layers as layers

    layers._grad_accum_fusion_available = True


def _with_torch_adam() -> None:
    """Without Apex and Transformer Engine, Adam is torch's, which keeps a `step` per parameter that
    checkpoints do not hold.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # Upstream looks every state up in the checkpoint and fails on `step` (KeyError); what is no
        # tensor it skips.
        set_states(self, model_param, {"step": None, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_step  # type: ignore[method-assign]


def _save_in_this_process() -> None:
    """A save's writers hand results to a queue, which upstream serves from a process of its own.

    That process imports the whole program again (5 s and 560 MB a rank at the first save) and
    outlives a killed rank for ever. Our writers are threads of this process, and one save is under
    way at a time, so a plain queue serves.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results: queue.Queue[Any] = queue.Queue()
    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": results


def _fail_together() -> None:
    """A disk that is full when the first rank writes a checkpoint's index, which it does last.

    Upstream raises there while the other ranks wait in a broadcast, for ever. Without an index the
    checkpoint is refused a moment later, on all ranks (`manifest.write`).
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    finish = FileSystemWriterAsync.finish

    def finish_if_it_can(self: Any, metadata: Any, results: Any) -> None:
        with contextlib.suppress(OSError):
            finish(self, metadata, results)

    FileSystemWriterAsync.finish = finish_if_it_can  # type: ignore[method-assign]


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """torch.compile gives functions back as they are.

    Megatron decorates with it while it is imported, and the first use brings in torch's whole
    compiler: 1.5 of 4.7 seconds that a process takes to start.
    """
    compile_it = torch.compile
    any_torch: Any = torch
    any_torch.compile = lambda model=None, **options: model or (lambda function: function)
    try:
        yield
    finally:
        any_torch.compile = compile_it


def _without_gpu() -> None:
    with _uncompiled():
        import megatron.core.jit as jit
    # jit_fuser is torch.compile: on CPU it would call a C++ compiler in the first step of every
    # process.
    jit.disable_jit_fuser()
    import megatron.core.tensor_parallel.random as rng
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    any_rng: Any = rng
    # The tracker reads CUDA's generator by device index; there is one generator here.
    any_rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    any_rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Upstream converts only CUDA tensors, so all-to-all would be handed tensors as split sizes.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_host
