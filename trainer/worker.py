"""One rank of a run: reads the frozen config, builds, restores, trains, saves."""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from trainer.accounting import idle_w_of
from trainer.bookkeeping import Bookkeeper
from trainer.build import build, find_checkpoint, restore
from trainer.config import TrainConfig
from trainer.errors import BadInput, BadWorld, disk_full
from trainer.frozen import read_yaml
from trainer.loop import train
from trainer.place import place, storage_errors
from trainer.plan import Plan, make_plan
from trainer.runtime.checkpoint import read_state
from trainer.runtime.comm import Comm, is_echo
from trainer.runtime.ending import cause, read_failures, read_stuck, write_failure
from trainer.runtime.env import read_rank_env
from trainer.runtime.local import die_with_parent, launcher_pid
from trainer.runtime.pulse import Pulse
from trainer.runtime.rundir import attempt_dir, checkpoints_of, complete
from trainer.runtime.saver import Superseded
from trainer.runtime.signals import EXIT_FINAL, EXIT_REQUEUE, StopFlag
from trainer.runtime.watchdog import Watchdog

log = logging.getLogger(__name__)


def plan_from(cfg: TrainConfig, run: Path) -> Plan:
    """Plan the rest of a run that may have taken steps of another size before."""
    there = complete(checkpoints_of(cfg))
    state = read_state(there[-1]) if there else None
    if state is None:
        return make_plan(cfg)
    return make_plan(cfg, step=state.step, images_seen=state.images_seen)


def on_world(cfg: TrainConfig, world: int) -> TrainConfig:
    """Return the config for so many ranks: `kiln supervise` may have taken fewer nodes."""
    if cfg.cluster.kind == "local":
        return cfg
    num_nodes = max(1, world // cfg.cluster.ranks_per_node)
    return replace(cfg, cluster=replace(cfg.cluster, num_nodes=num_nodes))


def work(run: Path) -> int:
    """Train the run as one of its ranks; return 0 when it is done, 85 when it should continue."""
    stop, pulse = StopFlag(), Pulse()
    env = read_rank_env()
    cfg = on_world(read_yaml(TrainConfig, run / "config.yaml"), env.world)
    plan = plan_from(cfg, run)
    with Watchdog(attempt_dir(run, env.attempt), env, cfg.watchdog, pulse):
        idle_w = idle_w_of(cfg, env)
        comm = Comm(env, cfg.cluster.device)
        with (
            storage_errors(place(cfg.data.dataset)),
            Bookkeeper(
                cfg, plan, comm, env, launcher_pid=launcher_pid(), idle_w=idle_w, pulse=pulse
            ) as books,
        ):
            with books.span("restore"):
                checkpoint = find_checkpoint(checkpoints_of(cfg), comm)
            built = build(cfg, plan, comm, read_state(checkpoint) if checkpoint else None)
            with books.span("restore"):
                progress = restore(built, checkpoint)
            if env.rank == 0:
                where = (progress.step, plan.total_steps)
                log.info("%s: attempt %d, step %d of %d", run, env.attempt, *where)
            books.begin(built, progress)
            finished = train(built.parts(), progress, stop, books)
            books.finish(progress)
        comm.close()
    if env.rank == 0:
        words = "finished" if finished else f"stopped by {stop.received or 'another rank'}, saved"
        log.info("%s: %s at step %d of %d", run, words, progress.step, plan.total_steps)
    return 0 if finished else EXIT_REQUEUE


def ended(work: Callable[[], int], run: Path, *, command: str = "train") -> int:
    """Do a rank's work and return its exit code; an error is said, and left to the others."""
    try:
        return work()
    except (BadInput, BadWorld) as error:
        print(f"kiln {command}: {error}", file=sys.stderr)
        code = (
            2 if isinstance(error, BadInput) else EXIT_FINAL if isinstance(error, Superseded) else 1
        )
        return _leave(run, str(error), code, command, echo=False)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            print(f"kiln {command}: {disk_full(error)}", file=sys.stderr)
            return _leave(run, disk_full(error), 1, command, echo=False)
        traceback.print_exc()
        last_line = traceback.format_exception_only(error)[-1].strip()
        return _leave(run, last_line, 1, command, echo=is_echo(error))


def _leave(run: Path, error: str, code: int, command: str, *, echo: bool) -> int:
    """Write down what ended this rank; an echo of another one's end gives way to that."""
    with suppress(BadWorld):  # started by hand: there are no others
        env = read_rank_env()
        folder = attempt_dir(run, env.attempt)
        write_failure(folder, env.rank, error, is_echo=echo, code=code)
        first = cause(read_failures(folder).values())
        if echo and read_stuck(folder) is not None:
            return EXIT_REQUEUE
        if echo and first is not None and not first.is_echo:
            print(f"kiln {command}: {first}", file=sys.stderr)
    return code


def be_rank(work: Callable[[], int], run: Path, *, command: str = "train") -> NoReturn:
    """Be a rank of a run that `kiln COMMAND` or a job started: work, and leave."""
    die_with_parent()
    # PyTorch 2.13 renames collectives that DeepSpeed 0.19 still calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    code = ended(work, run, command=command)
    sys.stdout.flush()
    sys.stderr.flush()
    # Other ranks may be dead: the collectives' threads would wait for them at a normal exit.
    os._exit(code)


def main(argv: Sequence[str]) -> NoReturn:
    """`python -m trainer.worker RUN_DIR`, once per rank, with RANK and so on set."""
    run = Path(argv[0])
    be_rank(partial(work, run), run)


if __name__ == "__main__":
    main(sys.argv[1:])
