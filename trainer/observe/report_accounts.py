"""Lay out what a run cost: time and energy by bucket, the figures of its account, its attempts."""

from collections.abc import Mapping
from datetime import UTC, datetime

from trainer.observe.accounts import Total, close_check, combined, lost_work
from trainer.observe.figure_words import HEAD, figure_rows, joules_text, known_text
from trainer.observe.figures import Figures
from trainer.observe.html import Html, absent, join, table, tag
from trainer.observe.ledger import Bucket
from trainer.observe.report_ledger import attempt_rows, energy_bars
from trainer.observe.report_numbers import duration, in_joules
from trainer.observe.story import Story

_MEANING = {
    Bucket.QUEUE: "waiting for the scheduler",
    Bucket.INIT: "starting: imports, building, compiling",
    Bucket.RESTORE: "loading a checkpoint",
    Bucket.PRODUCTIVE: "work that is in the result",
    Bucket.DATA_STALL: "waiting for data",
    Bucket.ENCODING: "encoding pictures and captions between steps (data.latents=online)",
    Bucket.CHECKPOINT_STALL: "waiting for a checkpoint",
    Bucket.EVALUATION: "evaluating",
    Bucket.DRAIN: "stopping",
    Bucket.LOST_WORK: "work done again after a stop or a rollback",
    Bucket.IDLE: "nothing",
}


def accounts(story: Story, figures: Figures) -> list[Html]:
    """Show where seconds and joules went."""
    if not story.ledger:
        return absent("The ledger", f"kiln train run={story.run_dir}")
    sums = figures.by_bucket
    parts: list[Html] = []
    for stage in dict.fromkeys(stage for stage, _ in sums):
        buckets = {bucket: total for (of, bucket), total in sums.items() if of == stage}
        parts += [tag("h3", stage.capitalize()), _bar(buckets), _bucket_table(buckets)]
        parts += energy_bars(buckets)
    return [*parts, *attempt_rows(story), _closing(story)]


def _bar(buckets: Mapping[Bucket, Total]) -> Html:
    whole_s = sum(total.seconds for total in buckets.values()) or 1.0
    slices = [
        tag("i", class_=f"b-{bucket.value}", style=f"width:{100 * total.seconds / whole_s:.3f}%")
        for bucket, total in buckets.items()
    ]
    return tag("div", *slices, class_="bar", aria_hidden="true")


def _bucket_table(buckets: Mapping[Bucket, Total]) -> Html:
    whole = combined(buckets.values())
    whole_s, known = whole.seconds or 1.0, known_text(whole.known_by)
    rows = [
        (
            join((tag("i", class_=f"swatch b-{bucket.value}"), bucket.value.replace("_", " "))),
            tag("span", _MEANING[bucket], class_="soft"),
            known_text(total.known_by),
            duration(total.seconds),
            f"{100 * total.seconds / whole_s:.1f} %",
            in_joules(total.joules),
        )
        for bucket, total in buckets.items()
        if total.seconds > 0 or total.joules > 0
    ]
    filled = table(
        ("bucket", "meaning", "how it is known", "time", "share", "energy"),
        rows,
        numeric=3,
        foot=("all", "", known, duration(whole_s), "100 %", in_joules(whole.joules)),
    )
    return tag("div", filled, class_="wide")


def _closing(story: Story) -> Html:
    open_accounts = [check for check in close_check(story.ledger) if not check.holds()]
    words = "Every second of every attempt lies in exactly one bucket."
    if open_accounts:
        names = ", ".join(f"{check.stage} {check.attempt}" for check in open_accounts)
        words = f"The account does not close for: {names}."
    return tag("p", words, class_="note")


def figure_table(story: Story, figures: Figures) -> list[Html]:
    """Show what follows from the account, and how each number is known."""
    found = figures.by_key
    parts = [tag("div", table(HEAD, figure_rows(found.values()), numeric=0), class_="wide")]
    if not found:
        parts = absent("Joules", f"kiln train run={story.run_dir}")
    elif "energy" in found and "carbon" not in found:
        command = tag("code", f"kiln report run={story.run_dir} accounts.grid=COUNTRY")
        words = "Carbon is not told, for nobody said which grid it was. Run "
        parts.append(tag("p", words, command, ".", class_="note"))
    return parts


def attempts(story: Story) -> list[Html]:
    """Show when each attempt ran, how it ended and what was lost with it."""
    lost = lost_work(story.ledger)
    rows = []
    for check in close_check(story.ledger):
        own = [
            row
            for row in story.ledger
            if (row["stage"], row["attempt"], row["rank"])
            == (check.stage, check.attempt, check.rank)
        ]
        started = datetime.fromtimestamp(min(row["start_unix_s"] for row in own), UTC)
        killed = any(row["bucket"] == Bucket.LOST_WORK for row in own)
        ended = "killed" if killed else "properly" if own[-1].get("closed") else "running or killed"
        rows.append(
            (
                f"{check.stage} {check.attempt}",
                f"{started:%Y-%m-%d %H:%M:%S} UTC",
                ended,
                duration(sum(row["seconds"] for row in own)),
                joules_text(lost[check.stage, check.attempt, check.rank]),
                f"{max(row['step'] for row in own):,}" if check.stage == "train" else "-",
            )
        )
    if not rows:
        return []
    head = ("attempt", "started", "ended", "time", "lost", "last step")
    return [tag("h3", "Attempts"), table(head, rows, numeric=3), tag("h3", "Made from")]
