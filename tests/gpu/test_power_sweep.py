"""A power sweep of one real GPU; needs the right to set its limit."""

import json

import pytest

from tests.cluster.training import NETWORK, publish
from trainer.cli import main
from trainer.errors import BadInput
from trainer.observe.nvml import NvmlReader
from trainer.observe.power_limit import check_limits, gpus_of
from trainer.runtime.env import visible_gpus

pytestmark = pytest.mark.gpu


def test_a_gpu_draws_no_more_than_its_limit_and_gets_its_own_back(tmp_path):
    gpus = NvmlReader.open()
    assert gpus is not None
    (uuid,) = gpus_of(gpus.uuids(), visible_gpus(), num_ranks=1)
    least_w, _ = gpus.limit_range_w(uuid)
    try:
        check_limits(gpus, [uuid], [least_w])
    except BadInput as error:
        pytest.skip(str(error))
    found_w = gpus.limit_w(uuid)
    limit_w = round(least_w) + 1
    words = [
        *(f"data.dataset={publish(tmp_path)}", f"run={tmp_path}/sweep", *NETWORK),
        *("cluster.device=cuda", "cluster.ranks_per_node=1", "batch.micro_batch_images=32"),
        *(f"watts=[{limit_w}]", "steps=20"),
    ]
    assert main(["power-sweep", *words]) == 0
    assert gpus.limit_w(uuid) == found_w
    free, limited = json.loads((tmp_path / "sweep/power_sweep.json").read_text())["points"]
    assert limited["w"] <= 1.05 * limit_w
    assert 0 < limited["w"] <= 1.05 * free["w"]
