"""Write HTML from Python: text is escaped unless it already is markup."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


# A page may show what is in it and ask for nothing; the browser enforces it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


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


def absent(what: str, command: str) -> list[Html]:
    """Say that something is not there yet, and which command makes it."""
    text = tag("p", f"{what}: not there yet. Run ", tag("code", command), ".", class_="absent")
    return [text]


def picture(path: Path, *, alt: str) -> Html:
    """Embed a picture file, so that the page asks for nothing; say so when it is not there."""
    media = _MEDIA.get(path.suffix.lower())
    if media is None or not path.is_file():
        return tag("span", f"{path.name} is missing", class_="missing")
    return image(path.read_bytes(), media=media, alt=alt)


def image(content: bytes, *, media: str, alt: str) -> Html:
    """Embed a picture's bytes."""
    data = base64.b64encode(content).decode("ascii")
    return Html(f'<img src="data:{media};base64,{data}" alt="{escape(alt)}">')


def page(title: str, *sections: Content, style: str) -> str:
    """Make a whole page of one file that asks the network for nothing.

    Args:
        title: What the browser's tab says.
        sections: What stands in `main`.
        style: The style sheet.
    """
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", Html(style)),
    )
    html = tag("html", head, tag("body", tag("main", *sections)), lang="en")
    return f"<!doctype html>\n{html}\n"


def cards(facts: Iterable[tuple[str, str]]) -> Html:
    """Show a few (name, value) pairs large."""
    shown = [tag("div", tag("b", value), tag("span", name), class_="card") for name, value in facts]
    return tag("div", *shown, class_="cards")
