"""The folder that a run writes, and what it reads: model, tokenizer, data."""

import os
import shutil
import time
import uuid
from pathlib import Path

from moetrain.cluster.doctor.base import GIB, Finding, Subject, fail, ok, skip, warn, worst
from moetrain.errors import plural
from moetrain.layout.memory import checkpoint_bytes
from moetrain.models.lookup import HF, NOTE, config_of
from moetrain.run.inputs import missing

PROBE_BYTES = 16 * 2**20
SEEN_SECONDS = 10.0  # for the other nodes to see a file: NFS caches folders for some seconds
SLOW_MB_S = 50.0
FILES_LEFT = 100_000

SHARED_REMEDY = "put run_dir on a file system that all nodes mount, and bind it into the image"


def shared(subject: Subject) -> Finding:
    """Write, fsync, rename and read back beside run_dir, from the first rank; every node looks."""
    ranks = subject.ranks
    first = ranks is None or ranks.rank == 0
    folder = _existing(subject.recipe.run_dir)
    probe = folder / f".moetrain-doctor-{uuid.uuid4().hex[:12]}"
    if ranks is not None:
        probe = ranks.gather(probe)[0]
    finding = _write(probe) if first else ok("")
    try:
        if ranks is None:
            return finding
        first_level = ranks.gather((finding.level, probe.name))[0]
        blind = ranks.gather(None if _sees(probe) else ranks.nodes[ranks.rank])
        if first_level[0] == finding.level.FAIL or not first:
            return finding
        missing = sorted({node for node in blind if node is not None})
        if missing:
            return fail(f"{folder} of {ranks.nodes[0]} is not seen on {', '.join(missing)}",
                        SHARED_REMEDY)  # fmt: skip
        nodes = len(ranks.leaders)
        return Finding(finding.level, f"{finding.text}, seen by {nodes} nodes", finding.remedy)
    finally:
        if first:
            shutil.rmtree(probe, ignore_errors=True)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _write(probe: Path) -> Finding:
    """What happened to a file that was written, flushed, renamed over another and read back."""
    content = os.urandom(PROBE_BYTES)
    part, final = probe / "part", probe / "final"
    try:
        probe.mkdir()
        final.write_bytes(b"old")
        started = time.perf_counter()
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, final)
        seconds = time.perf_counter() - started
        same = final.read_bytes() == content
        skew = final.stat().st_mtime - time.time()
    except OSError as error:
        return fail(
            f"{error.filename or probe.parent} cannot be written: {error.strerror}",
            "give run_dir a folder that this user may write, with room",
        )
    if not same:
        return fail(f"{probe.parent} gives back other bytes than were written", SHARED_REMEDY)
    speed = PROBE_BYTES / 1e6 / seconds
    message = (
        f"{probe.parent}: {PROBE_BYTES >> 20} MiB written, flushed, renamed at {speed:.0f} MB/s"
    )
    if abs(skew) > 5:
        return warn(
            f"{message}; its clock is {skew:.0f} s from this node's",
            "let the file server and the nodes follow one time server",
        )
    if speed < SLOW_MB_S:
        return warn(message, "put run_dir on the parallel file system, not on a home folder")
    return ok(message)


def _sees(probe: Path) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < end:
        try:
            os.listdir(probe.parent)  # makes NFS look again
            if (probe / "final").stat().st_size == PROBE_BYTES:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def space(subject: Subject) -> Finding:
    """Whether the checkpoints that the recipe keeps have room where run_dir is."""
    plan = subject.plan
    assert plan is not None
    recipe, table = plan.recipe, plan.model.table
    folder = _existing(recipe.run_dir)
    usage, inodes = shutil.disk_usage(folder), os.statvfs(folder)
    one = checkpoint_bytes(table, recipe, plan.learns)
    # One is always being written beside those that stay.
    count = recipe.checkpoint.keep + 1 + (recipe.checkpoint.best is not None)
    sizes = f"{plural(count, 'checkpoint')} of {one / GIB:.2f} GiB"
    message = f"{usage.free / GIB:.1f} GiB free for {sizes} in {folder}"
    remedy = "make room, set checkpoint.keep lower, or checkpoint.save_optimizer=false"
    if usage.free < 2 * one:
        return fail(message, remedy)
    if usage.free < count * one:
        return warn(message, remedy)
    if inodes.f_files and inodes.f_favail < FILES_LEFT:
        return warn(f"{inodes.f_favail} files may still be made in {folder}", "remove old files")
    return ok(message)


def inputs(subject: Subject) -> Finding:
    """All folders and files that the recipe names are on this node: references, adapters, data."""
    problems = list(missing(subject.recipe))
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return fail(f"{problems[0]}{more}", "") if problems else ok("all that it names is there")


def model(subject: Subject) -> Finding:
    """The model's folder holds one set of weights, every tensor of it as config.json says."""
    from moetrain.weights.dequantised import open_weights
    from moetrain.weights.folder import weight_files
    from moetrain.weights.transport import check_names

    path = subject.recipe.model.path
    if path is None or path.startswith("builtin:"):
        return ok(f"{path or 'from scratch'}: nothing to be read")
    folder = Path(path)
    if not (folder / NOTE).is_file() and not (folder / HF).is_file():
        return fail(
            f"model.path={path} has no {HF} and no {NOTE}",
            "set model.path to where it is; bind that folder into the image",
        )
    _, is_megatron = config_of(folder)
    if is_megatron or subject.recipe.model.init == "random":
        return ok(f"{path}: {NOTE if is_megatron else HF}")
    assert subject.plan is not None
    files = list(weight_files(folder))
    gone = [file.name for file in files if not os.access(file, os.R_OK)]
    if gone:
        return fail(
            f"{path}: {len(gone)} of {len(files)} weight files may not be read, first {gone[0]}",
            "give this user the right to read them",
        )
    model = subject.plan.model
    reader = open_weights(folder, model)
    held, table = set(reader.names()), model.table
    made = {name for name in model.heads.added if not held & set(table[name].hf)}
    check_names((), {n: rule for n, rule in table.items() if n not in made}, reader, model)
    size = sum(file.stat().st_size for file in files)
    return ok(f"{path}: {plural(len(files), 'file')} of weights, {size / GIB:.1f} GiB")


def tokenizer(subject: Subject) -> Finding:
    """The tokenizer loads, fits the model, and its template marks what is to be learned."""
    from moetrain.data import tokenizer as tokenizers
    from moetrain.data.chat import ChatOptions
    from moetrain.data.formats import to_conversation
    from moetrain.data.run_tokenizer import model_vocab, tokenizer_of

    recipe = subject.recipe
    corpus = recipe.method.learns_from == "corpus"
    if corpus and recipe.model.tokenizer is None and recipe.model.hf is not None:
        return skip("an indexed corpus needs none")
    loaded = tokenizers.load(tokenizer_of(recipe))
    num_tokens = tokenizers.vocab_of(loaded)
    tokenizers.check_vocab(num_tokens, model_vocab(recipe), f"The tokenizer {loaded.name_or_path}")
    tokenizers.end_of_document(loaded)
    if corpus:
        return ok(f"{num_tokens} tokens")
    chat = ChatOptions.of(recipe.data).open(tokenizer_of(recipe))
    talk = {"messages": [{"role": "user", "content": "2 + 2"},
                         {"role": "assistant", "content": "It is 4."}]}  # fmt: skip
    marked = chat.mark(to_conversation(talk))
    learned = "".join(text for m in marked for text in m.learned)
    if "It is 4." not in learned or "2 + 2" in learned:
        return fail(
            f"the chat template marks {learned!r} of an answer 'It is 4.'",
            "give data.chat_template one that marks assistant turns with {% generation %}",
        )
    if notes := chat.notes():
        return warn(notes[0], "docs/data.md says what follows from it")
    return ok(f"{num_tokens} tokens, chat template marks answers")


def data(subject: Subject) -> Finding:
    """Every path of data.train, data.eval and data.demonstrations opens, and a sample of its
    records can be learned from.
    """
    from moetrain.data.preview import lengths, previews

    recipe = subject.recipe
    given = [*recipe.data.train, *recipe.data.eval]
    paths, shown = (
        [path for path in some if not path.startswith("builtin:")]
        for some in (given, recipe.data.demonstrations)
    )
    if not paths and not shown:
        return ok(f"{', '.join(given)}: made here")
    if recipe.method.learns_from == "corpus":
        return _corpora(paths)
    previewed = previews(recipe)
    bad = [reject for one in previewed for reject in one.rejects]
    num = sum(one.num_seen for one in previewed)
    usable = f"{num - len(bad)} of {plural(num, 'record')} looked at"
    message = f"{usable} in {plural(len(paths) + len(shown), 'path')} can be used"
    if not bad:
        return ok("; ".join([message, *lengths(recipe, previewed)]))
    verdict = fail if len(bad) / num > recipe.data.max_rejected else warn
    return verdict(
        f"{message}; {bad[0].file}:{bad[0].line}: {bad[0].reason}",
        f"mend the records, or set data.max_rejected (now {recipe.data.max_rejected})",
    )


def _corpora(paths: list[str]) -> Finding:
    findings: list[Finding] = []
    total = 0
    for path in paths:
        prefix = path.removesuffix(".bin").removesuffix(".idx")
        for suffix in (".idx", ".bin"):
            file = Path(prefix + suffix)
            if not os.access(file, os.R_OK):
                findings.append(
                    fail(
                        f"{file} is not there, or not for this user to read",
                        f"moetrain data index INPUT --tokenizer FOLDER --out {prefix}",
                    )
                )
                continue
            total += file.stat().st_size
    return worst(findings, f"{len(paths)} indexed corpora, {total / GIB:.2f} GiB")
