"""Lay the clusters of duplicates out as one self-contained page of pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from trainer.data.shards import Shard
from trainer.observe.charts import bar_chart
from trainer.observe.html import Html, cards, image, page, tag
from trainer.observe.report_style import STYLE

PAGE = "dedup.html"
_SIDE_PX = 160
_MOST_CAPTION_CHARS = 160
_PICTURES = ("jpg", "png", "webp")
_KEPT = {
    "largest": "the one with most pixels, then the longest caption, then the smallest key",
    "oldest": "the first in order of shards",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One sample of a cluster, as it is shown."""

    key: str
    caption: str
    thumbnail: bytes
    """JPEG; empty if the picture does not decode."""
    place: int
    """1 is the one that stays."""
    distance: int
    """Bits by which its hash differs from that one's."""
    exact: bool
    """Its bytes are that one's."""
    dataset: str
    """Name of another dataset that it lies in; empty for the own."""

    @classmethod
    def read(
        cls, shard: Shard, row: int, *, place: int, distance: int, exact: bool, dataset: str
    ) -> "Member":
        """Read caption and picture of a row."""
        there = shard.extensions(row)
        caption = shard.read(row, "txt").decode(errors="replace") if "txt" in there else ""
        extension = next(ext for ext in there if ext in _PICTURES)
        return cls(
            key=shard.keys[row],
            caption=caption,
            thumbnail=thumbnail(shard.read(row, extension)),
            place=place,
            distance=distance,
            exact=exact,
            dataset=dataset,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Samples that are duplicates of each other."""

    size: int
    members: list[Member]
    """The first of them, the one that stays before all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a search for duplicates found."""

    name: str
    outcome: str
    keep: str
    max_distance: int
    images: int
    """Live samples of the dataset."""
    others: int
    """Those of the other datasets."""
    flat: int
    """Samples whose hash says nothing; they were compared by their bytes alone."""
    exact: int
    """Samples that have the bytes of the one that stays."""
    near: int
    """Samples that are otherwise near it, or near one that is."""
    weighted: int
    """Samples in clusters."""
    sizes: Mapping[int, int]
    """Cluster size -> clusters."""
    clusters: Sequence[Cluster]
    """The largest."""

    @property
    def num_clusters(self) -> int:
        """All of them."""
        return sum(self.sizes.values())


def thumbnail(content: bytes) -> bytes:
    """Shrink a picture to at most 160 pixels a side, as JPEG."""
    bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        return b""
    scale = min(1.0, _SIDE_PX / max(bgr.shape[:2]))
    size = (max(1, round(bgr.shape[1] * scale)), max(1, round(bgr.shape[0] * scale)))
    small = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1])


def render(found: Findings) -> str:
    """Return the page; the same findings give the same bytes."""
    return page(
        f"Duplicates in {found.name} - Kiln",
        tag("section", *_summary(found)),
        tag("section", *_sizes(found)),
        tag("section", *_clusters(found)),
        style=STYLE,
    )


def _summary(found: Findings) -> list[Html]:
    surplus = found.exact + found.near
    share = 100 * surplus / max(found.images, 1)
    against = f", and with {found.others:,} of other datasets" if found.others else ""
    done = (
        f"Of each cluster one stays: {_KEPT[found.keep]}"
        + (" (one in another dataset before all)." if found.others else ".")
        if found.outcome == "remove"
        else "All samples stay; those of a cluster share the weight of one."
    )
    facts = [
        ("images", f"{found.images:,}"),
        ("clusters", f"{found.num_clusters:,}"),
        ("exact duplicates", f"{found.exact:,}"),
        ("near-duplicates", f"{found.near:,}"),
        (
            ("removed" if found.outcome == "remove" else "weighted"),
            f"{surplus if found.outcome == 'remove' else found.weighted:,}",
        ),
        ("flat, by bytes alone", f"{found.flat:,}"),
    ]
    return [
        tag("h1", f"Duplicates in {found.name}"),
        tag(
            "p",
            f"{share:.2f} % of {found.images:,} pictures are duplicates of others. They were "
            f"compared with each other{against}: by their stored bytes, and by 64-bit perceptual "
            f"hashes, which may differ in {found.max_distance} bits. What a chain of duplicates "
            f"connects is one cluster. {done}",
            class_="lead",
        ),
        cards((name, value) for name, value in facts),
    ]


def _sizes(found: Findings) -> list[Html]:
    if not found.sizes:
        return [tag("p", "No two pictures are duplicates.", class_="absent")]
    bars: dict[str, int] = {}
    for size, count in sorted(found.sizes.items()):
        low = 1 << (size.bit_length() - 1)
        name = str(size) if size < 8 else f"{low:,} to {2 * low - 1:,}"
        bars[name] = bars.get(name, 0) + count
    return [
        tag("h2", "Sizes of clusters"),
        bar_chart("Clusters by number of samples", list(bars.items())),
    ]


def _clusters(found: Findings) -> list[Html]:
    if not found.clusters:
        return []
    rest = found.num_clusters - len(found.clusters)
    words = f"The {len(found.clusters)} largest; {rest:,} more are not shown." if rest else "All."
    shown = [_cluster(number, cluster) for number, cluster in enumerate(found.clusters, start=1)]
    return [tag("h2", "Clusters"), tag("p", words, class_="note"), *shown]


def _cluster(number: int, cluster: Cluster) -> Html:
    figures = [_figure(member) for member in cluster.members]
    hidden = cluster.size - len(cluster.members)
    more = [tag("p", f"and {hidden:,} more", class_="note")] if hidden else []
    title = tag("h3", f"{number}. {cluster.size:,} samples")
    return tag("div", title, tag("div", *figures, class_="pictures"), *more, class_="cluster")


def _figure(member: Member) -> Html:
    where = f" in {member.dataset}" if member.dataset else ""
    if member.place == 1:
        verdict = tag("span", f"stays{where}", class_="ok")
    else:
        how = "equal bytes" if member.exact else f"{member.distance} bits"
        verdict = tag("span", f"{how}{where}", class_="soft")
    caption = member.caption
    if len(caption) > _MOST_CAPTION_CHARS:
        caption = f"{caption[:_MOST_CAPTION_CHARS]} ..."
    shown = (
        image(member.thumbnail, media="image/jpeg", alt=caption or member.key)
        if member.thumbnail
        else tag("span", "does not decode", class_="missing")
    )
    words = (verdict, Html("<br>"), tag("code", member.key), Html("<br>"), caption)
    return tag(
        "figure",
        shown,
        tag("figcaption", *words),
        class_="kept" if member.place == 1 else "other",
    )
