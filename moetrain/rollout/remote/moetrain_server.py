"""A vLLM engine behind HTTP, for one trainer: a token on every endpoint, ids in and ids out.

Started as `python -m moetrain_server SETTINGS.json` by the interpreter that has vLLM. Written for
vLLM 0.32.

    GET  /health                 what is served
    POST /generate               {version, draw, requests}: a JSON line for each answer as it ends;
                                 empty lines say that the engine is alive
    POST /stop                   {draw}: answers of that name end where they are, as "abort"
    POST /probe                  {sequences, num_tokens}: log-probs of given tokens, greedy answers
    POST /push                   {links, since, version}: serve the weights of folders, each with
                                 its version (moetrain_weights); `since` is what is served now
    POST /transfer/{step}        init, start, update, finish: vLLM's own weight transfer
    POST /reload                 {folder, version}: end; the trainer starts it again from there
    POST /sleep, /wake           give the GPU's memory back, take it again
"""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from moetrain_answers import LEVEL, LOGPROBS, answer_of, keep_what_could_be_drawn, params_of
from moetrain_door import MIB, Guard, Refused, body_of, protocol
from moetrain_weights import unseen
from moetrain_worker import WITH_ROUTES, packed

TOKEN = "MOETRAIN_ROLLOUT_TOKEN"
BEAT_SECONDS = 1.0
STOP_SECONDS = 0.02
NOTHING: dict[str, Any] = {"tokens": [], "logprobs": []}


class Service:
    """The endpoints, and what they share."""

    def __init__(self, settings: dict[str, Any], file: Path):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        self.on_cpu = current_platform.is_cpu()
        keep_what_could_be_drawn()
        args = engine_args(settings, self.on_cpu)
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        self.settings, self.file = settings, file
        self.version: int | None = settings["version"]  # None: unknown weights, nothing is drawn
        self.loading = False  # the engine's loop stands still then, for minutes in a large model
        self.unfinished = 0
        self.layers: list[int] = []
        self.longest: int = self.engine.model_config.max_model_len
        # Of a body: a full queue of the longest prompts, as far as memory is to go.
        queue = settings["max_queue"] * (8 * self.longest + 1024)
        self.most = max(64 * MIB, min(queue, 1024 * MIB))
        self._numbers = count()
        self._running: dict[str, set[str]] = {}  # names of requests, by their draw
        self._stopped: deque[str] = deque(maxlen=64)  # draws; a request may come after its end
        self._pushing = asyncio.Lock()

    async def prepare(self) -> None:
        """What needs the engine's workers."""
        if self.settings["routes"]:
            self.layers = (await self.engine.collective_rpc("moe_layers"))[0]
            if self.on_cpu:
                await self.engine.collective_rpc("record_routes")

    async def health(self, body: dict[str, Any]) -> Any:
        await self.engine.check_health()
        if not self.loading:
            await self.engine.is_sleeping()  # goes through the engine's loop: it turns
        return {
            "version": self.version,
            "unfinished": self.unfinished,
            "pid": os.getpid(),
            "ranks": self.settings["engine"].get("tensor_parallel_size", 1),
        }

    async def generate(self, body: dict[str, Any]) -> Any:
        requests = body["requests"]
        if not self.settings["tokenizer"] and any(request["stop"] for request in requests):
            raise Refused(400, "rollout.stop needs a server that was started with rollout.stop")
        if self.version is None or body["version"] != self.version:
            raise Refused(409, f"weights {body['version']} are asked for, {self.version} served")
        room = max(0, self.settings["max_queue"] - self.unfinished)
        if len(requests) > room:
            raise Refused(429, f"the queue has room for {room} requests", room=room)
        self.unfinished += len(requests)
        return self._stream(requests, body.get("draw", ""))

    async def stop(self, body: dict[str, Any]) -> Any:
        self._stopped.append(body["draw"])
        while names := self._running.get(body["draw"]):
            await self.engine.abort(list(names))
            await asyncio.sleep(STOP_SECONDS)  # one that the engine does not know yet is there then
        return {}

    async def _stream(self, requests: list[dict[str, Any]], draw: str) -> Any:
        """JSON lines; the tasks end with the connection, and vLLM then drops their requests."""
        left = len(requests)
        tasks = {asyncio.create_task(self._draw(request, draw)) for request in requests}
        beat = time.monotonic()
        try:
            while tasks:
                done, tasks = await asyncio.wait(
                    tasks, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    left -= 1
                    self.unfinished -= 1
                    yield json.dumps(task.result()) + "\n"
                if time.monotonic() > beat + BEAT_SECONDS:
                    await self.engine.is_sleeping()
                    yield "\n"
                    beat = time.monotonic()
        finally:
            self.unfinished -= left
            for task in tasks:
                task.cancel()

    async def _draw(self, request: dict[str, Any], draw: str) -> dict[str, Any]:
        if draw in self._stopped:
            return {"number": request["number"], "finish": "abort"} | NOTHING
        routes = request["routes"]
        whole = len(request["tokens"]) + request["max_tokens"]
        if whole > self.longest:  # vLLM 0.32 would cut the answer there, as if max_tokens said so
            limit = f"vLLM's limit of {self.longest} (rollout.engine_args.max_model_len)"
            text = f"its {len(request['tokens'])} tokens and rollout.max_tokens pass {limit}"
            return {"number": request["number"], "error": text}
        params = params_of(request, self.on_cpu)
        name = f"{WITH_ROUTES if routes else 'plain-'}{next(self._numbers)}"
        running = self._running.setdefault(draw, set())
        running.add(name)
        try:
            out = await self._last(request["tokens"], params, name)
        except ValueError as error:  # vLLM's refusal of this request
            return {"number": request["number"], "error": str(error)}
        finally:
            running.discard(name)
            if not running and self._running.get(draw) is running:
                del self._running[draw]
        answer = answer_of(out, kept=request["kept"]) | {"number": request["number"]}
        if routes and answer["finish"] != "abort":
            answer["routes"] = await self._routes_of(out, name)
        return answer

    async def _routes_of(self, out: Any, name: str) -> dict[str, Any]:
        length = len(out.prompt_token_ids) + len(out.outputs[0].token_ids) - 1
        if self.on_cpu:
            answers = await self.engine.collective_rpc("take_routes", args=(name, length))
            return next(routes for routes in answers if routes is not None)
        return packed(out.outputs[0].routed_experts[:length, self.layers])

    async def _last(self, tokens: list[int], params: Any, name: str) -> Any:
        last = None
        async for out in self.engine.generate({"prompt_token_ids": tokens}, params, name):
            last = out
        return last

    async def probe(self, body: dict[str, Any]) -> Any:
        sequences, num_tokens = body["sequences"], body["num_tokens"]
        scored = await asyncio.gather(*(self._score(sequence) for sequence in sequences))
        answers = await asyncio.gather(
            *(self._continue(sequence, num_tokens) for sequence in sequences)
        )
        return {"version": self.version, "scored": scored, "answers": answers}

    async def _score(self, tokens: list[int]) -> list[float]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        out = await self._last(tokens, params, f"score-{next(self._numbers)}")
        later = zip(tokens[1:], out.prompt_logprobs[1:], strict=True)
        return [entry[token].logprob for token, entry in later]

    async def _continue(self, tokens: list[int], num_tokens: int) -> dict[str, Any]:
        """Greedily, and through the prefix cache as any answer."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, **LOGPROBS)
        return answer_of(await self._last(tokens, params, f"greedy-{next(self._numbers)}"))

    async def push(self, body: dict[str, Any]) -> Any:
        async with self._pushing:
            folders = [link["folder"] for link in body["links"]]
            new = unseen(body, self.version)
            await self._hold()
            try:
                reports = await self.engine.collective_rpc("push_folders", args=(folders, new))
            except Exception as error:
                raise Refused(422, f"push of {folders[-1]}: {error}") from error
            await self._serve(body["version"])
        return {"load": max(report["load"] for report in reports)}

    async def transfer(self, body: dict[str, Any]) -> Any:
        """vLLM's own weight transfer, step by step; the tensors travel beside."""
        from vllm.distributed.weight_transfer.base import (
            WeightTransferInitRequest,
            WeightTransferUpdateRequest,
        )

        step, info = body["step"], body.get("info", {})
        if step == "init":
            await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        elif step == "start":
            await self._hold()
            await self.engine.start_weight_update()
        elif step == "update":
            request = WeightTransferUpdateRequest(update_info=info)
            await self.engine.update_weights(request)
        elif step == "finish":
            await self.engine.collective_rpc("check_schema", args=(body["schema"],))
            await self.engine.finish_weight_update()
            await self.engine.collective_rpc("finish_push")
            await self._serve(body["version"])
        else:
            raise Refused(404, f"no such step: {step}")
        return {}

    async def _hold(self) -> None:
        """No request runs while weights change; what is left of earlier ones is dropped."""
        self.version, self.loading = None, True
        await self.engine.pause_generation(mode="abort", clear_cache=True)

    async def _serve(self, version: int) -> None:
        if not await self.engine.reset_prefix_cache():
            raise Refused(500, "vLLM did not reset its prefix cache")
        await self.engine.resume_generation()
        self.version, self.loading = version, False

    async def reload(self, body: dict[str, Any]) -> Any:
        wanted = self.settings | {"model": body["folder"], "version": body["version"]}
        write(self.file, wanted)
        self.version = None
        asyncio.get_running_loop().call_later(0.2, os.killpg, 0, signal.SIGKILL)
        return {}

    async def sleep(self, body: dict[str, Any]) -> Any:
        self.version = None  # level 2 keeps no weights
        await self.engine.sleep(level=2)
        return {}

    async def wake(self, body: dict[str, Any]) -> Any:
        await self.engine.wake_up()
        return {}


def engine_args(settings: dict[str, Any], on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's engine: ours, which a recipe may add to and not change."""
    folder = Path(settings["model"])
    if not folder.is_dir():  # of an earlier push, and gone: weights come with the next one
        folder, settings["version"] = Path(settings["base"]), None
    args: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": not settings["tokenizer"],
        "max_logprobs": settings["most_kept"] + LEVEL,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is drawn from
        "worker_extension_cls": "moetrain_worker.Worker",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if settings["tokenizer"]:
        args["tokenizer"] = settings["tokenizer"]
    free = {"enforce_eager": on_cpu, "seed": 0}
    if not list(folder.glob("*.safetensors")):
        args["load_format"] = "dummy"
    if on_cpu:
        free["block_size"] = 32  # a prompt of 32 tokens is shared by its answers
        # A prompt that is cut in two draws a token in vain, which vLLM 0.32 takes back by the
        # offset of the request's generator; the CPU's has none, and the engine ends.
        free["enable_chunked_prefill"] = False
    elif settings["routes"]:
        args["enable_return_routed_experts"] = True
    if settings["transfer"]:
        args["weight_transfer_config"] = {"backend": settings["transfer"]}
        args["enable_sleep_mode"] = settings["transfer"] == "ipc"
    wrong = sorted(set(args) & set(settings["engine"]))
    if wrong:
        raise SystemExit(f"engine_args must leave {wrong} to moetrain")
    return free | settings["engine"] | args


def application(service: Service, token: str) -> Guard:
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def call(handler: Any, request: Request) -> Response:
        try:
            body = await body_of(request, service.most) if request.method == "POST" else {}
            answer = await handler(body | request.path_params)
        except Refused as refusal:
            return JSONResponse({"error": str(refusal)} | refusal.more, refusal.status)
        except (KeyError, TypeError, ValueError) as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 400)
        except Exception as error:  # the engine's; the trainer starts the server anew
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
        if hasattr(answer, "__aiter__"):
            return StreamingResponse(answer, media_type="application/x-ndjson")
        return JSONResponse(answer)

    posts = {
        "/generate": service.generate,
        "/stop": service.stop,
        "/probe": service.probe,
        "/push": service.push,
        "/transfer/{step}": service.transfer,
        "/reload": service.reload,
        "/sleep": service.sleep,
        "/wake": service.wake,
    }
    routes = [Route("/health", partial(call, service.health), methods=["GET"])]
    routes += [
        Route(path, partial(call, handler), methods=["POST"]) for path, handler in posts.items()
    ]
    return Guard(Starlette(routes=routes), token)


def follow_parent() -> None:
    """End, with all processes of this session, when the process at the other end of stdin ends."""

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


async def serve(settings: dict[str, Any], file: Path, token: str) -> None:
    """Load the model, then listen until SIGTERM."""
    import uvicorn

    family = socket.AF_INET6 if ":" in settings["host"] else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings["host"], settings["port"]))
    service = Service(settings, file)
    await service.prepare()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            write(Path(settings["ready"]), {"port": listener.getsockname()[1], "pid": os.getpid()})

    config = uvicorn.Config(
        application(service, token),
        http=protocol(),
        ws="none",
        headers=[("Connection", "close")],
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
    )
    try:
        await Server(config).serve(sockets=[listener])
    finally:
        service.engine.shutdown()


def write(path: Path, content: dict[str, Any]) -> None:
    """Make a JSON file, which appears whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


def main() -> None:
    file = Path(sys.argv[1])
    settings = json.loads(file.read_text())
    token = os.environ.pop(TOKEN, "")  # kept from processes that are started from here
    if not token:
        raise SystemExit(f"no token: set {TOKEN}")
    follow_parent()
    asyncio.run(serve(settings, file, token))


if __name__ == "__main__":
    main()
