"""The chat templates that people train with, each with a small tokenizer that knows its tokens.

Most are read from the installed TRL, which ships them as their models have them. The rest are made
here from what is public about them: the marks of turns, what is prefilled, what is left out.
"""

import functools
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from data_helpers import tokenizer_folder

from moetrain.data import tokenizer
from moetrain.data.chat import Chat

IM = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
DEEPSEEK = tuple(
    f"<\uff5c{name}\uff5c>".replace(" ", "\u2581")
    for name in (
        "begin of sentence",
        "end of sentence",
        "User",
        "Assistant",
        "tool calls begin",
        "tool calls end",
        "tool call begin",
        "tool call end",
        "tool outputs begin",
        "tool outputs end",
        "tool output begin",
        "tool output end",
        "tool sep",
    )
)
LLAMA = tuple(
    f"<|{name}|>"
    for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id")
)
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GPT_OSS = tuple(
    f"<|{name}|>" for name in ("start", "end", "message", "channel", "call", "return", "constrain")
)

# Qwen3-Thinking-2507 is Qwen3's template but for the prompt for an answer, which opens a thought.
QWEN3_PROMPT = """\
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
"""
OPENED = "    {{- '<think>\\n' }}\n"
# DeepSeek-V3.1: an answer to a user begins with </think>, which the prompt has, or <think> there;
# one to a tool's output has no mark of its own. `tools` are not rendered, arguments are texts, and
# only a content of none is left out before calls.
DEEPSEEK_V31 = """\
{{- bos_token }}
{%- set ns = namespace(user=false, tool=false) %}
{%- for m in messages if m.role == 'system' %}
{{- ('' if loop.first else '\\n\\n') + m.content }}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<\uff5cUser\uff5c>' + m.content }}{% set ns.user = true %}{% set ns.tool = false %}
{%- elif m.role == 'assistant' %}
{%- if ns.user %}{{- '<\uff5cAssistant\uff5c></think>' }}{% endif %}
{%- set ns.user = false %}
{%- if m.tool_calls is defined and m.tool_calls is not none %}
{%- for call in m.tool_calls %}
{%- if loop.first %}
{{- (m.content if m.content is not none else '') + '<\uff5ctool\u2581calls\u2581begin\uff5c>' }}
{%- endif %}
{{- '<\uff5ctool\u2581call\u2581begin\uff5c>' + call.function.name }}
{{- '<\uff5ctool\u2581sep\uff5c>' + call.function.arguments }}
{{- '<\uff5ctool\u2581call\u2581end\uff5c>' }}
{%- endfor %}
{{- '<\uff5ctool\u2581calls\u2581end\uff5c>' }}
{%- elif not ns.tool and '</think>' in m.content %}
{{- m.content.split('</think>', 1)[1] }}
{%- else %}{{- m.content }}{%- endif %}
{{- eos_token }}{% set ns.tool = false %}
{%- elif m.role == 'tool' %}{% set ns.user = false %}{% set ns.tool = true %}
{{- '<\uff5ctool\u2581output\u2581begin\uff5c>' + m.content }}
{{- '<\uff5ctool\u2581output\u2581end\uff5c>' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt and ns.user %}
{{- '<\uff5cAssistant\uff5c>' + ('<think>' if thinking is defined and thinking else '</think>') }}
{%- endif %}
"""
# Mixtral: no system, roles in turn, marks that are no tokens.
MIXTRAL = """\
{{- bos_token }}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('After the optional system message, roles must alternate') }}
{%- endif %}
{%- if m.role == 'user' %}{{- ' [INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}
{%- endfor %}
"""
CHATML = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@dataclass(frozen=True)
class Known:
    """A template: its text or its file in TRL, and the tokens of its tokenizer."""

    source: str
    tokens: tuple[str, ...]
    eos: str
    bos: str | None = None
    end: str | None = None  # of a turn; None: the end of the text
    stops: str | None = None  # what stops an answer, where no token ends a turn
    reasoning: bool = False  # has a place for a thought
    calls: bool = False
    tools: bool = True  # has a place for the tools on offer
    system: bool = True
    other: tuple[str, str] = ("", "")  # what of the file is different, and how

    @property
    def text(self) -> str:
        if not self.source.endswith(".jinja"):
            return self.source
        files = {file.name: file for file in metadata.files("trl") or ()}
        text = Path(str(files[self.source].locate())).read_text(encoding="utf-8")
        assert self.other[0] in text
        return text.replace(*self.other) if self.other[0] else text


QWEN: dict[str, Any] = dict(tokens=(*IM, *THINK), eos="<|im_end|>", calls=True)
KNOWN: dict[str, Known] = {
    "qwen3-thinking-2507": Known(
        "qwen3.jinja", **QWEN, reasoning=True, other=(QWEN3_PROMPT, OPENED)
    ),
    "qwen3-instruct-2507": Known("qwen3_instruct_2507.jinja", **QWEN),
    "qwen3": Known("qwen3.jinja", **QWEN, reasoning=True),
    "qwen2.5": Known("qwen2_5.jinja", **QWEN),
    "llama-3.1": Known("llama3_1.jinja", LLAMA, "<|eot_id|>", "<|begin_of_text|>", calls=True),
    "llama-3.3": Known("llama3_2.jinja", LLAMA, "<|eot_id|>", "<|begin_of_text|>", calls=True),
    "r1-distill": Known("deepseek_r1_distill.jinja", (*DEEPSEEK, *THINK), DEEPSEEK[1], DEEPSEEK[0]),
    "deepseek-v3": Known(
        "deepseekv3.jinja", DEEPSEEK, DEEPSEEK[1], DEEPSEEK[0], calls=True, tools=False
    ),
    "deepseek-v3.1": Known(
        DEEPSEEK_V31, (*DEEPSEEK, *THINK), DEEPSEEK[1], DEEPSEEK[0], calls=True, tools=False
    ),
    "glm-4.5": Known(
        "glm4moe.jinja",
        (*GLM, *THINK, "<tool_call>", "</tool_call>"),
        "<|endoftext|>",
        end="",
        stops="<|user|>",
        reasoning=True,
        calls=True,
    ),
    "gpt-oss": Known(
        "gptoss.jinja", GPT_OSS, "<|return|>", "<|startoftext|>", reasoning=True, calls=True
    ),
    "mixtral": Known(MIXTRAL, (), "</s>", "<s>", system=False),
    "chatml-base": Known(CHATML, IM, "<|endoftext|>", end="<|im_end|>"),
}


@functools.cache
def folder(name: str) -> Path:
    """A tokenizer's folder with this template."""
    known = KNOWN[name]
    made: Any = tokenizer.load(tokenizer_folder())
    made.add_tokens([t for t in known.tokens if t not in made.get_vocab()], special_tokens=True)
    made.add_special_tokens({"eos_token": known.eos, "bos_token": known.bos or known.eos})
    if known.bos is None:
        made.bos_token = None
    made.chat_template = known.text
    path = Path(tempfile.mkdtemp()) / name
    made.save_pretrained(str(path))
    return path


@functools.cache
def chat_of(name: str) -> Chat:
    """The template with its tokenizer."""
    return Chat(tokenizer.load(folder(name)))


def end_of(name: str) -> str:
    """What ends a turn of an answer."""
    known = KNOWN[name]
    return known.eos if known.end is None else known.end
