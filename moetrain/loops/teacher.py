"""A teacher that the ranks of a job run themselves: another model beside the student, or the
student as it was, with a longer prompt.

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
from moetrain.data.teacher_prompts import TeacherPrompts
from moetrain.engine import Engine
from moetrain.engine.on_disk import model_in
from moetrain.engine.outputs import likeliest_columns, likeliest_of
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
    prompts: those that it has in place of the student's, where they are others.
    """

    engine: Engine
    k: int
    weights: Weights | None = None
    prompts: TeacherPrompts | None = None

    def words(self, packs: Sequence[Packed]) -> list[Packed]:
        """The packs with what it says at their own tokens. Collective."""
        outs = self._outputs(packs)
        return [with_values(pack, _values(out)) for pack, out in zip(packs, outs, strict=True)]

    def words_behind(
        self, packs: Sequence[Packed], others: Sequence[Packed], lengths: Tensor
    ) -> list[Packed]:
        """The same where it has other prompts: `others` has all answers behind those, dealt to the
        replicas in any way; lengths [answers] of what the model wrote. Collective.
        """
        ends = lengths.cumsum(0)
        rows = torch.zeros(int(ends[-1]), 1 + 2 * self.k)
        for pack, out in zip(others, self._outputs(others), strict=True):
            places, mask = _places(pack, ends - lengths)
            rows[places] = torch.stack(likeliest_columns(out), dim=1)[mask]
        world = self.engine.world
        rows = world.sum(rows, world.dp_group)  # exact: a replica has what the others lack
        done: list[Packed] = []
        for pack in packs:
            places, mask = _places(pack, ends - lengths)
            whole = rows.new_zeros(pack.num_tokens, rows.size(1))
            whole[mask] = rows[places]
            (out,) = likeliest_of([whole.t()], self.k)
            done.append(with_values(pack, _values(out)))
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
    k, prompts = recipe.method.teacher_tokens, teacher_prompts(recipe)
    if teacher.path == START:
        return Teacher(student, k, student.snapshot(), prompts)
    vocab = student.model.heads.vocab
    return Teacher(engine_of(recipe, teacher.path, student.world, vocab), k, None, prompts)


def teacher_prompts(recipe: Recipe) -> TeacherPrompts | None:
    """The teacher's, where teacher.system makes others of them."""
    assert recipe.teacher is not None
    if recipe.teacher.system is None:
        return None
    _, rollout = recipe.sampling
    room = recipe.data.seq_len - rollout.max_tokens
    return TeacherPrompts(recipe.teacher.system, chat_of(recipe), room)


def check_teacher_prompts(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Raise DataError for a prompt that teacher.system cannot be said before."""
    if recipe.teacher is not None and (own_prompts := teacher_prompts(recipe)) is not None:
        own_prompts.check(prompts)


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


def with_teacher_prompts(given: Outline, prompts: TeacherPrompts) -> Outline:
    """The batch, where it is, with the prompts as the teacher is given them."""
    if given.batch is None:
        return given
    groups = tuple(replace(one, prompt=prompts.of(one.prompt)) for one in given.batch.groups)
    return replace(given, batch=replace(given.batch, groups=groups))


def check_words(recipe: Recipe, packs: Sequence[Packed]) -> None:
    """Raise DataError where a batch has no word of the teacher that the recipe's method needs."""
    if recipe.teacher is None:
        return
    k = recipe.method.teacher_tokens
    for pack in packs:
        ids = pack.per_token.get("teacher_ids")
        if "teacher_logp" not in pack.per_token or (0 if ids is None else ids.size(1)) != k:
            raise DataError(
                f"The rollouts on disk hold no word of a teacher with method.top_k={k}: a run with"
                " teacher.address writes it. Give teacher.path, which asks again"
            )


def _values(out: Out) -> dict[str, Tensor]:
    """Of a pack's `per_token`."""
    values = {"teacher_logp": out.logp}
    if out.at_teacher is not None and out.likeliest is not None and out.likeliest.numel():
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
