"""Studies from a PACS into a folder to predict from, and results back to one; both go on where they were broken off.

What was fetched is remembered beside the images, so that a study is fetched again only when the PACS has more images of
it. What was sent is remembered in the ledger, once the PACS has said that it stored it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medvit.data.pseudonym import pseudonym, site_key
from medvit.deployment.audit import Audit
from medvit.deployment.choice import Wanted
from medvit.deployment.ledger import Ledger
from medvit.deployment.options import BatchOptions
from medvit.deployment.premises import AUDIT, LEDGER, occupied, written
from medvit.inference import Model
from medvit.io import Found, Pacs, PacsError, Sent
from medvit.io.disk import sync_folder, write_whole

RECEIVED, IMAGES, ARRIVING, FETCHED = "received", "images", "arriving", "fetched"
"""Below the output, and below that: whole studies; the one under way; how many images each had."""

IN_A_ROW = 3
"""Studies that fail one after the other before the PACS is given up."""

Step = Callable[[str], None]


@dataclass(frozen=True)
class Received:
    """What a PACS gave: studies fetched now, there already, and failed; `why` says what was last heard of a failure.

    Their images are in `folder`.
    """

    folder: Path
    fetched: int
    known: int
    failed: int
    why: str = ""


def receive(
    pacs: Pacs,
    query: Mapping[str, str],
    output: Path,
    wanted: Wanted,
    *,
    stop: Callable[[], bool] = lambda: False,
    start: Callable[[str, int], None] = lambda _what, _total: None,
    step: Step = lambda _: None,
) -> Received:
    """Fetch the studies that match a query, those apart that are here already.

    A study that cannot be had costs itself; after several in a row the others are left for the next run.

    Args:
        pacs: where from.
        query: as `Pacs.find`.
        output: of the run; studies are kept in its subfolder `RECEIVED`.
        wanted: a shard, or single studies, of those found; at most `limit` new ones are fetched.
        stop: asked before each study.
        start: told of the work and its length; `step` of each study.
        step: see `start`.

    Raises:
        PacsError: the PACS does not say what it has.
        MedvitError: the output folder is in use, or cannot be written.
    """
    with occupied(output), written(output):
        return _receive(pacs, query, output / RECEIVED, wanted, stop, start, step)


def _receive(
    pacs: Pacs,
    query: Mapping[str, str],
    folder: Path,
    wanted: Wanted,
    stop: Callable[[], bool],
    start: Callable[[str, int], None],
    step: Step,
) -> Received:
    found = [one for one in pacs.find(query) if _asked_for(one, wanted)]
    start("fetching studies", len(found))
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    (folder / FETCHED).mkdir(exist_ok=True)
    tally, row, why = Counter[str](), 0, ""
    for one in found:
        if stop() or tally["fetched"] == wanted.limit:
            break
        try:
            tally["fetched" if _fetch(pacs, one, folder) else "known"] += 1
            row = 0
        except PacsError as error:
            tally["failed"], row, why = tally["failed"] + 1, row + 1, str(error)
            if row == IN_A_ROW:
                break
        step(f"{tally['fetched']} fetched, {tally['known']} here already, {tally['failed']} failed")
    return Received(folder / IMAGES, tally["fetched"], tally["known"], tally["failed"], why)


def _asked_for(one: Found, wanted: Wanted) -> bool:
    return wanted.mine(one.study_uid) and (not wanted.studies or one.study_uid in wanted.studies)


def _fetch(pacs: Pacs, one: Found, folder: Path) -> bool:
    """Fetch a study that is new or has grown; whether it was."""
    name = pseudonym("study", one.study_uid)
    note = folder / FETCHED / f"{name}.json"
    known = json.loads(note.read_text()) if note.is_file() else None
    if known is not None and one.instances is not None and one.instances == known["instances"]:
        return False
    if known is not None and pacs.images(one.study_uid) == known["images"]:  # what is new are results
        write_whole(note, json.dumps(known | {"instances": one.instances}).encode())
        return False
    images, arriving = folder / IMAGES / name, folder / ARRIVING / name
    shutil.rmtree(arriving, ignore_errors=True)  # whole, but a kill kept it from its place
    count = pacs.fetch(one.study_uid, arriving)
    if count:
        shutil.rmtree(images, ignore_errors=True)
        arriving.rename(images)
        sync_folder(folder / IMAGES)
    write_whole(note, json.dumps({"instances": one.instances, "images": count}).encode())
    return True


def send_results(
    pacs: Pacs,
    output: Path,
    model: Model,
    options: BatchOptions,
    *,
    start: Callable[[str, int], None] = lambda _what, _total: None,
    step: Step = lambda _: None,
) -> Counter[str]:
    """Send the results in an output folder that a PACS has not got yet.

    Args:
        pacs: where to.
        output: of `predict_folder`, with this model and these options.
        model: see `output`; `options` too.
        options: see `output`.
        start: told of the work and its length; `step` of each file.
        step: see `start`.

    Returns:
        How many files ended how: "" is stored, anything else a reason.

    Raises:
        PacsError: it cannot be reached, or refuses us; what it has is remembered.
    """
    with (
        occupied(output),
        Ledger(output / LEDGER, *options.identity(model)) as ledger,
        Audit(output / AUDIT, site_key()) as audit,
    ):
        target, counts = str(pacs.url), Counter[str]()
        names = {output / name: name for name in ledger.unsent(target)}
        start("sending results", len(names))

        def settled(one: Sent) -> None:
            counts["" if one.accepted else one.code] += 1
            if one.accepted:
                head = audit.append("sent", file=one.path.name, destination=pseudonym("place", target))
                ledger.put_sent(names[one.path], target, head)
            step(f"{counts['']} stored")

        pacs.send(names, settled=settled)
    return counts
