"""The optimizer of a recipe: its schedule, and which weights learn at a rate of their own."""

from typing import Literal, Self

from pydantic import Field, model_validator

from moetrain.config.section import Count, Fraction, Paths, Section, WarmUp


class OptimGroup(Section):
    """Weights that learn otherwise than the rest."""

    match: Paths = Field(min_length=1, description="patterns of weights, as `trainable` has them")
    lr: float | None = Field(default=None, ge=0, description="highest learning rate")
    lr_scale: float | None = Field(
        default=None, ge=0, description="in place of lr: this times optim.lr"
    )
    weight_decay: float | None = Field(default=None, ge=0, description="of the group's matrices")
    name: Literal["adamw"] | None = Field(
        default=None, description="take the group's matrices from muon"
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        given = [self.lr, self.lr_scale, self.weight_decay, self.name]
        if all(value is None for value in given):
            raise ValueError(
                f"the group of {self.match} changes nothing: give lr, lr_scale, weight_decay or"
                " name"
            )
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError(
                f"the group of {self.match} has lr={self.lr:g} and lr_scale={self.lr_scale:g}: give"
                " one of them"
            )
        return self


class OptimConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon steps the matrices of layers, each expert's and q, k, v, gate and up"
        " alone, and adamw the rest",
    )
    lr: float = Field(default=1e-4, ge=0, description="highest learning rate")
    min_lr: float = Field(
        default=0.0, ge=0, description="where the schedule ends; not for constant"
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine", description="after the warm-up; wsd holds lr and decays at the end"
    )
    warmup: WarmUp = Field(
        default=0,
        ge=0,
        description="steps of linear warm-up from 0; less than 1: a share of the run's steps",
    )
    decay_steps: Count | None = Field(
        default=None,
        description="steps that the decay takes; default: wsd the last tenth, the others all",
    )
    wsd_decay: Literal["linear", "cosine", "exponential", "minus_sqrt"] = Field(
        default="linear", description="shape of wsd's decay"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        default=0.1, ge=0, description="of matrices; norms and biases have none"
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="decay of muon's momentum")
    muon_nesterov: bool = Field(default=True, description="muon looks ahead by its momentum")
    muon_num_ns_steps: Count = Field(
        default=5, description="Newton-Schulz iterations, with K. Jordan's coefficients"
    )
    muon_scale_mode: Literal["spectral", "shape_scaling", "unit_rms_norm"] = Field(
        default="spectral",
        description="of the orthogonal update: sqrt(max(out, in)), sqrt(max(1, out / in)),"
        " sqrt(out / in)",
    )
    muon_extra_scale_factor: float = Field(
        default=0.2,
        gt=0,
        description="times that; 0.2 (arXiv 2502.16982; 1 in Megatron) gives spectral updates the"
        " size of adamw's, at its learning rate",
    )
    clip_grad: float = Field(
        default=1.0, ge=0, description="largest gradient norm; 0 turns clipping off"
    )
    offload: Fraction = Field(
        default=0.0, description="share of the optimizer's state kept on the host (GPU)"
    )
    state_dtype: Literal["fp32", "bf16", "fp8"] = Field(
        default="fp32", description="of the two moments; less than fp32 needs Transformer Engine"
    )
    grad_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="in which gradients are summed over micro-batches and ranks"
    )
    groups: list[OptimGroup] = Field(
        default=[],
        description="weights with a rate or decay of their own, e.g. [{match: value_head, lr:"
        " 1e-5}, {match: [mlp.gate, norm], lr_scale: 0.1, weight_decay: 0}]; of several that match"
        " the last counts",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.name == "adamw" and any(group.name for group in self.groups):
            raise ValueError("optim.groups: name is for optim.name=muon. Leave it out")
        return self

    def rates_of(self, group: OptimGroup | None) -> tuple[float, float]:
        """(highest, last) learning rate of a group's weights; the schedule has one shape."""
        if group is None:
            return self.lr, self.min_lr
        if group.lr is None:
            scale = 1.0 if group.lr_scale is None else group.lr_scale
            return self.lr * scale, self.min_lr * scale
        return group.lr, self.min_lr * group.lr / self.lr if self.lr else 0.0
