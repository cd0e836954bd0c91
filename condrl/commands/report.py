"""Write a page of a run, or of several beside each other: one HTML file to open, to keep and to mail.

    condrl report runs/quickstart               writes runs/quickstart/report.html
    condrl report runs/a runs/b                 writes comparison.html: their numbers and pictures beside each other
    condrl report runs/a runs/b --out ab.html   the same, elsewhere

A run's page can be written while it goes. The file needs nothing else, and nothing is fetched when it is opened.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from condrl.commands.arguments import parser_of
from condrl.commands.console import exit_code
from condrl.errors import UsageError, visible
from condrl.io.files import check_folder

SEVERAL = "comparison.html"


def parse(words: list[str]) -> argparse.Namespace:
    parser = parser_of("report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    where = f"by default report.html in the run's folder; of several runs {SEVERAL} in this one"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Exit code: 0, 1 when the page cannot be written, 2 for bad input."""
    return exit_code(lambda: report(parse(words)))


def report(args: argparse.Namespace) -> None:
    from condrl.report.page import write_report
    from condrl.report.run import read_run

    runs = [read_run(folder) for folder in {folder.resolve(): folder for folder in args.runs}.values()]
    path = args.out or (own_page(args.runs[0]) if len(runs) == 1 else Path(SEVERAL))
    check_out(path)
    write_report(runs, path)
    print(visible(f"wrote {path}"))


def own_page(run: Path) -> Path:
    """The page in a run's own folder, which is on its list from now on."""
    from condrl.training.folder import RunFolder

    return RunFolder(run).file("report.html")


def check_out(path: Path) -> None:
    """Raises: UsageError when something else is there."""
    from condrl.report.page import OPENING

    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the name of a file with --out")
    if path.is_file() and path.read_text("utf-8", errors="replace")[: len(OPENING)] != OPENING:
        raise UsageError(f"{path} is not a page that condrl wrote: choose another name with --out")
    check_folder(path.parent)
