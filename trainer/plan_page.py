"""Print what a training run takes and costs, how wrong that may be, and what else to type.

Nothing is allocated; of a dataset the manifest alone is read. A run that cannot work is refused,
with a value that works. `kiln plan compare=RUN` shows for a run that was trained what its plan said
beside what was measured.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from shutil import get_terminal_size

from rich.console import Console
from rich.table import Table

from trainer.command import run_command
from trainer.config import TrainConfig
from trainer.data import mixture
from trainer.datasets import dataset_places, find_datasets, weights_of
from trainer.errors import BadInput
from trainer.hardware import ACCELERATORS
from trainer.launch import jobs_of
from trainer.place import storage
from trainer.plan import rows
from trainer.plan_compare import compare
from trainer.plan_forecast import Forecast, forecast
from trainer.plan_memory import (
    GIB,
    largest_micro_batch,
    memory_of,
    micro_batches,
    num_averages,
    num_ranks,
    with_micro_batch,
)
from trainer.plan_needs import (
    NODE_SHARE,
    POWER_SHARE,
    QUEUE_S,
    RESTART_S,
    configured_interval_s,
    image_latent_bytes,
    predict_data,
)
from trainer.plan_options import NUM_SHOWN, options, with_stages
from trainer.plan_speed import (
    HIDDEN_SHARE,
    LINK_SHARE,
    Band,
    constants,
    network_gb_per_s,
    rounded,
)

PIPED_WIDTH = 110
"""Columns of a page that no terminal shows."""
MOST_MICRO_BATCHES = 6
Row = tuple[str, str]


def main(argv: Sequence[str]) -> int:
    """`kiln plan [experiment=...] [key=value ...]`, or `kiln plan compare=RUN`.

    Raises:
        BadInput: No run is given to compare, or it cannot be compared.
    """
    words = list(argv)
    for word, after in zip(words, [*words[1:], ""], strict=True):
        key, _, run = word.removeprefix("--").partition("=")
        if key == "compare":
            if word == "--compare":
                run = after
            if not run:
                form = "--compare RUN" if word == "--compare" else "compare=RUN"
                raise BadInput(f"{word} has no run. Give it: kiln plan {form}.")
            return compare(Path(run))
    if not any(word.startswith("data.dataset=") for word in words):
        words.append("data.dataset=none")
    return run_command(show, TrainConfig, "train", words, name="plan")


def show(cfg: TrainConfig) -> int:
    """Print the plan of a run.

    Raises:
        BadInput: The run cannot work; says with which value it would.
    """
    if cfg.cluster.kind == "slurm":
        jobs_of(cfg, "plan")
    console = Console()
    if not console.is_terminal:
        console.width = get_terminal_size((PIPED_WIDTH, 0)).columns
    page(cfg, console)
    return 0


def page(cfg: TrainConfig, console: Console) -> None:
    """Print it; plain where nobody looks, as in a file.

    Raises:
        BadInput: The run cannot work; says with which value it would.
    """
    made = forecast(cfg)
    _section(console, "Run", rows(cfg, made.plan))
    _memory(console, cfg, made)
    _section(console, "Speed", speed_rows(cfg, made))
    _section(console, "Time, failures, checkpoints", time_rows(cfg, made))
    _section(console, "Cost", cost_rows(cfg, made))
    _section(console, "Data", data_rows(cfg, made))
    _options(console, cfg, made)
    _section(console, "Rests on", assumptions(cfg, made))


def _section(console: Console, title: str, found: Iterator[Row]) -> None:
    console.print(f"\n[bold]{title}[/]", highlight=False)
    _rows(console, found)


def _rows(console: Console, found: Iterator[Row]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, title_justify="left")
    table.add_column(min_width=18, no_wrap=True)
    table.add_column(overflow="fold")
    for what, how_much in found:
        table.add_row(what, how_much)
    console.print(table, highlight=False)


def _memory(console: Console, cfg: TrainConfig, made: Forecast) -> None:
    """Print a rank's bytes by part at each stage, when it holds most, and what follows."""
    stages = dict(with_stages(cfg))
    table = Table("", *(f"ZeRO {stage}" for stage in stages), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].min_width, table.columns[0].no_wrap = 18, True
    parts = [memory_parts(changed) for changed in stages.values()]
    for name in parts[0]:
        if any(part[name] for part in parts):
            table.add_row(name, *(f"{part[name] / GIB:,.2f}" for part in parts))
    console.print("\n[bold]Memory per rank[/], in GiB, when it holds most", highlight=False)
    console.print(table, highlight=False)
    _rows(console, memory_rows(cfg, made))


def memory_parts(cfg: TrainConfig) -> dict[str, float]:
    """Give a rank's bytes by part, with their sum."""
    memory = memory_of(cfg)
    return {
        "weights": memory.weights_bytes,
        "gradients": memory.gradients_bytes,
        "optimizer": memory.optimizer_bytes,
        f"averages ({num_averages(cfg)})": memory.ema_bytes,
        "activations": memory.activations_bytes,
        "buffers": memory.buffers_bytes,
        "runtime, assumed": memory.runtime_bytes,
        "offloaded": -memory.offloaded_bytes,
        "checkpoint's copy": memory.snapshot_bytes if memory.on_host else 0.0,
        "total": memory.device_bytes,
    }


def memory_rows(cfg: TrainConfig, made: Forecast) -> Iterator[Row]:
    """Yield what the run takes as it is, and with other micro-batches."""
    memory, stage = made.memory, cfg.engine.zero_stage
    yield (
        "as it is",
        f"{_gib(memory.device_bytes)} of {cfg.cluster.device_memory_gib:g} GiB at "
        f"engine.zero_stage={stage}",
    )
    if not memory.on_host:
        offloaded = " and for what is offloaded" if memory.offloaded_bytes else ""
        yield "host memory", f"{_gib(memory.host_bytes)} for the checkpoint's copy{offloaded}"
    if cfg.model.kind == "autoencoder_kl":
        return
    micros = [micro for micro in micro_batches(cfg) if micro.bit_count() == 1]
    sizes = [(micro, memory_of(with_micro_batch(cfg, micro)).device_bytes) for micro in micros]
    yield (
        "by micro-batch",
        "; ".join(f"{micro}: {_gib(size)}" for micro, size in sizes[:MOST_MICRO_BATCHES]),
    )
    yield "largest micro-batch", f"{largest_micro_batch(cfg)} images fit and divide the batch"


def speed_rows(cfg: TrainConfig, made: Forecast) -> Iterator[Row]:
    """Yield seconds of a step by part, and what follows."""
    speed = made.speed
    if speed is None:
        if cfg.model.kind == "autoencoder_kl":
            yield "unknown", "an autoencoder trains on crops of many sizes: nothing is predicted"
        elif cfg.cluster.device == "cpu":
            yield "unknown", "cluster.device=cpu: give cluster.accelerator with cluster.device=cuda"
        else:
            yield "unknown", f"give cluster.accelerator=NAME, one of {', '.join(ACCELERATORS)}"
        return
    yield (
        "images/s",
        f"{speed.images_per_s}; {speed.images_per_s.mid / num_ranks(cfg):,.1f} per GPU",
    )
    yield "MFU", f"{speed.mfu_frac.scaled(100)} %"
    yield "step", f"{speed.step_s} s"
    step_s = speed.step_s.mid
    for name, seconds in (
        ("  compute", speed.compute_s),
        ("  per micro-batch", speed.fixed_s),
        ("  communication", speed.exposed_s),
        ("  optimizer, EMA", speed.update_s),
        ("  encoders", speed.encoding_s),
    ):
        if seconds:
            yield name, f"{seconds:.3f} s, {100 * seconds / step_s:.1f} %"
    if speed.exchange_s:
        yield "  all of it", f"{speed.exchange_s:.3f} s of communication, hidden or not"
    for doubt in speed.doubts:
        yield f"  +- {100 * doubt.share:.0f} %", doubt.reason


def time_rows(cfg: TrainConfig, made: Forecast) -> Iterator[Row]:
    """Yield hours, failures, and how often to save."""
    needs = made.needs
    if made.speed is None:
        yield "unknown", "no speed, no time"
        return
    if needs is None:
        mttf_h = made.failures.mttf_gpu_h / num_ranks(cfg)
        interval_s = configured_interval_s(cfg, made.speed, steps=made.plan.total_steps)
        yield (
            "never ends",
            f"the run does not finish with these failures: one every {rounded(60 * mttf_h)} min "
            f"({made.failures.words}), and a checkpoint every {rounded(interval_s / 60)} min after "
            f"{RESTART_S / 60:g} min to start. Give a smaller checkpoint.every_images, fewer "
            "nodes, or a longer cluster.mttf_gpu_h if that is not so",
        )
        return
    yield "training", f"{_hours(needs.train_h)} for {needs.total_steps:,} steps"
    yield "with failures", f"{_hours(needs.run_h)} that nodes are held"
    yield (
        "wall time",
        f"{_hours(needs.wall_h)} with {needs.num_jobs:,} job(s), each queued {QUEUE_S / 3600:g} h",
    )
    yield (
        "failures",
        f"{needs.num_failures:,.1f} expected; one every {needs.mttf_h:,.1f} h "
        f"({made.failures.words})",
    )
    yield (
        "checkpoint now",
        f"every {needs.interval_s / 60:,.1f} min, {needs.checkpoint_gib:,.1f} GiB; "
        f"{100 * needs.loss_frac:.2f} % of the time lost to saving and failures",
    )
    yield (
        "checkpoint best",
        f"every {needs.best_interval_s / 60:,.1f} min (Young/Daly): checkpoint.every_images="
        f"{needs.best_interval_images}; {100 * needs.best_loss_frac:.2f} % lost; a save stalls "
        f"{needs.checkpoint_stall_s:.1f} s and is on disk in {needs.checkpoint_write_s:,.0f} s",
    )


def cost_rows(cfg: TrainConfig, made: Forecast) -> Iterator[Row]:
    """Yield GPU hours, money, energy and carbon, or what to give for them."""
    needs, accounts = made.needs, cfg.accounts
    if needs is None:
        yield "unknown", "no speed, no cost" if made.speed is None else "it never ends"
        return
    unit = accounts.currency
    yield "GPU hours", str(needs.gpu_hours)
    yield (
        "GPU cost",
        f"{needs.gpu_cost} {unit}" if needs.gpu_cost else "give accounts.price_per_gpu_hour",
    )
    yield (
        "energy",
        f"{needs.kwh} kWh (a model of TDPs, no measurement; PUE {accounts.pue:g})",
    )
    yield (
        "energy cost",
        f"{needs.energy_cost} {unit}" if needs.energy_cost else "give accounts.price_per_kwh",
    )
    yield (
        "carbon",
        f"{needs.kg_co2e} kgCO2e ({made.carbon.words})"
        if needs.kg_co2e and made.carbon
        else "give accounts.grid, such as DEU",
    )


def data_rows(cfg: TrainConfig, made: Forecast) -> Iterator[Row]:
    """Yield what is read, from manifests alone; or what a sample takes if there is none."""
    images = made.plan.total_steps * made.plan.images_per_step
    if cfg.data.dataset == "none" or cfg.data.reader == "webdataset":
        yield "unknown", "give data.dataset=DIR for epochs, cache and egress"
        if cfg.reads_latents:
            size = image_latent_bytes(cfg)
            yield (
                "a sample",
                f"{size / 1e3:,.0f} kB of latents and text states: {_size(size * 1e6)} per million",
            )
        return
    try:
        with ExitStack() as stack:
            for where in dataset_places(cfg.data):
                stack.enter_context(storage(where))
            datasets = find_datasets(cfg)
    except BadInput as error:
        yield "unknown", str(error)
        return
    shares = mixture.shares(weights_of(cfg.data))
    data = predict_data(
        cfg,
        [(each.encoding or each.manifest).shards for each in datasets],
        [share / sum(shares) for share in shares],
        images=images,
    )
    yield "dataset", f"{data.num_samples:,} samples, {_size(data.total_bytes)}"
    yield "epochs", f"{data.epochs:,.2f}"
    yield "egress", f"{_size(data.egress_bytes)} fetched in the whole run"
    keeps = "" if cfg.data.cache else "; none is set (data.cache=FOLDER)"
    yield "cache of a node", f"{_size(data.cache_bytes)} to fetch nothing twice{keeps}"


def _options(console: Console, cfg: TrainConfig, made: Forecast) -> None:
    if made.speed is None:
        return
    found = options(
        cfg, made.failures, steps=made.plan.total_steps, carbon=made.carbon, price=made.price
    )
    columns = ("GPU h", "wall h", "images/s", "MFU %", "GiB", "type")
    table = Table(*columns, box=None, pad_edge=False)
    as_it_is = [option for option in found[NUM_SHOWN:] if not option.words]
    for option in found[:NUM_SHOWN] + as_it_is:
        table.add_row(
            rounded(option.needs.gpu_hours.mid),
            rounded(option.needs.wall_h.mid),
            rounded(option.speed.images_per_s.mid),
            f"{100 * option.speed.mfu_frac.mid:.1f}",
            f"{option.memory_gib:.1f}",
            " ".join(option.words) or "as it is",
        )
    console.print(f"\n[bold]Alternatives[/], {len(found)} fit, the cheapest first", highlight=False)
    console.print(table, highlight=False)


def assumptions(cfg: TrainConfig, made: Forecast) -> Iterator[Row]:
    """Yield what the numbers rest on."""
    yield (
        "memory",
        "sums that match what DeepSpeed's ranks hold on CPUs within 5 %; on GPUs unmeasured",
    )
    if made.speed is None or made.gpu is None:
        return
    share, readings = constants()
    yield (
        "speed",
        "two published measurements (SD2 UNet, precomputed latents, 8 x A100: 1,100 img/s at 256 "
        f"px, 290 at 512): matrix products at {100 * share:.1f} % of the peak, and "
        f"{readings:.1f} readings of the weights per micro-batch. No run of ours is behind them. "
        "Rows that they were not fitted to, 16 to 128 A100s, are met within 5 %, but for one: 128 "
        "at 256 px ran at three quarters of the prediction",
    )
    network = network_gb_per_s(cfg, made.gpu)
    across = f", {network:g} GB/s of network per node" if network else ""
    yield (
        "hardware",
        f"{made.gpu.name}: {made.gpu.half_tflops:g} TFLOP/s, {made.gpu.memory_gb_per_s:g} GB/s, "
        f"link {made.gpu.link_gb_per_s or 0:g} GB/s{across}; links at {100 * LINK_SHARE:.0f} %, "
        f"{100 * HIDDEN_SHARE:.0f} % of what can be hidden is",
    )
    yield (
        "energy",
        f"{100 * POWER_SHARE.mid:.0f} % of {made.gpu.tdp_w:g} W per GPU, and "
        + (
            f"{cfg.accounts.node_overhead_w:g} W per node besides"
            if cfg.accounts.node_overhead_w
            else f"{NODE_SHARE.mid:g} times that for the node"
        ),
    )
    if cfg.accounts.hourly is not None:
        yield (
            "rates",
            f"the mean over all hours of {cfg.accounts.hourly}: when the run will draw its energy "
            "is not known",
        )
    yield "failures", f"{RESTART_S / 60:g} min to start again, half an interval done again"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f} GiB"


def _size(num_bytes: float) -> str:
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.3g} {unit}"
    return f"{num_bytes / 1e6:,.3g} MB"


def _hours(band: Band) -> str:
    return f"{band} h, {band.mid / 24:,.1f} days,"
