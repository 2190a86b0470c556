"""`moetrain report`: runs side by side, as a page, CSV and table."""

from pathlib import Path

from moetrain.commands.common import Arguments, Command, Parser


def arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or of runs")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="default: report.html in the RUN given"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default: beside the page")


def run(args: Arguments) -> int:
    """Run it; the exit code."""
    from moetrain.observe.report import write_report

    return write_report(args.runs, args.out, args.csv)


COMMAND = Command("runs side by side: page, CSV, table", arguments, run)
