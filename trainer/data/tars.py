"""Say which tars a pattern means: a folder, a glob, braces with numbers or names, or a URL."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import BadInput
from trainer.place import is_local, place, remote, storage_errors

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_TARS = 10_000_000


def list_tars(pattern: str) -> list[Path]:
    """List the tars that a pattern means: those of braces in their order, of a glob by name.

    Args:
        pattern: `data/laion`, `data/laion/*.tar`, `s3://bucket/laion/{00000..00099}.tar`.

    Raises:
        BadInput: It means none, means one twice, or is a command for a shell.
    """
    tars = [tar for one in expand_braces(pattern) for tar in _found(one)]
    if not tars:
        raise BadInput(f"tars={pattern} means no file. Give a folder with tars in it, or a glob.")
    if len(set(map(str, tars))) < len(tars):
        raise BadInput(f"tars={pattern} means some tars twice. Name each once.")
    return tars


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield what `{a,b}` and `{000..123}` in a pattern stand for; numbers keep their zeros.

    Raises:
        BadInput: The braces have neither, or stand for too much.
    """
    found = _BRACES.search(pattern)
    if not found:
        if "{" in pattern or "}" in pattern:
            raise BadInput(f"{pattern} has a brace without its partner, or one in another.")
        yield pattern
        return
    head, inside, tail = pattern[: found.start()], found[1], pattern[found.end() :]
    for choice in _choices(pattern, inside):
        yield from (f"{head}{choice}{rest}" for rest in expand_braces(tail))


def _choices(pattern: str, inside: str) -> Iterator[str]:
    span = _RANGE.fullmatch(inside)
    if span:
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < _MOST_TARS:
            raise BadInput(
                f"{pattern}: {{{inside}}} are {last - first + 1} numbers, need 1 to {_MOST_TARS}."
            )
        width = len(span[1]) if span[1].startswith("0") else 1
        yield from (f"{number:0{width}d}" for number in range(first, last + 1))
    elif "," in inside:
        yield from inside.split(",")
    else:
        raise BadInput(f"{pattern}: {{{inside}}} is neither {{first..last}} nor {{one,other}}.")


def _found(where: str) -> list[Path]:
    if where.startswith("pipe:"):
        raise BadInput(f"{where} is a command for a shell, and Kiln runs none. Give a URL.")
    path = place(where)
    if where.endswith("/") or (is_local(path) and path.is_dir()):
        return _found(f"{where.rstrip('/')}/*.tar")
    if not glob.has_magic(where):
        return [path.absolute() if is_local(path) else path]
    if is_local(path):
        names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - it may be absolute
        return [Path(name).absolute() for name in names]
    fs, name = remote(path)
    with storage_errors(path):
        return [place(fs.unstrip_protocol(found)) for found in sorted(fs.glob(name))]
