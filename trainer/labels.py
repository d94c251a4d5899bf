"""Say in a picture, and in a file beside it, what made it: synthetic media must be labelled.

The label is a flat mapping. A PNG carries each entry as iTXt, and an XMP packet with what other
software looks for: IPTC's digital source type and the properties for generative AI of the IPTC
Photo Metadata Standard 2025.1 (https://iptc.org/std/photometadata/specification). No label holds
a time or a machine, so that equal commands give equal bytes.
"""

import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.config_tools import SamplingConfig
from trainer.data.publish import file_sha256, publish_bytes, publish_json
from trainer.frozen import thaw
from trainer.sampler import Sampler

Label = Mapping[str, Any]

_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN = f"{_TYPES}trainedAlgorithmicMedia"
EDITED = f"{_TYPES}compositeWithTrainedAlgorithmicMedia"
XMP = "XML:com.adobe.xmp"
_FILES = "files_sha256"
# What the next command need not repeat for a picture to be the one it asks for.
_NOT_ASKED = {"software", "heat_map", _FILES}
# These change a picture by rounding alone.
_ONLY_SPEED = {"batch_images", "guidance_split"}
# https://www.w3.org/TR/xml/#charsets; PNG texts may not hold NUL either.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def label_of(sampler: Sampler, sampling: SamplingConfig, *, edited: bool = False) -> dict[str, Any]:
    """Say what all pictures of one command have in common.

    Args:
        sampler: With the weights that draw.
        sampling: How they draw.
        edited: Whether a picture was given to start from.
    """
    settings = {key: value for key, value in thaw(sampling).items() if key not in _ONLY_SPEED}
    num_steps = settings.pop("num_steps")
    state = sampler.state
    return {
        "digital_source_type": EDITED if edited else DRAWN,
        "software": f"Kiln {version('kiln')}, torch {version('torch')}",
        "negative": settings.pop("negative"),
        "seed": settings.pop("seed"),
        "solver": settings.pop("solver"),
        "steps": None if sampling.is_adaptive else num_steps,
        "guidance": settings.pop("guidance_scale"),
        "sampling": settings,
        "weights": sampler.weights,
        "weights_sha256": sampler.weights_sha256,
        "step": state.step,
        "images_seen": state.images_seen,
        "dataset_fingerprint": state.dataset_fingerprint,
        "encoding_fingerprint": state.encoding_fingerprint,
    }


def png_bytes(pixels: NDArray[np.uint8], label: Label) -> bytes:
    """Encode ``(H, W, 3)`` pixels as a PNG that carries a label."""
    info = PngInfo()
    for key, value in label.items():
        info.add_itxt(key, _legal(value if isinstance(value, str) else _json(value)))
    info.add_itxt(XMP, xmp_packet(label))
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def xmp_packet(label: Label) -> str:
    """Write the label as XMP: source type, system and prompt as IPTC has them, and a description.

    Args:
        label: From `label_of`, with ``prompt`` where there is one.
    """
    prompt = label.get("prompt", "")
    information = prompt
    if label["negative"]:
        information += f"\nNegative: {label['negative']}"
    facts = {
        "xmp:CreatorTool": label["software"],
        "Iptc4xmpExt:DigitalSourceType": label["digital_source_type"],
        "Iptc4xmpExt:AISystemUsed": label["software"],
        "Iptc4xmpExt:AISystemVersionUsed": f"{label['weights_sha256']}/{label['weights']}",
        "Iptc4xmpExt:AIPromptInformation": information,
    }
    lines = [f"<{key}>{_escaped(text)}</{key}>" for key, text in facts.items() if text]
    if prompt:
        lines.append(
            f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{_escaped(prompt)}</rdf:li>'
            "</rdf:Alt></dc:description>"
        )
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        'xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">\n'
        + "\n".join(lines)
        + '\n</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end="r"?>'
    )


def publish_labelled(folder: Path, name: str, label: Label, files: Mapping[str, bytes]) -> None:
    """Write files, then `name`.json: the label, and the files' hashes.

    Args:
        folder: Where.
        name: Of the label, without suffix.
        label: What made the files.
        files: Their bytes by name.
    """
    hashes = {file: publish_bytes(folder / file, data) for file, data in files.items()}
    publish_json(folder / f"{name}.json", {**label, _FILES: hashes})


def is_complete(folder: Path, name: str, label: Label) -> bool:
    """Whether `name`.json says what is asked for, and its files are whole."""
    try:
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        hashes = dict(found[_FILES])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    asked, made = (
        {k: v for k, v in each.items() if k not in _NOT_ASKED} for each in (label, found)
    )
    return _json(asked) == _json(made) and all(
        (folder / file).is_file() and file_sha256(folder / file) == sha256
        for file, sha256 in hashes.items()
    )


def bytes_sha256(path: Path) -> str:
    """Hash a picture that was given, for the label of what is made of it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _escaped(text: str) -> str:
    return html.escape(_legal(text), quote=False)


def _legal(text: str) -> str:
    """Replace what neither XML nor PNG can hold."""
    return _ILLEGAL.sub("\ufffd", text)
