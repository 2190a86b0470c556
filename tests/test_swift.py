"""ms-swift's commands and recipes: both directions, and what is said about the rest."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.load import load_recipe, recipe_from
from moetrain.config.recipe import Recipe
from moetrain.config.swift import from_swift, to_swift
from moetrain.config.swift.convert import keys_of
from moetrain.config.swift.shell import read_command
from moetrain.errors import ConfigError

ROOT = Path(__file__).parent.parent
BASE = "megatron sft --model /m --dataset d.jsonl --output_dir o --train_iters 100 --max_length 512"
DPO = BASE.replace("sft", "rlhf --rlhf_type dpo", 1)
LORA = f"{BASE} --tuner_type lora"
UNCARRIED = ("not carried", "check")


def notes(text: str, *kinds: str, steps: int | None = None) -> dict[str, str]:
    return {n.what: n.why for n in from_swift(text, steps).notes if n.kind in kinds}


def keys(text: str) -> dict[str, Any]:
    """Every key of the recipe that the command makes, defaults too."""
    return keys_of(recipe_from(from_swift(text).content).model_dump(mode="json"))


# What each flag means, told apart from the table.
MEANINGS = [
    (BASE, "--seed 7", {"seed": 7}),
    (BASE, "--tensor_model_parallel_size 4", {"parallel.tp": 4, "parallel.sp": False}),
    (BASE, "--tensor_model_parallel_size 4 --sequence_parallel true", {"parallel.sp": True}),
    (BASE, "--pipeline_model_parallel_size 2", {"parallel.pp": 2}),
    (
        BASE,
        "--pipeline_model_parallel_size 4 --virtual_pipeline_model_parallel_size 2"
        " --decoder_first_pipeline_num_layers 3 --decoder_last_pipeline_num_layers 5",
        {"parallel.vpp": 2, "parallel.first_stage_layers": 3, "parallel.last_stage_layers": 5},
    ),
    (BASE, "--expert_model_parallel_size 8", {"parallel.ep": 8}),
    (BASE, "--expert_tensor_parallel_size 2", {"parallel.etp": 2}),
    (BASE, "--context_parallel_size 2", {"parallel.cp": 2}),
    (BASE, "--torch_dtype float32 --fp16 false", {"model.dtype": "fp32"}),
    (BASE, "--torch_dtype bfloat16", {"model.dtype": "bf16"}),
    (BASE, "--enable_dft_loss true", {"method.name": "dft"}),
    (DPO, "--beta 0.075", {"method.name": "dpo", "method.beta": 0.075}),
    (DPO, "--label_smoothing 0.1", {"method.label_smoothing": 0.1}),
    (DPO, "--rpo_alpha 1", {"method.rpo_alpha": 1.0}),
    (DPO, "--loss_type ipo", {"method.name": "ipo"}),
    (DPO, "--loss_type hinge", {"method.name": "hinge"}),
    (
        DPO,
        "--rlhf_type kto --desirable_weight 2 --undesirable_weight 0.5",
        {"method.name": "kto", "method.desirable_weight": 2.0, "method.undesirable_weight": 0.5},
    ),
    (
        DPO,
        "--rlhf_type rm --center_rewards_coefficient 0.01",
        {"method.name": "reward", "method.center_rewards": 0.01},
    ),
    (LORA, "--lora_rank 16", {"adapter.rank": 16, "adapter.alpha": 32.0, "adapter.type": "lora"}),
    (LORA, "--lora_alpha 64", {"adapter.alpha": 64.0, "adapter.rank": 8}),
    (LORA, "--use_rslora true", {"adapter.type": "rslora"}),
    (LORA, "--target_modules all-linear all-router", {"adapter.target": ["all-router"]}),
    (LORA, "--target_modules all-router", {"adapter.target": ["mlp.gate"]}),
    (
        LORA,
        "--target_modules linear_qkv linear_proj",
        {"adapter.target": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    (
        LORA,
        "--target_modules linear_fc1 linear_fc2",
        {"adapter.target": ["gate_proj", "up_proj", "down_proj"]},
    ),
    (BASE, "--adapters /peft", {"adapter.path": "/peft"}),
    (BASE, "--packing true", {"data.pack": True}),
    (BASE, "--packing false", {"data.pack": False}),
    (BASE, "--max_length 8192", {"data.seq_len": 8192}),
    (BASE, "--val_dataset a.jsonl b.jsonl", {"data.eval": ["a.jsonl", "b.jsonl"]}),
    (BASE, "--truncation_strategy delete", {"data.too_long": "reject"}),
    (BASE, "--truncation_strategy right", {"data.too_long": "truncate"}),
    (BASE, "--dataset_num_proc 8", {"data.num_workers": 8}),
    (BASE, "--train_dataloader_shuffle false", {"data.shuffle": False}),
    (BASE, "--micro_batch_size 2 --global_batch_size 32", {"train.global_batch": 32}),
    (BASE, "--train_iters 7", {"train.steps": 7}),
    (BASE, "--lr 2e-5 --min_lr 2e-6", {"optim.lr": 2e-5, "optim.min_lr": 2e-6}),
    (BASE, "--lr_warmup_iters 10", {"optim.warmup": 10}),
    (BASE, "--lr_warmup_fraction 0.05", {"optim.warmup": 5}),
    (BASE, "--lr_warmup_iters 10 --lr_decay_iters 60", {"optim.decay_steps": 50}),
    (BASE, "--lr_decay_style constant", {"optim.schedule": "constant"}),
    (
        BASE,
        "--lr_decay_style linear --lr_warmup_iters 10",
        {"optim.schedule": "wsd", "optim.wsd_decay": "linear", "optim.decay_steps": 90},
    ),
    (
        BASE,
        "--lr_decay_style WSD --lr_wsd_decay_style cosine --lr_wsd_decay_iters 20",
        {"optim.schedule": "wsd", "optim.wsd_decay": "cosine", "optim.decay_steps": 20},
    ),
    (BASE, "--weight_decay 0 --clip_grad 0.5", {"optim.weight_decay": 0, "optim.clip_grad": 0.5}),
    (BASE, "--adam_beta1 0.8 --adam_beta2 0.9", {"optim.beta1": 0.8, "optim.beta2": 0.9}),
    (BASE, "--adam_eps 1e-6", {"optim.eps": 1e-6}),
    (
        BASE,
        "--optimizer_cpu_offload true --optimizer_offload_fraction 0.7",
        {"optim.offload": 0.7},
    ),
    (BASE, "--exp_avg_dtype bf16 --exp_avg_sq_dtype bf16", {"optim.state_dtype": "bf16"}),
    (BASE, "--main_grads_dtype bf16", {"optim.grad_dtype": "bf16"}),
    (
        BASE,
        "--recompute_granularity full --recompute_method uniform --recompute_num_layers 1",
        {"train.recompute": "full"},
    ),
    (BASE, "--recompute_granularity none", {"train.recompute": "none"}),
    (BASE, "--save_steps 50", {"checkpoint.every": 50}),
    (BASE, "--val_dataset a.jsonl --save_steps 50", {"train.eval_every": 50}),
    (BASE, "--val_dataset a.jsonl --eval_steps 20", {"train.eval_every": 20}),
    (BASE, "--val_dataset a.jsonl --eval_iters 3", {"train.eval_packs": 48}),
    (BASE, "--save_total_limit 4", {"checkpoint.keep": 4, "checkpoint.best": None}),
    (
        BASE,
        "--val_dataset a.jsonl --save_total_limit 4 --metric_for_best_model loss",
        {"checkpoint.keep": 3, "checkpoint.best": "eval_loss"},
    ),
    (BASE, "--no_save_optim true", {"checkpoint.save_optimizer": False}),
    (BASE, "--save_safetensors false", {"checkpoint.export_hf": False}),
    (LORA, "--save_safetensors true", {"checkpoint.export_hf": True}),
    (LORA, "--save_safetensors true --merge_lora false", {"checkpoint.export_hf": False}),
    (BASE, "--moe_aux_loss_coeff 1e-3", {"router.aux_loss": 1e-3}),
    (BASE, "--moe_z_loss_coeff 1e-3", {"router.z_loss": 1e-3}),
    (
        BASE,
        "--report_to wandb --wandb_project p --wandb_exp_name n",
        {"observe.wandb": {"project": "p", "name": "n"}, "observe.tensorboard": False},
    ),
    (
        BASE,
        """--megatron_extra_kwargs '{"moe_permute_fusion": true}'""",
        {"megatron": {"moe_permute_fusion": True}},
    ),
    # what ms-swift takes without a flag
    (
        BASE,
        "",
        {
            "method.name": "sft",
            "seed": 42,
            "data.pack": False,
            "data.too_long": "reject",
            "train.global_batch": 16,
            "train.recompute": "selective",
            "checkpoint.every": 500,
            "checkpoint.export_hf": True,
            "optim.lr": 1e-5,
            "optim.min_lr": 0,
            "optim.schedule": "cosine",
            "optim.warmup": 0,
            "optim.decay_steps": None,
            "optim.beta1": 0.9,
            "optim.beta2": 0.95,
            "optim.eps": 1e-8,
            "optim.weight_decay": 0.1,
            "optim.clip_grad": 1,
            "optim.offload": 0,
            "train.micro_batch": 1,
            "router.aux_loss": 0,
            "router.z_loss": 0,
            "checkpoint.save_optimizer": True,
            "observe.tensorboard": True,
            "adapter.rank": None,
            "cluster.nodes": None,
        },
    ),
    (LORA, "", {"optim.lr": 1e-4, "adapter.rank": 8, "adapter.target": ["all-linear"]}),
    (BASE.replace("sft", "rlhf"), "", {"method.name": "dpo", "method.beta": 0.1}),
    (BASE.replace("sft", "pt"), "", {"method.name": "cpt"}),
]


@pytest.mark.parametrize(("base", "flags", "expected"), MEANINGS)
def test_a_flag_means(base: str, flags: str, expected: dict[str, Any]) -> None:
    found = keys(f"{base} {flags}")
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(("base", "flags", "expected"), MEANINGS)
def test_the_way_back_says_the_same(base: str, flags: str, expected: dict[str, Any]) -> None:
    recipe = recipe_from(from_swift(f"{base} {flags}").content)
    exported = to_swift(recipe.model_dump(mode="json"))
    assert not [note for note in exported.notes if note.kind == "not carried"]
    assert recipe_from(from_swift(exported.text).content) == recipe


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of these keys."""
    return st.fixed_dictionaries({}, optional=fields)


small = st.floats(1e-6, 0.5, allow_nan=False)
count = st.integers(1, 64)
path = st.sampled_from(["a.jsonl", "/data/b c.jsonl", "it's.jsonl", "$HOME/x.jsonl"])
METHODS = st.one_of(
    st.fixed_dictionaries({"name": st.sampled_from(["sft", "dft", "cpt"])}),
    st.fixed_dictionaries(
        {"name": st.just("dpo")}, optional={"beta": small, "label_smoothing": st.floats(0, 0.4),
                                            "rpo_alpha": small},
    ),
    st.fixed_dictionaries({"name": st.sampled_from(["ipo", "hinge"])}, optional={"beta": small}),
    st.fixed_dictionaries(
        {"name": st.just("kto")},
        optional={"beta": small, "desirable_weight": small, "undesirable_weight": small},
    ),
    st.fixed_dictionaries({"name": st.just("reward")}, optional={"center_rewards": small}),
)  # fmt: skip
ADAPTERS = st.one_of(
    st.none(),
    st.fixed_dictionaries({"path": path}),
    maybe(
        type=st.sampled_from(["lora", "rslora"]),
        rank=count,
        alpha=small,
        target=st.sampled_from(
            [["all-linear"], ["all-router"], ["q_proj", "k_proj", "v_proj", "o_proj"],
             ["experts", "mlp.gate"], ["gate_proj", "up_proj", "down_proj"]]
        ),
    ),
)  # fmt: skip
PARALLEL = st.one_of(
    maybe(ep=count, etp=count, cp=count),
    st.fixed_dictionaries({"tp": st.integers(2, 8)}, optional={"sp": st.booleans()}),
    st.fixed_dictionaries(
        {"pp": st.integers(2, 8)},
        optional={"vpp": count, "first_stage_layers": count, "last_stage_layers": count},
    ),
)
OPTIM = maybe(
    lr=small, min_lr=small, warmup=st.integers(0, 99), decay_steps=count,
    schedule=st.just("cosine"), beta1=small, beta2=small, eps=small, weight_decay=small,
    clip_grad=small, offload=small, state_dtype=st.sampled_from(["fp32", "bf16", "fp8"]),
    grad_dtype=st.sampled_from(["fp32", "bf16"]),
) | st.fixed_dictionaries(
    {"schedule": st.just("wsd"), "decay_steps": count},
    optional={"wsd_decay": st.sampled_from(["linear", "cosine", "exponential"]), "warmup": count},
) | maybe(schedule=st.just("constant"), warmup=count)  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of everything that the table carries."""
    micro, accumulation = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    length = draw(st.sampled_from([{"steps": 120}, {"epochs": 3.0}]))
    train = draw(
        maybe(
            eval_every=count,
            recompute=st.sampled_from(["none", "selective", "full"]),
            overlap=st.booleans(),
        )
    )
    held_out = draw(maybe(eval=st.lists(path, max_size=2)))
    if held_out.get("eval") and draw(st.booleans()):
        train["eval_packs"] = micro * accumulation * draw(count)
    method = draw(METHODS)
    data = draw(
        maybe(
            pack=st.booleans() if method["name"] != "cpt" else st.just(True),
            too_long=st.sampled_from(["truncate", "reject"])
            if method["name"] != "cpt"
            else st.just("truncate"),
            shuffle=st.booleans(),
            num_workers=st.integers(0, 8),
        )
    )
    best = draw(st.sampled_from([None, "eval_loss"] if held_out.get("eval") else [None]))
    content = {
        "run_dir": draw(st.sampled_from(["runs/x", "/a b/c"])),
        "seed": draw(st.integers(0, 2**31)),
        "model": {"path": "/models/m", "dtype": draw(st.sampled_from(["fp32", "bf16"]))},
        "parallel": draw(PARALLEL),
        "method": method,
        "data": {"train": draw(st.lists(path, min_size=1, max_size=3)), "seq_len": draw(count)}
        | held_out
        | data,
        "optim": draw(OPTIM),
        "train": length
        | train
        | {"micro_batch": micro, "global_batch": micro * accumulation},
        "router": draw(maybe(aux_loss=small, z_loss=small, freeze=st.booleans())),
        "adapter": (adapter := draw(ADAPTERS)),
        "trainable": draw(
            st.sampled_from([None, ["self_attn"], ["experts", "mlp.gate"], ["lm_head"]])
            if adapter is None
            else st.none()
        ),
        "checkpoint": {"best": best, "keep": draw(st.integers(1 if best else 2, 9))}
        | draw(maybe(every=count, save_optimizer=st.booleans(), export_hf=st.booleans())),
        "observe": draw(
            st.sampled_from(
                [{}, {"wandb": {"project": "p"}},
                 {"tensorboard": False, "wandb": {"project": "p", "name": "n"}}]
            )
        ),
        "cluster": draw(maybe(nodes=count, gpus_per_node=count)),
        "megatron": draw(st.sampled_from([{}, {"moe_token_dispatcher_type": "flex"}])),
    }  # fmt: skip
    return recipe_from(content)


@settings(max_examples=300, deadline=None)
@given(recipes())
def test_round_trip(recipe: Recipe) -> None:
    exported = to_swift(recipe.model_dump(mode="json"))
    assert not [str(note) for note in exported.notes if note.kind == "not carried"]
    imported = from_swift(exported.text)
    assert recipe_from(imported.content) == recipe
    assert not [str(note) for note in imported.notes if note.kind in UNCARRIED and "lora_dropout"
                not in note.what]  # fmt: skip


# Flags that are lost: what is said, and by which word.
@pytest.mark.parametrize(
    ("base", "flags", "what", "why"),
    [
        (LORA, "", "lora_dropout (0.05 by default)", "no dropout"),
        (LORA, "--lora_dropout 0.1", "--lora_dropout 0.1", "no dropout"),
        (LORA, "--target_regex x", "--target_regex x", "adapter.target"),
        (LORA, "--target_modules a b", "--target_modules a b", "no counterpart"),
        (LORA, "--mcore_adapter /a", "--mcore_adapter /a", "PEFT"),
        (BASE, "--lora_rank 8", "--lora_rank 8", "no new adapter"),
        (BASE, "--split_dataset_ratio 0.01", "--split_dataset_ratio 0.01", "data.eval"),
        (BASE, "--optimizer muon", "--optimizer muon", "adamw"),
        (BASE, "--finetune false", "--finetune false", "run_dir"),
        (BASE, "--made_up 3 4", "--made_up 3 4", "no key"),
        (BASE, "--recompute_granularity full --recompute_num_layers 4",
         "--recompute_num_layers 4", "every layer"),
        (BASE, "--lr_decay_style inverse-square-root",
         "--lr_decay_style inverse-square-root", "cosine"),
        (BASE, "--moe_aux_loss_coeff 0.1 0.2", "--moe_aux_loss_coeff 0.1 0.2", "one number"),
        (BASE, "--freeze_parameters a", "--freeze_parameters a", "Hugging Face"),
        (DPO, "--loss_type robust", "--loss_type robust", "sigmoid"),
        (DPO, "--reference_free true", "--reference_free true", "reference"),
        (DPO, "--loss_scale all", "--loss_scale all", "assistant"),
        (DPO, "--ref_adapters /a", "--ref_adapters /a", "adapters off"),
        (BASE.replace("--train_iters 100", "--num_train_epochs 2"), "--lr_warmup_fraction 0.05",
         "--lr_warmup_fraction 0.05", "--steps"),
    ],
)  # fmt: skip
def test_what_is_not_carried_is_named(base: str, flags: str, what: str, why: str) -> None:
    found = notes(f"{base} {flags}", "not carried")
    assert what in found, found
    assert why in found[what]


def test_no_flag_is_dropped_in_silence() -> None:
    """Whatever is given is in the recipe or in a note."""
    flags = "--alpha 1 --moe_grouped_gemm true --finetune true --attention_backend flash --x"
    told = notes(f"{BASE} {flags}", "not carried", "changed", "implied")
    assert {"--alpha 1", "--x", "--finetune true"} <= {*told}
    assert told["--moe_grouped_gemm true"] == "experts are grouped always"


def test_a_secret_is_not_repeated() -> None:
    told = str(notes(f"WANDB_API_KEY=abc123 {BASE} --hub_token t0p", "not carried", "implied"))
    assert "WANDB_API_KEY" in told and "--hub_token" in told
    assert "abc123" not in told and "t0p" not in told


def test_steps_count_a_fraction_of_epochs() -> None:
    text = BASE.replace("--train_iters 100", "--num_train_epochs 2") + " --lr_warmup_fraction 0.05"
    content = from_swift(text, steps=240).content
    assert content["optim"]["warmup"] == 12
    assert content["train"]["epochs"] == 2 and "steps" not in content["train"]


def test_what_changes_its_meaning_is_said() -> None:
    assert "records" in notes(BASE, "changed")["global_batch_size"]
    assert "global_batch_size" not in notes(f"{BASE} --packing true", "changed")
    assert "both together" in notes(DPO, "changed")["max_length"]
    assert "mean over tokens" in notes(f"{DPO} --loss_type ipo", "changed")["beta"]
    assert "index" in notes(BASE.replace("sft", "pt"), "changed")["dataset"]


def test_what_a_recipe_cannot_be_is_said() -> None:
    told = notes("megatron sft --model /m --output_dir o --train_iters 5", "check")
    assert "data" in told["recipe"]


SCRIPT = r"""#!/bin/bash
# megatron sft --model wrong
export NNODES=4
MODEL="/models/a b"   # one word
DATA='one.jsonl two.jsonl'
NPROC_PER_NODE=8 \
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
megatron rlhf \
    --rlhf_type dpo \
    --model "$MODEL" --dataset $DATA 'three#5.jsonl' \
    --lr=${LR:-2e-5} --output_dir out/${NAME:-run} \
    --num-train-epochs 1 2>&1 | tee "log of $(date).txt"
echo done; exit $?
"""


def test_a_script() -> None:
    content = from_swift(SCRIPT).content
    assert content["model"] == {"path": "/models/a b"}
    assert content["data"]["train"] == ["one.jsonl", "two.jsonl", "three#5.jsonl"]
    assert content["optim"]["lr"] == 2e-5
    assert content["run_dir"] == "out/run"
    assert content["train"]["epochs"] == 1
    assert content["cluster"] == {"gpus_per_node": 8, "nodes": 4}


def test_names_of_ms_swift_3() -> None:
    text = BASE.replace("--output_dir", "--save").replace("--train_iters 100", "--max_epochs 2")
    text += " --train_type lora --save_interval 30 --eval_interval 15 --val_dataset e.jsonl"
    text += " --load_safetensors true --num_workers 4"
    found = keys(text)
    assert (found["run_dir"], found["train.epochs"], found["adapter.rank"]) == ("o", 2, 8)
    assert (found["checkpoint.every"], found["train.eval_every"]) == (30, 15)
    assert not notes(text, "not carried").keys() - {"lora_dropout (0.05 by default)"}


def test_open_variables_leave_the_world_open() -> None:
    command = read_command(f"NPROC_PER_NODE=4 NNODES=$WORLD {BASE}")
    assert command.open == {"NNODES"}
    content = from_swift(f"NPROC_PER_NODE=4 NNODES=$WORLD {BASE}").content
    assert content["cluster"] == {"gpus_per_node": 4}
    assert keys(f"NPROC_PER_NODE=4 {BASE}")["cluster.nodes"] == 1


def test_swift_without_megatron() -> None:
    text = "swift rlhf --rlhf_type simpo --model /m --dataset d.jsonl --output_dir o"
    found = keys(f"{text} --simpo_gamma 0.5 --target_modules q_proj k_proj v_proj --use_dora true")
    assert (found["method.name"], found["method.gamma"], found["method.beta"]) == ("simpo", 0.5, 2)
    assert (found["adapter.type"], found["train.epochs"]) == ("dora", 3)
    assert found["adapter.target"] == ["q_proj", "k_proj", "v_proj"]
    with pytest.raises(ConfigError, match="--learning_rate -> --lr"):
        from_swift(f"{text} --learning_rate 1e-4")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no training command"),
        ("megatron export --to_hf true", "no training command"),
        (f"{BASE}; {BASE}", "2 training commands"),
        (f"{BASE} --lr abc", "--lr abc: a number"),
        (f"{BASE} --train_iters 1.5", "a whole number"),
        (f"{BASE} --packing maybe", "true or false"),
        (f"{BASE} --system 'open", "not closed"),
        (f"{BASE} --lr $LR", r"\$LR"),
        (f"{BASE} --lr $(cat lr)", r"\$\(cat lr\)"),
        ("megatron sft conf.yaml --lr 1", "conf.yaml"),
        (f"{BASE.replace('sft', 'rlhf')} --rlhf_type grpo", "dpo, kto and rm"),
        (f"{BASE} --tuner_type lora_llm", "full training and lora"),
    ],
)
def test_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_swift(text)


def test_export_names_what_ms_swift_cannot_say() -> None:
    content = {
        "run_dir": "r",
        "model": {"path": "/m", "tokenizer": "/t"},
        "method": {"name": "dpo", "kl_budget": 5.0},
        "data": {"train": ["d.jsonl"], "reference": "/r"},
        "train": {"epochs": 1.5},
        "adapter": {"type": "dora", "target": ["layers.3"]},
    }
    exported = to_swift(recipe_from(content).model_dump(mode="json"))
    told = {note.what for note in exported.notes if note.kind == "not carried"}
    assert told == {
        "adapter.target=['layers.3']",
        "adapter.type=dora",
        "data.reference=/r",
        "method.kl_budget=5.0",
        "model.tokenizer=/t",
        "train.epochs=1.5",
    }
    assert "--tuner_type lora" in exported.text and "megatron rlhf" in exported.text


@pytest.mark.parametrize("name", ["orpo", "simpo", "chord_sft"])
def test_methods_that_megatron_swift_has_not(name: str) -> None:
    base = from_swift(BASE).content | {"method": name}
    with pytest.raises(ConfigError, match=name):
        to_swift(recipe_from(base).model_dump(mode="json"))


def moetrain(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moetrain", "swift", *argv],
        capture_output=True, text=True, input=stdin, cwd=ROOT, check=False,
    )  # fmt: skip


def test_command_line(tmp_path: Path) -> None:
    recipe, script = tmp_path / "dpo.yaml", tmp_path / "run.sh"
    done = moetrain("import", f"{DPO} --beta 0.075 --made_up 3", "--out", str(recipe))
    assert (done.returncode, done.stdout) == (0, "")
    assert "moetrain: not carried: --made_up 3" in done.stderr
    assert load_recipe(recipe).method.model_dump()["beta"] == 0.075

    done = moetrain("export", str(recipe), "optim.lr=3e-5")
    assert done.returncode == 0
    assert "megatron rlhf \\\n    --rlhf_type dpo \\\n" in done.stdout
    assert "--lr 3e-05" in done.stdout

    script.write_text(done.stdout)
    for argv, stdin in ((["import", str(script)], ""), (["import", "-"], done.stdout)):
        again = moetrain(*argv, stdin=stdin)
        assert again.returncode == 0
        recipe.write_text(again.stdout)
        assert load_recipe(recipe).optim.lr == 3e-5

    missing = moetrain("import", "nothing.sh")
    assert missing.returncode == 2
    assert missing.stderr == (
        "moetrain: error: nothing.sh: No such file or directory. Give a script's path, or the "
        "command in quotes.\n"
    )
