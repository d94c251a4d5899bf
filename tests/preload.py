"""What a forked rank has imported already."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401

import trainer.bookkeeping
import trainer.build  # noqa: F401
