"""The door by which text reaches a terminal: no control characters but those of rich itself."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from probe_kd.errors import visible


class PlainConsole(Console):
    """rich's console, with a picture for every control character in what is shown."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
