"""What a launch script may hold: the shell's own forms, files of arguments, and hostile text."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.load import load_recipe
from moetrain.errors import ConfigError
from moetrain.interop.swift import from_swift, survey
from moetrain.interop.swift.shell import Command, read_command

BASE = "megatron sft --model /m --dataset d.jsonl --output_dir o --train_iters 100 --max_length 512"


def flags(text: str, **more: Any) -> dict[str, tuple[str, ...]]:
    return dict(read_command(text, **more).flags)


@pytest.mark.parametrize(
    ("before", "flag", "value"),
    [
        ("", "$(pwd)/a.jsonl", "./a.jsonl"),
        ("", '"$PWD/a b.jsonl"', "./a b.jsonl"),
        ("", "`pwd`/a", "./a"),
        ("a=2; b=3", "$((a + b))", "5"),
        ("a=2; b=3", "$(( ($a + b) * 4 - 7 % 4 ))", "17"),
        ("", "$((-7 / 2))", "-3"),  # as C has it
        ("", "$((2 ** 10))", "1024"),
        ("n=8", '"$((1024 * n))"', "8192"),
        ("M=Qwen/Qwen3-8B", "out/${M##*/}", "out/Qwen3-8B"),
        ("M=Qwen/Qwen3-8B", "${M%%/*}", "Qwen"),
        ("M=a.b.sh", "${M%.*}", "a.b"),
        ("M=a.b.sh", "${M#*.}", "b.sh"),
        ("M=a/b", "${M/\\//-}", "a-b"),
        ("M=abc", "${M:1:1}${M^^}", "bABC"),
        ("M=Qwen/Qwen3-8B", '"$(basename $M)"', "Qwen3-8B"),
        ("M=/x/y.sh", '$(dirname "$M")', "/x"),
        ("", "${LR:-${OTHER:-1e-4}}", "1e-4"),
        ("B=here", "${A:-$B/x}", "here/x"),
        ("A=", "${A:-empty}${A-unset}", "empty"),
        ("", "${A:=x}$A", "xx"),
        ("A=1", "${A:+yes}${B:+no}", "yes"),
        ("A=x; A+=y", "$A", "xy"),
        ("L=(p q r)", "${L[1]}${#L[@]}", "q3"),
        ("for x in only; do", "$x", "only"),
        ("cat <<EOF > f\nit's $x\nEOF\nA=1", "$A", "1"),
        ("cat <<-'EOF'\n\tit's\n\tEOF\nA=1", "$A", "1"),
        ("export A=1 B=2", "$A$B", "12"),
        ("f() { local A=3; }", "3", "3"),
    ],
)
def test_a_value(before: str, flag: str, value: str) -> None:
    text = f"{before}\n{BASE} --x {flag}" if before else f"{BASE} --x {flag}"
    assert flags(text)["x"] == (value,)


def test_arrays_are_their_words() -> None:
    text = f"""
ARGS=(
    --lr 1e-5   # the rate
    --dataset 'a b.jsonl' c.jsonl
)
ARGS+=(--packing true)
EMPTY=()
{BASE} "${{ARGS[@]}}" ${{EMPTY[@]}} "$@"
"""
    found = flags(text)
    assert found["lr"] == ("1e-5",)
    assert found["dataset"] == ("a b.jsonl", "c.jsonl")
    assert found["packing"] == ("true",)


def test_a_value_of_several_lines() -> None:
    prompt = "First line.\n\nThe 'second'; $5 & more"
    text = f'PROMPT="First line.\n\nThe \'second\'; \\$5 & more"\n{BASE} --system "$PROMPT"'
    assert flags(text)["system"] == (prompt,)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (f"for lr in 1e-5 2e-5; do {BASE} --lr $lr; done", "lr is 1e-5, 2e-5: .*sweep"),
        (f"run() {{ {BASE} --lr $1; }}; run 1e-4", r"uses \$1"),
        (f"{BASE} --x $(date +%s)", r"\$\(date \+%s\)"),
        (f"{BASE} --x $(pwd | tr a b)", r"\$\(pwd \| tr a b\)"),
        (f"{BASE} --x $((n + 1))", r"n \+ 1"),
        (f"{BASE} --x $((1 / 0))", "1 / 0"),
        (f"{BASE} --x $((9 ** 99))", "9 "),
        (f"{BASE} --x ${{A[@]}}", r"\$\{A\[@\]\}"),
        (f"{BASE} --x $(unclosed", "not closed"),
        (f"A=(1 2\n{BASE}", "not closed"),
        (f"{BASE}\0", "NUL"),
        ("A=" + "x" * 1000 + ";A=$A$A" * 40 + f";{BASE}", "1,000,000 characters"),
        (BASE + ' --x "' + "$(echo " * 60 + ")" * 60 + '"', "expansions are nested"),
        (f"{BASE}\n{BASE} --lr 1\n{BASE}", "3 training commands.*--number"),
    ],
)
def test_what_the_text_does_not_say(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        read_command(text)
    assert "\n" not in str(caught.value)


def test_one_of_several() -> None:
    text = f"LR=1\n{BASE} --lr $LR\nLR=2\n{BASE} --lr $LR"
    assert [flags(text, number=n)["lr"] for n in (1, 2)] == [("1",), ("2",)]
    with pytest.raises(ConfigError, match="--number 3: the text has 2"):
        from_swift(text, number=3)


def test_a_loop_and_a_folder_are_said() -> None:
    text = f"cd examples/here\nwhile true; do\n  {BASE}\ndone\n"
    told = {note.what: note.why for note in from_swift(text).notes if note.kind == "changed"}
    assert "loop" in told and "cd examples/here" in told
    after = f"for i in 1 2; do echo $i; done\n{BASE}"
    assert not read_command(after).repeated


def test_a_file_of_arguments(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "sft.yaml").write_text(
        "ENV: {NNODES: 2}\nmodel: /m\ndataset: [a.jsonl, 'b.jsonl#5']\nlr: 1e-4\npacking: true\n"
        "output_dir: o\nnum_train_epochs: 1\n"
        "megatron_extra_kwargs: {moe_token_dispatcher_type: flex}\n"
    )
    script = tmp_path / "scripts" / "run.sh"
    script.parent.mkdir()
    script.write_text("NPROC_PER_NODE=4 megatron sft conf/sft.yaml --lr 2e-4\n")
    imported = from_swift(script.read_text(), script=script)
    content = imported.content
    assert content["data"]["train"] == ["a.jsonl", "b.jsonl"]
    assert content["data"]["take"] == [None, 5]
    assert content["optim"]["lr"] == 2e-4, "the command line goes before the file"
    assert content["cluster"] == {"gpus_per_node": 4, "nodes": 2}
    assert content["megatron"] == {"moe_token_dispatcher_type": "flex"}
    assert any(note.why == "was read" for note in imported.notes)
    with pytest.raises(ConfigError, match=r"conf/sft\.yaml: no such file"):
        from_swift(script.read_text())


def test_the_method_in_a_file_for_ray(tmp_path: Path) -> None:
    """`rlhf --config grpo.yaml` must not become dpo, which is rlhf's default."""
    (tmp_path / "grpo.yaml").write_text(
        "rlhf_type: grpo\nmodel: /m\ndataset: a.jsonl\nreward_funcs: [accuracy, format]\n"
        "max_length: 512\nnum_train_epochs: 1\nglobal_batch_size: 16\nbeta: 0\n"
        "train: {gpus: 4, output_dir: o, tensor_model_parallel_size: 2}\n"
        "rollout: {gpus: 4, vllm_tensor_parallel_size: 2}\n"
    )
    script = tmp_path / "run.sh"
    script.write_text(
        'DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"\n'
        'megatron rlhf --use_ray true --config "$DIR/grpo.yaml"\n'
    )
    content = from_swift(script.read_text(), script=script).content
    assert content["method"]["name"] == "grpo"
    assert content["rewards"] == ["accuracy", "format"]
    assert content["parallel"]["tp"] == 2
    assert content["rollout"]["tensor_parallel"] == 2
    assert content["cluster"] == {"gpus_per_node": 4, "nodes": 1}
    with pytest.raises(ConfigError, match=r"uses \$\(cd"):
        from_swift(script.read_text())
    for text, match in (("[1]", "a mapping"), ("a: [", "not readable")):
        (tmp_path / "grpo.yaml").write_text(text)
        with pytest.raises(ConfigError, match=match):
            from_swift(script.read_text(), script=script)


def test_a_system_message_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("You are terse.\nVery.")
    text = f"{BASE} --system prompt.txt"
    content = from_swift(text, script=tmp_path / "run.sh").content
    assert content["data"]["system"] == "You are terse.\nVery."
    with pytest.raises(ConfigError, match=r"prompt\.txt: no such file"):
        from_swift(text)


@pytest.mark.parametrize("break_", ["\n", "\r", "\x85", "\u2028", "\x1b[2J"])
def test_a_value_that_is_not_carried_writes_no_live_yaml(tmp_path: Path, break_: str) -> None:
    imported = from_swift(f"{BASE} --made_up 'x{break_}seed: 666'")
    assert "seed: 666" in imported.yaml()
    assert yaml.safe_load(imported.yaml())["seed"] == 42
    out = tmp_path / "r.yaml"
    out.write_text(imported.yaml(), encoding="utf-8")
    assert load_recipe(out).seed == 42
    assert all("\n" not in str(note) and "\x1b" not in str(note) for note in imported.notes)


WORDS = r"""
megatron sft rlhf pt export --lr --model 1e-4 $ ${ } $( ) $(( )) ` ' " \ ; && | A= A+= A=( $A
${A[@]} ${A:- ${A## ${#A} for x in do done while <<EOF EOF < > # * export local cd pwd echo
basename @ 0 9 ** / % { [ ] --config --dataset a.jsonl#3 --rlhf_type grpo --beta é --packing true
--system x.txt if then fi
"""
PIECES = [*WORDS.split(), "\n", " ", "\t", "\r\n", "\x00", "\ud800", "for x in"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40), st.booleans())
def test_no_text_ends_in_a_traceback(pieces: list[str], spaced: bool) -> None:
    text = (" " if spaced else "").join(pieces)
    for script in (text, f"{text}\n{BASE} {text}"):
        started = time.perf_counter()
        try:
            from_swift(script).yaml()
        except ConfigError as error:
            assert "\n" not in str(error)
        assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "text",
    [
        BASE + " --x " + "$A" * 20_000,
        BASE + " --x " + "${A:-" * 20_000,
        BASE + " --x " + "$((" * 20_000,
        BASE + " --x '" + "\n" * 200_000 + "'",
        "A=(" * 20_000 + BASE,
        "\n".join(["A=1"] * 20_000) + "\n" + BASE,
        "\n".join(f"A{i}=$A{i - 1}x" for i in range(2_000)) + "\n" + BASE,
        "A=" + "a" * 1000 + "\n" + "B=${A%%*a*a*a*a*a*a*a*a*b}\n" * 200 + BASE,
        "cat <<E\n" * 5_000 + BASE,
        "9" * 300_000 + "\n" + BASE,
        "A=(" + "x " * 20_000 + ")\n" + BASE + ' "${A[@]}"' * 200,
    ],
    ids=range(11),
)
def test_long_texts_take_no_time(text: str) -> None:
    started = time.process_time()
    try:
        from_swift(text)
    except ConfigError as error:
        assert len(str(error)) < 1000
    assert time.process_time() - started < 3


def test_a_command_is_what_it_was(tmp_path: Path) -> None:
    assert read_command("megatron sft --a 1") == Command("megatron", "sft", {"a": ("1",)})


def test_the_table_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text(f"{BASE} --lr_warmup_fraction 0.05 --lora_rank 3\n")
    (tmp_path / "b.sh").write_text(f"{BASE} --task_type embedding\n")
    (tmp_path / "c.md").write_text(
        f"Text.\n```shell\n{BASE}\n{BASE.replace('sft', 'rlhf')}\n```\n"
        "```python\nmegatron sft\n```\n```bash\nmegatron export --to_hf true\n```\n"
    )
    (tmp_path / "d.txt").write_text(BASE)
    found = survey([tmp_path])
    assert found.texts == 4
    assert found.commands == {"sft": 3, "rlhf": 1, "export": 1}
    assert found.imported == {"sft": 2, "dpo": 1} and found.whole == 3
    assert list(found.refused.values()) == [1] and "embeddings" in next(iter(found.refused))
    assert sum(found.not_carried.values()) == 1
    lines = found.text().splitlines()
    assert "| commands that train (sft, pt, rlhf) | 4 |" in lines
    assert "| refused, with the reason | 1 |" in lines
    with pytest.raises(ConfigError, match="no `megatron` command"):
        survey([tmp_path / "d.txt"])
    with pytest.raises(ConfigError, match="no such file or folder"):
        survey([tmp_path / "none"])
