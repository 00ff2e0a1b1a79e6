"""Tables that keep every digit, at 80 columns, in a narrow terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(slots=True)
class Grid:
    """A table of text. Columns of numbers are as wide as their longest cell; only those named in `words` wrap.

    words: headings of the columns whose cells may wrap between words; they are set left, the others right. The first
        column is set left too. rows: cells of each row; None is a line across.
    """

    headings: Sequence[str]
    title: str = ""
    caption: str = ""
    words: Sequence[str] = ()
    rows: list[Sequence[str] | None] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)

    def add_line(self) -> None:
        self.rows.append(None)

    def table(self) -> Table:
        """For the console: beyond what the numbers need, columns of words share what is left."""
        table = Table(title=escape(self.title), caption=escape(self.caption))
        table.title_justify = table.caption_justify = "left"
        for at, (heading, least) in enumerate(zip(self.headings, self._least(), strict=True)):
            in_words = heading in self.words
            table.add_column(
                escape(heading),
                justify="left" if in_words or at == 0 else "right",
                min_width=least,
                overflow="fold",
            )
        for row in self.rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*map(escape, row))
        return table

    def least_width(self) -> int:
        """Columns below which digits would be lost."""
        return sum(self._least()) + 3 * len(self.headings) + 1

    def _least(self) -> list[int]:
        return [
            max(map(_longest_word if heading in self.words else len, cells), default=0)
            for heading, cells in zip(self.headings, self._columns(), strict=True)
        ]

    def whole_width(self) -> int:
        """The width at which nothing wraps."""
        columns = zip(self.headings, self._columns(), strict=True)
        return sum(max(len(heading), *map(len, cells), 0) for heading, cells in columns) + 3 * len(self.headings) + 1

    def _columns(self) -> list[list[str]]:
        """The cells of each column, with the words of its heading, which may stand one above the other."""
        rows = [row for row in self.rows if row is not None]
        return [[*heading.split(), *(row[at] for row in rows)] for at, heading in enumerate(self.headings)]


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def show(items: Iterable[Grid | str], *, console: Console | None = None) -> None:
    """Print tables and lines of text. A terminal's width is kept unless digits would be lost; a pipe gets no wraps."""
    console = console or Console(highlight=False)
    width = console.width
    for item in items:
        if isinstance(item, Grid):
            console.width = max(width, item.least_width() if console.is_terminal else item.whole_width())
            console.print(item.table())
        else:
            console.width = width
            console.print(item, markup=False, soft_wrap=not console.is_terminal)
