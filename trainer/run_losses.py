"""Tell what the lost work of a run's attempts took: time of its nodes, and energy where known."""

import logging
from collections import defaultdict
from pathlib import Path

from trainer.errors import BadInput
from trainer.observe.accounts import Total, combined, lost_work
from trainer.observe.figure_words import energy_text, known_text
from trainer.observe.progress import in_words
from trainer.run_account import run_account

log = logging.getLogger(__name__)


def losses_in_words(run_dir: Path) -> dict[int, str]:
    """Return it by attempt, of those whose steps were done again."""
    try:
        rows = [row for row in run_account(run_dir) if row["stage"] == "train"]
    except BadInput as error:
        log.warning("What was lost is not known: %s", error)
        return {}
    by_attempt: defaultdict[int, Total] = defaultdict(Total)
    for (_, attempt, _), own in lost_work(rows).items():
        by_attempt[attempt] = combined((by_attempt[attempt], own))
    return {attempt: _words(lost) for attempt, lost in by_attempt.items() if lost.seconds > 0}


def _words(lost: Total) -> str:
    time_ = f"{in_words(lost.seconds)} of a node"
    if lost.joules <= 0:
        return f"{time_}, and energy that nobody metered"
    return f"{time_} and {energy_text(lost.joules)}, {known_text(lost.known_by)}"
