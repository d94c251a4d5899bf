"""Build DeepSpeed's CPU communication op once, before several ranks need it."""

import fcntl
import logging
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

from trainer.errors import BadWorld

log = logging.getLogger(__name__)

_NAME = "deepspeed_shm_comm"
_BUILD = (
    "from deepspeed.accelerator import get_accelerator as a;"
    "a().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
)


def build_cpu_op() -> None:
    """Compile the op unless it is there; takes about half a minute, once per machine.

    Raises:
        BadWorld: There is no C++ compiler, or it failed.
    """
    folder = Path(_get_build_directory(_NAME, verbose=False))
    with (folder.parent / f"{_NAME}.kiln-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / f"{_NAME}.so").exists():
            return
        # We hold the real lock: a lock file of PyTorch's is left over from a build that was killed.
        (folder / "lock").unlink(missing_ok=True)
        if shutil.which("c++") is None and shutil.which("g++") is None:
            raise BadWorld(
                "DeepSpeed compiles a small C++ op at its first start and finds no compiler; "
                "install one, for example: apt install g++"
            )
        log.info("compiling DeepSpeed's CPU op, once (about half a minute) ...")
        done = subprocess.run(  # noqa: S603 - our own constant, no shell
            [sys.executable, "-c", _BUILD], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BadWorld(f"DeepSpeed's CPU op did not compile:\n{done.stderr[-2000:]}")


def load_cpu_op() -> None:
    """Build the op unless it is there, and hand it to DeepSpeed.

    DeepSpeed's own loader takes a lock file at every start, which a killed rank leaves behind and
    for which all later ones would wait without end.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder  # noqa: PLC0415 - slow import

    build_cpu_op()
    path = Path(_get_build_directory(_NAME, verbose=False)) / f"{_NAME}.so"
    spec = spec_from_file_location(_NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    OpBuilder._loaded_ops[_NAME] = module
