"""Laws of sharing and of continuing: the same files, whoever draws them and however often."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.trainer.test_sample import CAPTIONS, config, load, pixels
from trainer import sample as command
from trainer.errors import BadInput, BadWorld
from trainer.frozen import thaw
from trainer.pictures import wanted
from trainer.runtime.rundir import locked
from trainer.sample_rank import main as rank_main

PROMPTS = 'prompts=["{}"]'.format('","'.join([*CAPTIONS, "a ring", "a star"]))
QUICK = ("sampling.batch_images=2", "num_reconstructions=1")


def draw(run, out, *words):
    assert command.run(config(run, PROMPTS, f"out={out}", *QUICK, *words)) == 0
    return files(out)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name[0] != "."}


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("sample_*.png")}


def test_the_same_command_gives_the_same_files(tiny_run, tmp_path):
    first, second = (draw(tiny_run, tmp_path / name) for name in "ab")
    assert first == second
    assert {"grid.png", "index.json", "sample_0004.png", "sample_0004.json"} <= set(first)


def test_threads_and_parts_change_no_byte(tiny_run, tmp_path):
    alone = draw(tiny_run, tmp_path / "alone")
    assert draw(tiny_run, tmp_path / "threads", "threads=2") == alone
    for part in (2, 0):
        draw(tiny_run, tmp_path / "parts", "parts=3", f"part={part}")
        assert not (tmp_path / "parts" / "grid.png").exists()
    assert draw(tiny_run, tmp_path / "parts", "parts=3", "part=1") == alone
    assert len(list((tiny_run / "ledger").glob("sample-*.jsonl"))) == 3


@pytest.mark.multiproc
def test_ranks_change_no_byte(tiny_run, tmp_path):
    alone = draw(tiny_run, tmp_path / "alone", "images_per_prompt=2")
    both = draw(tiny_run, tmp_path / "both", "images_per_prompt=2", "ranks=2")
    assert both == alone
    assert not list((tmp_path / "both").glob(".ranks-*"))


def test_what_is_there_is_not_drawn_again(tiny_run, tmp_path):
    draw(tiny_run, tmp_path / "o")
    before = stamps(tmp_path / "o")
    draw(tiny_run, tmp_path / "o")
    assert stamps(tmp_path / "o") == before


def test_what_is_missing_damaged_or_not_what_is_asked_is_drawn_again(tiny_run, tmp_path):
    out = tmp_path / "o"
    whole = draw(tiny_run, out)
    before = stamps(out)
    (out / "sample_0001.png").unlink()
    (out / "sample_0002.png").write_bytes(b"cut off")
    facts = json.loads((out / "sample_0003.json").read_text())
    (out / "sample_0003.json").write_text(json.dumps({**facts, "prompt": "another"}))
    assert draw(tiny_run, out) == whole
    changed = {name for name, stamp in stamps(out).items() if stamp != before[name]}
    assert changed == {"sample_0001.png", "sample_0002.png", "sample_0003.png"}
    assert draw(tiny_run, out, "sampling.seed=9") != whole


def test_more_pictures_of_a_prompt_leave_the_first_ones(tiny_run, tmp_path):
    draw(tiny_run, tmp_path)
    before = stamps(tmp_path)
    draw(tiny_run, tmp_path, "images_per_prompt=2")
    after = stamps(tmp_path)
    assert len(after) == 2 * len(before)
    assert {name: after[name] for name in before} == before


def test_no_two_pictures_share_their_noise():
    asked = [each.asked[1] for each in wanted(["a"] * 300, 7)]
    assert len(set(asked)) == 2100
    assert wanted(["a", "b"], 1)[1].asked == ("b", 1)


def test_only_files_that_kiln_named_are_removed(tiny_run, tmp_path):
    for name in ("holiday.png", "sample.png", "sample_0099.png", "sample_0099.json"):
        (tmp_path / name).write_bytes(b"")
    draw(tiny_run, tmp_path)
    assert (tmp_path / "holiday.png").exists()
    assert (tmp_path / "sample.png").exists()
    assert not list(tmp_path.glob("sample_0099*"))


def test_two_commands_do_not_fill_one_folder_at_once(tiny_run, tmp_path):
    with (
        locked(tmp_path, ".lock-0000"),
        pytest.raises(BadInput, match="is being filled with pictures by"),
    ):
        draw(tiny_run, tmp_path)


def start(run, out, *words):
    args = [PROMPTS, f"out={out}", *QUICK, "threads=1", "solver=ddim", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "sample", str(run), *args],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(path, process):
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError(path)


@pytest.mark.multiproc
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_by_force_it_loses_at_most_the_batches_in_flight(tiny_run, tmp_path, ranks):
    # Enough steps that there is time to kill it between two batches.
    words = ("images_per_prompt=4", "sampling.num_steps=60")
    out = tmp_path / "o"
    process = start(tiny_run, out, *words, f"ranks={ranks}")
    wait_for(out / "sample_0000_01.json", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    time.sleep(0.5)  # the kernel kills ranks with their parent
    there = [path.stem for path in out.glob("sample_*.json")]
    assert 2 <= len(there) < 20
    before = stamps(out)
    resumed = draw(tiny_run, out, *words)
    after = stamps(out)
    kept = [name for name in there if after[f"{name}.png"] == before[f"{name}.png"]]
    assert kept == there
    assert resumed == draw(tiny_run, tmp_path / "whole", *words)


@pytest.mark.multiproc
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_ends_at_the_next_step_and_says_how_to_go_on(tiny_run, tmp_path, ranks):
    out = tmp_path / "o"
    words = ("images_per_prompt=8", "sampling.num_steps=150")
    process = start(tiny_run, out, *words, f"ranks={ranks}")
    for name in ("sample_0000_01.json", "sample_0000_03.json"):  # of one rank and of the other
        wait_for(out / name, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert "the same command continues" in said
    assert not (out / "index.json").exists()
    assert len(list(out.glob("sample_*.json"))) < 40


@pytest.mark.multiproc
def test_a_rank_that_fails_is_named(tiny_run, tmp_path, capfd):
    with pytest.raises(BadWorld, match=r"rank . of 2 ended with code 2"):
        draw(tiny_run, tmp_path, "ranks=2", "watermark=much too long for 32 px")
    assert "kiln sample: watermark=" in capfd.readouterr().err


def test_a_rank_outside_of_a_launcher_says_so(tiny_run, tmp_path, monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "KILN_PARENT"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(thaw(config(tiny_run))))
    with pytest.raises(BadWorld, match="RANK"):
        rank_main([str(path)])


def test_a_part_beyond_the_parts_is_refused(tiny_run):
    with pytest.raises(BadInput, match="need 0 to parts - 1 = 1"):
        config(tiny_run, "parts=2", "part=2")


def test_the_command_and_the_sampler_draw_the_same_picture(tiny_run, tmp_path):
    draw(tiny_run, tmp_path)
    sampler = load(tiny_run)
    sampling = replace(config(tiny_run).sampling, batch_images=2)
    drawn = sampler.sample([*CAPTIONS, "a ring", "a star"], sampling)
    found = np.stack([pixels(path) for path in sorted(tmp_path.glob("sample_*.png"))])
    assert (found == drawn).all()
