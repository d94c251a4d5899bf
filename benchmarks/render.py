"""Render docs/benchmarks.md from the files in benchmarks/results/."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
_HEAD = """\
# Benchmarks

Made by `python -m benchmarks.render` from `benchmarks/results/*.json`; do not edit.
`make bench NAME=x` measures `benchmarks/x.py` again and renders this page anew.
Cases run in turn, round after round; a row has the median, and the least and most of all rounds.
"""


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page; results are the contents of the files by name, in any order."""
    if not results:
        return f"{_HEAD}\nNothing has been measured yet.\n"
    return "\n".join([_HEAD, *(_one(name, results[name]) for name in sorted(results))])


def read_results(folder: Path = RESULTS) -> dict[str, Mapping[str, Any]]:
    """Read all result files of a folder."""
    files = sorted(folder.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def main() -> int:
    """Write the page; return 1 if a claim does not hold."""
    results = read_results()
    PAGE.write_text(render(results), encoding="utf-8")
    broken = [
        f"{name}: {claim['text']}"
        for name, result in results.items()
        for claim in result["claims"]
        if not claim["holds"]
    ]
    for line in broken:
        print(f"does not hold: {line}", file=sys.stderr)
    print(f"{PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")
    return 1 if broken else 0


def _one(name: str, result: Mapping[str, Any]) -> str:
    facts = result.get("machine", {})
    machine = (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}, "
        f"Python {facts['python']}"
        if facts
        else "machine not recorded"
    )
    parts = [f"## {name}\n", f"{result.get('question', '')}\n", f"Measured on: {machine}.\n"]
    if result["claims"]:
        parts.append("\n".join(_claims(result["claims"])) + "\n")
    parts.append("\n".join(_rows(result["rows"])) + "\n")
    if versions := sorted({pair for row in result["rows"] for pair in row["versions"].items()}):
        parts.append(f"Versions: {', '.join(f'{package} {v}' for package, v in versions)}.\n")
    return "\n".join(parts)


def _claims(claims: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from _table_head(("claim", "measured", "target", "holds"), numeric=(1, 2))
    for claim in claims:
        holds = "yes" if claim["holds"] else "**no**"
        yield _line((claim["text"], _number(claim["measured"]), _number(claim["target"]), holds))


def _rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    head = ("case", "system", "metric", "median", "least", "most", "unit", "rounds")
    yield from _table_head(head, numeric=(3, 4, 5, 7))
    for row in rows:
        numbers = [_number(row[key]) for key in ("median", "min", "max")]
        labels = (row["case"], row["system"], row["metric"])
        yield _line((*labels, *numbers, row["unit"], str(row["repetitions"])))


def _table_head(names: Sequence[str], *, numeric: Sequence[int]) -> Iterator[str]:
    yield _line(names)
    yield _line(["---:" if idx in numeric else "---" for idx in range(len(names))])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
