"""Say what an export is: training.json for programs, a model card for people."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data.manifest import encoding_folder, load_encoding, load_manifest
from trainer.encoded import latents_of
from trainer.frozen import thaw
from trainer.models.locations import PACKAGE
from trainer.observe.carbon import rates
from trainer.observe.evaluations import METRICS, training_rows
from trainer.observe.figure_words import HEAD, figure_rows, joules_text
from trainer.observe.figures import Figures, derive, work_on
from trainer.observe.jsonl import read_rows
from trainer.observe.report_numbers import duration, score_label, score_text, scores
from trainer.place import place
from trainer.run_account import run_account
from trainer.runtime.checkpoint import TrainState

WEIGHTS = {"ema": "moving average", "raw": "as the optimizer left them"}
_LAST_ROWS = 20


def public_name(path: str) -> str:
    """Return a hub's or a package's name as it is, of any other path or URL its last part."""
    is_hub = path.count("/") == 1 and "." not in path.partition("/")[0] and not Path(path).exists()
    if path.startswith(PACKAGE) or (is_hub and all(path.split("/"))):
        return path
    return path.rstrip("/").rpartition("/")[2]


def account_figures(run_dir: Path, trained: TrainConfig, state: TrainState) -> Figures:
    """Derive the figures of a run's account and its dataset's, for the images of a checkpoint."""
    dataset = place(trained.data.dataset) if state.dataset_fingerprint else None
    rows = run_account(run_dir, dataset)
    kept_samples = load_manifest(dataset).rows_kept if dataset else 0
    work = work_on(thaw(trained.cluster), images=state.images_seen, kept_samples=kept_samples)
    carbon, price = rates(trained.accounts)
    return derive(rows, work, trained.accounts, carbon=carbon, price=price)


def training_facts(
    run_dir: Path, trained: TrainConfig, state: TrainState, account: Figures, *, weights: str
) -> dict[str, Any]:
    """Say how the weights came about: what was trained on, for how long, and how it went."""
    metrics = training_rows(read_rows(run_dir / METRICS))
    ledger = [row for row in run_account(run_dir) if row["stage"] == "train"]
    last = [row["train/loss"] for row in metrics[-_LAST_ROWS:]]
    sections = thaw(trained)
    facts: dict[str, Any] = {
        "step": state.step,
        "images_seen": state.images_seen,
        "dataset_fingerprint": state.dataset_fingerprint,
        "datasets": datasets(trained, state),
        "mean_loss_of_last_rows": sum(last) / len(last) if last else None,
        "training_s": sum(row["seconds"] for row in ledger),
        "training_j": sum(row["joules"] for row in ledger),
        "joules_provenance": sorted({row["provenance"] for row in ledger if row["joules"]}),
        "figures": {key: asdict(figure) for key, figure in account.by_key.items()},
        "weights": WEIGHTS.get(weights, f"moving average {weights}"),
        **{name: sections[name] for name in ("model", "objective", "batch", "optim", "seed")},
    }
    if trained.start_from is not None:
        facts["start_from"] = public_name(trained.start_from)
    if trained.lora is not None:
        facts["lora"] = sections["lora"]
    if state.encoding_fingerprint:
        found = _latent_facts(run_dir, trained, state.encoding_fingerprint)
        paths = {name: public_name(path) for name, path in found["paths"].items()}
        facts["encoding"] = {**found, "paths": paths}
        encoders = sections["encoders"]
        for part in ("autoencoder", "text"):
            encoders[part]["path"] = public_name(encoders[part]["path"])
        facts["encoders"] = encoders
    return facts


def _latent_facts(run_dir: Path, trained: TrainConfig, fingerprint: str) -> dict[str, Any]:
    if trained.data.latents == "online":
        return latents_of(trained, run_dir).facts
    return load_encoding(encoding_folder(place(trained.data.dataset), fingerprint)).facts


def datasets(trained: TrainConfig, state: TrainState) -> list[dict[str, Any]]:
    """Name the data by fingerprints; how many pictures, if the dataset is as it was."""
    paths = [trained.data.dataset, *(mixed.dataset for mixed in trained.data.mix)]
    short = [fingerprint for fingerprint, _ in state.stream.get("datasets", [])][: len(paths)]
    fingerprints = [state.dataset_fingerprint, *short[1:]]
    found: list[dict[str, Any]] = []
    for path, fingerprint in zip(paths, fingerprints, strict=False):
        facts: dict[str, Any] = {"name": public_name(path), "fingerprint": fingerprint}
        if fingerprint:
            manifest = load_manifest(place(path))
            if manifest.fingerprint.startswith(fingerprint):
                facts["num_images"] = manifest.rows_live
        found.append(facts)
    return found


def write_card(
    folder: Path,
    run_dir: Path,
    facts: Mapping[str, Any],
    account: Figures,
    *,
    name: str,
    is_stock: bool,
) -> None:
    """Write README.md.

    Args:
        folder: The export's, where it is built.
        run_dir: The run; its evaluation is told where it exists.
        facts: `training_facts`.
        account: `account_figures`.
        name: The folder's last name, for the words that load it.
        is_stock: Whether a class of diffusers loads it.
    """
    parts = [_FRONT, f"# {name}\n", _what(facts), _load(name, is_stock=is_stock), _data(facts)]
    parts += [_cost(account), _evaluation(run_dir), _SYNTHETIC]
    text = "\n".join(part for part in parts if part)
    (folder / "README.md").write_text(text, encoding="utf-8")


_FRONT = """---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- diffusers
- kiln
---
"""

_SYNTHETIC = """## Synthetic media

Pictures that this model draws are synthetic media. Label them as such wherever they are shown or
passed on; IPTC's digital source type for them is `trainedAlgorithmicMedia`. They record nothing
that happened.
"""

_PROCESSES = {"flow": "rectified flow", "vp": "variance-preserving diffusion", "edm": "EDM"}


def _what(facts: Mapping[str, Any]) -> str:
    model, objective, encoders = facts["model"], facts["objective"], facts["encoders"]
    path = _PROCESSES[objective["process"]["kind"]]
    text, side = encoders["text"], encoders["image_side_px"]
    lines = [
        f"A {model['kind']} of {facts['num_parameters'] / 1e6:.3g} M parameters that turns "
        f"captions into pictures of {side} x {side} px, in the latents of an autoencoder. Trained "
        "with Kiln.",
        "",
        f"- Objective: {path}, predicting {objective['prediction']}",
        f"- Weights: {facts['weights']}, after {facts['images_seen']:,} training images "
        f"({facts['step']:,} steps of {facts['batch']['global_batch_images']:,})",
        f"- Autoencoder: {encoders['autoencoder']['path']} ({encoders['autoencoder']['kind']})",
        f"- Text encoder: {text['path']} ({text['kind']}), {text['max_tokens']} tokens, "
        f"padding: {text['padding']}",
    ]
    if facts["mean_loss_of_last_rows"] is not None:
        lines.append(f"- Training loss at the end: {facts['mean_loss_of_last_rows']:.4g}")
    if "lora" in facts:
        lora, base = facts["lora"], facts["start_from"]
        lines.append(
            f"- LoRA of rank {lora['rank']}, merged into the weights of {base}. The adapters alone "
            f"are in `lora`: `pipeline.load_lora_weights` puts them on {base}, on nothing else"
        )
    elif "start_from" in facts:
        lines.append(f"- Began with the weights of {facts['start_from']}")
    return "\n".join([*lines, ""])


def _load(name: str, *, is_stock: bool) -> str:
    trust = "" if is_stock else ", trust_remote_code=True"
    why = (
        ""
        if is_stock
        else "Its way from captions to pictures is `pipeline.py`, in this folder; read it before "
        "you trust it.\n\n"
    )
    return f"""## Load it

{why}```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({json.dumps(name)}{trust})
drawn = pipeline("a green square", num_inference_steps=20, guidance_scale=4.0)
drawn.images[0].save("picture.png")
```
"""


def _data(facts: Mapping[str, Any]) -> str:
    lines = ["## Data", ""]
    for dataset in facts["datasets"]:
        count = f", {dataset['num_images']:,} images" if "num_images" in dataset else ""
        lines.append(f"- {dataset['name']}: fingerprint `{dataset['fingerprint']}`{count}")
    return "\n".join([*lines, ""])


def _cost(account: Figures) -> str:
    if not account.by_bucket:
        return ""
    lines = ["## Cost", "", "| stage | went into | time | energy |", "|---|---|---|---|"]
    for (stage, bucket), total in account.by_bucket.items():
        time, energy = duration(total.seconds), joules_text(total)
        lines.append(f"| {stage} | {bucket} | {time} | {energy} |")
    lines += ["", "In brackets, how the joules are known.", ""]
    lines += [f"| {' | '.join(HEAD)} |", "|---|---|---|---|"]
    for cells in figure_rows(account.by_key.values()):
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _evaluation(run_dir: Path) -> str:
    path = run_dir / "evaluation.json"
    if not path.exists():
        return ""
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    weights = evaluation.get("weights", "ema")
    whose = {"ema": "averaged", "raw": "raw"}.get(weights, weights)
    lines = [
        "## Evaluation",
        "",
        f"Of the {whose} weights after {evaluation['images_seen']:,} training images.",
        "",
        "| score | value | chance | interval | of |",
        "|---|---|---|---|---|",
        *_score_rows(evaluation),
    ]
    return "\n".join([*lines, ""])


def _score_rows(evaluation: Mapping[str, Any]) -> Iterator[str]:
    for name, value, chance in scores(evaluation):
        score = evaluation["scores"][name]
        told = score if isinstance(score, Mapping) else {}
        interval = "-"
        if "low" in told:
            interval = f"{score_text(name, told['low'])} to {score_text(name, told['high'])}"
        by_chance = "-" if chance is None else score_text(name, chance)
        cells = (score_label(name), score_text(name, value), by_chance, interval)
        yield f"| {' | '.join(cells)} | {told.get('count', '-')} |"
