"""A teacher that the trainers' ranks hold: its weights beside the student's, and its forward pass
before each step. One that is served, or asked once before the student is built, is not in a step.
Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moetrain.config.distill import START
from moetrain.config.recipe import ParallelConfig, Recipe
from moetrain.errors import LayoutError
from moetrain.layout.memory import static_bytes
from moetrain.layout.mesh import check_layout, plan_mesh
from moetrain.layout.teacher import teacher_model
from moetrain.models import Model
from moetrain.planner.cost import Seconds


@dataclass
class Teacher:
    """own: another model than the student; None: the student as it was, which lies on the host."""

    student: Model
    own: Model | None
    _bytes: dict[tuple[ParallelConfig, int], list[int]] = field(
        default_factory=dict[tuple[ParallelConfig, int], list[int]]
    )

    @classmethod
    def of(cls, recipe: Recipe, student: Model) -> "Teacher | None":
        """None where the ranks hold none while the student learns."""
        teacher = recipe.teacher
        if teacher is None or teacher.path is None or not recipe.method.samples:
            return None
        own = None if teacher.path == START else teacher_model(recipe, dry=True)
        return cls(student, own)

    def divides(self, recipe: Recipe) -> bool:
        """Whether the student's layout is one of the teacher's."""
        if self.own is None:
            return True
        try:
            tokens = recipe.data.seq_len * recipe.train.micro_batch
            check_layout(self.own, recipe.parallel, tokens)
        except LayoutError:
            return False
        return True

    def bytes_of(self, recipe: Recipe, size: int) -> Sequence[int]:
        """[stage] of its weights on a GPU."""
        plan = plan_mesh(recipe.parallel, size)
        if self.own is None:
            return [0] * plan.pp
        key = recipe.parallel, size
        if key not in self._bytes:
            stages = static_bytes(self.own, plan, recipe, {})
            self._bytes[key] = [stage.weights for stage in stages]
        return self._bytes[key]

    def asked(self, seconds: Seconds, seq_len: int) -> Seconds:
        """With its pass, which takes what the student's own before a step does, by the FLOPs of
        both.
        """
        pairs = seq_len * (seq_len + 1) // 2
        model = self.own or self.student
        more = seconds.before * model.flops(seq_len, pairs) / self.student.flops(seq_len, pairs)
        share = seconds.total / (seconds.total + more)
        return replace(
            seconds,
            total=seconds.total + more,
            before=seconds.before + more,
            tokens_per_s=seconds.tokens_per_s * share,
            tflops=seconds.tflops * share,
        )
