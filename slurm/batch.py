"""One attempt of a training run, on the first node of a job: check, run the ranks, judge, requeue.

The sbatch script becomes this process. It needs nothing but Python: the ranks may live in a
container.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from slurm import client
from slurm.attempts import (
    FINAL,
    Attempt,
    Cause,
    End,
    begin_attempt,
    end_attempt,
    gives_up,
    read_attempts,
)
from slurm.judgement import EXIT_REFUSED, Evidence, Judgement, judge
from slurm.lost import close_lost
from slurm.preflight import asking, judge_answers, read_answers
from slurm.rendezvous import rendezvous
from slurm.runfile import STOP, read_json, read_spec, saved_step
from slurm.spec import EARLY_WARNING_S, Checks, RunSpec
from slurm.step import TOO_LONG, Ended, Steps
from slurm.words import from_slurm
from trainer.runtime.ending import cause, read_failures, read_stuck, stuck_ranks
from trainer.runtime.signals import EXIT_FINAL, EXIT_REQUEUE

log = logging.getLogger(__name__)

_CODES: Mapping[Cause, int] = {
    "finished": 0,
    "refused": EXIT_REFUSED,
    "superseded": EXIT_FINAL,
    "gave_up": EXIT_FINAL,
}
_REQUEUED_WITHIN_S = 300
_RANKS_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Batch:
    """A job that works on a run."""

    def __init__(self, run: Path, spec: RunSpec, env: Mapping[str, str]) -> None:
        """Read what Slurm says of the job, and begin an attempt."""
        self._run, self._spec = run, spec
        self._steps = Steps(spec.stop_signal)
        self._job_id = env["SLURM_JOB_ID"]
        # A whole array has the number of its last task.
        self._name = (
            f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
            if "SLURM_ARRAY_JOB_ID" in env
            else self._job_id
        )
        self._nodes = client.hostnames(env["SLURM_JOB_NODELIST"])
        self._restarts = env.get("SLURM_RESTART_COUNT", "0")
        close_lost(self._own_attempts())
        self._before = self._own_attempts()
        self._attempt = begin_attempt(
            run, self._job_id, self._nodes, eligible_unix_s=self._eligible_unix_s()
        )
        meet = rendezvous(self._nodes[0])
        self._address = meet["MASTER_ADDR"]
        logs = self._attempt.folder
        # Those of a shell that was itself started by a launcher would be every rank's.
        inherited = {name: value for name, value in env.items() if name not in _RANKS_OWN}
        self._env = {
            **inherited,
            **spec.env,
            **meet,
            "KILN_ATTEMPT": str(self._attempt.number),
            "NCCL_DEBUG_FILE": f"{logs}/nccl.%h.%p.log",
            "TORCH_FR_DUMP_TEMP_FILE": f"{logs}/nccl_trace_rank_",
        }

    def work(self) -> int:
        """Return the exit code of the job."""
        reason = self._gives_up(self._before)
        if reason is not None:
            return self._end(Judgement("gave_up", reason, {}))
        self._say(f"on {' '.join(self._nodes)}, from step {self._attempt.begin.saved_step}")
        return self._end(self._check() or self._train())

    def _check(self) -> Judgement | None:
        """Look at the nodes; None when all are well."""
        checks = self._spec.checks
        if checks is None:
            return None
        folder = self._attempt.folder / "preflight"
        asked_unix_s = time.time()
        with asking(folder, checks, self._address):
            asked = self._srun(
                1,
                (),
                (sys.executable, "-m", "slurm.preflight", str(folder)),
                log="preflight",
                timeout_s=checks.timeout_s,
            )
        if self._is_told_to_stop(asked):
            return self._judge(Ended(EXIT_REQUEUE, ()))
        bad = judge_answers(
            self._nodes,
            read_answers(folder),
            asked_unix_s=asked_unix_s,
            heard_unix_s=time.time(),
            max_clock_skew_s=checks.max_clock_skew_s,
        )
        if bad:
            why = "; ".join(f"{node} {what}" for node, what in bad.items())
            return Judgement("bad_node", why, dict.fromkeys(bad, 1.0))
        return self._meet(checks)

    def _meet(self, checks: Checks) -> Judgement | None:
        """Let the nodes add numbers together; None when they can, at the second try at the latest.

        A node is blamed for what happens twice, the second time at another port.
        """
        why, suspects = "", dict[str, float]()
        for log_name in ("all_reduce", "all_reduce_again"):
            met = self._srun(
                1, self._spec.srun, self._spec.meet, log=log_name, timeout_s=checks.timeout_s
            )
            if self._is_told_to_stop(met):
                return self._judge(Ended(EXIT_REQUEUE, ()))
            if met.code == TOO_LONG:
                why = f"the nodes did not add numbers together within {checks.timeout_s} s"
                return Judgement("bad_node", f"{why}; see {log_name}_*.log", {})
            if met.code == 0:
                return None
            first = str(met.died[0]) if met.died else f"code {met.code}"
            suspects = {died.node: 0.5 for died in met.died[:1]}
            why = f"the nodes cannot add numbers together ({first}); see {log_name}_*.log"
            self._say(why)
            self._env |= rendezvous(self._nodes[0])
        return Judgement("bad_node", why, suspects)

    def _is_told_to_stop(self, ended: Ended) -> bool:
        """Whether Slurm told the batch script, or the tasks of this step."""
        return bool(self._steps.heard) or ended.code == EXIT_REQUEUE

    def _train(self) -> Judgement:
        spec = self._spec
        return self._judge(self._srun(spec.ranks_per_node, spec.srun, spec.worker, log="rank"))

    def _judge(self, ended: Ended) -> Judgement:
        spec, folder = self._spec, self._attempt.folder
        job: dict[str, str] = {}
        with suppress(client.SlurmError):
            job = client.show_job(self._name)
        first = cause(read_failures(folder).values())
        return judge(
            Evidence(
                ended=ended,
                error=str(first) if first else None,
                error_code=first.code if first and not first.is_echo else 0,
                stuck=read_stuck(folder),
                stuck_nodes=[
                    self._nodes[rank // spec.ranks_per_node] for rank in stuck_ranks(folder)
                ],
                job=job,
                is_asked_to_stop=self._is_asked_to_stop(),
                is_near_walltime=_is_near(job, spec.warn_before_kill_s + EARLY_WARNING_S),
            )
        )

    def _srun(
        self,
        tasks_per_node: int,
        options: Sequence[str],
        command: Sequence[str],
        *,
        log: str,
        timeout_s: float | None = None,
    ) -> Ended:
        num_nodes = len(self._nodes)
        return self._steps.srun(
            f"--nodes={num_nodes}",
            f"--ntasks={num_nodes * tasks_per_node}",
            f"--ntasks-per-node={tasks_per_node}",
            "--distribution=block",
            # Threads of a rank that read and write may take any core of the job's.
            "--cpu-bind=none",
            "--kill-on-bad-exit=1",
            "--wait=60",
            "--unbuffered",
            f"--output={self._attempt.folder}/{log}_%5t.log",
            *options,
            *command,
            env=self._env,
            log=self._attempt.folder / f"srun_{log}.log",
            timeout_s=timeout_s,
        )

    def _end(self, found: Judgement) -> int:
        """Write down what ended the attempt, and ask for another one if that makes sense."""
        if self._is_left_behind():
            self._say("Slurm has given up on this node, and the job goes on without it")
            return EXIT_FINAL
        ended = self._ended(found)
        if found.cause not in FINAL:
            reason = self._gives_up([*self._before, ended])
            if reason is not None:
                ended = self._ended(Judgement("gave_up", reason, found.suspects))
        assert ended.end is not None
        end_attempt(ended, ended.end)
        self._say(f"{ended.end.cause}: {ended.end.why}")
        if ended.end.cause not in FINAL:
            self._requeue(ended.end)
        return _CODES.get(ended.end.cause, EXIT_REQUEUE)

    def _ended(self, found: Judgement) -> Attempt:
        end = End(
            cause=found.cause,
            why=found.why,
            unix_s=time.time(),
            saved_step=saved_step(self._run),
            suspects=dict(found.suspects),
        )
        return replace(self._attempt, end=end)

    def _eligible_unix_s(self) -> float | None:
        with suppress(client.SlurmError):
            return from_slurm(client.show_job(self._name).get("EligibleTime", ""))
        return None

    def _own_attempts(self) -> list[Attempt]:
        return [each for each in read_attempts(self._run) if each.begin.job_id == self._job_id]

    def _gives_up(self, attempts: Sequence[Attempt]) -> str | None:
        return gives_up(
            attempts,
            saved_step(self._run),
            max_restarts=self._spec.max_restarts,
            no_progress=self._spec.no_progress_attempts,
        )

    def _is_left_behind(self) -> bool:
        """Whether the job was restarted meanwhile: then its files are another attempt's."""
        try:
            job = client.show_job(self._name)
        except client.SlurmError:
            return False
        return job.get("Restarts", self._restarts) != self._restarts

    def _is_asked_to_stop(self) -> bool:
        asked = read_json(self._run / STOP)
        return asked is not None and asked["unix_s"] > self._attempt.begin.unix_s

    def _requeue(self, end: End) -> None:
        """Put the job back into the queue, and wait to be ended for it."""
        try:
            client.requeue(self._name)
        except client.SlurmError as error:
            self._say(f"could not be requeued: {error}")
            return
        bad = [node for node, sure in end.suspects.items() if sure >= 1]
        deadline_s = time.monotonic() + _REQUEUED_WITHIN_S
        while "SIGTERM" not in self._steps.heard and time.monotonic() < deadline_s:
            time.sleep(0.1)
        if bad:
            # A job that waits may be told which nodes to leave alone; `kiln supervise` does it
            # better, because it remembers.
            with suppress(client.SlurmError):
                client.update(self._name, ExcNodeList=",".join(bad))

    def _say(self, what: str) -> None:
        log.info("%s, attempt %d: %s", self._run.name, self._attempt.number, what)


def _is_near(job: Mapping[str, str], within_s: float) -> bool:
    """Whether a job has at most so many seconds left of its walltime.

    Not by EndTime, which Slurm moves when it cancels or preempts.
    """
    ran_s, limit_s = (client.seconds(job.get(name, "")) for name in ("RunTime", "TimeLimit"))
    return ran_s is not None and limit_s is not None and limit_s - ran_s <= within_s


def main(argv: Sequence[str]) -> int:
    """`python -m slurm.batch RUN`, as the command of an sbatch script."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run = Path(argv[0])
    spec = read_spec(run)
    if spec is None:
        log.error("%s was not launched by `kiln launch`.", run)
        return EXIT_REFUSED
    return Batch(run, spec, os.environ).work()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
