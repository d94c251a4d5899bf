"""Rank 1 fails at once; the others would wait for it for a minute."""

import os
import time

if os.environ["RANK"] == "1":
    raise RuntimeError("the disk of rank 1 is on fire")
time.sleep(60)
