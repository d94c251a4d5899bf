"""An open W&B run that goes on from where W&B says that it stands.

Row n of metrics.jsonl has W&B's own step n x `_SLOTS`; pictures have steps between rows. W&B tells
whoever continues a run after which step it stands, so that rows go on from there: what a lost
network, a wrong key or a kill kept back is sent later, and no row is sent twice. The x axis is
images_seen, which may go back.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.observe.evaluations import METRICS

log = logging.getLogger(__name__)

Level = Literal["WARN", "ERROR"]

_AXIS = "images_seen"
_SLOTS = 100
_INIT_S = 10.0
_SEND_S = 600.0
_NUM_PICTURES = 16
KEPT, _SHOWN = "wandb.json", "wandb_pictures"


@dataclass(frozen=True)
class Target:
    """The W&B run that a run's folder belongs to."""

    run_dir: Path
    mode: Literal["offline", "online"]
    project: str
    config: Mapping[str, Any]
    """What may be published; nothing else is."""


class Session:
    """An open W&B run."""

    def __init__(
        self,
        run_dir: Path,
        run: Any,  # noqa: ANN401 - wandb.Run
        *,
        sent_steps: int,
        stopped: threading.Event,
    ) -> None:
        """Go on after the steps that W&B has.

        Args:
            run_dir: Whose metrics.jsonl and samples are sent.
            run: W&B's.
            sent_steps: So many of W&B's steps are over.
            stopped: Set when W&B has given up sending.
        """
        self._run_dir, self._run, self._stopped = run_dir, run, stopped
        self._next_step = sent_steps
        self.num_rows = -(-sent_steps // _SLOTS)
        """Of metrics.jsonl, that were handed to W&B."""
        self._rows = new_rows(run_dir / METRICS, skip=self.num_rows)
        self._shown = _read_text(run_dir / _SHOWN)

    def send_rows(self, attempt: int | None = None) -> None:
        """Hand over what metrics.jsonl has more; does not wait for the network.

        Args:
            attempt: The last one whose rows count.

        Raises:
            RuntimeError: W&B has given up sending.
        """
        if self._stopped.is_set():
            self._run.finish()
            raise RuntimeError("it has ended the upload")
        for row in self._rows:
            if row is None:
                return
            if attempt is not None and row.get("attempt", attempt) > attempt:
                self._rows = iter(())
                return
            told = {**row, "_timestamp": row["time_unix_s"]} if "time_unix_s" in row else row
            self._log(told, self.num_rows * _SLOTS)
            self.num_rows += 1

    def send_pictures(self) -> None:
        """Hand over the samples in the run's folder, unless they were before, or no row is."""
        step = max(self._next_step, (self.num_rows - 1) * _SLOTS + 1)
        if step >= self.num_rows * _SLOTS:
            return
        with suppress(OSError, ValueError, LookupError):  # they are being replaced
            shown = _gallery(self._run_dir / "samples")
            if shown.digest != self._shown:
                self._log(_pictures(shown), step)
                self._shown = shown.digest

    def alert(self, kind: str, text: str, level: Level) -> None:
        """Have W&B write a mail, or what its user chose."""
        title = f"{self._run_dir.resolve().name[:40]}: {kind}"
        self._run.alert(title=title, text=text, level=level)

    def finish(self, exit_code: int) -> None:
        """Wait until all is sent.

        Raises:
            TimeoutError: That takes too long.
        """
        self._run.finish(exit_code=exit_code)
        if self._shown:
            (self._run_dir / _SHOWN).write_text(f"{self._shown}\n", encoding="utf-8")

    def _log(self, row: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(row), step=step)
        self._next_step = step + 1


def open_session(target: Target, *, finish_s: float) -> Session | None:
    """Start or continue the W&B run; None if it was online before and cannot be offline now.

    Args:
        target: The W&B run.
        finish_s: How long `finish` may take.
    """
    run_dir, name = target.run_dir, run_id(target)
    folder, sent_steps = run_dir / "wandb", 0
    if target.mode == "offline":
        if list(folder.glob(f"run-*-{name}*")):
            log.info("W&B has a part of this run; `kiln sync %s` sends the rest", run_dir)
            return None
        sent_steps = _offline_steps(folder, name)
    before = set(folder.glob("run-*"))
    stopped = threading.Event()
    try:
        run = _init(target, name, finish_s=finish_s, stopped=stopped)
    except Exception:
        for failed in set(folder.glob("run-*")) - before:
            shutil.rmtree(failed, ignore_errors=True)
        raise
    if target.mode == "online":
        sent_steps = run.starting_step
        _replace_offline(run_dir, name)
    return Session(run_dir, run, sent_steps=sent_steps, stopped=stopped)


def send_all(target: Target) -> int:
    """Send what W&B lacks, and ask it whether it has it; return how many rows it lacked.

    Raises:
        Exception: W&B cannot be reached, says no, or has not all; of W&B's kinds.
    """
    session = open_session(target, finish_s=_SEND_S)
    assert session is not None, "not offline"
    num_before = session.num_rows
    session.send_rows()
    session.send_pictures()
    session.finish(0)
    if session.num_rows > num_before:
        check = open_session(target, finish_s=_SEND_S)
        assert check is not None, "not offline"
        check.finish(0)
        if check.num_rows < session.num_rows:
            raise RuntimeError(f"it has {check.num_rows} of {session.num_rows} rows")
    return session.num_rows - num_before


def _init(target: Target, name: str, *, finish_s: float, stopped: threading.Event) -> Any:  # noqa: ANN401 - wandb.Run
    import wandb  # noqa: PLC0415 - a second that only this sink needs

    wandb.setup(wandb.Settings(silent=True))
    run = wandb.init(
        project=target.project,
        name=target.run_dir.resolve().name,
        id=name,
        resume="allow",
        mode=target.mode,
        dir=target.run_dir,
        config=dict(target.config),
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_INIT_S,
            finish_timeout=finish_s,
            finish_timeout_raises=True,
            x_file_stream_retry_max=10_000,  # a server may be away for days
            x_skip_transaction_log=target.mode == "online",  # metrics.jsonl is that
            # W&B would interrupt training, for its stop button as well as when it gives up.
            stop_on_fatal_error=True,
            stop_fn=stopped.set,
            # No host name, user, command line, environment, code or git remote.
            host="-",
            x_disable_meta=True,
            x_disable_machine_info=True,
            disable_git=True,
            disable_code=True,
            x_save_requirements=False,
        ),
    )
    run.define_metric("*", step_metric=_AXIS)
    return run


def default_entity() -> str:
    """Ask W&B whose workspaces are made where nobody is named."""
    import wandb  # noqa: PLC0415

    return str(wandb.Api().default_entity)


def end_service() -> None:
    """End W&B's own process after a failure: it would say that the run's id is in use."""
    with suppress(Exception):  # it may be what failed
        import wandb  # noqa: PLC0415

        wandb.teardown()


def new_rows(path: Path, *, skip: int) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a file that grows, but for the first; None where there is no more yet."""
    offset, number = 0, 0
    while True:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset, number = offset + len(line), number + 1
                if number > skip:
                    yield json.loads(line)
        yield None


def _offline_steps(folder: Path, name: str) -> int:
    """Say up to which step W&B's own files hold the run, of which a kill leaves one unfinished.

    An unfinished one is put aside, since all its rows come again, unless `wandb sync` sent it.
    """
    for file in sorted(folder.glob(f"offline-run-*/run-{name}.wandb"), reverse=True):
        told = _inspect(file)
        is_sent = file.with_name(f"{file.name}.synced").exists()
        if told["exit_code"] is None and not is_sent:
            file.parent.rename(folder / f"unfinished-{file.parent.name}")
        elif told["step"] is not None:
            return int(told["step"]) + 1
    return 0


def _replace_offline(run_dir: Path, name: str) -> None:
    """Keep `wandb sync` from sending once more what an online session sends from metrics.jsonl."""
    for file in (run_dir / "wandb").glob(f"offline-run-*/run-{name}.wandb"):
        marker = file.with_name(f"{file.name}.synced")
        if not marker.exists():
            marker.touch()
            (run_dir / _SHOWN).unlink(missing_ok=True)


def _inspect(file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)  # noqa: S603
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@dataclass(frozen=True)
class _Gallery:
    digest: str
    label: Mapping[str, Any]
    captions: Mapping[Path, str]


def _gallery(folder: Path) -> _Gallery:
    """Read what a folder of samples shows, as far as W&B gets it."""
    index = (folder / "index.json").read_bytes()
    entries = json.loads(index)["samples"][:_NUM_PICTURES]
    label = json.loads((folder / entries[0]["picture"]).with_suffix(".json").read_bytes())
    made_by = json.dumps([label["weights_sha256"], label["step"]]).encode()
    marks = {True: "right: ", False: "wrong: ", None: ""}
    return _Gallery(
        digest=hashlib.blake2b(index + made_by, digest_size=8).hexdigest(),
        label=label,
        captions={
            folder / entry["picture"]: marks[entry["ok"]] + entry["caption"] for entry in entries
        },
    )


def _pictures(gallery: _Gallery) -> dict[str, Any]:
    import wandb  # noqa: PLC0415

    images = [wandb.Image(str(path), caption=text) for path, text in gallery.captions.items()]
    return {
        "step": gallery.label["step"],
        _AXIS: gallery.label["images_seen"],
        "samples": images,
    }


def run_id(target: Target) -> str:
    """Make an id of the run's name, config and birth, and keep it: all attempts continue one run.

    Project and config are kept beside it, for `kiln sync`.
    """
    path = target.run_dir / KEPT
    kept = read_kept(target.run_dir)
    born = [target.run_dir.resolve().name, target.config, time.time_ns()]
    text = json.dumps(born, sort_keys=True, default=str)
    made = kept.get("id") or hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    now = {"id": made, "project": target.project, "config": target.config}
    written = json.loads(json.dumps(now, default=str))
    if written != kept:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(f"{json.dumps(written, indent=1)}\n", encoding="utf-8")
        partial.replace(path)
    return str(made)


def read_kept(run_dir: Path) -> dict[str, Any]:
    """Read what `run_id` kept; empty where W&B was never on."""
    path = run_dir / KEPT
    kept: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return kept


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
