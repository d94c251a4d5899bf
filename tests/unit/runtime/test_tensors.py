import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trainer.errors import BadInput
from trainer.place import place
from trainer.runtime import tensors
from trainer.runtime.tensors import read_wanted, sha256_of, stored_tensors, write_tensors

SOME = {
    "a": torch.arange(7.0),
    "empty": torch.zeros(0),
    "half": torch.arange(5).bfloat16(),
    "square": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_the_safetensors_package_and_kiln_read_each_others_files(tmp_path, where):
    path = tmp_path / "ours" if where == "disk" else place("memory://tensors/ours")
    size, sha256 = write_tensors(path, SOME)
    content = path.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
    assert sha256_of(path) == sha256
    (tmp_path / "copy").write_bytes(content)
    theirs = load_file(tmp_path / "copy")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in SOME.items())
    save_file(SOME, tmp_path / "theirs", metadata={"format": "pt"})
    for file in (path, tmp_path / "theirs"):
        targets = {name: torch.full_like(tensor, 9) for name, tensor in SOME.items()}
        stored = stored_tensors(file)
        assert {name: s.shape for name, s in stored.items()} == {
            n: t.shape for n, t in SOME.items()
        }
        read_wanted(stored[name].range(0, target) for name, target in targets.items())
        assert all(torch.equal(targets[name], tensor) for name, tensor in SOME.items())


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    cuts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40), st.integers(0, 40)), max_size=9),
    gap=st.sampled_from([0, 8, 1000]),
    block=st.sampled_from([1, 64, 1000]),
)
def test_any_ranges_are_read_however_they_share_requests(tmp_path_factory, sizes, cuts, gap, block):
    path = tmp_path_factory.mktemp("tensors") / "file"
    whole = {str(n): 100.0 * n + torch.arange(float(size)) for n, size in enumerate(sizes)}
    write_tensors(path, whole)
    stored = stored_tensors(path)
    asked = []
    for which, start, stop in cuts:
        name = str(which % len(sizes))
        low, high = sorted((start % (len(whole[name]) + 1), stop % (len(whole[name]) + 1)))
        asked.append((name, low, torch.empty(high - low)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "GAP_BYTES", gap)
        patch.setattr(tensors, "BLOCK_BYTES", block)
        read_wanted(stored[name].range(low, target) for name, low, target in asked)
    for name, low, target in asked:
        assert torch.equal(target, whole[name][low : low + len(target)])


def test_a_cut_file_and_one_that_is_none_are_refused(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, SOME)
    stored = stored_tensors(path)["square"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadInput, match="ends 4 bytes too early"):
        read_wanted([stored.range(0, torch.empty(12))])
    for content in (b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b'\x08\0\0\0\0\0\0\0{"a": 1}'):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="no safetensors file"):
            stored_tensors(path)
    header = json.dumps({"a": {"dtype": "F128", "shape": [1], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(BadInput, match="F128"):
        stored_tensors(path)
