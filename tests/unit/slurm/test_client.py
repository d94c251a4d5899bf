import pytest

from slurm import client
from slurm.client import Queued, SlurmError, _fields


def tool(folder, name, does):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)


def test_what_scontrol_prints_is_read_by_field():
    told = _fields(
        "JobId=12 ArrayJobId=9 JobName=a b c Comment=kiln:/x y/z "
        "NodeList=node[1-2] ExcNodeList= Reason=None Features=a&b Restarts=3"
    )
    assert told["JobId"] == "12"
    assert told["Comment"] == "kiln:/x y/z"
    assert told["ExcNodeList"] == ""
    assert told["Restarts"] == "3"


def test_no_slurm_and_a_slurm_that_refuses_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="there is no sbatch on this machine's PATH"):
        client.submit(tmp_path / "a.sbatch")
    tool(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    with pytest.raises(SlurmError, match="invalid partition"):
        client.submit(tmp_path / "a.sbatch")
    tool(tmp_path, "sbatch", "echo hello")
    with pytest.raises(SlurmError, match=r"'hello\\n', which is no job's number"):
        client.submit(tmp_path / "a.sbatch")
    tool(tmp_path, "sbatch", "echo '1234;kiln'")
    assert client.submit(tmp_path / "a.sbatch") == "1234"


def test_a_slurm_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(client, "_TIMEOUT_S", 0.2)
    tool(tmp_path, "squeue", "exec sleep 30")
    with pytest.raises(SlurmError, match="did not answer within"):
        client.queue()


def test_only_kilns_jobs_have_a_folder():
    fields = dict.fromkeys(Queued.__dataclass_fields__, "")
    assert Queued(**{**fields, "comment": "kiln:/a b"}).folder.as_posix() == "/a b"
    assert Queued(**{**fields, "comment": "mine"}).folder is None


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("00:10:00", 600),
        ("1-02:03:04", 93784),
        ("05:06", 306),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_spans_are_read_as_slurm_writes_them(told, expected):
    assert client.seconds(told) == expected
