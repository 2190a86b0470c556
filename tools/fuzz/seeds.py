"""What the fuzzer starts from: records in every form, recipes, overrides and commands that work."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}
SYSTEM = {"role": "system", "content": "You add."}
THOUGHT = ANSWER | {"reasoning_content": "2 and 2 make 4."}
ARGUMENTS = {"a": 2, "b": [2, None], "c": {"d": "e"}}
FUNCTION = {"name": "add", "arguments": ARGUMENTS}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}],
}
RESULT = {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"}
PROPERTIES = {"a": {"type": "integer", "default": None, "enum": [1, None]}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}

RECORDS: tuple[dict[str, Any], ...] = (
    {"messages": [SYSTEM, USER, ANSWER, USER, THOUGHT | {"weight": 0}, USER, ANSWER]},
    {"messages": [USER, CALL, RESULT, ANSWER], "tools": [TOOL], "source": "x"},
    {"messages": [USER, THOUGHT], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER]},
    {"messages": ['{"role": "user", "content": "hi"}', '{"role": "assistant", "content": "ho"}']},
    {"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]'},
    {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
        "system": "You greet.",
    },
    {"prompt": "hi", "completion": "ho", "answer": "ho"},
    {"prompt": [SYSTEM, USER], "completion": [ANSWER], "label": True},
    {"prompt": "hi", "completion": "ho", "label": 0},
    {"instruction": "Add.", "input": "2 2", "output": "4", "history": [["a", "b"]], "system": "s"},
    {"question": "2 + 2?", "answer": "4", "kto_tag": False},
    {"problem": "2 + 2?", "solution": "4", "tools": [TOOL]},
    {"prompt": "hi", "chosen": "ho", "rejected": "no", "margin": 0.5},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5"}]},
    {"chosen": [USER, ANSWER], "rejected": [USER, CALL], "tools": [TOOL]},
    {"messages": [USER, ANSWER], "rejected_response": "5"},
    {"messages": [USER, ANSWER], "rejected_messages": [USER, THOUGHT]},
    {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "ho"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    {"instruction": "Add.", "chosen": "4", "rejected": "5", "input": ""},
    {"text": "A document.\n\nIt has two parts."},
    {"tokens": [1, 2, 3]},
)

ANSWERS: dict[str, Any] = {
    "prompt": {"id": "a", "tokens": [1], "columns": {"prompt": [USER], "answer": "4"}},
    "answers": [
        {"text": text, "reward": reward, "parts": {"exact": reward}, "finish": "stop",
         "tokens": [1, 2], "logprobs": [-0.5, -1.0]}
        for text, reward in (("4", 1.0), ("5", 0.0), ("", None))
    ],
}  # fmt: skip

TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endif %}{{ m.content or '' }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content.strip() }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
)

OVERRIDES = (
    "optim.lr=2e-5",
    "data.train=[a.jsonl, b.jsonl]",
    "data.train=[builtin:checkable-sft, {path: x.jsonl, take: 10}]",
    "parallel={tp: 2, pp: 1, ep: 2}",
    "method=dpo",
    "method.name=grpo",
    "method.beta=0.1",
    "train.epochs=1.5",
    "train.steps=10",
    "adapter={rank: 8, targets: [q_proj, experts]}",
    "rollout={group_size: 8, max_tokens: 64, temperature: 0.6}",
    "rewards=[accuracy, ./mine.py:f]",
    "model.path=builtin:qwen3-moe-tiny",
    "model.hf={architectures: [Qwen3MoeForCausalLM], num_hidden_layers: 2}",
    "model.hf.num_experts=64",
    "megatron.moe_aux_loss_coeff=0.001",
    "cluster={nodes: 4, gpus_per_node: 8, time: 01:00:00}",
    "checkpoint.every=10",
    "observe.tensorboard=false",
    "run_dir=runs/x",
    "seed=1",
)

SWIFT = (
    "megatron sft --model /m --dataset d.jsonl --output_dir o --train_iters 100 --max_length 512"
    " --tensor_model_parallel_size 2 --expert_model_parallel_size 4 --lr 1e-5 --min_lr 1e-6"
    " --lr_warmup_fraction 0.05 --global_batch_size 16 --micro_batch_size 1 --packing true",
    "#!/bin/bash\nset -e\nexport CUDA_VISIBLE_DEVICES=0,1\nMODEL=${MODEL:-/models/Qwen3}\n"
    "NPROC_PER_NODE=8 \\\nmegatron rlhf \\\n    --rlhf_type dpo \\\n    --model $MODEL \\\n"
    "    --dataset 'a b.jsonl#500' \"$HOME/data.jsonl\" \\\n    --beta 0.1 --loss_scale all \\\n"
    "    --output_dir $(pwd)/out --num_train_epochs 1 --max_epochs 1 \\\n"
    "    --recompute_granularity full --recompute_num_layers $((1+1)) 2>&1 | tee log.txt\n",
    "PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' megatron pt --load m --dataset swift/x"
    " --split_dataset_ratio 0.01 --train_iters 10 --save o --optimizer adam --bf16 true"
    " --tuner_type lora --lora_rank 8 --lora_alpha 32 --target_modules all-linear",
    "megatron rlhf --rlhf_type grpo --model m --dataset d --num_generations 8 --temperature 0.9"
    " --reward_funcs accuracy format --max_completion_length 64 --use_vllm true"
    " --vllm_mode colocate --output_dir o --train_iters 5 --max_length 128 --sleep_level 1"
    " --offload_model true",
)


SAMPLES: dict[str, Any] = {
    "prompt": {"id": "a", "tokens": [1], "columns": {"prompt": [USER], "answer": "4"},
               "opened": "", "is_text": False, "source": "f"},
    "answers": [
        {"prompt_id": "a", "index": index, "text": text, "tokens": [1, 2], "finish": "stop",
         "logprobs": [-0.5, -1.0], "version": 0, "reward": 1.0, "parts": {"exact": 1.0},
         "routes": {"shape": [2, 1, 1], "int16": "AAABAA=="}}
        for index, text in enumerate(("4", "5", ""))
    ],
}  # fmt: skip

QUESTIONS: tuple[dict[str, Any], ...] = (
    {"question": "2 + 2?", "answer": "4", "level": 1, "choices": ["3", "4"]},
    {"problem": "2 + 2?", "solution": "It is \\\\boxed{4}.", "meta": {"a": [1, None]}},
    {"prompt": [SYSTEM, USER], "answer": 4, "tools": [TOOL]},
    {"completion": "4", "prompt": [USER], "completion_ids": [1, 2], "answer": "4"},
)

BENCHES = (
    "name: b\ndata: q.jsonl\nquestion: question\nanswer: answer\nscorer: accuracy\n",
    "name: b\ndata: q.jsonl\nquestion: problem\nanswer: solution\nsystem: Be brief.\n"
    "prompt: 'Solve {question}. {meta[a]} {solution!r}'\nscorer: {name: exact}\n"
    "samples: 2\npass_at: [1, 2]\nrollout: {eval_temperature: 0.7}\n",
    "data: q.jsonl\nanswer: answer\nprompt: '{question} {choices[0]} {{}}'\nlimit: 1\n"
    "scorer: {name: judge, url: http://127.0.0.1:1, model: m, prompt: '{question} {completion}'}\n"
    "scale: [0, 10]\n",
)

MANIFEST: dict[str, Any] = {"of": {"model": ["m", "m"]}, "answers": 3, "started": "2026-01-01"}

CASES: tuple[dict[str, Any], ...] = (
    {"tests": [{"input": "1", "output": "2"}, {"input": "3", "output": "4.0"}]},
    {"test_cases": '{"inputs": ["1"], "outputs": [["2", "3"]]}', "language": "python"},
    {"verification_info": {"language": "cpp", "test_cases": [{"input": "", "output": "1 2",
                                                              "type": "stdin_stdout"}]}},
    {"input_output": '{"inputs": ["1\\n"], "outputs": ["2\\n"], "fn_name": null}'},
)  # fmt: skip

PROGRAMS = (
    "So:\n```python\nprint(1)\n```\nDone.",
    "```\nx\n```\n  ```cpp\nint main() {}\n  ```\n````\n```python title=a\n",
    "<think>```python\n1\n```</think>",
)

RUN: dict[str, Any] = {
    "sweep.jsonl": [
        {"name": "a", "overrides": ["optim.lr=1e-5", "method.beta=0.1"], "command": ["python"]},
        {"name": "b", "overrides": ["optim.lr=2e-5"], "command": ["python"]},
    ],
    "a/ledger.jsonl": [
        {"step": i, "loss": 1.0 / i, "lr": 1e-5, "tokens": 10, "tokens_per_s": 5.0, "seconds": 2,
         "router/layer0/load_max_over_mean": 1.5, "rewards/margins": 0.1, "logps/chosen": -1.0,
         "reward/mean": 0.5, "groups/no_signal": i / 11, "groups/graded": 8, "groups/std": 0.2,
         "length/mean": 9.0, "kl": 0.1, "mismatch/kl": 0.2}
        for i in range(1, 12)
    ] + [{"step": 11, "eval_loss": 0.5, "warning": ["a fall"], "eval_seconds": 1.0,
          "eval_reward/mean": 0.4, "eval_reward/std": 0.5, "eval_reward/graded": 9,
          "eval_rewards/accuracies": 0.6, "eval_rewards/graded": 40}],
    "a/environment.json": {"num_steps": 11, "versions": {"torch": "2"}},
    "a/resolved.yaml": "optim: {lr: 1.0e-05, betas: [0.9, 0.95]}\nmethod: {name: sft}\nseed: 1\n",
    "a/checkpoints/best.json": {"name": "step_3", "metric": "eval_loss", "value": 0.5},
    "a/evals/b.json": {
        "name": "b", "scores": {"mean": {"score": 0.5, "interval": [0.4, 0.6], "n": 9}}
    },
    "a/evals/c.json": {"name": "c", "score": 1, "interval": [0, 1]},
    "a/starts.jsonl": [{"start": "fresh", "step": 0}, {"end": 1, "step": 2, "crash": "x"}],
    "a/train.log": "$ python -m moetrain train\nmoetrain: error: no\n",
}  # fmt: skip

INDEX: dict[str, Any] = {"num_documents": 10, "num_tokens": 90, "num_rejected": 0, "vocab": 600}


def recipes() -> list[Path]:
    """The examples."""
    found = sorted((ROOT / "examples").rglob("*.yaml"))
    return [path for path in found if "evals" not in path.parts]
