"""The engine: few verbs over Megatron Core, the same on two CPU cores and on H100 nodes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.config.recipe import Recipe
from moetrain.engine import checkpoint, device
from moetrain.engine.adapter_state import (
    adapter_of,
    as_base,
    base_for,
    fill_head,
    planned_adapter,
)
from moetrain.engine.contents import contents, fill
from moetrain.engine.layers.block import choose_backend
from moetrain.engine.layers.router import RouterMonitor, watch
from moetrain.engine.lora import attach
from moetrain.engine.model import DTYPES, build, transformer_config
from moetrain.engine.objective import Objective
from moetrain.engine.optim import (
    clip_and_step,
    finalize_gradients,
    gathered,
    make_optimizer,
    set_rates,
    wrap,
)
from moetrain.engine.outputs import Columns, likeliest_columns, likeliest_of, rows_of
from moetrain.engine.params import freeze, local_adapters, local_merged, local_params
from moetrain.engine.snapshot import Weights, as_before, snapshot
from moetrain.engine.source import ModelSource, model_of
from moetrain.engine.step import Runner, StepResult, micro_batches
from moetrain.engine.world import World, open_world
from moetrain.layout.mesh import check_layout
from moetrain.layout.passed import check_dropout
from moetrain.methods.base import Known, Method, Out
from moetrain.models import Rule, read_model
from moetrain.models.adapter import AdapterTable, trained_table
from moetrain.models.patterns import trainable_names
from moetrain.models.rates import own_rates
from moetrain.models.rules import exported
from moetrain.ops.packed import Packed
from moetrain.weights import transport
from moetrain.weights.adapter_init import InitialAdapter
from moetrain.weights.dtypes import NAMES
from moetrain.weights.fused import file_names, file_shapes, groups, put_together, with_all_experts
from moetrain.weights.hf_files import Target
from moetrain.weights.peft_reader import PeftReader
from moetrain.weights.peft_writer import write_peft
from moetrain.weights.reader import Reader
from moetrain.weights.sent import Sent
from moetrain.weights.side_files import SideFiles
from moetrain.weights.writer import write_hf


class Engine:
    """A model on this process's place in the world. Every verb is collective: all ranks call it in
    the same order.

    Args:
        recipe: the resolved recipe; `model`, `parallel`, `optim`, `train`, `router` and `megatron`
            are read.
        world: where it lives; None opens the one that RANK and WORLD_SIZE name. In a meta world
            there are shapes alone, and no weights are read.
        train: build gradients and the optimizer too. Without it only forward passes and weights are
            there.

    Raises:
        LayoutError: the layout does not divide the model or the world.
        WeightsError: the model's weights are missing or are not this architecture's.
    """

    def __init__(self, recipe: Recipe, world: World | None = None, *, train: bool = True):
        self.recipe = recipe
        self.source: ModelSource = model_of(recipe, exports=train)
        self.model = read_model(self.source.hf, value_head=recipe.method.value_head)
        check_layout(self.model, recipe.parallel, recipe.data.seq_len * recipe.train.micro_batch)
        if recipe.train.deterministic:
            device.ask_for_determinism()
        torch.use_deterministic_algorithms(recipe.train.deterministic)
        far = recipe.rollout is not None and bool(recipe.rollout.address)
        self.world = world or open_world(recipe.parallel, recipe.seed, far=far)
        target = self.world.device
        self.backend = choose_backend(recipe.model.backend, target)
        self.steps_done = 0
        self.carried: dict[str, float] = {}  # from step to step, for the method
        self.monitor = RouterMonitor(
            self.model.num_layers,
            self.model.num_experts,
            recipe.router.aux_loss,
            recipe.router.z_loss,
        )
        self.config = transformer_config(recipe, self.model, target, self.backend)
        adapted = recipe.adapter is not None
        with target:  # Megatron's router makes its weight where torch makes tensors
            self.chunks = build(self.config, self.model, self.world, self.backend, adapted)
        watch(self.chunks, self.monitor)
        self.optimizer: Any = None
        self.adapters: AdapterTable | None = None
        self.initial_adapter: InitialAdapter | None = None
        self._load_source()
        models: Sequence[Any] = self.chunks
        self.wrapped: list[Any] = []
        if train:
            patterns = recipe.trainable if self.adapters is None else None
            trained = trainable_names(self.model.table, patterns) if patterns else None
            freeze(self.chunks, self.world, all_but=trained, router=recipe.router.freeze)
            self.wrapped = models = wrap(self.chunks, self.config, recipe)
            self.config.finalize_model_grads_func = finalize_gradients
            rates = own_rates(recipe, self.trained_rules, self.adapters)
            self.optimizer = make_optimizer(
                self.wrapped, recipe, self.backend, self.world, self.model, rates
            )
            self.config.grad_scale_func = self.optimizer.scale_loss
        self.run = Runner(models, self.world, self.model)

    def _load_source(self) -> None:
        """Base weights, then an adapter: a new one, which changes nothing yet, or an earlier."""
        recipe = self.recipe
        if self.world.kind == "meta":
            return self._attach(planned_adapter(recipe, self.model))
        reader = self.source.reader(recipe, self.model)
        adapters = adapter_of(recipe, self.model, reader)
        self.load(base_for(reader, adapters, recipe.seed))
        self._attach(adapters)
        if adapters is not None:
            self.initial_adapter = InitialAdapter(reader, adapters, recipe.seed)
            self.load_adapter(self.initial_adapter)
            if recipe.adapter is not None and recipe.adapter.path is not None:
                earlier = PeftReader(recipe.adapter.path, self.model, reader)
                fill_head(self.chunks, earlier.head)
                self.load_adapter(earlier)

    def _attach(self, adapters: AdapterTable | None) -> None:
        self.adapters = adapters
        if adapters is not None:
            if adapters.spec.dropout:  # which a folder may say
                check_dropout(self.recipe)
            attach(self.chunks, adapters, self.world)

    def load_adapter(self, reader: Reader) -> None:
        """Fill the adapters from `reader`, which has the tensors of `self.adapters`."""
        assert self.adapters is not None, "the recipe has no adapter"
        transport.load(local_adapters(self.chunks, self.world), self.adapters, reader, self.model)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    @property
    def trained_rules(self) -> Mapping[str, Rule]:
        """The weight table of what is trained, by canonical name."""
        return trained_table(self.model, self.recipe.trainable, self.adapters)

    def close(self) -> None:
        """Leave the process group. The engine is of no use afterwards."""
        self.world.close()

    # Training

    def step(
        self, packs: Sequence[Packed], method: Method, num_steps: int | None = None
    ) -> StepResult:
        """One optimizer step over this data-parallel rank's `packs` of the global batch.

        `num_steps` is how many the run has, for the learning rate (None: train.steps).

        Raises DivergedError before the optimizer steps when the loss or the gradient is not finite.
        """
        assert self.optimizer is not None, "this engine was built with train=False"
        recipe = self.recipe
        objective, batches, known = self._prepare(packs, method)
        counts, tokens = objective.counts(batches)
        self.monitor.start_step(tokens)
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
            chunk.train()
        self.optimizer.zero_grad()
        drops = self.adapters is not None and self.adapters.spec.dropout > 0
        self.run.salt = (recipe.seed, self.steps_done + 1) if drops else ()
        if recipe.router.balance == "global":
            with self.monitor.counted(self.world), gathered(self.wrapped):
                self.run.unscored(batches)
        outputs = self.run(batches, objective.head(counts, known), forward_only=False)
        self.run.salt = ()
        totals = objective.totals(outputs)
        step = self.steps_done + 1
        self.optimizer.prepare_grads()
        grad_norm = 0.0
        if self.world.kind != "meta":
            grad_norm = float(self.optimizer.get_grad_norm() or 0.0)
        objective.check(step, totals["loss"], grad_norm, outputs, batches)
        lr = set_rates(self.optimizer, step, recipe.optim, num_steps or recipe.train.steps or 0)
        clip_and_step(self.optimizer, grad_norm, recipe.optim.clip_grad)
        self.steps_done = step
        self.carried = method.carried(self.carried, totals, recipe.method)
        router: dict[str, float] = {}
        if self.model.moe is not None:
            router = self.monitor.summary(self.model.moe_layers, self.world)
        loss = totals.pop("loss")
        memory = device.memory_gib(self.world.device)
        return StepResult(loss, totals, grad_norm, lr, int(tokens), memory, router)

    def _prepare(
        self, packs: Sequence[Packed], method: Method
    ) -> tuple[Objective, list[Packed], Known]:
        """What a method makes of a global batch: its objective, the micro-batches to run, and the
        global means that it wants to know before.
        """
        objective = Objective(method, self.recipe.method, self.world)
        self.run.asked = method.needs | method.also_needs(self.recipe.method)
        asked, packs = objective.parted(packs)
        known = dict(self.carried)
        if asked is not None:
            batches = micro_batches(asked, self.recipe.train.micro_batch, self.world)
            with torch.no_grad():
                known |= objective.totals(self._forward_only(batches, objective.estimate))
            del known["loss"]
        return objective, micro_batches(packs, self.recipe.train.micro_batch, self.world), known

    # Forward only

    @torch.no_grad()
    def evaluate(self, packs: Sequence[Packed], method: Method) -> dict[str, float]:
        """Mean loss and metrics over held-out packs (each data-parallel rank brings its share):
        {"loss": ..., ...}.
        """
        objective, batches, known = self._prepare(packs, method)
        counts, _ = objective.counts(batches)
        return objective.totals(self._forward_only(batches, objective.head(counts, known)))

    @torch.no_grad()
    def logprobs(self, packs: Sequence[Packed]) -> list[Tensor]:
        """Log-prob of each label under the loss mask (0 elsewhere), one fp32 [t] CPU tensor a pack
        (its own length), on every rank of the replica.
        """
        return [out.logp for out in self.outputs(packs)]

    @torch.no_grad()
    def outputs(self, packs: Sequence[Packed], *, with_entropy: bool = False) -> list[Out]:
        """What the model gives for each pack: log-probs, entropies when asked, and values where it
        has a value or scalar head; fp32 [t] CPU tensors of the pack's own length, on every rank of
        the replica.
        """
        names = ["logp"] + ["entropy"] * with_entropy
        self.run.asked = frozenset(names)
        names += ["value"] * (self.model.heads.value or self.model.heads.scalar)
        rows = self._rows(packs, lambda out: [vars(out)[name] for name in names], len(names))
        return [Out(**dict(zip(names, row, strict=True))) for row in rows]

    @torch.no_grad()
    def likeliest(self, packs: Sequence[Packed], num: int) -> list[Out]:
        """For each pack the log-probs of its labels, and at each scored place the `num` likeliest
        tokens with theirs, as a teacher's word: `logp` [t] and `at_teacher` [t, num] fp32,
        `likeliest` [t, num] int64, on the CPU.
        """
        self.run.asked, self.run.num_likeliest = frozenset({"logp", "likeliest"}), num
        return likeliest_of(self._rows(packs, likeliest_columns, 1 + 2 * num), num)

    def _rows(self, packs: Sequence[Packed], columns: Columns, num: int) -> list[Tensor]:
        return rows_of(packs, columns, num, self.world, self._forward_only)

    def snapshot(self) -> Weights:
        """The trained weights as they are, on the host: an adapter alone, where there is one."""
        return snapshot(self.chunks, self.wrapped)

    def as_before(self, weights: Weights) -> AbstractContextManager[None]:
        """Meanwhile the weights are an earlier snapshot's: a reference without a second model."""
        return as_before(self.chunks, self.wrapped, weights)

    def as_base(self) -> AbstractContextManager[None]:
        """Before the first step: meanwhile an earlier adapter is a new one, without effect."""
        return as_base(self.recipe, self.chunks, self.wrapped, self.world, self.initial_adapter)

    def _forward_only(self, batches: Sequence[Packed], head: Any) -> list[dict[str, Any]]:
        for model in self.run.models:
            model.eval()
        with gathered(self.wrapped):
            return self.run(batches, head, forward_only=True)

    # Weights

    def load(self, reader: Reader) -> None:
        """Fill the live shards from `reader`; this rank reads only what it needs."""
        transport.load(local_params(self.chunks, self.world), self.model.table, reader, self.model)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def export(
        self, to: transport.To = "all", since: Sent | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every weight, adapters merged into it, in one order
        on every rank; with to="first" on the first rank alone, with `since` of what moved since.
        """
        with gathered(self.wrapped):
            rules = exported(self.model.table)
            local = [p for p in local_merged(self.chunks, self.world) if p.name in rules]
            if since is not None:
                moved = with_all_experts(since.moved(local, self.world), rules)
                rules = {name: rule for name, rule in rules.items() if name in moved}
                local = [p for p in local if p.name in moved]
            yield from put_together(transport.export(local, rules, self.world, to=to), rules)

    def export_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """(name in `self.adapters`, whole tensor) of the adapter and of a scalar head beside it, on
        the first rank.
        """
        with gathered(self.wrapped):
            yield from transport.export(*self._of_adapter(), self.world, to="first")

    def _of_adapter(self) -> tuple[list[transport.LocalParam], dict[str, Rule]]:
        """The shards here and the rules of what is exported of it."""
        assert self.adapters is not None, "the recipe has no adapter"
        local = local_adapters(self.chunks, self.world)
        rules = exported(self.trained_rules)
        heads = self.model.heads.added & rules.keys()
        local += [p for p in local_params(self.chunks, self.world) if p.name in heads]
        return local, rules

    @cached_property
    def side_files(self) -> SideFiles:
        """What goes beside exported weights; of an engine that trains, what it taught."""
        return self.source.side_files(self.recipe, taught=self.optimizer is not None)

    def export_hf(self, folder: Path) -> None:
        """Write a Hugging Face model folder, in the source's dtypes, with adapters merged in."""
        dtypes = self.source.dtypes(self.recipe, self.model)
        default = DTYPES[self.recipe.model.dtype]
        with gathered(self.wrapped):
            rules = exported(self.model.table)
            local = [p for p in local_merged(self.chunks, self.world) if p.name in rules]
            # Experts that are one tensor come together on one rank.
            to: transport.To = "first" if groups(rules) else "owner"
            shapes = transport.exported_shapes(local, rules, self.world, to=to)
            parts = file_names(rules, shapes)
            targets = [
                Target(name, NAMES[dtypes.get(parts[name], default)], shape)
                for name, shape in file_shapes(rules, shapes).items()
            ]
            write_hf(
                put_together(transport.export(local, rules, self.world, to=to), rules),
                targets,
                folder,
                self.world,
                side_files=self.side_files,
                config=self.source.hf_for_export(self.recipe),
            )

    def export_peft(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder."""
        assert self.adapters is not None, "the recipe has no adapter"
        base = self.recipe.model.path or ""
        started = None if self.adapters.spec.starts_at_base else self.initial_adapter
        note = (self.side_files, self.source.hf)
        dtypes = transport.exported_dtypes(*self._of_adapter(), self.world)
        tensors = self.export_adapter()
        write_peft(tensors, dtypes, folder, self.adapters, base, started, note, self.world)

    # Checkpoints

    def save(self, folder: Path, state: dict[str, Any], *, optimizer: bool = True) -> None:
        """Write weights, optimizer and `state` (JSON) into `folder`, which must be empty."""
        self.begin_save(folder, state, optimizer=optimizer).finish()

    def begin_save(
        self,
        folder: Path,
        state: dict[str, Any],
        *,
        optimizer: bool = True,
        reference: Weights | None = None,
    ) -> checkpoint.Saving:
        """As `save`, a snapshot beside it, up to a copy in host memory; `finish` does the rest."""
        optimizer_state = self.optimizer if optimizer else None
        with gathered(self.wrapped):
            state = state | {"steps_done": self.steps_done, "carried": self.carried}
            tensors, aside = contents(self.chunks, self.model, self.adapters, self.world, reference)
            saving = checkpoint.Saving(folder, tensors, optimizer_state, state, self.world, aside)
        if self.world.is_first:
            self.source.describe(folder, self.recipe, self.side_files)
        return saving

    def restore(self, folder: Path, reference: Weights | None = None) -> dict[str, Any]:
        """Read what `save` wrote, at this layout or another, and into a snapshot what was saved of
        it; returns its `state`.
        """
        tensors, aside = contents(self.chunks, self.model, self.adapters, self.world, reference)
        loaded, state = checkpoint.restore(folder, tensors, self.optimizer, self.world, aside)
        fill(self.chunks, loaded, reference)
        if self.optimizer is not None:
            checkpoint.restore_optimizer(self.optimizer, loaded)
        self.steps_done = int(state.pop("steps_done"))
        self.carried = state.pop("carried", {})  # 0.1 had none
        return state
