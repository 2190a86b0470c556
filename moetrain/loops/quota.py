"""Which groups a step takes where more are drawn than it needs: those that are whole first."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from moetrain.data.samples import Prompt
from moetrain.data.trajectories import Trajectory

Key = tuple[str, int]  # a prompt's id, which answer to it


@dataclass
class Quota:
    """What ends a draw: `num` groups are whole, those that are `due` among them.

    Args:
        prompts: of all groups that are drawn; where several become whole at once, in their order.
        done: what has been drawn so far; others change it meanwhile.
        due: ids of prompts.
    """

    prompts: Sequence[Prompt]
    group_size: int
    num: int
    done: Mapping[Key, Trajectory]
    due: Collection[str] = ()
    _whole: dict[str, Prompt] = field(default_factory=dict[str, Prompt])  # as they became so

    def reached(self) -> bool:
        """Whether nothing more has to be drawn."""
        for prompt in self.prompts:
            if prompt.id not in self._whole and self._is_whole(prompt):
                self._whole[prompt.id] = prompt
        return len(self._whole) >= self.num and all(one in self._whole for one in self.due)

    def _is_whole(self, prompt: Prompt) -> bool:
        group = (self.done.get((prompt.id, index)) for index in range(self.group_size))
        return all(one is not None and not one.is_open for one in group)

    def taken(self) -> list[Prompt]:
        """The prompts of the step, in their order: those that are due, then those that were whole
        first.
        """
        self.reached()  # the last to end may not have been looked at
        first = sorted(self._whole, key=lambda one: one not in self.due)  # stable
        chosen = set(first[: max(self.num, len(self.due))])
        return [prompt for prompt in self.prompts if prompt.id in chosen]


def due_now(oldest: Mapping[str, int], step: int, num: int, most: int) -> set[str]:
    """Of groups that wait, those that `step` has to take so that no token gets more than `most`
    steps old, where every step takes `num`; oldest: prompt -> the version of its oldest token.
    """
    last = sorted((version + 1 + most, one) for one, version in oldest.items())
    # The steps after this one take as many as they can of those that may wait for them.
    needed = [i - num * (until - step) for i, (until, _) in enumerate(last, 1)]
    return {one for _, one in last[: max(0, *needed, 0)]}
