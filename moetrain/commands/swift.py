"""`moetrain swift`: its arguments, and what it does."""

import sys
from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser, positive
from moetrain.errors import MoetrainError


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    line = "the recipe of a `megatron sft|pt|rlhf` command"
    action_parser = actions.add_parser("import", help=line, description=line)
    action_parser.add_argument(
        "command_text",
        nargs="+",
        metavar="COMMAND",
        help="its text, or a script; - for stdin; with --table folders of scripts",
    )
    action_parser.add_argument(
        "--number", type=positive, metavar="N", help="which of several commands of a script"
    )
    action_parser.add_argument(
        "--table", action="store_true", help="count what would come of all commands; write nothing"
    )
    action_parser.add_argument("--out", type=Path, metavar="FILE", help="default: stdout")
    action_parser.add_argument(
        "--steps", type=positive, metavar="N", help="of the run, to give a warm-up in steps"
    )
    line = "the `megatron` command of a recipe"
    action_parser = actions.add_parser("export", help=line, description=line)
    action_parser.add_argument("recipe", type=Path)
    action_parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.interop import swift

    if args.action == "export":
        from moetrain.config.load import load_recipe

        recipe = load_recipe(args.recipe, args.overrides)
        exported = swift.to_swift(recipe.model_dump(mode="json"))
        text, notes = exported.text, exported.notes
    else:
        if args.table:
            print(swift.survey([Path(given) for given in args.command_text]).text(), end="")
            return 0
        if len(args.command_text) > 1:
            raise MoetrainError("swift import: give one script, or one command in quotes.")
        text, script = swift.command_text(args.command_text[0])
        imported = swift.from_swift(text, args.steps, script, args.number)
        text, notes = imported.yaml(), imported.notes
    for note in notes:
        print("moetrain:", note, file=sys.stderr)
    if args.action == "import" and args.out is not None:
        swift.write_text(args.out, text)
    else:
        print(text, end="")
    return 0


COMMAND = Command("recipes from and to ms-swift's commands", arguments, run)
