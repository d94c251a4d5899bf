"""The `kiln` command: finds the subcommand's module and prints user errors in one message."""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from trainer.errors import BadInput, BadWorld, disk_full

# Imported by name, so that a laptop's `kiln --help` loads neither torch nor img2dataset.
COMMANDS = {
    "demo": ("trainer.demo", "the whole way on this machine: URLs in, pictures and a report out"),
    "source": (
        "data_prep.sources",
        "make a folder of captioned pictures and a parquet of its URLs",
    ),
    "serve": ("data_prep.serve", "serve such a folder on loopback, with its faults"),
    "prepare": ("data_prep.prepare", "download, check and publish image-text URLs as WebDataset"),
    "index": ("data_prep.index", "make a dataset of any WebDataset where it lies, from headers"),
    "encode": ("data_prep.encode", "turn pictures and captions into latents and text states"),
    "verify": ("data_prep.verify", "re-hash and cross-check a published dataset"),
    "stats": ("data_prep.stats", "say what is in a published dataset, as tables and a page"),
    "dedup": ("data_prep.dedup", "remove or weigh down exact and near-duplicate pictures"),
    "remove": ("data_prep.remove", "take samples out by key, URL or hash; no tar is rewritten"),
    "plan": ("trainer.plan_page", "print what a training run will take; touches nothing"),
    "stream-plan": (
        "trainer.stream_plan",
        "print epochs, windows, cache and requests of a run's data; reads manifests only",
    ),
    "train": ("trainer.train", "train, or continue a run; the same command again resumes"),
    "checkpoints": ("trainer.checkpoints", "list a run's checkpoints and re-hash all their files"),
    "sample": (
        "trainer.sample",
        "draw labelled pictures from prompts with a run's weights",
    ),
    "evaluate": ("trainer.evaluate", "score samples against their captions"),
    "export": ("trainer.export", "write a run as a diffusers pipeline folder"),
    "sync": ("trainer.sync", "send to W&B what it lacks of a run, and no row twice"),
    "dashboard": ("trainer.dashboard", "make a W&B workspace with the report's charts"),
    "report": ("trainer.report", "write the run's story as one HTML file"),
    "order": ("trainer.order", "print which samples each step of a run took"),
    "where": ("trainer.where", "say which steps of a run saw a sample"),
    "verify-resume": (
        "trainer.verify_resume",
        "kill real readers of a dataset at random, resume them, and compare what they gave",
    ),
    "pipeline": (
        "trainer.pipeline",
        "from URLs to an evaluated model: all stages, here or as Slurm jobs",
    ),
    "launch": (
        "trainer.launch_sweep",
        "submit a training run to Slurm, frozen; again: continue it; -m: a sweep",
    ),
    "power-sweep": (
        "trainer.power_sweep",
        "measure J/image against images/s under power limits of this machine's GPUs",
    ),
    "status": ("slurm.status", "what becomes of all runs, or of one: job, step, speed, time left"),
    "logs": ("slurm.logs", "print a rank's log, or the job's; -f follows it over restarts"),
    "explain": ("slurm.explain", "what happened to a run, attempt by attempt, and what comes next"),
    "stop": ("slurm.stop", "save and end a run, a sweep or a pipeline"),
    "supervise": ("slurm.supervise", "keep jobs alive: restart at once, without bad nodes"),
}
EXIT_INTERRUPTED = 130


def usage() -> str:
    """Return the help text of `kiln` itself."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {says}" for name, (_, says) in COMMANDS.items())
    return (
        "Kiln: from image-text URLs to a latent diffusion model, on a laptop or a cluster.\n\n"
        f"usage: kiln COMMAND [key=value ...]\n\n{rows}\n\n"
        "kiln COMMAND --help lists the command's keys and what they mean.\n"
        "The first thing to type: kiln demo"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        print(f"kiln: got the command '{name}'; known: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("botocore", "aiobotocore"):  # they would say where they found credentials
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        module = importlib.import_module(COMMANDS[name][0])
        return int(module.main(rest))
    except (BadInput, BadWorld) as error:
        if "KILN_TRACEBACK" in os.environ:
            raise
        print(f"kiln {name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"kiln {name}: {disk_full(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"kiln {name}: interrupted; the same command continues.", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
