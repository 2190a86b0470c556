"""What "builtin:NAME" stands for.

Small assets made on this machine from what every Python has, built once and cached.
"""

import ast
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

from moetrain import manifest
from moetrain.data import checkable, indexing, products, tokenizer, tokenizer_training
from moetrain.data.cache import build_once, cache_root, key_of
from moetrain.errors import DataError, nearest

# Raise it when an asset's content changes; old ones then stay unused in the cache.
VERSION = 4
MODELS_VERSION = 5
VOCAB = 2048
CORPUS_BYTES = 5_000_000  # tokenised in some seconds
EVAL_EVERY = 20  # one module in so many is held out
# Not the library's text: other people's packages, tests, tables of numbers.
SKIPPED = (
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "encodings",
    "__pycache__",
    "lib-dynload",
)
MIN_DOCSTRING = 200  # bytes


def resolve(name: str | Path, root: Path | None = None) -> Path:
    """The path of "builtin:NAME", built when needed; another path is returned as it is.

    A corpus' path is its index prefix.

    DataError for an unknown name.
    """
    if not str(name).startswith("builtin:"):
        return Path(name).expanduser()
    short = str(name).removeprefix("builtin:")
    if short in ASSETS:
        return ASSETS[short](cache_root(root))
    from moetrain.config import builtin

    if short in builtin.MODELS:
        return _model(short, builtin.MODELS[short], cache_root(root))
    known = [*ASSETS, *builtin.MODELS]
    raise DataError(
        f"There is no builtin:{short}; there are {', '.join(known)}.{nearest(short, known)}"
    )


def is_builtin(name: str | Path | None) -> bool:
    """Whether `resolve` would build something."""
    return name is not None and str(name).startswith("builtin:")


def _folder(name: str, root: Path) -> Path:
    """Where an asset lies: the standard library's text differs from one Python to the next."""
    return root / "builtin" / f"{name}-py{platform.python_version()}-v{VERSION}"


def _modules() -> list[Path]:
    """The library's modules, packages mixed, in always the same order, up to CORPUS_BYTES."""
    library = Path(os.__file__).parent
    paths = [
        path
        for path in library.rglob("*.py")
        if not set(path.relative_to(library).parts) & set(SKIPPED) and path.stat().st_size > 500
    ]
    paths.sort(key=lambda path: key_of(str(path.relative_to(library))))
    total, kept = 0, list[Path]()
    for path in paths:
        total += path.stat().st_size
        if total > CORPUS_BYTES:
            break
        kept.append(path)
    if not kept:
        raise DataError(
            f"The Python library at {library} has no source files: bring a corpus of your own."
        )
    return kept


def texts(*, held_out: bool) -> Iterator[str]:
    """Sources of the modules and, after each, its docstrings as a text of their own.

    A module is on one side only.
    """
    for i, path in enumerate(_modules()):
        if (i % EVAL_EVERY == 0) != held_out:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if not source.strip():
            continue
        yield source
        prose = _docstrings(source)
        if len(prose) >= MIN_DOCSTRING:
            yield prose


def _docstrings(source: str) -> str:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, nodes) and (text := ast.get_docstring(node)):
            texts.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
    return "\n\n".join(texts)


def _tokenizer(root: Path) -> Path:
    return build_once(
        _folder("stdlib-tokenizer", root),
        lambda tmp: tokenizer_training.fit(_tokenizer_texts(), VOCAB).save_pretrained(str(tmp)),
    )


def _tokenizer_texts() -> Iterator[str]:
    """The corpus, and the instruction data so that its few words are not spelt letter by letter."""
    yield from texts(held_out=False)
    yield from (json.dumps(record) for record in checkable.records(500, seed=0))


def _corpus(root: Path, name: str, *, held_out: bool) -> Path:
    def build(tmp: Path) -> None:
        lines = (json.dumps({"text": text}) + "\n" for text in texts(held_out=held_out))
        source = tmp / "corpus.jsonl"
        source.write_text("".join(lines))
        indexing.index([source], _tokenizer(root), tmp / "corpus")
        source.unlink()

    return build_once(_folder(name, root), build) / "corpus"


def _records(root: Path, name: str, make: Callable[[], list[dict[str, object]]]) -> Path:
    def build(tmp: Path) -> None:
        (tmp / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in make()))

    return build_once(_folder(name, root), build) / f"{name}.jsonl"


def _held_out_questions() -> list[dict[str, object]]:
    return checkable.held_out(200, seed=2)


def _questions_to_learn() -> list[dict[str, object]]:
    return checkable.records(50000, seed=1, avoid=checkable.questions(_held_out_questions()))


def _held_out_pairs() -> list[dict[str, object]]:
    return checkable.held_out_pairs(200, seed=2)


def _held_out_prompts() -> list[dict[str, object]]:
    return checkable.prompts(64, seed=8)


def _first_answers() -> list[dict[str, object]]:
    avoid = frozenset(str(record["prompt"]) for record in _held_out_prompts())
    return checkable.starts(4000, seed=4, avoid=avoid)


def _prompts_to_try() -> list[dict[str, object]]:
    avoid = frozenset(str(record["prompt"]) for record in _held_out_prompts())
    return checkable.prompts(1000, seed=7, avoid=avoid)


def _pairs_to_learn() -> list[dict[str, object]]:
    return checkable.pairs(10000, seed=3, avoid=checkable.questions(_held_out_pairs()))


def _held_out_products() -> list[dict[str, object]]:
    return products.prompts(products.pairs(64, seed=9))


def _products_to_try() -> list[dict[str, object]]:
    return products.prompts(products.pairs(1000, 10, avoid=frozenset(products.pairs(64, 9))))


def _worked_products() -> list[dict[str, object]]:
    return products.worked(products.pairs(4000, 11, avoid=frozenset(products.pairs(64, 9))))


def _model(name: str, hf: dict[str, object], root: Path) -> Path:
    """A Hugging Face folder with random weights of this configuration and the stdlib tokenizer."""

    def build(tmp: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        loaded = tokenizer.load(_tokenizer(root))
        tokenizer.check_vocab(
            tokenizer.vocab_of(loaded), int(str(hf["vocab_size"])), "builtin:stdlib-tokenizer"
        )
        settings = {
            key: value for key, value in hf.items() if key not in ("model_type", "architectures")
        }
        config = AutoConfig.for_model(str(hf["model_type"]), **settings)
        config.eos_token_id, config.pad_token_id = loaded.eos_token_id, loaded.pad_token_id
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.generation_config.eos_token_id = loaded.eos_token_id
        model.generation_config.pad_token_id = loaded.pad_token_id
        logging.disable_progress_bar()
        model.save_pretrained(str(tmp))
        logging.enable_progress_bar()
        loaded.save_pretrained(str(tmp))
        # As published models have it: transformers 5 writes its own names (num_local_experts).
        ends = {"eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id}
        (tmp / "config.json").write_text(json.dumps({**hf, **ends}, indent=2) + "\n")
        manifest.write(tmp, manifest.entries(sorted(tmp.iterdir())))

    key = key_of([hf, MODELS_VERSION, platform.python_version()])[:8]
    return build_once(root / "builtin" / f"{name}-{key}", build)


ASSETS: dict[str, Callable[[Path], Path]] = {
    "stdlib-tokenizer": _tokenizer,
    "stdlib-corpus": lambda root: _corpus(root, "stdlib-corpus", held_out=False),
    "stdlib-corpus-eval": lambda root: _corpus(root, "stdlib-corpus-eval", held_out=True),
    "checkable-sft": lambda root: _records(root, "checkable-sft", _questions_to_learn),
    "checkable-sft-eval": lambda root: _records(root, "checkable-sft-eval", _held_out_questions),
    "checkable-pairs": lambda root: _records(root, "checkable-pairs", _pairs_to_learn),
    "checkable-pairs-eval": lambda root: _records(root, "checkable-pairs-eval", _held_out_pairs),
    "checkable-starts": lambda root: _records(root, "checkable-starts", _first_answers),
    "checkable-prompts": lambda root: _records(root, "checkable-prompts", _prompts_to_try),
    "checkable-prompts-eval": lambda root: _records(
        root, "checkable-prompts-eval", _held_out_prompts
    ),
    "checkable-labels": lambda root: _records(
        root, "checkable-labels", lambda: checkable.labels(_pairs_to_learn(), seed=5)
    ),
    "checkable-labels-eval": lambda root: _records(
        root, "checkable-labels-eval", lambda: checkable.labels(_held_out_pairs(), seed=6)
    ),
    "products": lambda root: _records(root, "products", _products_to_try),
    "products-eval": lambda root: _records(root, "products-eval", _held_out_products),
    "products-worked": lambda root: _records(root, "products-worked", _worked_products),
}
