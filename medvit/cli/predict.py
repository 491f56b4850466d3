"""medvit-predict: run a trained model over an export folder; running it again continues.

One prediction per study, from its best series. Writes predictions.csv, quarantine.csv (what was set aside, and why) and
ledger.sqlite to OUT. New or changed studies are predicted again, finished ones are not.
"""

from __future__ import annotations

from pathlib import Path

import medvit
from medvit import deployment
from medvit.cli.console import Display, Parser, command
from medvit.records import EXIT_DONE, EXIT_QUARANTINE

EPILOG = """
examples:
  medvit-predict /exports/tonight --model runs/first --output results/tonight
"""


def parser() -> Parser:
    """The arguments."""
    result = Parser("predict", __doc__ or "", EPILOG)
    result.add_argument("folder", metavar="FOLDER", type=Path, help="export, searched with all subfolders")
    result.add_argument("--model", metavar="RUN_OR_BUNDLE", type=Path, required=True, help="from medvit-train")
    result.add_argument("--output", metavar="OUT", type=Path, required=True, help="results; kept between runs")
    result.add_argument("--assume-hu", action="store_true", help="take values without rescale tags for HU, flagged")
    result.add_argument(
        "--settled",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="leave series with a file that changed within so many seconds for the next run (default: 0)",
    )
    return result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    model = medvit.load_bundle(arguments.model)
    with Display() as display:
        done = deployment.predict_folder(
            arguments.folder,
            model,
            arguments.output,
            assume_hu=arguments.assume_hu,
            settled_s=arguments.settled,
            start=display.start,
            step=display.step,
        )
    print(
        f"{done.predicted} studies predicted, {done.kept} already done, {done.failed} set aside while reading\n"
        f"{done.seen} files seen: {done.used} used, {done.quarantined} quarantined, {done.rejected} rejected, "
        f"{done.skipped} skipped\n"
        f"predictions  {arguments.output / 'predictions.csv'}\nset aside    {arguments.output / 'quarantine.csv'}"
    )
    return EXIT_QUARANTINE if done.quarantined or done.rejected else EXIT_DONE
