"""Watch a training run or a meta-training run from its log: multipliers per group over progress, and the loss.

    python -m scripts.watch tiny/meta-s42               in the terminal, until the run is finished
    python -m scripts.watch tiny/meta-s42 --once        what there is now
    python -m scripts.watch /some/folder                any run's folder

Beside the log, multipliers.png shows the same and is rewritten whenever the log has grown. The run knows nothing of
it: only its log.jsonl is read.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jel.errors import JelError
from jel.watch import MARKS, add_arguments, run_command
from nanochat.common import base_dir, run_main

if TYPE_CHECKING:
    from rich.text import Text

COLORS = ("bright_red", "bright_blue", "green", "magenta", "yellow", "cyan", "white", "bright_black")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    args.run = str(folder_of(args.run))
    args.picture = args.picture or str(Path(args.run) / "multipliers.png")
    return run_command(args, printer())


def folder_of(run: str) -> Path:
    """A run's folder: by its tag, or as a path."""
    tagged = base_dir() / "runs" / run
    return tagged if tagged.is_dir() else Path(run)


def printer() -> Callable[[str], None]:
    """Prints a chart: in colours on a terminal where the package rich is installed, else plainly."""
    try:
        from rich.console import Console
    except ImportError:
        return print
    if not sys.stdout.isatty():
        return print
    console = Console()

    def show(text: str) -> None:
        clear, _, chart = text.rpartition("\033[H")
        print(clear and clear + "\033[H", end="", flush=True)
        console.print(coloured(chart))

    return show


def coloured(chart: str) -> Text:
    """The marks of a curve and its legend in one colour."""
    from rich.text import Text

    styled = Text(chart)
    for match in re.finditer(
        rf"^ *[-+.\w]+ \|(?P<row>.*)$|^ {{10}}(?P<legend>[{re.escape(MARKS)}]) \S.*$", chart, re.M
    ):
        if match["legend"]:
            styled.stylize(COLORS[MARKS.index(match["legend"])], match.start("legend"), match.end())
        for at in range(*match.span("row")):
            if chart[at] in MARKS:
                styled.stylize(COLORS[MARKS.index(chart[at])], at, at + 1)
    return styled


if __name__ == "__main__":
    run_main(main, JelError)
