"""Set power limits of GPUs, and always set them back."""

import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from trainer.errors import BadInput, BadWorld
from trainer.observe.energy import GpuReader
from trainer.observe.nvml import LimitForbidden, LimitRefused

log = logging.getLogger(__name__)

_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2),  # what Slurm may be told to warn with
)
_TRIES = 3
_RETRY_S = 0.2


class Stopped(BaseException):
    """A signal ended what must set limits back; no code in between may take it for an error."""


class LimitedGpus(GpuReader, Protocol):
    """What a power sweep needs of NVML; tests hand in a recording."""

    def default_limit_w(self, uuid: str) -> float:
        """Return the limit that the GPU has when nobody sets one; raises LimitRefused."""

    def limit_range_w(self, uuid: str) -> tuple[float, float]:
        """Return the least and the largest limit that can be set; raises LimitRefused."""

    def set_limit_w(self, uuid: str, watts: float) -> None:
        """Set the limit; raises LimitRefused."""


def gpus_of(known: Sequence[str], visible: Sequence[str] | None, *, num_ranks: int) -> list[str]:
    """Return the GPUs that so many ranks of this machine use, one each.

    Args:
        known: Unique ids of all GPUs, in NVML order.
        visible: Those that the job may use, as CUDA_VISIBLE_DEVICES names them; None: all.
        num_ranks: Ranks.

    Raises:
        BadInput: There are fewer, or they are no whole GPUs.
    """
    by_name = {str(idx): uuid for idx, uuid in enumerate(known)} | {uuid: uuid for uuid in known}
    named = list(known if visible is None else visible)[:num_ranks]
    if len(named) < num_ranks:
        advice = f"Try cluster.ranks_per_node={len(named)}, or ask" if named else "Ask"
        raise BadInput(
            f"cluster.ranks_per_node={num_ranks}, and this job has {len(named)} GPUs. {advice} for "
            "more."
        )
    strange = [name for name in named if name not in by_name]
    if strange:
        raise BadInput(
            f"CUDA_VISIBLE_DEVICES has {', '.join(strange)}, which NVML does not show as a GPU (it "
            f"shows {', '.join(known)}). Power limits are of whole GPUs: ask for those, not for "
            "slices (MIG)."
        )
    return [by_name[name] for name in named]


def check_limits(gpus: LimitedGpus, uuids: Sequence[str], watts: Sequence[float]) -> None:
    """Refuse what cannot be measured, before anything is changed.

    Raises:
        BadInput: A GPU has no counter or no such limit, or this user may not set it.
    """
    for uuid in uuids:
        try:
            if gpus.energy_mj(uuid) is None:
                raise BadInput(
                    f"GPU {uuid} has no energy counter (GPUs from Volta on have one), so that a "
                    "power sweep cannot measure it."
                )
            least_w, most_w = gpus.limit_range_w(uuid)
            beyond = [f"{limit:g}" for limit in watts if not least_w <= limit <= most_w]
            if beyond:
                raise BadInput(
                    f"watts has {', '.join(beyond)}, and GPU {uuid} takes limits from {least_w:g} "
                    f"to {most_w:g} W. Leave those out."
                )
            gpus.set_limit_w(uuid, gpus.limit_w(uuid))
        except LimitForbidden as error:
            raise BadInput(
                f"this user may not set the power limit of GPU {uuid} ({error}); NVIDIA's driver "
                "lets root alone do that, or who has CAP_SYS_ADMIN. A power sweep measures under "
                "limits that it sets: ask the site to run it, or to allow it to your job."
            ) from error
        except LimitRefused as error:
            raise BadInput(
                f"GPU {uuid} has no power limit that can be set ({error}), so that there is "
                "nothing to sweep."
            ) from error


def unusual(gpus: LimitedGpus, uuids: Sequence[str]) -> Iterator[str]:
    """Say of which GPUs the limit is not the default, and what sets it back."""
    for uuid in uuids:
        found_w, default_w = gpus.limit_w(uuid), gpus.default_limit_w(uuid)
        if found_w != default_w:
            yield (
                f"GPU {uuid} is limited to {found_w:g} W, and its default is {default_w:g} W: by "
                "the site, or by a sweep that was killed. It will be left as it is now; "
                f"`{_command(uuid, default_w)}` sets the default."
            )


@contextmanager
def restored(gpus: LimitedGpus, uuids: Sequence[str]) -> Iterator[None]:
    """Set the limits back that are found now, however the block ends; only kill -9 prevents it.

    Signals that end processes raise Stopped inside, once: what comes while limits are set back is
    ignored. For the main thread only.

    Raises:
        BadWorld: A limit cannot be set back; the message says how somebody can.
        Stopped: A signal came.
    """
    found_w = {uuid: gpus.limit_w(uuid) for uuid in uuids}
    is_armed = True

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal is_armed
        if is_armed:
            is_armed = False
            raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        # Two blocks: a signal may come between the end of the first one and that it is disarmed.
        try:
            yield
        finally:
            is_armed = False
    finally:
        try:
            _set_back(gpus, found_w)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _set_back(gpus: LimitedGpus, found_w: Mapping[str, float]) -> None:
    left = dict(found_w)
    for attempt in range(_TRIES):
        for uuid, watts in list(left.items()):
            try:
                gpus.set_limit_w(uuid, watts)
                del left[uuid]
            except LimitRefused as error:
                log.warning("GPU %s: its limit could not be set back: %s", uuid, error)
        if not left:
            return
        if attempt < _TRIES - 1:
            time.sleep(_RETRY_S)
    commands = "; ".join(_command(uuid, watts) for uuid, watts in left.items())
    raise BadWorld(
        f"the power limits of {', '.join(left)} could not be set back. As root: {commands}"
    )


def _command(uuid: str, watts: float) -> str:
    return f"nvidia-smi -i {uuid} -pl {watts:g}"
