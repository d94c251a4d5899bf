"""Read pictures of tars without an index through a plain `webdataset` pipeline, in rough order."""

import logging
import random
import tarfile
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.decode import decode_square
from trainer.data.headers import split_name
from trainer.data.index import PICTURES
from trainer.data.shards import key_ids
from trainer.data.sources import PictureBatch
from trainer.data.tars import list_tars
from trainer.errors import BadData, BadInput
from trainer.place import storage_errors

log = logging.getLogger(__name__)

_EXTENSIONS = (*PICTURES, "jpeg")
_BROKEN = (BadData, ValueError, FileNotFoundError, EOFError, tarfile.TarError, zlib.error)
_LEAST_BAD = 10


def foreign_batches(  # noqa: PLR0913 - a stream's, and a buffer's
    tars: Sequence[str],
    *,
    seed: int,
    images_seen: int,
    rank: int,
    world: int,
    micro_batch_images: int,
    epoch_images: int,
    side_px: int,
    device: torch.device,
    shuffle_buffer: int = 1000,
    max_bad_frac: float = 0.01,
) -> Generator[PictureBatch]:
    """Yield one rank's micro-batches, without end.

    Each rank has tars of its own. They are shuffled for each pass, and samples within a buffer, by
    `seed` and `images_seen`: a resumed run begins a new pass, and sees some pictures again before
    others. Broken tars and pictures are passed over, with a warning.

    Args:
        tars: Patterns as `list_tars` takes them.
        seed: Of the shuffling.
        images_seen: Pictures that the run has trained on, over all ranks.
        rank: Which of the ranks this is.
        world: Number of ranks.
        micro_batch_images: Pictures of a batch.
        epoch_images: About how many pictures there are; only the visits depend on it.
        side_px: Pictures are resized and centre-cropped to it.
        device: Where the batches go.
        shuffle_buffer: Encoded pictures in memory to draw from.
        max_bad_frac: Largest share of broken tars and pictures; ten are always let pass.

    Raises:
        BadInput: `webdataset` is not installed, there are fewer tars than ranks, no picture is in
            them, or too much of it is broken.
    """
    webdataset = _webdataset()
    paths = [path for pattern in tars for path in list_tars(pattern)]
    if len(paths) < world:
        raise BadInput(
            f"{len(paths)} tars for {world} ranks, and each needs one of its own. Give more tars, "
            "or `kiln index` them: an indexed dataset is dealt by samples."
        )
    log.warning(
        "the tars have no index: resuming is approximate (some pictures come again before others "
        "were seen at all), and so are epochs. `kiln index` makes them exact."
    )
    judge = _Judge(max_bad_frac)
    batch: list[tuple[str, NDArray[np.uint8]]] = []
    done = images_seen
    for number in count():
        draw = random.Random(f"{seed} {images_seen} {rank} {number}")  # noqa: S311 - an order
        order = draw.sample(paths[rank::world], len(paths[rank::world]))
        good_before = judge.num_good
        with storage_errors(order[0]):
            for key, picture in _pictures(webdataset, order, draw, shuffle_buffer, side_px, judge):
                batch.append((key, picture))
                if len(batch) == micro_batch_images:
                    yield _to_batch(batch, visit=done // epoch_images, device=device)
                    done += micro_batch_images * world
                    batch = []
        if judge.num_good == good_before:
            raise BadInput(
                f"{order[0]} and the {len(order) - 1} other tars of this rank have no picture "
                f"that can be read. Need members named KEY.jpg, KEY.png or KEY.webp."
            )


class _Judge:
    """Counts what is good and what is broken, and says when it is too much."""

    def __init__(self, max_bad_frac: float) -> None:
        self.num_good = self._num_bad = 0
        self._max_bad_frac = max_bad_frac

    def pass_over(self, error: Exception) -> bool:
        """Let a broken tar or picture pass; what is not their fault goes on up."""
        if not isinstance(error, _BROKEN):
            raise error
        self._num_bad += 1
        log.warning("passed over: %s", error.args[0] if error.args else error)
        total = self.num_good + self._num_bad
        if self._num_bad > max(_LEAST_BAD, self._max_bad_frac * total):
            raise BadInput(
                f"{self._num_bad} of {total} tars and pictures are broken, the last: {error}. Need "
                f"at most {self._max_bad_frac:.1%}. Put them right, or raise data.max_bad_frac."
            ) from error
        return True


def _webdataset() -> Any:  # noqa: ANN401 - it has no types
    try:
        return import_module("webdataset")
    except ImportError as error:
        raise BadInput(
            "data without an index is read with webdataset, which is not installed: "
            "pip install -e '.[foreign]', or make an index: kiln index."
        ) from error


def _pictures(
    webdataset: Any,  # noqa: ANN401 - it has no types
    order: Sequence[Path],
    draw: random.Random,
    shuffle_buffer: int,
    side_px: int,
    judge: _Judge,
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    # It is given open files: of URLs it would make shell commands. Nothing is decoded by it.
    pipeline = webdataset.DataPipeline(
        lambda: _opened(order, judge),
        webdataset.filters.pipelinefilter(webdataset.tariterators.tar_file_expander)(
            handler=judge.pass_over, select_files=_is_picture
        ),
        webdataset.filters.pipelinefilter(webdataset.tariterators.group_by_keys)(
            handler=judge.pass_over
        ),
        webdataset.shuffle(shuffle_buffer, initial=shuffle_buffer, rng=draw),
    )
    for sample in pipeline:
        key, extension = sample["__key__"], next(ext for ext in _EXTENSIONS if ext in sample)
        name = f"{sample['__url__']}: {key}.{extension}"
        try:
            picture = decode_square(sample[extension], side_px, name=name)
        except BadInput as error:
            judge.pass_over(error)
            continue
        judge.num_good += 1
        yield key, picture


def _opened(order: Sequence[Path], judge: _Judge) -> Iterator[Mapping[str, object]]:
    for path in order:
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            judge.pass_over(BadData(f"{path} is not there ({error})."))
            continue
        with file:
            yield {"url": str(path), "stream": file}


def _is_picture(name: str) -> bool:
    parts = split_name(name)
    return parts is not None and parts[1].lower() in _EXTENSIONS


def _to_batch(
    batch: Sequence[tuple[str, NDArray[np.uint8]]], *, visit: int, device: torch.device
) -> PictureBatch:
    keys, pictures = zip(*batch, strict=True)
    pictures_BHWC = torch.from_numpy(np.stack(pictures)).to(device)
    return PictureBatch(
        ids_B=torch.from_numpy(key_ids(keys)).to(device),
        visits_B=torch.full((len(keys),), visit, device=device),
        pictures_BCHW=pictures_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0,
    )
