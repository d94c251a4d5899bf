"""Write each row of metrics to metrics.jsonl (the truth), for W&B and a screen to show."""

import netrc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from trainer.errors import BadInput, BadWorld
from trainer.observe.evaluations import METRICS, hold_metrics
from trainer.observe.jsonl import JsonLines
from trainer.observe.progress import ProgressMode, Sink, open_progress
from trainer.observe.wandb_session import Level, Target, read_kept, send_all
from trainer.observe.wandb_sink import WandbSink

WandbMode = Literal["auto", "offline", "online", "off"]
_DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Two names of one service: wandb 0.31 goes to the second, with a login for either."""


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
        stuck: Callable[[], str | None] = lambda: None,
    ) -> "Sinks":
        """Open metrics.jsonl, W&B and the progress display of a run.

        Args:
            run_dir: Where metrics.jsonl and W&B's offline files lie.
            attempt: Number of this attempt, from 0.
            total_steps: Where the run ends.
            config: The resolved configuration: shown in W&B.
            wandb: auto: online when a key is set, else offline.
            project: W&B project.
            progress: auto: a live bar on a terminal, else a line now and then.
            stuck: Says who holds the work up, if it is stuck, for W&B to alert.
        """
        sinks: list[Sink] = [JsonlSink(run_dir / METRICS)]
        mode = resolve_wandb_mode(wandb, os.environ)
        if mode != "off":
            target = Target(run_dir, mode, project, config)
            sinks.append(WandbSink(target, attempt=attempt, stuck=stuck))
        screen = open_progress(progress, total_steps=total_steps)
        return cls([*sinks, *([screen] if screen else [])], attempt=attempt)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row, with at least `step` and `images_seen`, to all sinks."""
        full = {**row, "time_unix_s": round(time.time(), 3), "attempt": self._attempt}
        for sink in self._sinks:
            sink.log(full)

    def alert(self, kind: str, text: str, *, level: Level) -> None:
        """Have W&B, if it is on, tell the user; of each kind once in an attempt."""
        for sink in self._sinks:
            if isinstance(sink, WandbSink):
                sink.alert(kind, text, level=level)

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
    run_dir: Path, *, config: Mapping[str, Any], wandb: WandbMode, project: str
) -> None:
    """Send what is new in a run's folder to its W&B run; whoever trains the run now does that."""
    mode = resolve_wandb_mode(wandb, os.environ)
    if mode == "off" or not (run_dir / METRICS).exists():
        return
    held = hold_metrics(run_dir)
    if held is not None:
        with held:
            WandbSink(Target(run_dir, mode, project, config)).close()


def sync_wandb(run_dir: Path) -> int:
    """Send W&B what it lacks of a run's folder; return how many rows it lacked.

    Raises:
        BadInput: There are no metrics or no key, or somebody writes the metrics now.
        BadWorld: W&B cannot be reached, or does not take them.
    """
    target = wandb_target(run_dir)
    require_key()
    held = hold_metrics(run_dir)
    if held is None:
        raise BadInput(
            f"{run_dir / METRICS} is being written, or cannot be locked. Who writes it sends it "
            "to W&B: wait for its end."
        )
    with held:
        try:
            return send_all(target)
        except Exception as error:
            raise BadWorld(
                f"W&B does not take what it lacks of {run_dir} ({' '.join(str(error).split())}). "
                "Check WANDB_API_KEY, WANDB_BASE_URL and the network; the same command continues."
            ) from error


def wandb_target(run_dir: Path) -> Target:
    """Read to which W&B run a folder belongs, also if W&B was off until now.

    Raises:
        BadInput: There are no metrics.
    """
    kept, config_yaml = read_kept(run_dir), run_dir / "config.yaml"
    if not kept and config_yaml.exists():
        config = yaml.safe_load(config_yaml.read_text(encoding="utf-8"))
        kept = {"config": config, "project": config["logging"]["wandb_project"]}
    if not kept or not (run_dir / METRICS).exists():
        raise BadInput(
            f"{run_dir} has no metrics of a run. Give run= a folder with {METRICS} that `kiln "
            "train`, prepare or encode wrote."
        )
    return Target(run_dir, "online", kept["project"], kept["config"])


def require_key() -> None:
    """Say how to give a key.

    Raises:
        BadInput: W&B has none.
    """
    if not has_key(os.environ):
        raise BadInput(
            "got no key of W&B. Set WANDB_API_KEY, or run `wandb login`; for a server of your own "
            "set WANDB_BASE_URL too."
        )


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
            return "online" if has_key(environ) else "offline"
    raise BadInput(f"wandb={wanted!r}, need auto, offline, online or off.")


def has_key(environ: Mapping[str, str]) -> bool:
    """Whether W&B will find a key, in the environment or in netrc for its very host."""
    if environ.get("WANDB_API_KEY"):
        return True
    url = environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(url).netloc] if url else _DEFAULT_HOSTS
    file = environ.get("NETRC", str(Path(environ.get("HOME", "/")) / ".netrc"))
    try:
        logins = netrc.netrc(file)
    except (OSError, netrc.NetrcParseError):
        return False
    return any(logins.authenticators(host) is not None for host in hosts)
