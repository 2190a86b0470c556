"""What vLLM's workers get from moetrain: pushes of weights that hold on the CPU, too, and the
router's choices. Imported in vLLM's processes, which have no moetrain. Written for vLLM 0.32.
"""

import base64
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from moetrain_weights import Folders

RELOAD = "vllm.model_executor.model_loader.reload."
EXPERTS = ("w13_weight", "w13_bias", "w2_weight", "w2_bias")  # of all of a layer, in gpt-oss
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
                given = _Given((name, weights.read(name)) for name in names)
                self.model_runner.reload_weights(weights_iterator=given, is_checkpoint_format=True)
                if given.lost and self.vllm_config.parallel_config.pipeline_parallel_size == 1:
                    raise ValueError(f"vLLM keeps what it had for {given.lost[:4]}")
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


class _Given:
    """Tensors that are loaded, and the names of those that reached no parameter's loader: a reload
    takes them for not given.
    """

    calls = 0  # of loaders, in this process

    def __init__(self, weights: Iterable[tuple[str, Any]]):
        self.weights = weights
        self.lost: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name, tensor in self.weights:
            before = _Given.calls
            yield name, tensor
            if _Given.calls == before:
                self.lost.append(name)


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


def _count_loaders() -> None:
    """For `_Given`."""
    from vllm.model_executor.model_loader.reload import layerwise

    original = layerwise.make_online_process_loader

    def make(layer: Any, name: str) -> Any:
        loader = original(layer, name)

        @wraps(loader)  # vLLM looks at its name
        def counted(*args: Any, **kwargs: Any) -> Any:
            _Given.calls += 1
            return loader(*args, **kwargs)

        return counted

    layerwise.make_online_process_loader = make


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


def _load_gpt_oss_by_loaders() -> None:
    """vLLM 0.32 copies gpt-oss' experts and sinks into its parameters without their loaders. A
    reload sees loaders alone: it takes such layers for not given and puts back what they held, with
    a warning at most. Given one by one experts go through their loader, and sinks do so here.
    """
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader
    from vllm.model_executor.models.gpt_oss import GptOssModel

    original = GptOssModel.load_weights

    def load(self: Any, weights: Iterable[tuple[str, Any]]) -> set[str]:
        if getattr(self.config, "quantization_config", None):
            return original(self, weights)
        params, sinks = dict(self.named_parameters()), set[str]()

        def one_by_one() -> Iterator[tuple[str, Any]]:
            for name, tensor in weights:
                stem, _, last = name.rpartition(".")
                if stem.endswith(".mlp.experts") and last in EXPERTS:
                    for number, expert in enumerate(tensor):
                        yield f"{stem}.{number}.{last}", expert
                elif last == "sinks" and name in params:
                    sinks.add(name)
                    param = params[name]
                    size = param.size(0)
                    part = tensor.narrow(0, get_tensor_model_parallel_rank() * size, size)
                    getattr(param, "weight_loader", default_weight_loader)(param, part)
                else:
                    yield name, tensor

        return original(self, one_by_one()) | sinks

    GptOssModel.load_weights = load


_count_loaders()
_repack_experts()
_load_gpt_oss_by_loaders()
