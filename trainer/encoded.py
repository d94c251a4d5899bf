"""Which of a dataset's encodings a configuration means; latents of other encoders are refused."""

from pathlib import Path

from trainer.config import TrainConfig
from trainer.data.manifest import Encoding, Manifest, list_encodings
from trainer.errors import BadInput
from trainer.models.fingerprint import identify


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
            f"there: {there}. Make them: {encode}"
        )
    encoding = found[wanted]
    if encoding.dataset_fingerprint != manifest.shards_fingerprint:
        raise BadInput(
            f"the latents in {dataset}/encodings/{wanted} are of an older state of the dataset. "
            f"Bring them up to date: {encode}"
        )
    _check_network(cfg, encoding)
    return encoding


def _check_network(cfg: TrainConfig, encoding: Encoding) -> None:
    model = cfg.model
    assert model.kind != "autoencoder_kl"
    channels, side = encoding.facts["latent_shape"][:2]
    needs = {
        "model.latent_channels": (model.latent_channels, channels),
        "model.latent_side": (model.latent_side, side),
        "model.text_width": (model.text_width, encoding.facts["text_width"]),
    }
    for key, (got, need) in needs.items():
        if got != need:
            raise BadInput(f"{key}={got}, but the encoded dataset has {need}. Give {key}={need}.")
