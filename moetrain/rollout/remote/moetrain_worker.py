"""What vLLM's workers get from moetrain: pushes of weights that hold on the CPU, too, and the
router's choices. Imported in vLLM's processes, which have no moetrain. Written for vLLM 0.32.
"""

import base64
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from moetrain_weights import Folders

RELOAD = "vllm.model_executor.model_loader.reload."
WITH_ROUTES = "routes-"  # head of the ids of requests whose routing is recorded


class Worker:
    """Methods that vLLM's workers get (`worker_extension_cls`); reached through collective_rpc."""

    vllm_config: Any
    model_config: Any
    model_runner: Any
    _schema: dict[str, list[int]] | None = None
    _routes: dict[str, dict[int, list[Any]]] | None = None

    def push_folders(self, folders: list[str], new: list[str]) -> dict[str, float]:
        """Serve the weights of `folders`, of which all but those of `new` are served already."""
        from vllm.config import set_current_vllm_config

        started = time.perf_counter()
        weights = Folders(folders)
        self.check_schema(weights.schema())
        names = weights.to_load(new)
        with set_current_vllm_config(self.vllm_config), _quiet(len(names) < len(weights.names())):
            if names:
                self.model_runner.reload_weights(
                    weights_iterator=((name, weights.read(name)) for name in names),
                    is_checkpoint_format=True,
                )
            self.finish_push()
        return {"load": time.perf_counter() - started}

    def check_schema(self, schema: dict[str, list[int]]) -> None:
        """Refuse tensors that are not those that were served first: vLLM fills what
        is missing from a layer with whatever is in memory.
        """
        if self._schema is None:  # a server that began without weights believes the first push
            self._schema = Folders([self.model_config.model]).schema() or schema
        wrong = [n for n in self._schema | schema if self._schema.get(n) != schema.get(n)]
        if wrong:
            raise ValueError(f"missing, unknown or of another shape: {sorted(wrong)[:4]}")

    def finish_push(self) -> None:
        """What a reload of weights leaves undone on the CPU, and routes of the past."""
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.platforms import current_platform

        self._routes = None if self._routes is None else {}
        if not current_platform.is_cpu():
            return
        # A tied lm_head has no tensor of its own, so its prepacked copy would stay the old one.
        for module in self.model_runner.get_model().modules():
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)

    def moe_layers(self) -> list[int]:
        """Numbers of the layers with experts."""
        return sorted(runner.layer_id for runner in self._runners())

    def record_routes(self) -> None:
        """From now on note the experts of requests with WITH_ROUTES. vLLM's own way
        (enable_return_routed_experts) needs Triton, which the CPU lacks.
        """
        self._routes = {}
        for runner in self._runners():
            runner.router.set_capture_fn(partial(self._record, runner.layer_id))

    def take_routes(self, request: str, length: int) -> dict[str, Any] | None:
        """[length, MoE layers, experts of a token] of a request's first tokens, packed; forgotten
        here. None where it was not seen. Behind a stop string vLLM has drawn on.
        """
        import torch

        keys = [key for key in self._routes or {} if key.startswith(request + "-")]
        if not keys:
            return None
        assert self._routes is not None
        layers = self._routes.pop(keys[0])
        rows = []
        for layer in sorted(layers):
            end = max(start + len(ids) for start, ids in layers[layer])
            chosen = torch.full((end, layers[layer][0][1].size(1)), -1, dtype=torch.int32)
            for start, ids in layers[layer]:
                chosen[start : start + len(ids)] = ids
            rows.append(chosen)
        return packed(torch.stack(rows, 1)[:length].numpy())

    def _runners(self) -> list[Any]:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        return [m for m in self.model_runner.get_model().modules() if isinstance(m, MoERunner)]

    def _record(self, layer: int, ids: Any) -> None:
        batch, starts = self.model_runner.input_batch, self.model_runner.query_start_loc.np
        assert self._routes is not None
        for row, request in enumerate(batch.req_ids):
            if request.startswith(WITH_ROUTES):
                first = int(batch.num_computed_tokens_cpu[row])
                row_ids = ids[int(starts[row]) : int(starts[row + 1])].int().clone()
                self._routes.setdefault(request, {}).setdefault(layer, []).append((first, row_ids))


def packed(routes: Any) -> dict[str, Any]:
    """An integer array as JSON."""
    numbers = base64.b64encode(routes.astype("<i2").tobytes()).decode()
    return {"shape": list(routes.shape), "int16": numbers}


@contextmanager
def _quiet(partly: bool) -> Iterator[None]:
    """Without vLLM's warnings of every tensor that is not given."""
    loggers = [logging.getLogger(RELOAD + name) for name in ("layerwise", "inplace")]
    for logger in loggers:
        logger.disabled = partly
    try:
        yield
    finally:
        for logger in loggers:
            logger.disabled = False


def _repack_experts() -> None:
    """vLLM 0.32 on the CPU packs expert weights for its kernel at the first load alone; a reload
    puts plain numbers where packed ones are read, and nothing says so. Without a kernel it takes
    every load for the first.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module
    from vllm.platforms import current_platform

    method = module.UnquantizedFusedMoEMethod
    original = method.process_weights_after_loading

    def process(self: Any, layer: Any) -> Any:
        if current_platform.is_cpu():
            self.moe_kernel = None
        return original(self, layer)

    method.process_weights_after_loading = process


_repack_experts()
