"""What a forked rank has imported already."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed

# Compiles something when it is imported, for which PyTorch's compiler is imported: seconds.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import trainer.bookkeeping
import trainer.build  # noqa: F401
