"""`moetrain data`: index a corpus, see what becomes of records, list the tasks of a taskset."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.commands.common import Arguments, Command, Parser, add_overrides, positive, share
from moetrain.errors import MoetrainError, plural

if TYPE_CHECKING:
    from moetrain.data.show import Shown, View

ROWS = (0, 10)  # shown on a terminal


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _index_arguments(actions.add_parser("index", help="text to a corpus for pretraining"))
    show = actions.add_parser("show", help="what a recipe's records become, and what is learned")
    show.add_argument("recipe", type=Path)
    show.add_argument(
        "--rows", type=rows, metavar="A:B", help="records A to B-1, from 0 (0:10; --json: all)"
    )
    show.add_argument("--json", action="store_true", help="one JSON object a text")
    of = show.add_mutually_exclusive_group()
    of.add_argument("--eval", action="store_true", help="the held-out records")
    of.add_argument("--demonstrations", action="store_true", help="those of data.demonstrations")
    add_overrides(show)
    tasks = actions.add_parser("tasks", help="the tasks of a recipe's taskset, as prompts")
    tasks.add_argument("recipe", type=Path)
    tasks.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL")
    tasks.add_argument("--num", type=positive, metavar="N", help="the first N (all)")
    add_overrides(tasks)


def _index_arguments(parser: Parser) -> None:
    parser.add_argument(
        "inputs", nargs="+", type=Path, help="text or JSONL files, or folders of them"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="tokenizer folder or builtin:NAME"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="PREFIX.bin and PREFIX.idx are written",
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="of a record's document (text)"
    )
    parser.add_argument(
        "--max-rejected",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="stop when more of the records are no documents (0.05)",
    )
    parser.add_argument(
        "--special-tokens",
        choices=("reject", "escape", "keep"),
        default="reject",
        help="a document with a control token such as <|endoftext|> in its text: reject it, escape"
        " the token (its letters), or keep it as that token (reject)",
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes (one for each core)"
    )


def rows(text: str) -> tuple[int, int | None]:
    """A:B as two numbers; either may be left out."""
    start, colon, stop = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (start, stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range A:B of whole numbers")
    return int(start or 0), int(stop) if stop else None


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    return {"index": _index, "show": _show, "tasks": _tasks}[args.action](args)


def _tasks(args: Arguments) -> int:
    from moetrain.config.load import load_recipe
    from moetrain.environments.tasksets import written

    recipe = load_recipe(args.recipe, args.overrides)
    print(f"{plural(written(recipe, args.out, args.num), 'task')} in {args.out}")
    return 0


def _index(args: Arguments) -> int:
    from moetrain.data.indexing import Options, index
    from moetrain.data.run_tokenizer import locate
    from moetrain.observe.progress import ByteDisplay

    options = Options(args.text_key, args.max_rejected, args.special_tokens, args.workers)
    display = ByteDisplay("index")
    try:
        stats = index(
            args.inputs,
            locate(args.tokenizer),
            args.out,
            options,
            report=display.advance,
            say=display.say,
        )
    finally:
        display.close()
    print(stats.summary(args.out))
    return 0


def _show(args: Arguments) -> int:
    from moetrain.config.load import load_recipe
    from moetrain.data.show import View

    recipe = load_recipe(args.recipe, args.overrides)
    view = View(recipe, held_out=args.eval, demonstrations=args.demonstrations)
    start, stop = args.rows or ((0, None) if args.json else ROWS)
    if stop is not None and stop <= start:
        raise MoetrainError(f"--rows {start}:{stop} has no record: give A:B with A < B.")
    shown = view.show(view.rows(start, stop))
    if args.json:
        for one in shown:
            print(json.dumps(one.to_json(), ensure_ascii=False))
        return 0
    _print(list(shown), view)
    return 0


def _print(shown: "list[Shown]", view: "View") -> None:
    """Texts with what is learned marked, and what is to be said of all of them."""
    from rich.console import Console
    from rich.text import Text

    from moetrain.data.rejects import noted

    console = Console(highlight=False, soft_wrap=True)
    colour = console.is_terminal and not console.no_color
    open_, close = ("", "") if colour else ("\u27e6", "\u27e7")
    legend = Text("learned", style="black on green") if colour else Text("\u27e6learned\u27e7")
    console.print(Text.assemble("Marked ", legend, " is what the model learns to say."))
    for one in shown:
        where = f"\n{one.file}:{one.line}"
        if one.reason is not None:
            console.print(Text(f"{where}  rejected: {one.reason}", style="red"))
            continue
        more = f"  {one.answer}" if one.answer else ""
        more += "  truncated" if one.truncated else ""
        counts = f"  {plural(one.tokens, 'token')}, {one.learned_tokens} learned"
        console.print(Text(where + more + counts, style="bold"))
        text, end = Text(), 0
        for start, stop in one.learned:
            text.append(one.text[end:start], style="dim")
            text.append(open_ + one.text[start:stop] + close, style="black on green")
            end = stop
        text.append(one.text[end:], style="dim")
        console.print(text)
    usable = sum(one.reason is None for one in shown)
    num_packs, fill = view.fill()
    line = f"\n{plural(usable, 'text')}, {plural(len(shown) - usable, 'record')} rejected"
    if num_packs:
        line += f"; {plural(num_packs, 'pack')} of {view.recipe.data.seq_len}, {fill:.1%} full"
    console.print(Text(line))
    for note in noted(view.chat.notes(), view.notes):
        console.print(Text(note, style="yellow"))
    if view.recipe.method.demonstrated:
        console.print(Text("What it learns of data.demonstrations: --demonstrations shows it."))


COMMAND = Command("see what is learned of records; index a corpus; list tasks", arguments, run)
