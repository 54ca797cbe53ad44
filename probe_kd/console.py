"""Printing to a terminal: control characters are replaced, except those of rich itself, and all tables look alike."""

from collections.abc import Iterable

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from probe_kd.errors import visible

INDENT = 4
FOLDED = 24  # a narrower column of text would have one word per line


class PlainConsole(Console):
    """rich's console, which shows a symbol in place of every control character."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def table_of(title: str, first: str, *others: str) -> Table:
    """Return an empty table. Its first column is never cut, and a column written `name>` is right-aligned."""
    table = FoldingTable(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in others:
        right = column.endswith(">")
        table.add_column(column.removesuffix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


class FoldingTable(Table):
    """A table that becomes a list of entries where the terminal is too narrow for its columns."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if sum(map(_least_width, self.columns)) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text.from_markup(f"{self.title}\n", style="italic")
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            yield Text.from_markup(str(cells[0]), style="bold")
            named = [(column.header, cell) for column, cell in zip(self.columns[1:], cells[1:], strict=True) if cell]
            for line in _filled([f"{name}: {cell}" for name, cell in named], options.max_width - INDENT):
                yield Padding(Text.from_markup(line), (0, 0, 0, INDENT))
        yield Text.from_markup(f"\n{self.caption or ''}", style="dim italic")


def _least_width(column: Column) -> int:
    """Return the width that a column needs with its padding. Numbers and names are never folded, texts can be."""
    texts = [Text.from_markup(str(text)) for text in (column.header, *column.cells)]
    whole = max(text.cell_len for text in texts)
    if column.no_wrap:
        return whole + 3
    return max(min(whole, FOLDED), *(len(word) for text in texts for word in text.plain.split() or [""])) + 3


def _filled(pieces: Iterable[str], width: int) -> list[str]:
    """Join pieces to lines as long as they fit. A piece longer than a line gets a line of its own."""
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + len(piece) + 3 <= width:
            lines[-1] += f" · {piece}"
        else:
            lines.append(piece)
    return lines


def amount(number: float) -> str:
    """Format a number with three digits and a unit: 11.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Format a duration with two digits and a unit: 3.4 h."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s"


def size(count: float) -> str:
    """Format a number of bytes with three digits and a unit: 11.2 MB."""
    return f"{amount(count)}B" if count >= 1000 else f"{count:.0f} B"
