#!/usr/bin/env bash
# TRL 1.16.0, its chat templates deepseekv3.jinja and deepseekv3_training.jinja (with jinja2 3.1.6).
#
# Input: a conversation in which the assistant calls a tool, gets the result, calls a tool again, gets
# the result and answers.
# Expected: every block of calls is opened by <|tool_calls_begin|> (in the template's own spelling) and
# closed by <|tool_calls_end|>, since that is what a parser of answers looks for.
# Seen: the second block is closed and never opened. A model that is trained with it learns to call a
# tool for the second time without the token that starts a call.
# moetrain meets it where records have calls in two turns: it rejects them (docs/data.md).
#
# Output seen:
#   deepseekv3.jinja: 2 calls, blocks opened 1, closed 2
#   deepseekv3_training.jinja: 2 calls, blocks opened 1, closed 2
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    trl==1.16.0 jinja2==3.1.6 MarkupSafe==3.0.3

"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def call(number):
    function = {"name": "f", "arguments": json.dumps({"n": number})}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": function}],
    }


def result(text):
    return {"role": "tool", "content": text}


MESSAGES = [
    {"role": "user", "content": "question"},
    call(1),
    result("one"),
    call(2),
    result("two"),
    {"role": "assistant", "content": "answer"},
]
# As transformers renders templates, with its own filter for JSON. Its generation tag only marks
# what is trained: an `if` here.
MARKS = {"endgeneration %}": "endif %}", "generation %}": "if true %}"}
env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
templates = Path(sys.prefix).glob("lib/python3*/site-packages/trl/chat_templates")
changed = False
for template in sorted(next(templates).glob("deepseekv3*.jinja")):
    source = template.read_text()
    for mark, plain in MARKS.items():
        source = source.replace(mark, plain)
    text = env.from_string(source).render(
        messages=MESSAGES, tools=None, add_generation_prompt=False, bos_token="", eos_token="</s>"
    )
    opened = text.count("<｜tool▁calls▁begin｜>")
    closed = text.count("<｜tool▁calls▁end｜>")
    print(f"{template.name}: 2 calls, blocks opened {opened}, closed {closed}")
    changed |= (opened, closed) != (1, 2)
sys.exit(changed)
PYTHON
