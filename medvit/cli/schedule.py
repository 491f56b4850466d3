"""medvit-schedule: how much of each slice a training may leave out, and until when, so that it costs less.

Trains for a few epochs with the given configuration. On the way, at 0, 25, 50, 75 and 100 %, it compares the gradient
of whole slices with those of fewer patch tokens, of larger patches, and of both: how far off they are on average
(bias), how much they scatter (variance), and what they cost on this machine. What has the least error at equal compute
makes the schedule; tokens never become fewer in it, and the last 15 % of a training see whole slices.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from medvit import data, training
from medvit.cli.console import Display, Parser, command, tables
from medvit.cli.study import add_label_arguments, prepare, set_aside, show_study
from medvit.cli.train import supervised, unsupervised
from medvit.config import AccelerationConfig, Config, load_config
from medvit.records import EXIT_DONE, EXIT_QUARANTINE, UsageError

EPILOG = """
what it writes into DIR:
  gradient_error.csv   a row for each way of leaving something out at each point: keep (share of the patch tokens),
                       patch (px; empty: the model's own), tokens_share, bias2 and its standard error, variance, cost
                       (of the uncompressed time), ca_mse (bias2 + cost * variance: what is least is best), cosine,
                       steps compared
  gradient_error.png   the same as a picture
  schedule.yaml        the configuration with objective.acceleration set (and training.patience 0, which might end a
                       training before it has seen whole slices again), for medvit-train --config

with a config pretrain_* no labels are needed. A teacher (mocov3, dino) sees whole slices, and half of the cost stays:
objective.acceleration={symmetric: true, schedule: [{from_progress: 0}]} measures what it is to see as little.

a schedule is advice from a few batches of a short training: bias2 may come out below 0 where there is little of it.
What is small may be lost with the tokens, and the mean does not show it: train both ways, and compare class by class:
  medvit-evaluate runs/fast --baseline plain=runs/plain/predictions.csv --output report

examples:
  medvit-schedule /exports/ct --labels labels.csv --output schedule
  medvit-schedule /exports/ct --labels labels.csv --config staged --epochs 12 --output schedule training.batch_size=4
  medvit-schedule /exports/ct --config pretrain_simclr --output schedule
  medvit-train /exports/ct --labels labels.csv --config schedule/schedule.yaml --output runs/fast
"""


def parser() -> Parser:
    """The arguments."""
    result = Parser("schedule", __doc__ or "", EPILOG)
    add_label_arguments(result)
    result.add_argument("--config", metavar="YAML", help="file, or name of a shipped config (default: baseline)")
    result.add_argument("--output", metavar="DIR", type=Path, required=True, help="where all three files go, see below")
    result.add_argument("--epochs", metavar="N", type=int, default=8, help="of the pilot, at least 4 (default: 8)")
    result.add_argument(
        "--steps", metavar="N", type=int, default=16, help="steps whose gradients are compared, 4 or more (default: 16)"
    )
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the config file")
    return result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if min(arguments.epochs, arguments.steps) < 4:
        raise UsageError(f"--epochs {arguments.epochs}, --steps {arguments.steps}: give 4 or more of each.")
    with Display() as display, tempfile.TemporaryDirectory(prefix="medvit-") as scratch:
        cache_dir = config.data.cache_dir or data.default_cache_dir(Path(scratch))
        pretrains, sites = config.objective.pretrains, config.data.target_sites
        study = prepare(arguments, cache_dir, config.preprocessing, display, sites, unlabelled=pretrains)
        if pretrains:
            fold = data.split_patients(study.cases, config.data, config.training.seed)
        else:
            fold = data.make_folds(study.cases, config.data, config.training.seed)[0]
        show_study(study, [fold], display)
        set_up = unsupervised if pretrains else supervised
        experiment = set_up(study, config, Path(scratch), display)
        errors = training.run_pilot(experiment, fold, epochs=arguments.epochs, steps=arguments.steps)
    scheduled = write(errors, config, arguments.output)
    show(errors, scheduled, arguments.output)
    return EXIT_QUARANTINE if set_aside(study) else EXIT_DONE


def write(errors: Sequence[training.GradientError], config: Config, output: Path) -> Config:
    """Table, picture and configuration; returns the last."""
    output.mkdir(parents=True, exist_ok=True)
    training.write_errors(errors, output / "gradient_error.csv")
    training.draw_errors(errors).savefig(output / "gradient_error.png", dpi=150)
    schedule = training.derive_schedule(errors, config.learns_until)
    symmetric = config.objective.symmetric
    acceleration = AccelerationConfig(schedule=schedule, symmetric=symmetric) if len(schedule) > 1 else None
    objective = config.objective.model_copy(update={"acceleration": acceleration})
    # an early end might come before whole slices do
    patience = config.training.patience if acceleration is None else 0
    learning = config.training.model_copy(update={"patience": patience})
    scheduled = config.model_copy(update={"objective": objective, "training": learning})
    (output / "schedule.yaml").write_text(scheduled.to_yaml(), encoding="utf-8")
    return scheduled


def show(errors: Sequence[training.GradientError], scheduled: Config, output: Path) -> None:
    """The best at each point, the schedule, and where everything is."""
    table = Table(title=f"best at equal compute, of {errors[0].steps} steps each", title_justify="left")
    for heading in ("progress", "tokens kept", "patch", "share of tokens", "cost", "error", "of it bias²", "cosine"):
        table.add_column(heading, justify="right")
    for progress in sorted({error.progress for error in errors}):
        stage = [error for error in errors if error.progress == progress]
        whole, best = stage[0], min(stage, key=lambda error: error.ca_mse)  # the uncompressed comes first
        kept, patch = f"{100 * best.compression.keep:g} %", str(best.compression.patch or "own")
        share, cost, error, cosine = (
            f"{figure:.2f}" for figure in (best.tokens_share, best.cost, best.ca_mse / whole.ca_mse, best.cosine)
        )
        bias = f"{best.bias2 / whole.ca_mse:.2f} ± {best.bias2_error / whole.ca_mse:.2f}"
        table.add_row(f"{100 * progress:.0f} %", kept, patch, share, cost, error, bias, cosine)
    console = tables()
    console.print(table)
    acceleration = scheduled.objective.acceleration
    lines = [
        "error: bias² + cost × variance, of that of whole slices. Below 1, leaving something out pays; where the "
        "standard error of bias² (±) is as large as the gain, more --steps would tell."
    ]
    if acceleration is None:
        lines.append("schedule     none: leaving something out pays at no point")
    else:
        for step in acceleration.schedule:
            larger = f", patches of {step.patch} px" if step.patch else ""
            lines.append(
                f"schedule     from {100 * step.from_progress:g} % on: {100 * step.keep:g} % of tokens{larger}"
            )
    lines += [f"table        {output / 'gradient_error.csv'}", f"picture      {output / 'gradient_error.png'}"]
    lines.append(f"config       {output / 'schedule.yaml'}  (medvit-train --config)")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
