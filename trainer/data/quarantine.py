"""Samples that a stream could not read: written down once each, counted, and limited in rate."""

import json
import threading
from pathlib import Path

from trainer.errors import BadInput

FEW = 10
"""So many bad samples never stop a run, whatever their share."""


class Quarantine:
    """Bad samples of one rank; safe for several threads."""

    def __init__(self, path: Path | None, *, max_bad_frac: float) -> None:
        """Log to a JSON-lines file, which begins with the first bad sample; None logs nowhere."""
        self._path, self._max_bad_frac = path, max_bad_frac
        self._known: set[tuple[str, str, str]] = set()
        self._lock = threading.Lock()
        self.num_bad = self.num_seen = 0

    def saw(self, num_samples: int) -> None:
        """Count samples that were asked for."""
        with self._lock:
            self.num_seen += num_samples

    def add(self, *, dataset: str, shard: str, key: str, why: str) -> None:
        """Count a sample that was replaced; write it down unless it is there already.

        Raises:
            BadInput: Too many samples are bad: more than a share `max_bad_frac` of those asked for.
        """
        with self._lock:
            self.num_bad += 1
            self._write(dataset, shard, key, why)
            if self.num_bad > max(FEW, self._max_bad_frac * self.num_seen):
                where = f"; {self._path} lists them" if self._path else ""
                raise BadInput(
                    f"{self.num_bad} of {self.num_seen} samples could not be read, more than "
                    f"data.max_bad_frac={self._max_bad_frac:g} allows{where}. The last: {why} "
                    "Repair the dataset (`kiln verify` finds what is damaged), or allow more."
                )

    def exclude(self, *, dataset: str, shard: str, key: str) -> None:
        """Write down a sample that a rollback left out; it does not count as bad."""
        with self._lock:
            self._write(dataset, shard, key, "excluded by a rollback")

    def _write(self, dataset: str, shard: str, key: str, why: str) -> None:
        if (dataset, shard, key) in self._known:
            return
        self._known.add((dataset, shard, key))
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            row = {"dataset": dataset, "shard": shard, "key": key, "why": why}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
