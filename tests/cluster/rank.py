"""A rank without torch, for tests of signals: it notes what it hears, saves, and leaves with 85.

`rank.py RUN`: takes steps until RUN/finish is there; where RUN/fail is there it fails at once.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STOP = {"SIGTERM", "SIGUSR1", "SIGUSR2"}


def main(run: Path) -> int:
    attempt = run / "attempts" / f"{int(os.environ['KILN_ATTEMPT']):03d}"
    rank = int(os.environ["SLURM_PROCID"])
    heard: list[str] = []

    def note() -> None:
        (attempt / f"heard_{rank}.json").write_text(json.dumps(heard))

    def hear(number: int, _frame: object) -> None:
        heard.append(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, hear)
    (attempt / f"rank_{rank}.json").write_text(
        json.dumps({"pid": os.getpid(), "node": os.environ["SLURMD_NODENAME"], **dict(os.environ)})
    )
    if (run / "fail").exists():
        return 1
    step = 0
    while not (run / "finish").exists():
        time.sleep(0.05)
        step += 1
        if STOP & set(heard):
            time.sleep(0.3)  # what Slurm says besides
            note()
            if rank == 0:
                saved = {"step": 1000 * int(attempt.name) + step, "images_seen": step}
                (run / "saved.json").write_text(json.dumps(saved))
            return 85
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
