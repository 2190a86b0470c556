"""What ranks get of a teacher's words."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moetrain.data.groups import Group
from moetrain.engine import Engine
from moetrain.loops.demonstrations import open_demonstrations
from moetrain.loops.learn import Lessons
from moetrain.loops.store import Batch
from moetrain.loops.teacher import open_teacher
from moetrain.methods import METHODS
from moetrain.testing.ranks import recipe_for
from moetrain.testing.scattered import held

Said = dict[int, tuple[list[int], list[float], list[Any], list[Any]]]
"""Of an answer's tokens: labels, log-probs, likeliest tokens and their log-probs."""


def taught(
    model: str, parallel: dict[str, Any], groups: Sequence[Group], sections: dict[str, Any]
) -> tuple[Said, float, float]:
    """(what the teacher says of the answers in this rank's packs, the loss of a step on them, and
    kl/teacher of that step).
    """
    engine = Engine(recipe_for(model, parallel, **sections))
    recipe, world = engine.recipe, engine.world
    teacher = open_teacher(recipe, engine)
    lessons = Lessons(recipe, engine, None, open_demonstrations(recipe, world), teacher)
    outline = held(Batch(1, tuple(groups), 0))
    if not world.is_first:
        outline = replace(outline, batch=None)
    (packs,) = lessons.packs(outline)
    of_answers: Said = {}
    for pack in packs:
        starts = pack.cu_seqlens.tolist()
        for n, (begin, end) in enumerate(itertools.pairwise(starts)):
            if pack.extras["role"][n] != 1:
                continue
            span = slice(begin, end)
            none = np.zeros((end - begin, 0)).tolist()
            ids, top = (pack.per_token.get(f"teacher_{x}") for x in ("ids", "top"))
            of_answers[int(pack.extras["place"][n])] = (
                pack.labels[span].tolist(),
                pack.per_token["teacher_logp"][span].tolist(),
                none if ids is None else ids[span].tolist(),
                none if top is None else top[span].tolist(),
            )
    result = engine.step(packs, METHODS[recipe.method.name])
    return of_answers, result.loss, result.metrics["kl/teacher"]
