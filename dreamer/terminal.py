"""Printing for people, by rich, with text exactly as it is.

By default rich takes [words in brackets] for markup and :names: for emoji, and breaks lines at the edge of the screen.
Paths, tasks and messages of other programs contain all of these, so everything is printed by this console and these
tables. Styles come from `Text("stopped:", "bold red")`.
"""

from __future__ import annotations

from typing import Any

import rich.console
import rich.table
from rich.text import Text


class Console(rich.console.Console):
    """Prints text as it is, in whole lines: a path or a command can be copied from any screen."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """soft_wrap: whether lines stay whole; None: text lines do, while tables and panels fit the screen."""
        if soft_wrap is None:
            soft_wrap = all(isinstance(part, str | Text) for part in objects)
        super().print(*objects, soft_wrap=soft_wrap, **options)


def can_redraw(console: rich.console.Console) -> bool:
    """Whether it is a terminal on which lines can be redrawn."""
    return console.is_terminal and not console.is_dumb_terminal


class Table(rich.table.Table):
    """A table whose texts stay exactly as they are on any rich console."""

    def __init__(self, title: str | None = None, **options: Any) -> None:
        super().__init__(title=None if title is None else Text(title, "bold"), title_justify="left", **options)

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        super().add_column(_plain(header), *arguments, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


def _plain(cell: Any) -> Any:
    return Text(cell) if isinstance(cell, str) else cell
