"""A server on loopback that speaks W&B's protocol: openwandb, corrected where W&B's differs.

openwandb 0.5.25 takes any key, appends whatever comes instead of writing lines at their offset,
tells a client that continues a run that it has no lines yet, calls every run that ended finished,
and knows neither alerts nor workspaces. W&B's own server does not, and all that is what the tests
are about.
"""

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.tiny_source import free_port

READY_S = 60
HISTORY = "wandb-history.jsonl"
KEPT = {
    b"notifyScriptableRunAlert": ("alerts.jsonl", {"success": True}),
    b"upsertView": ("views.jsonl", {"view": {"id": "1", "name": "nw-kiln-v"}, "inserted": True}),
}
"""What openwandb does not know is kept in these files, and answered so."""

needs_wandb_server = pytest.mark.skipif(
    find_spec("openwandb") is None, reason="needs a server: pip install openwandb"
)


class WandbServer:
    """Keeps what it is sent in a folder, so that it can be killed and started again."""

    def __init__(self, folder, *, starts=True):
        self.folder, self.key, self.port = folder, secrets.token_hex(20), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process = None
        folder.mkdir(parents=True)
        if starts:
            self.start()

    def start(self):
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "tests.wandb_server", str(self.port)]
        env = {**os.environ, "OPENWANDB_DATA_DIR": str(self.folder), "WANDB_SERVER_KEY": self.key}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, cwd=Path(__file__).parents[1]
            )
        ends_s = time.monotonic() + READY_S
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            assert time.monotonic() < ends_s
            time.sleep(0.1)

    def _answers(self):
        try:
            urllib.request.urlopen(f"{self.url}/api/v2/auth/me", timeout=5).close()
        except urllib.error.HTTPError:
            return True  # it knows nobody without a key
        except OSError:
            return False
        return True

    def kill(self):
        """End it as a lost node ends."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def env(self):
        """What a user sets."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key}

    def run_folders(self):
        """Folders of all runs that were ever heard of."""
        return sorted((self.folder / "files").glob("*/*/*"))

    def history(self, run_id):
        """Rows of a run, line by line."""
        folders = [each for each in self.run_folders() if each.name == run_id]
        return [json.loads(line) for folder in folders for line in _lines(folder)]

    def ask(self, query):
        """Ask as the browser does."""
        request = urllib.request.Request(
            f"{self.url}/graphql",
            data=json.dumps({"query": query}).encode(),
            headers={"Content-Type": "application/json", "Authorization": _basic(self.key)},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]

    def run(self, run_id, project="kiln"):
        """Name, state, config and summary of a run."""
        fields = "displayName state config summaryMetrics"
        found = self.ask(f'{{project(name: "{project}") {{run(name: "{run_id}") {{{fields}}}}}}}')
        run = found["project"]["run"]
        return {**run, **{k: json.loads(run[k]) for k in ("config", "summaryMetrics")}}

    def alerts(self):
        """Variables of all alerts."""
        return self._kept("alerts.jsonl")

    def views(self):
        """Variables of all workspaces that were saved."""
        return self._kept("views.jsonl")

    def _kept(self, name):
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def _basic(key):
    return f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}"


class Gate:
    """Lets those in who have the key; keeps what the server behind it does not know."""

    def __init__(self, app, key, folder):
        self._app, self._key, self._folder = app, _basic(key).encode(), folder

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_key = dict(scope["headers"]).get(b"authorization") == self._key
        # Where files go, and where W&B counts how it is used, no key is shown.
        if not has_key and scope["method"] != "PUT" and not scope["path"].startswith("/sdk/"):
            await _answer(send, 401, {"errors": [{"message": "user is not logged in"}]})
            return
        if scope["path"] == "/graphql":
            await self._graphql(scope, await _body(receive), receive, send)
        else:
            await self._app(scope, receive, send)

    async def _graphql(self, scope, body, receive, send):
        asked = json.loads(body)
        for name, (file, told) in KEPT.items():
            if name in body:
                with (self._folder / file).open("a") as kept:
                    kept.write(json.dumps(asked["variables"]) + "\n")
                await _answer(send, 200, {"data": {name.decode(): told}})
                return
        if not asked.get("operationName"):
            asked.pop("operationName", None)  # "" is none for W&B's server
        ahead = [{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}]

        async def rest():
            return ahead.pop() if ahead else await receive()

        await self._app(scope, rest, send)


async def _body(receive):
    body, is_more = b"", True
    while is_more:
        message = await receive()
        body, is_more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _answer(send, status, content):
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


def _correct():
    """Let openwandb do what W&B's server does."""
    from openwandb import database, file_stream, graphql_schema, storage  # noqa: PLC0415

    stream, to_type = file_stream.process_file_stream, graphql_schema._run_to_type

    def process_file_stream(entity, project, run_id, payload, user_id=None):
        there = _lines(storage.get_run_files_dir(entity, project, run_id))
        if told := payload.get("files", {}).get(HISTORY):
            assert told["offset"] <= len(there), "lines are missing before these"
            told["content"] = told["content"][len(there) - told["offset"] :]
            if not told["content"]:
                del payload["files"][HISTORY]  # otherwise it writes an empty line
        answer = stream(entity, project, run_id, payload, user_id=user_id)
        if payload.get("complete") and payload.get("exitcode"):
            database.update_run_state(run_id, "failed")
        return answer

    def run_to_type(run):
        told = to_type(run)
        lines = _lines(storage.get_run_files_dir(told._entity_name, told._project_name, told.name))
        told.history_line_count = len(lines)
        told.history_tail = json.dumps(lines[-1:])
        told.events_tail = "[]"
        config = json.loads(told._config_json).get("_wandb", {}).get("value", {})
        told._config_json = json.dumps({**json.loads(told._config_json), **config})
        return told

    file_stream.process_file_stream, graphql_schema._run_to_type = process_file_stream, run_to_type


def _lines(folder):
    path = folder / HISTORY
    return path.read_text().splitlines() if path.exists() else []


def serve(port, key):
    """Serve until killed."""
    import uvicorn  # noqa: PLC0415
    from openwandb import config, server  # noqa: PLC0415

    _correct()
    app = Gate(server.app, key, config.DATA_DIR)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    serve(int(sys.argv[1]), os.environ["WANDB_SERVER_KEY"])
