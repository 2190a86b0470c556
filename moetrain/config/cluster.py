"""The `cluster` section: the machines, and when a run on them counts as hung."""

from typing import Annotated, Literal

from pydantic import Field

from moetrain.config.section import Section

Count = Annotated[int, Field(ge=1)]


class ClusterConfig(Section):
    """The machines the run is meant for; the dry run counts with them."""

    gpu: str | None = Field(
        default=None,
        description="a GPU that `moetrain plan` knows, or the path of a .yaml that `moetrain bench"
        " gpu` wrote; a recipe that names one is held against its memory before it starts, and its"
        " steps against the prediction; default: the dry run counts with an H100-80GB",
    )
    prediction: Literal["refuse", "warn", "none"] = Field(
        default="refuse",
        description="where gpu is named: a recipe that is predicted not to fit is refused by the"
        " dry run, by launch and at the start of a job, or only warned of; none: nothing is"
        " predicted",
    )
    gpus_per_node: Count = Field(default=8, description="ranks of a node")
    nodes: Count | None = Field(
        default=None, description="the dry run's world is nodes * gpus_per_node"
    )
    world_size: Count | None = Field(
        default=None,
        description="the dry run's ranks, in place of nodes; default: the fewest the layout takes",
    )
    hang_seconds: float = Field(
        default=900.0,
        gt=0,
        description="without any progress, after which ranks write their stacks and are ended; four"
        " times as long until the first",
    )

    @property
    def gpu_name(self) -> str:
        """The GPU that is counted with."""
        return self.gpu or "H100-80GB"
