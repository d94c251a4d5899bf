"""One of the processes that share a `kiln sample`: reads its config, draws its batches."""

import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.config_tools import SampleConfig
from trainer.errors import BadInput, BadWorld
from trainer.frozen import read_yaml
from trainer.runtime.env import read_rank_env
from trainer.runtime.local import die_with_parent
from trainer.sample import draw_share


def main(argv: Sequence[str]) -> int:
    """`python -m trainer.sample_rank CONFIG`, once per rank, with RANK and so on set."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    cfg, env = read_yaml(SampleConfig, Path(argv[0])), read_rank_env()
    part = cfg.part * env.world + env.rank
    try:
        draw_share(replace(cfg, part=part, parts=cfg.parts * env.world, ranks=1))
    except (BadInput, BadWorld) as error:
        print(f"kiln sample: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
