"""The mesh: Megatron's process groups and this rank's coordinates on each axis."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from moetrain.config.recipe import ParallelConfig
from moetrain.layout.mesh import MeshPlan, plan_mesh


@dataclass(frozen=True)
class Mesh:
    """Sizes in `plan`, this rank's coordinates, and the groups the engine talks over."""

    plan: MeshPlan
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    ep_rank: int
    etp_rank: int
    cp_rank: int
    dp_rank: int
    dp_size: int
    tp_group: ProcessGroup
    etp_group: ProcessGroup
    cp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.plan.pp - 1

    @property
    def speaks(self) -> bool:
        """Whether this rank adds the loss of its data once: one rank per data-parallel replica
        does.
        """
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0


def start_mesh(parallel: ParallelConfig, seed: int) -> Mesh:
    """Make Megatron's groups for `parallel` over all ranks of the process group; LayoutError when
    it does not divide.
    """
    plan = plan_mesh(parallel, dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp if plan.vpp > 1 else None,
        context_parallel_size=plan.cp,
        expert_model_parallel_size=plan.ep,
        expert_tensor_parallel_size=plan.etp,
        create_gloo_process_groups=dist.get_backend() == "nccl",
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    ps = parallel_state
    return Mesh(
        plan=plan,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        etp_rank=ps.get_expert_tensor_parallel_rank(),
        cp_rank=ps.get_context_parallel_rank(),
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        tp_group=ps.get_tensor_model_parallel_group(),
        etp_group=ps.get_expert_tensor_parallel_group(),
        cp_group=ps.get_context_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
    )
