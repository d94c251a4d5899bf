"""What latents a run is trained on; those of other encoders are refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainer.config import TrainConfig
from trainer.data.manifest import Encoding, Manifest, list_encodings, load_manifest
from trainer.data.publish import publish_json
from trainer.errors import BadInput
from trainer.models.fingerprint import identify
from trainer.place import place

RECORD = "latents.json"
"""In the folder of a run that encodes while training."""


@dataclass(frozen=True, slots=True)
class Latents:
    """What the numbers of a latent mean."""

    fingerprint: str
    """Of the encoders, and so the name of an encoding."""
    facts: dict[str, Any]
    """What the encoders were; latent_shape, text_width, latent_mean and latent_std."""


def matching_encoding(cfg: TrainConfig, dataset: Path, manifest: Manifest) -> Encoding:
    """Find the encoding of a dataset made by exactly `cfg.encoders` from exactly its shards.

    Raises:
        BadInput: There is none, it is of an older state of the dataset, or it does not fit the
            network.
    """
    wanted = identify(cfg.encoders).fingerprint
    found = {encoding.fingerprint: encoding for encoding in list_encodings(dataset)}
    encode = f"kiln encode dataset={dataset} (with the same autoencoder=, text= and encoders.*)"
    if wanted not in found:
        there = ", ".join(found) or "none"
        raise BadInput(
            f"{dataset} has no latents of this config's encoders, whose fingerprint is {wanted}; "
            f"there: {there}. Make them: {encode}; or give data.latents=online, which encodes "
            "while training."
        )
    encoding = found[wanted]
    if encoding.dataset_fingerprint != manifest.shards_fingerprint:
        raise BadInput(
            f"the latents in {dataset}/encodings/{wanted} are of an older state of the dataset. "
            f"Bring them up to date: {encode}"
        )
    check_network(cfg, encoding.facts)
    return encoding


def latents_of(cfg: TrainConfig, run: Path) -> Latents:
    """Say what latents a run that has begun is trained on.

    Raises:
        BadInput: Its encoding is not there, or its encoders are not what they were.
    """
    if cfg.data.latents == "encoded":
        dataset = place(cfg.data.dataset)
        encoding = matching_encoding(cfg, dataset, load_manifest(dataset))
        return Latents(encoding.fingerprint, encoding.facts)
    recorded = require_record(run)
    check_encoders(recorded.fingerprint, identify(cfg.encoders).fingerprint)
    return recorded


def check_encoders(before: str, now: str) -> None:
    """Refuse encoders that are not those that a run was trained with.

    Raises:
        BadInput: The fingerprints differ.
    """
    if before != now:
        raise BadInput(
            f"the run was trained with encoders of fingerprint {before}, but those of its config "
            f"now have {now}: their files changed. Bring them back, where "
            "encoders.autoencoder.path and encoders.text.path say, or begin another run=."
        )


def check_network(cfg: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Refuse a denoiser that does not take such latents and text states.

    Raises:
        BadInput: A number of its config is another than that of the latents.
    """
    model = cfg.model
    assert model.kind != "autoencoder_kl"
    channels, side = facts["latent_shape"][:2]
    needs = {
        "model.latent_channels": (model.latent_channels, channels),
        "model.latent_side": (model.latent_side, side),
        "model.text_width": (model.text_width, facts["text_width"]),
    }
    for key, (got, need) in needs.items():
        if got != need:
            raise BadInput(f"{key}={got}, but its encoders make {need}. Give {key}={need}.")


def read_record(run: Path) -> Latents | None:
    """Read what a run that encodes while training wrote down of its latents, if it did.

    Raises:
        BadInput: The file is damaged.
    """
    path = run / RECORD
    try:
        return TypeAdapter(Latents).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise BadInput(
            f"{path} is damaged ({error.errors()[0]['msg']}). Bring back the copy that the run "
            "began with."
        ) from error


def require_record(run: Path) -> Latents:
    """Read what a run that has begun wrote down of its latents.

    Raises:
        BadInput: The file is damaged, or not there.
    """
    recorded = read_record(run)
    if recorded is None:
        raise BadInput(
            f"{run} has no {RECORD}, which says how its latents are normalised: it did not begin "
            "to train yet, or is no whole copy. Bring the file back, or give the run= of one that "
            "has it."
        )
    return recorded


def write_record(run: Path, latents: Latents) -> None:
    """Write down what a run's latents are."""
    publish_json(run / RECORD, asdict(latents))
