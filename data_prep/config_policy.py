"""What a policy file may say: which rows are rejected for their metadata or known content."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.frozen import config


@config
class PolicyConfig:
    """A policy. A null or an empty list is no rule."""

    safety: Literal["unstated", "relaion", "denylist", "not_laion"]
    """Why rows with LAION metadata are fit to download: the rows are Re-LAION; a denylist below
    takes the unsafe ones out; or they are not from LAION. Plain LAION-5B is refused."""
    missing: Literal["keep", "reject"]
    """What happens to a row that lacks the value which a rule asks for."""
    min_side_px: PositiveInt | None
    """Columns width and height: the shorter side."""
    max_pixels: PositiveInt | None
    """Columns width and height: their product."""
    max_aspect_ratio: PositiveFloat | None
    """Columns width and height: longer by shorter side."""
    min_caption_chars: NonNegativeInt
    """Shorter captions are rejected."""
    max_caption_chars: PositiveInt | None
    """Longer captions are rejected."""
    min_caption_words: NonNegativeInt
    """Captions with fewer words are rejected."""
    languages: tuple[str, ...]
    """ISO 639-1 codes to keep, by the column LANGUAGE; where a row has none, the language of its
    caption is detected, before the download. Carry the column in columns.extra."""
    min_language_confidence: Annotated[float, Field(ge=0, le=1)]
    """A caption whose language is detected with less confidence has none: see missing."""
    min_similarity: float | None
    """Column similarity: cosine of picture and caption as CLIP sees them."""
    max_punsafe: NonNegativeFloat | None
    """Column punsafe: probability that the picture is not safe for work."""
    max_pwatermark: NonNegativeFloat | None
    """Column pwatermark: probability of a watermark."""
    min_aesthetic_score: float | None
    """Column AESTHETIC_SCORE."""
    licences: tuple[str, ...]
    """Values of the column LICENSE to keep, in any case."""
    top_level_domains: tuple[str, ...]
    """Last labels of host names to keep, e.g. [de, fr, eu]."""
    denied_top_level_domains: tuple[str, ...]
    """Last labels of host names to reject."""
    hosts: tuple[str, ...]
    """Hosts to keep; a domain of two or three labels stands for all hosts below it."""
    denied_hosts: tuple[str, ...]
    """Hosts to reject, likewise."""
    hosts_file: str | None
    """File of hosts to keep, one a line."""
    denied_hosts_file: str | None
    """File of hosts to reject, one a line."""
    urls_file: str | None
    """File of URLs to keep, one a line."""
    denied_urls_file: str | None
    """File of URLs to reject, one a line."""
    denied_hashes_file: str | None
    """File of hashes to reject, one a line: values of the column hash, or md5 or sha256 of URLs."""
    denied_content_file: str | None
    """File of hashes to reject, one a line: md5 or sha256 of downloaded files or of stored ones."""

    def __post_init__(self) -> None:
        if self.safety == "denylist" and not (self.denied_urls_file or self.denied_hashes_file):
            raise ValueError(
                "policy: safety=denylist, but neither denied_urls_file nor denied_hashes_file "
                "names a list. Give one of them."
            )
