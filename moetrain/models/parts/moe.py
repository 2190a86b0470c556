"""A mixture of experts: a router, experts of which a token meets a few, and one that it always
meets.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.errors import ConfigError
from moetrain.models.config import HfConfig, read_int
from moetrain.models.parts.base import Shares, Split
from moetrain.models.parts.mlp import SWIGLU, Glu, swiglu
from moetrain.models.rules import Weight
from moetrain.models.sharding import Cols, Copy, GateUp, Sharding


@dataclass(frozen=True)
class Names:
    """What Hugging Face calls the block and an expert's projections in its files. In memory
    transformers 5 calls every family's block `mlp` and keeps all experts as two tensors.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"


@dataclass(frozen=True)
class Router:
    """Softmax over `experts`, of which the `top_k` likeliest are taken."""

    hidden: int
    experts: int
    top_k: int
    renormalise: bool = True  # the chosen experts' probabilities sum to 1
    names: Names = Names()
    bias: bool = False

    def weights(self) -> Iterator[Weight]:
        name = f"{self.names.block}.{self.names.router}"
        yield Weight(
            "mlp.router.weight",
            (f"{name}.weight",),
            Copy((self.experts, self.hidden)),
            adapts="router",
            fused=None if self.names.block == "mlp" else "mlp.gate.weight",
        )
        if self.bias:
            yield Weight("mlp.router.bias", (f"{name}.bias",), Copy((self.experts,)))

    def splits(self) -> Iterator[Split]:
        yield from ()

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        return 2 * num_tokens * self.hidden * self.experts

    def activations(self, shares: Shares) -> float:
        return 16 * self.experts


@dataclass(frozen=True)
class Experts:
    """`num` SwiGLU blocks with `ffn` columns each; a token meets `top_k` of them.

    Where `interleaved`, files hold them as gpt-oss does: all experts as one tensor, an expert as
    [in, out] with gate and up in turn. No adapter stands beside them then, as in PEFT's all-linear.
    """

    hidden: int
    ffn: int
    num: int
    top_k: int
    names: Names = Names()
    bias: bool = False
    glu: Glu = SWIGLU
    interleaved: bool = False

    @property
    def fits_te(self) -> bool:
        """Whether Transformer Engine's grouped layers can compute them."""
        return not self.bias and self.glu == SWIGLU

    def weights(self) -> Iterator[Weight]:
        yield from self._weights("weight", GateUp((self.ffn, self.hidden)),
                                 Cols((self.hidden, self.ffn)))  # fmt: skip
        if self.bias:
            yield from self._weights("bias", GateUp((self.ffn,)), Copy((self.hidden,)))

    def _weights(self, kind: str, into: Sharding, out: Sharding) -> Iterator[Weight]:
        """Of both linear layers the weight, or the bias."""
        is_weight = kind == "weight"
        expert = f"{self.names.block}.experts.{{e}}."
        for layer, parts, sharding, fused in (
            ("linear_fc1", (self.names.gate, self.names.up), into, "gate_up_proj"),
            ("linear_fc2", (self.names.down,), out, "down_proj"),
        ):
            yield Weight(
                f"mlp.experts.{layer}.{kind}{{e}}",
                tuple(f"{expert}{part}.{kind}" for part in parts),
                sharding,
                adapts="experts" if is_weight and not self.interleaved else None,
                writes=layer == "linear_fc2",
                fused=f"mlp.experts.{fused}" + ("" if is_weight else "_bias"),
                interleaved=self.interleaved,
                num_experts=self.num,
                saved=f"mlp.experts.experts.{layer}.{kind}",
            )

    def splits(self) -> Iterator[Split]:
        yield Split("ep", self.num, "experts")
        yield Split("etp", self.ffn, "columns of an expert")

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        return 6 * num_tokens * self.top_k * self.hidden * self.ffn

    def activations(self, shares: Shares) -> float:
        return self.top_k * shares.width * (2 * self.hidden + 5 * self.ffn / shares.etp)


@dataclass(frozen=True)
class SharedExpert:
    """A SwiGLU block that every token meets, times sigmoid(gate x) of its own where `gated`."""

    hidden: int
    ffn: int
    gated: bool

    def weights(self) -> Iterator[Weight]:
        yield from swiglu(self.hidden, self.ffn, "mlp.shared_experts", "mlp.shared_expert")
        if self.gated:
            yield Weight(
                "mlp.shared_experts.gate_weight",
                ("mlp.shared_expert_gate.weight",),
                Copy((1, self.hidden)),
            )

    def splits(self) -> Iterator[Split]:
        yield Split("tp", self.ffn, "columns of the shared expert")

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        return num_tokens * self.hidden * (6 * self.ffn + 2 * self.gated)

    def activations(self, shares: Shares) -> float:
        return shares.width * 5 * self.ffn / shares.tp


@dataclass(frozen=True)
class Moe:
    """All of them."""

    router: Router
    experts: Experts
    shared: SharedExpert | None = None

    @property
    def parts(self) -> tuple[Router | Experts | SharedExpert, ...]:
        """Those that are there."""
        return (self.router, self.experts, *((self.shared,) if self.shared else ()))

    def weights(self) -> Iterator[Weight]:
        for part in self.parts:
            yield from part.weights()

    def splits(self) -> Iterator[Split]:
        for part in self.parts:
            yield from part.splits()

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        return sum(part.flops(num_tokens, num_pairs) for part in self.parts)

    def activations(self, shares: Shares) -> float:
        return sum(part.activations(shares) for part in self.parts)


def read_moe(
    hf: HfConfig,
    num_experts: int,
    *,
    ffn: str,
    renormalise: bool,
    top_k: int | None = None,
    shared: SharedExpert | None = None,
    names: Names | None = None,
    bias: bool = False,
    glu: Glu = SWIGLU,
    interleaved: bool = False,
) -> Moe:
    """From config.json, where `ffn` is the key of an expert's columns and `top_k` the family's own
    default; `bias` is the router's and the experts'. Raises ConfigError.
    """
    hidden, names = read_int(hf, "hidden_size"), names or Names()
    chosen = read_int(hf, "num_experts_per_tok", top_k)
    if chosen > num_experts:
        raise ConfigError(
            f"model config: num_experts_per_tok {chosen} is more than the {num_experts} experts"
        )
    return Moe(
        Router(hidden, num_experts, chosen, renormalise, names, bias),
        Experts(
            hidden,
            read_int(hf, ffn),
            num_experts,
            chosen,
            names,
            bias,
            glu,
            interleaved,
        ),
        shared,
    )


def read_num_experts(hf: HfConfig) -> int:
    """The number of experts; transformers writes num_experts or num_local_experts."""
    keys = [key for key in ("num_experts", "num_local_experts") if hf.get(key) is not None]
    counts = {read_int(hf, key, minimum=0) for key in keys}
    if not counts:
        raise ConfigError("model config: num_experts is missing; give a whole number")
    if len(counts) > 1:
        raise ConfigError(
            "model config: num_experts and num_local_experts differ; give one of them"
        )
    return counts.pop()
