"""Read rows of image-text metadata with DuckDB: any number of parquet, csv or jsonl files."""

import hashlib
import signal
import socket
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import duckdb
import fsspec

from data_prep.config import ColumnsConfig
from data_prep.policy import identifier, literal
from data_prep.transport import parse_url
from trainer.errors import BadInput

_READERS = {
    ".parquet": "read_parquet({}, union_by_name=true)",
    # Of a csv nothing is guessed, or what one row says could depend on the others.
    ".csv": "read_csv({}, union_by_name=true, header=true, all_varchar=true, comment='', skip=0, "
    "delim=',', quote='\"', escape='\"')",
    ".tsv": "read_csv({}, union_by_name=true, header=true, all_varchar=true, comment='', skip=0, "
    "delim='\\t')",
    ".jsonl": "read_json({}, union_by_name=true, format='newline_delimited', {})",
}
# Types that JSON has itself; dates and the like are guesses of DuckDB.
_JSON_TYPES = ("BIGINT", "UBIGINT", "HUGEINT", "DOUBLE", "BOOLEAN", "STRUCT(", "MAP(")
_URL_HOST = "kiln_url_host"
_OWN = ("kiln_url", "kiln_caption", "kiln_host")  # columns of ours; a source's are not read
_QUOTED_CHARS = 400
_NEEDS = {
    "csv": ". Need UTF-8, the names of the columns in the first line, commas between fields, and "
    "double quotes around those with a comma, a quote or a line break in them.",
}
_PACKED = (".gz", ".zst")
_FORMATS = f"{', '.join(_READERS)} (csv, tsv and jsonl also as .gz or .zst)"


@dataclass(frozen=True, slots=True)
class Row:
    """One row that is to be downloaded."""

    key: str
    """Stable id: `row_key` of the URL and the caption."""
    url: str
    caption: str
    extra: dict[str, Any]
    """The extra columns that have a value."""
    language: str | None = None
    """What the caption is written in, 'und' if that is unclear; None if the policy does not ask."""


def row_key(url: str, caption: str) -> str:
    """Give the 64-bit stable id of a row as 16 hex digits: the last half of an md5.

    The hash is DuckDB's `md5_number_lower`, so that ids are made where the rows are read. Of n rows
    about n^2 / 2^65 share an id with another by chance: one in 5.5e9 rows.
    """
    digest = hashlib.md5(f"{url}\0{caption}".encode(), usedforsecurity=False).digest()
    return f"{int.from_bytes(digest[8:], 'little'):016x}"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, as far as it can be known without reading it."""

    name: str
    """Path or URL."""
    bytes: int
    """Size."""
    state: str
    """Modification time or entity tag: another one means other content."""


def source_files(rows: str) -> list[SourceFile]:
    """List the files of a source, in order of their names.

    Args:
        rows: A file, a folder or a glob, local or an fsspec URL.

    Raises:
        BadInput: There are none, or they are of several kinds.
    """
    try:
        fs, path = fsspec.core.url_to_fs(rows, use_listings_cache=False)
        names = _list(fs, path)
        infos = [fs.info(name) for name in names]
    except (ImportError, ValueError) as error:
        raise BadInput(f"rows={rows} cannot be opened: {error}") from error
    except FileNotFoundError:
        names, infos = [], []
    if not names:
        raise BadInput(
            f"rows={rows} is not there, or has no files of the kinds {_FORMATS}. Give a file of "
            "URLs and captions, a folder or a glob; `kiln source kind=scenes out=...` makes one "
            "to try."
        )
    kinds = sorted({_kind(name) for name in names})
    if len(kinds) > 1:
        raise BadInput(f"rows={rows} has files of several kinds ({', '.join(kinds)}): give a glob.")
    local = "file" in fs.protocol
    return [
        SourceFile(
            name=name if local else fs.unstrip_protocol(name),
            bytes=int(info["size"]),
            state=str(info.get("ETag") or info.get("mtime") or info.get("created") or ""),
        )
        for name, info in zip(names, infos, strict=True)
    ]


def _list(fs: Any, path: str) -> list[str]:  # noqa: ANN401 - fsspec has no types
    if fs.isdir(path):
        found = fs.find(path)
    else:
        found = fs.glob(path) if any(letter in path for letter in "*?[") else [path]
    return sorted(str(name) for name in found if _kind(name) in _READERS or name == path)


def _kind(name: str) -> str:
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in _PACKED else path.suffix


@contextmanager
def connect(
    scratch: Path, *, memory_gb: float, threads: int
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open DuckDB in memory, with a limit; what does not fit is spilled to `scratch`.

    For the main thread only. Ctrl-C ends a query.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_gb}GB",
        "threads": threads,
        "temp_directory": str(scratch),
        # Neither code nor settings from outside.
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    with closing(duckdb.connect(config=config)) as connection:
        connection.execute("SET enable_progress_bar = false")  # it would write into our output
        connection.create_function(_URL_HOST, _url_host, ["VARCHAR"], "VARCHAR")
        with interruptible(connection):
            yield connection


@contextmanager
def interruptible(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Let Ctrl-C end a query in a moment, as the KeyboardInterrupt that it is.

    DuckDB by itself looks for it between steps that take seconds, and makes errors of its own.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] == signal.SIGINT:
                connection.interrupt()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    except (RuntimeError, duckdb.InterruptException) as error:
        if "interrupted" not in str(error).lower():
            raise
        raise KeyboardInterrupt from error
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        watcher.join()
        reader.close()


def open_source(
    connection: duckdb.DuckDBPyConnection, files: Sequence[SourceFile], columns: ColumnsConfig
) -> list[str]:
    """Create the view `source` over the files; return its columns.

    Raises:
        BadInput: A file is not what its name says, or the URL or caption column is missing.
    """
    kind = _kind(files[0].name)
    if kind not in _READERS:
        raise BadInput(f"{files[0].name}: a source is of the kinds {_FORMATS}.")
    if "://" in files[0].name:
        connection.register_filesystem(fsspec.core.url_to_fs(files[0].name)[0])
    names = "[" + ", ".join(literal(file.name) for file in files) + "]"
    reader = _READERS[kind].format(names, "sample_size=-1")
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM {reader}").fetchall()
        types = {str(row[0]): str(row[1]) for row in described if row[0].lower() not in _OWN}
        _check_columns(files[0].name, columns, list(types))
        texts = {columns.url.lower(), columns.caption.lower()}
        if kind == ".jsonl":
            reader = _READERS[kind].format(names, f"columns={_json_columns(types, texts)}")
        selected = ", ".join(
            _decoded(name) if of == "BLOB" and name.lower() in texts else identifier(name)
            for name, of in types.items()
        )
        connection.execute(f"CREATE OR REPLACE TEMP VIEW source AS SELECT {selected} FROM {reader}")
    except duckdb.Error as error:
        raise unreadable(files, error) from error
    return list(types)


def _check_columns(file: str, columns: ColumnsConfig, found: Sequence[str]) -> None:
    lower = {name.lower() for name in found}
    for key in ("url", "caption"):
        name = getattr(columns, key)
        if name.lower() not in lower:
            raise BadInput(
                f"{file} has no column '{name}'; it has {', '.join(found) or 'none'}. "
                f"Name the right one with columns.{key}=..."
            )


def _json_columns(types: dict[str, str], texts: Collection[str]) -> str:
    """Give DuckDB's types of columns for which a row says the same, whatever the other rows say."""

    def kept(name: str, of: str) -> bool:
        return name.lower() not in texts and (of.startswith(_JSON_TYPES) or of.endswith("]"))

    pairs = (
        f"{literal(name)}: {literal(of if kept(name, of) else 'VARCHAR')}"
        for name, of in types.items()
    )
    return "{" + ", ".join(pairs) + "}"


def _decoded(name: str) -> str:
    """Give SQL for a column of bytes as text; bytes that are no UTF-8 stay visible as such."""
    column = identifier(name)
    return f"coalesce(TRY(decode({column})), CAST({column} AS VARCHAR)) AS {column}"


def unreadable(files: Sequence[SourceFile], error: duckdb.Error) -> BadInput:
    """Build the error for a source that DuckDB gives up on."""
    said = " ".join(str(error).split("\n\n")[0].splitlines()[:3]).rstrip(".")
    kind = _kind(files[0].name).removeprefix(".")
    named = files[0].name if len(files) == 1 else f"one of {len(files)} files"
    need = _NEEDS.get(kind, "")
    return BadInput(f"{named} is no readable {kind} file: {said[:_QUOTED_CHARS]}{need}")


def rows_sql(columns: ColumnsConfig, found: Sequence[str], broken_rule: str) -> str:
    """Give SQL over `source` for key, url, caption, reason (null: keep), and `extra.NAME` columns.

    Args:
        columns: What the columns are called.
        found: The columns that are there.
        broken_rule: SQL for the reason, over `kiln_url`, `kiln_caption`, `kiln_host`
            and the source's columns.
    """
    there = {name.lower(): name for name in found}
    extras = [identifier(there[name.lower()]) for name in columns.extra if name.lower() in there]
    carried = "".join(f", {name} AS {identifier('extra.' + name[1:-1])}" for name in extras)
    url, caption = (_text(there[name.lower()]) for name in (columns.url, columns.caption))
    return (
        f"WITH texts AS (SELECT *, {url} AS kiln_url, {caption} AS kiln_caption FROM source), "
        f"hosts AS (SELECT *, {_HOST} AS kiln_host FROM texts) "
        "SELECT md5_number_lower(kiln_url || chr(0) || kiln_caption) AS key, kiln_url AS url, "
        f"kiln_caption AS caption, {broken_rule} AS reason{carried} FROM hosts"
    )


# Nearly every URL is plain. The others are taken apart by the code that fetches them, so that no
# spelling of a host is judged as one and fetched as another.
_PLAIN_HOST = "regexp_extract(kiln_url, '^https?://([A-Za-z0-9.-]+)/', 1)"
_HOST = (
    f"CASE WHEN {_PLAIN_HOST} <> '' THEN rtrim(lower({_PLAIN_HOST}), '.') "
    f"ELSE {_URL_HOST}(kiln_url) END"
)


def _url_host(url: str) -> str:
    try:
        return parse_url(url).host
    except ValueError:
        return ""


def _text(name: str) -> str:
    text = f"coalesce(CAST({identifier(name)} AS VARCHAR), '')"
    space = "chr(32) || chr(9) || chr(10) || chr(11) || chr(12) || chr(13)"
    # Most texts need no trimming, which costs as much as all rules together.
    return (
        f"CASE WHEN {text}[1] <= ' ' OR {text}[-1] <= ' ' THEN trim({text}, {space}) "
        f"ELSE {text} END"
    )
