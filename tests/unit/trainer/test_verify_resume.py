from collections import Counter

import pytest

from tests.latents_without_encoders import make_dataset
from tests.streams import law_of
from trainer.data.stream import advance, begin, to_json
from trainer.errors import BadInput
from trainer.verify_resume import VerifyResumeConfig, _encoding, compare, main, repeated
from trainer.verify_resume_attempts import Seen, Step

LAW = law_of([4, 4])


def step(first, samples, *, size=1):
    state = begin(LAW, [1.0])
    for _ in range(first + size):
        state = advance(LAW, state, 4)
    return Step(first, size, Seen(samples), to_json(LAW, state))


WHOLE = [step(n, [(4 * n % 8 + k, n // 2) for k in range(4)]) for n in range(4)]


def test_steps_of_any_size_with_the_same_samples_are_identical():
    assert compare(WHOLE, WHOLE) is None
    double = [step(n, WHOLE[n].seen + WHOLE[n + 1].seen, size=2) for n in (0, 2)]
    assert compare(WHOLE, double) is None
    assert compare(WHOLE, [WHOLE[0], step(1, WHOLE[1].seen + WHOLE[2].seen, size=2)]) is None
    assert repeated(LAW, WHOLE, num_bad=0) is None


def test_the_first_step_that_differs_is_named_with_its_samples():
    # Of step 1, sample 5 is missing and 9 stands there; step 3 is wrong as well.
    wrong = [WHOLE[0], step(1, [(4, 0), (9, 0), (6, 0), (7, 0)]), WHOLE[2], step(3, [(1, 1)])]
    assert compare(WHOLE, wrong) == (
        "different at step 1: 1 samples are missing (0000000000000005@0), "
        "1 are too many (0000000000000009@0)"
    )
    assert compare(WHOLE, [step(2, WHOLE[2].seen, size=2)]).startswith(
        "different at steps 2 to 3: 4 samples are missing"
    )
    # An epoch too early is another sample; a sample twice is too many; ids have no sign.
    early = [step(2, [(id_, 0) for id_, _ in WHOLE[2].seen])]
    assert "4 samples are missing" in compare(WHOLE, early)
    twice = [step(0, WHOLE[0].seen + Counter([(-1, 0)]))]
    assert "0 samples are missing, 1 are too many (ffffffffffffffff@0)" in compare(WHOLE, twice)


def test_samples_that_come_twice_or_never_in_an_epoch_are_named():
    twice = [*WHOLE[:1], step(1, [(0, 0), (5, 0), (6, 0), (7, 0)])]
    assert repeated(LAW, twice, num_bad=0) == (
        "different: 1 samples came twice in an epoch (0000000000000000@0)"
    )
    never = [*WHOLE[:1], step(1, [(4, 0), (5, 0)])]
    assert repeated(LAW, never, num_bad=0) == "different: epoch 0 had 6 of 8 samples"
    # The second epoch is not over yet, and others stand for bad samples.
    assert repeated(LAW, WHOLE[:3], num_bad=0) is None
    assert repeated(LAW, twice, num_bad=1) is None


def test_worlds_that_cannot_share_a_step_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"not a multiple of all worlds=\[2, 3\]. Try .*=12"):
        main([f"dataset={tmp_path}", "worlds=[2,3]", "global_batch_images=8"])
    with pytest.raises(BadInput, match=r"worlds=\[\] leaves nobody to read"):
        main([f"dataset={tmp_path}", "worlds=[]"])


def test_the_encoding_is_the_only_one_or_must_be_named(tmp_path):
    def chosen(encoding):
        given = {"seed": 0, "global_batch_images": 8, "steps": 1, "kills": 0, "worlds": (1,)}
        cfg = VerifyResumeConfig(
            dataset=dataset, encoding=encoding, cache=None, cache_gb=1.0, **given
        )
        return _encoding(cfg)

    dataset = make_dataset(tmp_path)
    assert (chosen(None), chosen("tiny"), chosen("pictures")) == ("tiny", "tiny", None)
    with pytest.raises(BadInput, match=r"encoding=large is none of this dataset. Give .* pictures"):
        chosen("large")
    (dataset / "encodings/other").mkdir()
    text = (dataset / "encodings/tiny/encoding.json").read_text()
    (dataset / "encodings/other/encoding.json").write_text(text.replace('"tiny"', '"other"'))
    with pytest.raises(BadInput, match=r"encoding=null leaves a choice. Give one of: other, tiny"):
        chosen(None)
    for path in dataset.glob("encodings/*/encoding.json"):
        path.unlink()
    assert chosen(None) is None
