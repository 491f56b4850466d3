"""medvit-rank: which pretrained weights to start from, told before anything is trained.

Shows the labelled cases to every candidate as it is, and asks how well its features suit the labels: a linear probe on
patients that it was not trained on, the nearest case of another patient, LogME, H-score, and LEEP where the weights
bring the classifier they were pretrained with. Random weights of the same architecture always take part: what is not
better than those has no use for this task. The order is advice: no score predicts reliably what training will find.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from medvit import data, evaluation
from medvit.cli.console import Display, Parser, command, tables
from medvit.cli.learned import TAUGHT, run_of, shared
from medvit.cli.study import add_label_arguments, prepare, set_aside, show_study
from medvit.config import Config, DataConfig, load_config
from medvit.records import EXIT_DONE, EXIT_QUARANTINE, Case, GateError, ReasonCode, UsageError

SCRATCH = "none"
"""The control: random weights of the architecture that the config names."""

EPILOG = """
candidates: a .safetensors file with timm's names, hub, or none (random weights, which always take part). They are for
the config's model.name; MODEL=FILE is for another timm model, and so is MODEL=hub.

the table, best linear probe first:
  probe AUROC   of a logistic regression on the frozen features, within patient-wise folds, with its interval
  gain          of that AUROC over random weights, with its interval; share: of what random weights leave to be gained
  1-NN          balanced accuracy of the nearest case of another patient; chance is 1 / classes
  LogME, H, LEEP   higher is better, comparable between candidates on the same cases only
  sites apart   largest squared MMD between the features of two sites: 0 where they look alike

examples:
  medvit-rank /exports/ct --labels labels.csv --weights vit.safetensors other.safetensors
  medvit-rank /exports/ct --labels labels.csv --weights vit.safetensors vit_base_patch14_dinov2.lvd142m=base.safetensors
  medvit-rank /exports/ct --labels labels.csv --config frozen --weights hub --output ranking preprocessing.size=126
"""


def parser() -> Parser:
    """The arguments."""
    result = Parser("rank", __doc__ or "", EPILOG)
    add_label_arguments(result)
    result.add_argument("--config", metavar="YAML", help="file, or name of a shipped config (default: baseline)")
    result.add_argument("--weights", metavar="[MODEL=]WEIGHTS", nargs="+", required=True, help="candidates, see below")
    result.add_argument("--output", metavar="DIR", type=Path, help="write ranking.json there")
    result.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the config file")
    return result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_intermixed_args(argv)
    # settings that follow --weights are taken for candidates by argparse
    settings = [word for word in arguments.weights if is_setting(word)]
    config = load_config(arguments.config, [*arguments.overrides, *settings])
    candidates = read_candidates([word for word in arguments.weights if word not in settings], config)
    with Display() as display, tempfile.TemporaryDirectory(prefix="medvit-") as scratch:
        display.start("loading each candidate once", len(candidates))
        for candidate in candidates:
            evaluation.check_candidate(candidate, config)
            display.step()
        cache_dir = config.data.cache_dir or data.default_cache_dir(Path(scratch))
        study = prepare(arguments, cache_dir, config.preprocessing, display)
        show_study(study, [], display)
        cases = choosing(study.cases, config.data)
        refuse_taught(candidates, cases, display)
        if kept := sum(case.label is not None for case in study.cases) - len(cases):
            display.say(f"  {kept} labelled cases are kept for judging (split test, held-out and target sites)")
        sights = {}
        for candidate in candidates:
            display.start(f"features of {candidate.name}", len(cases))
            sights[candidate.name] = evaluation.see_cases(candidate, config, cases, study.cache.load, display.step)
        display.start("probes", 0)
        columns = [(str(case.label), case.group, case.site) for case in cases]
        labels, groups, sites = (np.array(column) for column in zip(*columns, strict=True))
        ranking = evaluation.rank(sights, SCRATCH, labels, groups, sites, config.evaluation)
    document = json.dumps(ranking.to_document(), indent=1)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "ranking.json").write_text(document + "\n", encoding="utf-8")
    if arguments.json:
        print(document)
    else:
        show(ranking)
    return EXIT_QUARANTINE if set_aside(study) else EXIT_DONE


def refuse_taught(candidates: Sequence[evaluation.Candidate], cases: Sequence[Case], display: Display) -> None:
    """Refuse to rank a run by the labels that it has learned.

    Raises:
        GateError: a candidate is such a run.
        UsageError: fewer than two classes are left to rank by.
    """
    if len({case.label for case in cases}) < 2:
        raise UsageError(
            f"{len(cases)} labelled cases are left to rank by, of fewer than two classes: the others are kept for "
            "judging (split test, data.holdout_sites, data.target_sites)."
        )
    patients = len({case.patient_id for case in cases})
    for run in filter(None, (run_of(one.model.weights) for one in candidates)):
        seen, unknown = shared(run, cases, TAUGHT)
        if unknown:
            display.say(f"  whether {run} has learned from these patients is not known: {unknown}")
        if seen:
            raise GateError(
                f"{ReasonCode.LEAKAGE}: {run} has learned the labels of {len(seen)} of {patients} patients, and "
                "would come first for it. Rank it by others."
            )


def choosing(cases: Sequence[Case], settings: DataConfig) -> list[Case]:
    """Labelled cases that weights may be chosen by: none that judges, or whose labels are not to be known."""
    apart = {*settings.holdout_sites, *settings.target_sites}
    sides = ("test", "target")
    return [case for case in cases if case.label is not None and case.split not in sides and case.site not in apart]


def is_setting(word: str) -> bool:
    """Whether a word is `section.key=value` of the config, and no `MODEL=FILE`."""
    key, equals, _ = word.partition("=")
    section, dot, _ = key.partition(".")
    return bool(equals and dot) and section in Config.model_fields


def read_candidates(words: Sequence[str], config: Config) -> list[evaluation.Candidate]:
    """The candidates as given, each once, and random weights.

    Raises:
        UsageError: nothing but random weights, or half of MODEL=FILE is missing.
    """
    found = []
    for word in dict.fromkeys([*words, SCRATCH]):
        name, equals, weights = word.partition("=")
        if not equals or Path(word).is_file():
            model = config.model.model_copy(update={"weights": word})
        elif name and weights:  # options are of the config's own architecture
            model = config.model.model_copy(update={"name": name, "weights": weights, "options": {}})
        else:
            raise UsageError(f"--weights: saw {word!r}. Give a .safetensors file, hub, none, or MODEL=FILE.")
        found.append(evaluation.Candidate(word, model))
    if len(found) == 1:
        raise UsageError(
            "--weights: saw none but random weights, which always take part. Name weights to compare them."
        )
    return found


def show(ranking: evaluation.Ranking) -> None:
    """The table, the label curve of the first, and what it all does not say."""
    percent = f"{100 * ranking.confidence:g} %"
    table = Table(
        title=f"weights by linear probe: {ranking.cases} cases of {ranking.patients} patients, {percent} intervals",
        title_justify="left",
    )
    table.add_column("weights", overflow="fold")
    for heading in ("probe AUROC", "gain", "share", "1-NN", "LogME", "H", "LEEP", "sites apart"):
        table.add_column(heading, justify="right")
    for one in ranking.standings:
        random = one.weights == SCRATCH
        table.add_row(
            "none (random)" if random else one.weights,
            str(one.auroc),
            "-" if random else str(one.gain),
            "-" if random else written(one.normalised_gain),
            *(written(value) for value in (one.nearest_neighbour, one.logme, one.h_score, one.leep)),
            f"{written(one.site_distance)} {' / '.join(one.sites)}".rstrip(),
        )
    console = tables()
    console.print(table)
    first = ranking.standings[0]
    points = ", ".join(f"{written(point.auroc)} with {point.patients:.0f}" for point in ranking.label_curve)
    for line in (
        f"{first.weights} by labelled patients trained on, AUROC of the probe: {points}",
        f"Ordered by the linear probe. With {ranking.patients} patients, differences within intervals mean nothing. No "
        "score predicts reliably what fine-tuning finds: take the order as advice, and train the first by each score.",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def written(value: float) -> str:
    """Two decimals; a dash where there is nothing to say."""
    return "-" if math.isnan(value) else f"{value:.2f}"
