"""Broken folders of weights, and unfinished conversions, under `convert inspect`, `verify`,
`hf2mcore` and `mcore2hf` as the command line runs them.

Each is used or refused in a line. Nothing in them runs, nothing is written but the result, which is
there only where the conversion says so, and then holds what the source holds: what a manifest knows
is as it was.
"""

import contextlib
import functools
import io
import random
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damages
import unfinished
import wholes

SECRET = b"what lies outside of the folder"
# What CPython 3.12.1 says of a pickle that asks for a bytearray of 1 TB, before its MemoryError.
NOISE = "SystemError: deallocated bytearray object has exported buffers\n"
SIZES = dict(
    model_type="qwen3_moe", vocab_size=40, hidden_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, intermediate_size=24, num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=1, mlp_only_layers=[],
    norm_topk_prob=True, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=False,
    dtype="bfloat16", eos_token_id=3,
)  # fmt: skip
MXFP4 = dict(
    model_type="gpt_oss", vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, intermediate_size=64, num_local_experts=2,
    num_experts_per_tok=1, sliding_window=8, max_position_embeddings=64, rms_norm_eps=1e-5,
    tie_word_embeddings=False, dtype="bfloat16", eos_token_id=3,
    quantization_config={"quant_method": "mxfp4"},
)  # fmt: skip
SIDES = {
    "generation_config.json": {"eos_token_id": [3], "temperature": 0.7},
    "tokenizer_config.json": {"eos_token": "<e>", "tokenizer_class": "PreTrainedTokenizerFast"},
    "special_tokens_map.json": {"eos_token": "<e>"},
    "tokenizer.json": {"version": "1.0", "model": {"type": "WordLevel", "vocab": {}}},
}
TOKENIZER = {
    "tokenizer.json": {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"<e>": 3, "a": 4}, "unk_token": "<e>"},
    },
}  # fmt: skip
HF, MEGATRON = ("plain", "single", "sharded", "mxfp4"), ("mcore", "columns", "megatron-lm")


@dataclass(frozen=True)
class Place:
    """Whole folders by name, and where broken copies of them are converted."""

    folder: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def whole(self, name: str) -> Path:
        return self.folder / name

    def result(self, name: str) -> Path:
        """What a conversion makes of a whole folder."""
        return self.folder / f"of {name}"


def build(folder: Path) -> Place:
    """Make the whole folders."""
    from moetrain import cli
    from moetrain.weights import convert

    # The same few command lines thousands of times.
    parsed = functools.cache(lambda words, parse=cli.parse: parse(words, cli.COMMANDS))
    cli.parse = lambda words, commands: parsed(tuple(words))
    place = Place(folder)
    place.work.mkdir(parents=True)
    (folder / "secret").write_bytes(SECRET)
    wholes.plain_folder(place.whole("plain"), SIZES, SIDES)
    wholes.plain_folder(place.whole("mxfp4"), MXFP4, SIDES)
    with contextlib.redirect_stdout(io.StringIO()):
        convert.hf2mcore(place.whole("plain"), place.whole("mcore"))
        small = convert.Options(shard_bytes=6000)
        convert.mcore2hf(place.whole("mcore"), place.whole("single"))
        convert.mcore2hf(place.whole("mcore"), place.whole("sharded"), small)
        style = convert.Options(style="megatron-lm")
        convert.hf2mcore(place.whole("plain"), place.whole("megatron-lm"), style)
        wholes.cut_columns(place.whole("mcore"), place.whole("columns"))
        for name in HF:
            convert.hf2mcore(place.whole(name), place.result(name))
        for name in MEGATRON:
            convert.mcore2hf(place.whole(name), place.result(name))
    for name, sides in zip(wholes.ADAPTERS, ({}, SIDES | TOKENIZER), strict=True):
        wholes.peft_folder(place.whole(name), SIZES, sides)
    return place


def make(kind: str, rng: random.Random) -> tuple[str, int]:
    """What is broken, and the chance that breaks it."""
    return kind, rng.getrandbits(48)


def run(bench: Any, made: tuple[str, int]) -> str:
    """In each command that reads it."""
    place: Place = bench.conversions
    kind, seed = made
    rng = random.Random(seed)
    shutil.rmtree(place.work)
    place.work.mkdir()
    name = rng.choice(damages.KINDS[kind].folders)
    source = place.work / "in"
    shutil.copytree(place.whole(name), source)
    inner = source / "release" if name == "megatron-lm" else source
    what = damages.KINDS[kind].change(rng, inner)
    checked = damages.after(rng, inner, kind)
    told = f"{name}, {checked}: {what}"
    before = state(place.folder)
    inspected = command("inspect", source, *["--json"] * rng.randrange(2))
    assert inspected in (0, 2), told
    verified = command("verify", source, place.whole("plain"))
    assert verified in (0, 1, 2), told
    code = _converted(place, name, source, rng)
    assert state(place.folder) == before, f"{told}: something else was written"
    if code == 0:
        _check(place, name, source, checked, told)
    return "used" if code == 0 else "refused"


def _converted(place: Place, name: str, source: Path, rng: random.Random) -> int:
    """Its exit code; the result is there, or nothing of it."""
    out = place.work / "out"
    action = "hf2mcore" if name in HF else "mcore2hf"
    more: list[str] = []
    if name == "megatron-lm" and not (source / "release" / "moetrain.json").is_file():
        more = ["--hf", str(place.whole("plain"))]
    code = command(action, source, out, "--workers", str(rng.choice((1, 3))), *more)
    assert code in (0, 2), code
    left = sorted(path.name for path in place.work.iterdir())
    assert left == (["in", "out"] if code == 0 else ["in"]), left
    return code


def _check(place: Place, name: str, source: Path, checked: str, told: str) -> None:
    """That the result holds what the source holds."""
    out = place.work / "out"
    if checked == "damaged manifest":  # maybe of what a conversion has no use for
        assert wholes.weights(out) == wholes.weights(place.result(name)), told
        return
    assert command("verify", out, source, "--workers", "1") == 0, f"{told}: another result"
    wanted, found = (wholes.weights(p) for p in (place.result(name), out))
    if checked == "stale manifest":
        assert found == wanted, f"{told}: values that the manifest does not know"
    elif name in MEGATRON and set(found) == set(wanted):
        zeros = [file for file, content in found.items() if bytes(16) in content]
        assert not zeros, f"{told}: values that nobody wrote"
    for path in out.rglob("*"):
        assert not path.is_file() or SECRET not in path.read_bytes(), f"{told}: {path} is not its"


def run_journal(bench: Any, made: tuple[str, int]) -> str:
    """A conversion that was killed, whose folder is then damaged: it ends as if it had not been, or
    what it makes is seen to be damaged.
    """
    place: Place = bench.conversions
    rng = random.Random(made[1])
    name = rng.choice(("single", "mcore"))
    shutil.rmtree(place.work)
    place.work.mkdir()
    out, part = place.work / "out", place.work / ".out.part"
    action = "hf2mcore" if name == "single" else "mcore2hf"
    unfinished.kill(rng, action, place.whole(name), out)
    what = unfinished.change_part(rng, part, place.folder / "secret")
    before = state(place.folder)
    code = command(action, place.whole(name), out, "--resume")
    told = f"{name}, {what}"
    assert code in (0, 2) and state(place.folder) == before, f"{told}: {code}"
    assert out.exists() == (code == 0), told
    if code == 2:
        return "refused"
    assert not part.exists()
    wanted, found = (wholes.content(p) for p in (place.result(name), out))
    if wanted != found:
        assert what == "other bytes", f"{told}: another result"
        assert command("verify", out, place.whole("plain")) == 2, f"{told}: looks whole"
        return "damaged and seen"
    return "used"


def run_flip(bench: Any, made: tuple[str, int]) -> str:
    """One bit of one file of a folder with a manifest: `verify` names the file."""
    place: Place = bench.conversions
    rng = random.Random(made[1])
    shutil.rmtree(place.work)
    source = place.work / "in"
    shutil.copytree(place.whole(rng.choice(("single", "sharded", *MEGATRON))), source)
    inner = source / "release" if (source / "release").is_dir() else source
    paths = sorted(inner.iterdir())
    data = [one for one in paths if one.suffix in (".safetensors", ".distcp")]
    path = rng.choice(rng.choice((paths, data)))
    raw = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    pair = [source, place.whole("plain")]
    rng.shuffle(pair)
    code, said = _said("verify", *pair)
    assert code == 2 and str(path) in said, f"bit {bit} of {path}: {code} {said}"
    return f"refused in {path.suffix or path.name}"


def command(*words: object) -> int:
    return _said(*words)[0]


def _said(*words: object) -> tuple[int, str]:
    """A command's exit code, and what it says on stderr: one line that any terminal can show."""
    from moetrain import cli

    streams = [
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)
        for errors in ("strict", "backslashreplace")  # as Python has them
    ]
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams
    try:
        code = cli.main(["convert", *map(str, words)])
    finally:
        sys.stdout, sys.stderr = kept
    said = streams[1].buffer.getvalue().decode()  # type: ignore[attr-defined]
    said = said.removeprefix(NOISE)
    if code == 2:
        assert re.fullmatch(r"moetrain: error: [^\n]{20,}\n", said), said
    else:
        assert not re.sub(r"(verify|out): [^\n]*/s, [^\n]*\n", "", said), said  # its progress
    return code, said


def state(folder: Path) -> Mapping[str, tuple[int, int]]:
    """What there is beside results."""
    return dict(_files(folder))


def _files(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    for path in folder.rglob("*"):
        if path.name != "work" and not {"out", ".out.part"} & set(path.parts):
            stat = path.lstat()
            yield str(path), (stat.st_size, stat.st_mtime_ns)


# name -> (weight, make, run)
CONVERSIONS: dict[str, tuple[int, Any, Any]] = {
    **{name: (1, lambda rng, name=name: make(name, rng), run) for name in damages.KINDS},
    "journals": (1, lambda rng: make("journals", rng), run_journal),
    "flips": (1, lambda rng: make("flips", rng), run_flip),
}
