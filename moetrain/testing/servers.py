"""Servers that tests ask: small ones of their own, and vLLM's in OpenAI's form."""

import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from moetrain.ports import free_port


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Where `handler` answers, on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False  # a client may keep a connection open
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def vllm_serving(python: Path, folder: Path, log: Path, *words: str) -> Iterator[str]:
    """Where vLLM's server in OpenAI's form serves `folder` in fp32, once it is up."""
    port = str(free_port())
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host",
             "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager", *words],
            stdout=out, stderr=out, start_new_session=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables,
        )  # fmt: skip
    root = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 600
    try:
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{root}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield root
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
