"""Send each row of metrics to metrics.jsonl (the truth), to Weights & Biases and to a screen."""

import hashlib
import json
import logging
import netrc
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from trainer.errors import BadInput
from trainer.observe.jsonl import JsonLines
from trainer.observe.progress import ProgressMode, Sink, open_progress

log = logging.getLogger(__name__)

WandbMode = Literal["auto", "offline", "online", "off"]
_DEFAULT_HOST = "https://api.wandb.ai"
_AXIS = "images_seen"


class JsonlSink:
    """metrics.jsonl: one row per logged step, written before `log` returns."""

    def __init__(self, path: Path) -> None:
        """Continue the file."""
        self._file = JsonLines(path)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append the row; unlike other sinks this one may fail: a full disk ends the run."""
        self._file.append([row])

    def close(self, *, exit_code: int = 0) -> None:
        """Close the file."""
        self._file.close()


class WandbSink:
    """A W&B run that all attempts of a run continue; its failures warn once and end it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: Literal["offline", "online"],
        project: str,
        config: Mapping[str, Any],
    ) -> None:
        """Start or continue the W&B run; config is what may be published, nothing else is."""
        self._run: Any = None
        logging.getLogger("wandb").propagate = False  # it has its own files
        try:
            import wandb  # noqa: PLC0415 - half a second that only this sink needs

            self._run = wandb.init(
                project=project,
                name=run_dir.resolve().name,
                id=run_id(run_dir, config),
                resume="allow",
                mode=mode,
                dir=run_dir,
                config=dict(config),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    # No host name, user, command line, environment, code or git remote.
                    host="-",
                    x_disable_meta=True,
                    x_disable_machine_info=True,
                    disable_git=True,
                    disable_code=True,
                    x_save_requirements=False,
                ),
            )
            # Without step=: W&B drops rows whose step does not rise, as after a rollback.
            self._run.define_metric("*", step_metric=_AXIS)
        except Exception as error:  # whatever W&B does, training goes on
            self._give_up(error)

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand the row to W&B's own process; does not wait for the network."""
        if self._run is None:
            return
        try:
            self._run.log(dict(row))
        except Exception as error:
            self._give_up(error)

    def close(self, *, exit_code: int = 0) -> None:
        """Finish the run; a code other than 0 marks it as failed."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        log.warning("W&B is off for this attempt (%s); metrics.jsonl has everything", error)
        self._run = None


class Sinks:
    """All sinks of one attempt; rows get the time and the attempt here."""

    def __init__(self, sinks: Sequence[Sink], *, attempt: int) -> None:
        """Log to these, in order; the first must be metrics.jsonl."""
        self._sinks, self._attempt = sinks, attempt

    @classmethod
    def open(
        cls,
        run_dir: Path,
        *,
        attempt: int,
        total_steps: int,
        config: Mapping[str, Any],
        wandb: WandbMode = "auto",
        project: str = "kiln",
        progress: ProgressMode = "auto",
    ) -> "Sinks":
        """Open metrics.jsonl, W&B and the progress display of a run.

        Args:
            run_dir: Where metrics.jsonl and W&B's offline files lie.
            attempt: Number of this attempt, from 0.
            total_steps: Where the run ends.
            config: The resolved configuration: shown in W&B, and part of the run's id.
            wandb: auto: online when a key is set, else offline.
            project: W&B project.
            progress: auto: a live bar on a terminal, else a line now and then.
        """
        sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl")]
        mode = resolve_wandb_mode(wandb, os.environ)
        if mode != "off":
            sinks.append(WandbSink(run_dir, mode=mode, project=project, config=config))
        screen = open_progress(progress, total_steps=total_steps)
        return cls([*sinks, *([screen] if screen else [])], attempt=attempt)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row, with at least `step` and `images_seen`, to all sinks."""
        full = {**row, "time_unix_s": round(time.time(), 3), "attempt": self._attempt}
        for sink in self._sinks:
            sink.log(full)

    def close(self, *, exit_code: int = 0) -> None:
        """Close all sinks."""
        for sink in self._sinks:
            sink.close(exit_code=exit_code)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)


def send_to_wandb(
    run_dir: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
    wandb: WandbMode,
    project: str,
) -> None:
    """Send rows that metrics.jsonl has already, of a run that nobody trains now, to its W&B run."""
    mode = resolve_wandb_mode(wandb, os.environ)
    if mode == "off" or not rows:
        return
    sink = WandbSink(run_dir, mode=mode, project=project, config=config)
    for row in rows:
        sink.log(row)
    sink.close()


def run_id(run_dir: Path, config: Mapping[str, Any]) -> str:
    """Derive the W&B run id from name and config, and keep it: all attempts continue one run."""
    kept = run_dir / "wandb_run_id"
    if kept.exists():
        return kept.read_text(encoding="utf-8").strip()
    derived = _derive_id(run_dir, config)
    kept.write_text(f"{derived}\n", encoding="utf-8")
    return derived


def _derive_id(run_dir: Path, config: Mapping[str, Any]) -> str:
    text = json.dumps([run_dir.resolve().name, config], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def resolve_wandb_mode(
    wanted: WandbMode, environ: Mapping[str, str]
) -> Literal["offline", "online", "off"]:
    """Turn `auto` into online where W&B has a key, else offline; WANDB_MODE may forbid.

    Raises:
        BadInput: Not a mode.
    """
    match wanted:
        case "offline" | "online" | "off":
            return wanted
        case "auto":
            chosen = environ.get("WANDB_MODE")
            if chosen in {"offline", "disabled"}:
                return "offline" if chosen == "offline" else "off"
            return "online" if _has_key(environ) else "offline"
    raise BadInput(f"wandb={wanted!r}, need auto, offline, online or off.")


def _has_key(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL", _DEFAULT_HOST)).hostname or ""
    file = environ.get("NETRC", str(Path(environ.get("HOME", "/")) / ".netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
