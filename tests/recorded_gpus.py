"""GPUs that tests play: what they draw follows a law, and what is set is written down."""

import json
import time
from pathlib import Path

from trainer.observe.nvml import LimitForbidden, LimitRefused

DEFAULT_W, LEAST_W, MOST_W = 400.0, 100.0, 500.0


class RecordedGpus:
    """Plays NVML. A GPU draws what it wants, but never more than its limit."""

    def __init__(self, *uuids, wants_w=350.0, clock_s=time.time, limits=None):
        self.wants_w, self.clock_s = wants_w, clock_s
        self.limits = dict.fromkeys(uuids, DEFAULT_W) | (limits or {})
        self.mj = dict.fromkeys(self.limits, 0.0)
        self.read_s = clock_s()
        self.log = []
        """Pairs of a GPU and the limit that it was given."""
        self.refuses = {}
        """By GPU, what setting its limit raises."""
        self.has_counter = True

    def uuids(self):
        return list(self.limits)

    def name(self, uuid):
        return "a recorded GPU"

    def power_w(self, uuid):
        return min(self.wants_w, self.limits[uuid])

    def energy_mj(self, uuid):
        self._count()
        return int(self.mj[uuid]) if self.has_counter else None

    def limit_w(self, uuid):
        return self.limits[uuid]

    def default_limit_w(self, uuid):
        return DEFAULT_W

    def limit_range_w(self, uuid):
        return LEAST_W, MOST_W

    def set_limit_w(self, uuid, watts):
        if uuid in self.refuses:
            raise self.refuses[uuid]
        self._count()
        self.limits[uuid] = watts
        self.log.append((uuid, watts))

    def _count(self):
        now_s = self.clock_s()
        for uuid in self.mj:
            self.mj[uuid] += self.power_w(uuid) * (now_s - self.read_s) * 1e3
        self.read_s = now_s


class SharedGpus(RecordedGpus):
    """The same for several processes: limits and counters lie in a file."""

    def __init__(self, folder, *uuids):
        self.file = Path(folder) / "gpus.json"
        super().__init__(*uuids)
        if uuids:
            self._save()

    def uuids(self):
        self._load()
        return super().uuids()

    def energy_mj(self, uuid):
        self._load()
        return super().energy_mj(uuid)

    def limit_w(self, uuid):
        self._load()
        return super().limit_w(uuid)

    def set_limit_w(self, uuid, watts):
        self._load()
        super().set_limit_w(uuid, watts)
        self._save()

    def history(self):
        self._load()
        return [tuple(each) for each in self.log]

    def _load(self):
        told = json.loads(self.file.read_text())
        self.limits, self.mj, self.read_s, self.log = told

    def _save(self):
        partial = self.file.with_name(".gpus.partial")
        partial.write_text(json.dumps([self.limits, self.mj, self.read_s, self.log]))
        partial.rename(self.file)


FORBIDDEN = LimitForbidden("Insufficient Permissions")
UNSUPPORTED = LimitRefused("Not Supported")
