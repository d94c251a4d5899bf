"""Write HTML from Python: text is escaped unless it already is markup."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Content = str | Iterable["Content"]


def tag(name: str, *content: Content, **attributes: str) -> Html:
    """Make an element; `class_` is the attribute class, `data_x` is data-x."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{pairs}>{join(content)}</{name}>")


def join(content: Content) -> Html:
    """Concatenate, escaping what is plain text."""
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(escape(content))
    return Html("".join(map(join, content)))


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: int, foot: Sequence[str] = ()
) -> Html:
    """Make a table whose last `numeric` columns are numbers, right-aligned; `foot` is a total."""

    def cells(name: str, row: Sequence[str]) -> list[Html]:
        first_number = len(row) - numeric
        return [
            tag(name, cell, class_="num" if idx >= first_number else "txt")
            for idx, cell in enumerate(row)
        ]

    body = [tag("tr", *cells("td", row)) for row in rows]
    parts = [tag("thead", tag("tr", *cells("th", head))), tag("tbody", *body)]
    if foot:
        parts.append(tag("tfoot", tag("tr", *cells("td", foot))))
    return tag("div", tag("table", *parts), class_="scroll")


def picture(path: Path, *, alt: str) -> Html:
    """Embed a picture file, so that the page asks for nothing; say so when it is not there."""
    media = _MEDIA.get(path.suffix.lower())
    if media is None or not path.is_file():
        return tag("span", f"{path.name} is missing", class_="missing")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Html(f'<img src="data:{media};base64,{data}" alt="{escape(alt)}">')
