#!/usr/bin/env bash
# DeepSeek-R1-Distill's chat template (as TRL 1.16.0 ships it, rendered by transformers 5.19.0): the end of the calls and of the turn is
# written only after a second call, so a turn with ONE tool call has no end; and calls beside a content are not rendered at all.
# Expected: a turn of one call ends as one of two calls does; calls beside a content are rendered, or refused.
# Seen:
#   one call ends with the end of sentence: False
#   two calls end with the end of sentence: True
#   a call beside a content is rendered: False
# A trainer that masks by turns learns no end of such a turn, and nothing of the second kind; both are silent.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 jinja2==3.1.6
"$work/env/bin/pip" install --quiet --disable-pip-version-check --no-deps trl==1.16.0
"$work/env/bin/python" - <<'PY'
from importlib.metadata import files, version

from transformers.utils.chat_template_utils import render_jinja_template

print("versions: trl", version("trl"), "transformers", version("transformers"))
(template,) = [f.locate() for f in files("trl") if f.name == "deepseek_r1_distill.jinja"]
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"


def turn(content, calls):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "q"},
                {"role": "assistant", "content": content, "tool_calls": [call] * calls}]
    (text,), _ = render_jinja_template(
        conversations=[messages], chat_template=template.read_text(encoding="utf-8"), bos_token="", eos_token=END
    )
    return text


seen = {
    "one call ends with the end of sentence": turn(None, 1).endswith(END),
    "two calls end with the end of sentence": turn(None, 2).endswith(END),
    "a call beside a content is rendered": "add" in turn("Let me see.", 1),
}
for what, result in seen.items():
    print(f"{what}: {result}")
assert list(seen.values()) == [False, True, False], "this has changed"
PY
