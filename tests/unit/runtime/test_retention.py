from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_config
from trainer.runtime.retention import fates

some = st.none() | st.integers(1, 40)
images_seen = st.lists(st.integers(1, 200), unique=True, min_size=1).map(sorted)


@given(images=images_seen, last=st.integers(1, 5), every=some, ema=some, best=st.integers(0, 200))
def test_the_last_the_best_and_one_of_each_stretch_stay(images, last, every, ema, best):
    cfg = replace(
        tiny_config().checkpoint,
        keep_last=last,
        keep_every_images=every,
        keep_ema_every_images=ema,
    )
    decided = fates(images, cfg, best=best)
    assert list(decided) == images
    assert all(decided[n] == "whole" for n in images[-last:])
    assert decided.get(best, "whole") == "whole"
    for n in images:
        if every and n // every > 0:
            assert any(decided[m] == "whole" and m // every == n // every for m in images)
        if ema and n // ema > 0:
            assert any(decided[m] != "gone" and m // ema == n // ema for m in images)
    assert decided == fates(images, cfg, best=best)
    left = [n for n in images if decided[n] != "gone"]
    assert dict(fates(left, cfg, best=best)) == {n: decided[n] for n in left}, "deciding is final"
    if not every and not ema:
        assert len(left) <= last + 1
