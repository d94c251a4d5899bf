import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from tests.observed_run import STEPS, write_run
from trainer.config_tools import ReportConfig
from trainer.errors import BadInput, BadWorld
from trainer.observe.evaluations import hold_metrics
from trainer.observe.report_serve import PageServer
from trainer.report import main, report_server


@contextmanager
def serving(run):
    with report_server(ReportConfig(run=str(run), dataset=None, output=None)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path, *, method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_only_its_own_name_and_get_are_answered(tmp_path):
    with serving(write_run(tmp_path)) as server:
        port = server.server_port
        assert server.server_address[0] == "127.0.0.1"
        status, page = ask(server, "/")
        assert status == 200
        assert b"connect-src 'self'" in page
        assert ask(server, "/data.json", host=f"localhost:{port}")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
            assert ask(server, "/data.json", host=host)[0] == 421
        for path in ("/config.yaml", "/../config.yaml", "/data.json?x"):
            assert ask(server, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            assert ask(server, "/", method=method)[0] == 501


def test_data_say_whether_the_run_goes_on(tmp_path):
    run = write_run(tmp_path)

    def told():
        return json.loads(ask(server, "/data.json")[1])

    with serving(run) as server:
        assert told()["state"] == "finished"
        with hold_metrics(run):
            assert told()["state"] == "running"
        (run / "plan.json").write_text(json.dumps({"total_steps": STEPS + 1}))
        assert told()["state"] == "stopped"
        assert told()["runs"][0]["training"]["axes"]["steps"][-1] == STEPS


def test_a_long_run_is_not_read_anew_for_every_question():
    made = []

    def slow():
        time.sleep(1.1)
        made.append("slow")
        return "page"

    with PageServer(0, slow, lambda: made.append("quick")) as server:
        assert {server.make("/") for _ in range(3)} == {b"page"}
        assert [server.make("/data.json") for _ in range(3)] == [b"null"] * 3
    assert made == ["slow", *["quick"] * 3]


def test_what_cannot_be_read_is_said_and_read_again_later(tmp_path, caplog):
    run = write_run(tmp_path)
    with serving(run) as server:
        whole = (run / "evaluation.json").read_text()
        (run / "evaluation.json").write_text("[]")
        status, said = ask(server, "/data.json")
        assert status == 503
        assert b"evaluation.json is damaged" in said
        assert "evaluation.json is damaged" in caplog.text
        (run / "evaluation.json").write_text(whole)
        assert ask(server, "/data.json")[0] == 200


def test_a_page_that_sees_the_state_change_gets_a_page_of_that_state():
    state = "running"

    def slow():
        time.sleep(1.1)
        return state

    with PageServer(0, slow, slow) as server:
        assert (server.make("/"), server.make("/data.json")) == (b"running", b'"running"')
        server._kept.clear()  # as after a while
        state = "finished"
        assert (server.make("/data.json"), server.make("/")) == (b'"finished"', b"finished")
        assert server.make("/data.json") == b'"finished"'


def test_a_port_that_is_taken_and_a_folder_that_is_no_run_are_refused(tmp_path):
    run = write_run(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadWorld, match=rf"port {port} of 127.0.0.1 cannot be had.*port=0"):
            main([f"run={run}", "--serve", f"port={port}"])
    with pytest.raises(BadInput, match="it is no run directory"):
        main([f"run={tmp_path}", "serve=true"])


def test_ctrl_c_ends_it(tmp_path):
    command = [sys.executable, "-m", "trainer.cli", "report", f"run={write_run(tmp_path)}"]
    with subprocess.Popen(
        [*command, "--serve"], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    ) as job:
        said = ""
        while "Ctrl-C" not in said:
            line = job.stdout.readline()
            assert line, said
            said += line
        os.kill(job.pid, signal.SIGINT)
        rest, _ = job.communicate(timeout=30)
    assert job.returncode == 0, rest
    assert "Traceback" not in rest
