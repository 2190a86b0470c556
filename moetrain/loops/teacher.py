"""A teacher that the ranks of a job run themselves: another model beside the student, or the
student as it was, which is told more.

Legend: t tokens of a pack, k likeliest tokens, m tokens that the model wrote in all answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.config.distill import START
from moetrain.config.recipe import Recipe
from moetrain.data.run_tokenizer import chat_of, tokenizer_of
from moetrain.data.same_vocabulary import check_same
from moetrain.data.samples import Prompt
from moetrain.data.told_more import ToldMore
from moetrain.engine import Engine
from moetrain.engine.on_disk import model_in
from moetrain.engine.snapshot import Weights
from moetrain.engine.world import World
from moetrain.errors import DataError
from moetrain.loops.batch_values import with_values
from moetrain.loops.outline import Outline
from moetrain.methods.base import Out
from moetrain.methods.online import answer_mask
from moetrain.ops.packed import Packed


@dataclass(frozen=True)
class Teacher:
    """Gives packs a teacher's word: teacher_logp [t], and with k > 0 teacher_ids and teacher_top
    [t, k].

    weights: of `engine` at the time when it was the teacher; None: as they are.
    told: what it is told beside the prompt, where it is more.
    """

    engine: Engine
    k: int
    weights: Weights | None = None
    told: ToldMore | None = None

    def words(self, packs: Sequence[Packed]) -> list[Packed]:
        """The packs with what it says at their own tokens. Collective."""
        outs = self._outputs(packs)
        return [with_values(pack, _values(out)) for pack, out in zip(packs, outs, strict=True)]

    def words_told(
        self, packs: Sequence[Packed], told: Sequence[Packed], lengths: Tensor
    ) -> list[Packed]:
        """The same where it sees other prompts: `told` has all answers behind those, dealt to the
        replicas in any way; lengths [answers] of what the model wrote. Collective.
        """
        ends = lengths.cumsum(0)
        rows = torch.zeros(int(ends[-1]), 1 + 2 * self.k)
        for pack, out in zip(told, self._outputs(told), strict=True):
            places, mask = _places(pack, ends - lengths)
            rows[places] = torch.cat([x[mask].float() for x in _columns(out, self.k)], dim=1)
        world = self.engine.world
        rows = world.sum(rows, world.dp_group)  # exact: a replica has what the others lack
        done: list[Packed] = []
        for pack in packs:
            places, mask = _places(pack, ends - lengths)
            whole = rows.new_zeros(pack.num_tokens, rows.size(1))
            whole[mask] = rows[places]
            done.append(with_values(pack, _values(_out(whole, self.k))))
        return done

    def _outputs(self, packs: Sequence[Packed]) -> list[Out]:
        """Whatever experts the student's sampler chose."""
        plain = [
            replace(pack, per_token={n: x for n, x in pack.per_token.items() if n != "routes"})
            for pack in packs
        ]

        def take() -> list[Out]:
            if self.k:
                return self.engine.likeliest(plain, self.k)
            return self.engine.outputs(plain)

        if self.weights is None:
            return take()
        with self.engine.as_before(self.weights):
            return take()


def open_teacher(recipe: Recipe, student: Engine) -> Teacher | None:
    """The recipe's, where it has one that its ranks run. Collective.

    Raises DataError where its tokenizer is another than the student's.
    """
    teacher = recipe.teacher
    if teacher is None or teacher.path is None:
        return None
    k, told = teacher_k(recipe), told_more(recipe)
    if teacher.path == START:
        return Teacher(student, k, student.snapshot(), told)
    vocab = student.model.heads.vocab
    return Teacher(engine_of(recipe, teacher.path, student.world, vocab), k, None, told)


def teacher_k(recipe: Recipe) -> int:
    """How many of its likeliest tokens the method asks for."""
    return int(getattr(recipe.method, "top_k", 0))


def told_more(recipe: Recipe) -> ToldMore | None:
    """What it is told besides."""
    assert recipe.teacher is not None
    if recipe.teacher.system is None:
        return None
    _, rollout = recipe.sampling
    room = recipe.data.seq_len - rollout.max_tokens
    return ToldMore(recipe.teacher.system, chat_of(recipe), room)


def check_told(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Raise DataError for a prompt that teacher.system cannot be said before."""
    if recipe.teacher is not None and (told := told_more(recipe)) is not None:
        told.check(prompts)


def engine_of(recipe: Recipe, folder: str, world: World | None, vocab: int | None) -> Engine:
    """The model in `folder` at the student's layout, for the log-probs of the student's tokens.

    world: the student's; None: one of its own. vocab: how many tokens the student knows.
    """
    tokenizer = tokenizer_of(recipe)
    model = recipe.model.model_copy(
        update={"path": model_in(folder), "hf": None, "init": None, "tokenizer": str(tokenizer)}
    )
    other = recipe.model_copy(update={"model": model, "adapter": None, "trainable": None})
    check_same(tokenizer, model_in(folder))
    engine = Engine(other, world, train=False)
    engine.run.most_tokens = vocab
    return engine


def told_groups(given: Outline, told: ToldMore) -> Outline:
    """The batch, where it is, with the prompts as the teacher is given them."""
    if given.batch is None:
        return given
    groups = tuple(replace(one, prompt=told.prompt(one.prompt)) for one in given.batch.groups)
    return replace(given, batch=replace(given.batch, groups=groups))


def check_words(recipe: Recipe, packs: Sequence[Packed]) -> None:
    """Raise DataError where a batch has no word of the teacher that the recipe's method needs."""
    if recipe.teacher is None:
        return
    k = teacher_k(recipe)
    for pack in packs:
        ids = pack.per_token.get("teacher_ids")
        if "teacher_logp" not in pack.per_token or (0 if ids is None else ids.size(1)) != k:
            raise DataError(
                f"The rollouts on disk hold no word of a teacher with method.top_k={k}: a run with"
                " teacher.address writes it. Give teacher.path, which asks again"
            )


# A word as columns [t, 1 + 2 k]: the token's own log-prob, k log-probs, the tokens that they are of


def _columns(out: Out, k: int) -> list[Tensor]:
    if not k:
        return [out.logp[:, None]]
    assert out.at_teacher is not None and out.likeliest is not None
    return [out.logp[:, None], out.at_teacher, out.likeliest]


def _out(columns: Tensor, k: int) -> Out:
    if not k:
        return Out(columns[:, 0])
    ids = columns[:, 1 + k :].long()  # exact in fp32: fewer than 2^24
    return Out(columns[:, 0], at_teacher=columns[:, 1 : 1 + k], likeliest=ids)


def _values(out: Out) -> dict[str, Tensor]:
    """Of a pack's `per_token`."""
    values = {"teacher_logp": out.logp}
    if out.at_teacher is not None and out.likeliest is not None:
        values["teacher_ids"] = out.likeliest.to(torch.int32)
        values["teacher_top"] = out.at_teacher.contiguous()
    return values


def _places(pack: Packed, starts: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of a table of all answers' tokens [n], where these stand in the pack [t] bool), for
    answers that begin at the rows `starts`.
    """
    mask = answer_mask(pack) > 0
    ids = pack.sequence_ids
    before = mask.long().cumsum(0) - 1  # of the pack
    first = torch.zeros(pack.num_sequences, dtype=torch.int64)
    first.index_add_(0, ids, mask.long())
    first = first.cumsum(0) - first  # tokens before each sequence
    rows = starts[pack.extras["place"].long()][ids] + before - first[ids]
    return rows[mask], mask
