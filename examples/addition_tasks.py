"""A taskset for `verifiers` 0.4: sums. docs/agents.md says how a model is trained on it."""

from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["Additions"]


class Sum(vf.TaskData):
    answer: str


class Addition(vf.Task[Sum]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply.strip() == self.data.answer)


class Additions(vf.Taskset[Addition]):
    def load(self) -> Iterator[Addition]:
        for a in range(10):
            for b in range(10):
                yield Addition(Sum(prompt=f"What is {a} + {b}?", answer=str(a + b)))
