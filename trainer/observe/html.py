"""Write HTML from Python: text is escaped unless it already is markup."""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

_MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


# A page may show what is in it and ask for nothing; the browser enforces it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Script:
    """The one script that a page may run, and what it works on."""

    code: str
    data: Any
    """Plain JSON, in the element `curves`."""
    may_ask: bool = False
    """Whether it may ask the server that the page came from."""

    @property
    def policy(self) -> str:
        """What the page's policy allows for it."""
        digest = base64.b64encode(hashlib.sha256(self.code.encode()).digest()).decode()
        return f"; script-src 'sha256-{digest}'" + ("; connect-src 'self'" if self.may_ask else "")

    def elements(self) -> list["Html"]:
        """Write the data, in which no `<` can end the element, and the code after it."""
        text = json.dumps(self.data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        return [
            Html(f'<script type="application/json" id="curves">{text}</script>'),
            Html(f"<script>{self.code}</script>"),
        ]


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


def page(title: str, *sections: Content, style: str, script: Script | None = None) -> str:
    """Make a whole page of one file that asks the network for nothing.

    Args:
        title: What the browser's tab says.
        sections: What stands in `main`.
        style: The style sheet.
        script: The one that it may run, at its end.
    """
    policy = _POLICY + (script.policy if script else "")
    at_end = script.elements() if script else []
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", Html(style)),
    )
    html = tag("html", head, tag("body", tag("main", *sections), *at_end), lang="en")
    return f"<!doctype html>\n{html}\n"


def cards(facts: Iterable[tuple[str, str]]) -> Html:
    """Show a few (name, value) pairs large."""
    shown = [tag("div", tag("b", value), tag("span", name), class_="card") for name, value in facts]
    return tag("div", *shown, class_="cards")
