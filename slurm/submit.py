"""Hand a script to sbatch; the only side effect of this package."""

import re
import subprocess
from pathlib import Path


def submit(script: Path) -> int:
    """Submit `script` and return the job's number.

    Raises:
        RuntimeError: There is no sbatch here, or it refused; its own words are in the message.
    """
    try:
        done = subprocess.run(  # noqa: S603 - sbatch of the site, no shell
            ["sbatch", "--parsable", str(script)],  # noqa: S607 - found on PATH as users do
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise RuntimeError(
            f"there is no sbatch on this machine. Copy {script.parent} to a login node's shared "
            f"file system and run: sbatch {script}"
        ) from error
    number = re.match(r"\d+", done.stdout)
    if done.returncode or number is None:
        raise RuntimeError(f"sbatch refused {script}: {done.stderr.strip() or done.stdout.strip()}")
    return int(number.group())
