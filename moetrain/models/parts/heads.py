"""What stands before the first layer and behind the last."""

from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.models.parts.base import Shares, Split
from moetrain.models.rules import EMBEDDING, HEAD, VALUE_HEAD, Weight
from moetrain.models.sharding import Copy, Vocab


@dataclass(frozen=True)
class Heads:
    """The embedding, the final norm, and the output: logits of the vocabulary, or with `scalar` one
    number per token (a reward); with `value` one more number per token (PPO's value) beside it.
    """

    hidden: int
    vocab: int  # rows of the Hugging Face embedding, unpadded
    tied: bool  # logits are made with the embedding
    scalar: bool = False
    value: bool = False

    def weights(self) -> Iterator[Weight]:
        words = Vocab((self.vocab, self.hidden))
        yield Weight("embedding.word_embeddings.weight", (EMBEDDING,), words)
        yield Weight("decoder.final_layernorm.weight", ("model.norm.weight",), Copy((self.hidden,)))
        if self.scalar:
            yield Weight("output_layer.weight", ("score.weight",), Copy((1, self.hidden)))
        elif not self.tied:
            yield Weight("output_layer.weight", (HEAD,), words)
        if self.value:
            yield Weight(VALUE_HEAD, (VALUE_HEAD,), Copy((1, self.hidden)))

    def splits(self) -> Iterator[Split]:
        yield from ()  # the vocabulary is padded

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        rows = 1 if self.scalar else self.vocab
        return 2 * num_tokens * self.hidden * (rows + self.value)

    def activations(self, shares: Shares) -> float:
        """Of the embedding, or of the final norm; not the logits, which exist in parts."""
        return self.hidden * (8 + 2 * shares.width)

    @property
    def added(self) -> frozenset[str]:
        """Megatron names of the heads of one number per token: a language model's folder may lack
        them, and they are trained whole beside an adapter.
        """
        scalar = {"output_layer.weight"} if self.scalar else set[str]()
        return frozenset(scalar | ({VALUE_HEAD} if self.value else set[str]()))
