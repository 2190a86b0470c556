"""The `cluster` section: the machines, and when a run on them counts as hung."""

from typing import Annotated

from pydantic import Field

from moetrain.config.section import Section

Count = Annotated[int, Field(ge=1)]


class ClusterConfig(Section):
    """The machines the run is meant for; the dry run counts with them."""

    gpu: str = Field(default="H100-80GB", description="its memory is what the dry run warns about")
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
