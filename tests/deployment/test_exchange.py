"""From a PACS and back: each study once, each result once, whatever breaks in between."""

from pathlib import Path

import pytest
from pydicom import dcmread

from medvit.cli import predict
from medvit.deployment import BatchOptions, Wanted, predict_folder, receive, send_results
from medvit.deployment.ledger import Ledger
from medvit.deployment.premises import LEDGER
from medvit.io import Pacs, PacsError, Retry, open_pacs
from medvit.models.bundle import save_bundle
from tests.deployment.batches import NOON, make_model, outputs, series

QUICK = Retry(tries=2, first_s=0.01, longest_s=0.01)


@pytest.fixture
def bundle(tmp_path) -> Path:
    model = make_model()
    save_bundle(tmp_path / "bundle", model.encoder.classifier, model.info)
    return tmp_path / "bundle"


@pytest.fixture(params=["dicomweb", "dimse"])
def url(request, orthanc) -> str:
    return str(getattr(orthanc, request.param))


def fill(orthanc, folder: Path, count: int = 3) -> list[str]:
    """Studies in the PACS; their UIDs."""
    for number in range(count):
        for path in series(number).write(folder / str(number)):
            orthanc.ask("/instances", path.read_bytes())
    return [series(number).dataset(0).StudyInstanceUID for number in range(count)]


def in_series(orthanc, study: str) -> dict[str, int]:
    """Modality -> objects, of a study in the PACS."""
    found = orthanc.ask(
        "/tools/find", b'{"Level":"Series","Expand":true,"Query":{"StudyInstanceUID":"%s"}}' % study.encode()
    )
    return {one["MainDicomTags"]["Modality"]: len(one["Instances"]) for one in found}


def test_query_fetch_predict_send_and_the_results_are_in_their_studies(orthanc, url, bundle, tmp_path, capsys):
    studies = fill(orthanc, tmp_path / "in")
    command = ["--from", url, "--model", str(bundle), "--output", str(tmp_path / "out"), "--send-to", url]
    assert predict.main(command) == 0
    assert "3 studies predicted" in capsys.readouterr().out
    for study in studies:
        assert in_series(orthanc, study) == {"CT": 4, "SR": 1, "OT": 1}
    before = outputs(tmp_path / "out")
    assert predict.main(command) == 0
    shown = capsys.readouterr()
    assert "0 studies fetched, 3 here already, 0 failed" in shown.err
    assert "0 studies predicted, 3 already done" in shown.out
    assert "0 files stored" in shown.err
    assert {name: raw for name, raw in outputs(tmp_path / "out").items() if "fetched" not in name} == {
        name: raw for name, raw in before.items() if "fetched" not in name
    }


def test_a_study_that_grew_is_fetched_again_and_its_result_replaced(orthanc, bundle, tmp_path):
    (study,) = fill(orthanc, tmp_path / "in", 1)
    url = orthanc.dicomweb
    command = ["--from", url, "--model", str(bundle), "--output", str(tmp_path / "out"), "--send-to", url]
    assert predict.main(command) == 0
    late = series(0, slices=5)
    (path,) = late.write(tmp_path / "late", only=[4])
    orthanc.ask("/instances", path.read_bytes())
    assert predict.main(command) == 0
    assert in_series(orthanc, study) == {"CT": 5, "SR": 2, "OT": 2}
    (report,) = (tmp_path / "out" / "sr").iterdir()
    assert dcmread(report).PredecessorDocumentsSequence


def test_what_is_fetched_is_chosen_by_query_study_and_limit(orthanc, tmp_path):
    studies = fill(orthanc, tmp_path / "in")
    pacs = open_pacs(orthanc.dicomweb)
    assert receive(pacs, {"PatientID": "P1"}, tmp_path / "a", Wanted()).fetched == 1
    assert receive(pacs, {}, tmp_path / "b", Wanted(studies=frozenset(studies[:2]))).fetched == 2
    assert receive(pacs, {"PatientID": "nobody"}, tmp_path / "d", Wanted()).fetched == 0
    assert receive(pacs, {}, tmp_path / "c", Wanted(limit=1)).fetched == 1
    again = receive(pacs, {}, tmp_path / "c", Wanted(limit=1))
    assert (again.fetched, again.known) == (1, 1)


def test_results_that_could_not_be_sent_are_sent_by_the_next_run(orthanc, tmp_path):
    fill(orthanc, tmp_path / "in")
    model, options = make_model(), BatchOptions()
    predict_folder(tmp_path / "in", model, tmp_path / "out", options, clock=lambda: NOON)
    pacs = open_pacs(orthanc.dicomweb, retry=QUICK)
    orthanc.stop()
    with pytest.raises(PacsError):
        send_results(pacs, tmp_path / "out", model, options)
    orthanc.start()
    fill(orthanc, tmp_path / "in")
    assert send_results(pacs, tmp_path / "out", model, options) == {"": 6}
    assert send_results(pacs, tmp_path / "out", model, options) == {}
    assert orthanc.instances() == 3 * (4 + 2)


def test_the_report_of_images_that_have_changed_is_not_sent(tmp_path):
    """What a PACS has got it keeps: it would say of the images there what was said of others."""
    for number in range(2):
        series(number).write(tmp_path / "in" / str(number))
    model, options = make_model(), BatchOptions()
    predict_folder(tmp_path / "in", model, tmp_path / "out", options, clock=lambda: NOON)
    with Ledger(tmp_path / "out" / LEDGER, *options.identity(model)) as ledger:
        first, second = (result.study for result in ledger.results())
        whole = ledger.unsent("pacs")
        ledger.outdate([first])
        left = ledger.unsent("pacs")
        assert len(whole) == 4
        kept = ledger.find(second)
        assert set(left) == {kept.sr, kept.sc}
        assert set(ledger.written()) == set(whole)  # they stay where they are


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either FOLDER or --from"),
        (["in", "--from", "dimse://A@localhost:1"], "either FOLDER or --from"),
        (["in", "--query", "StudyDate=2026"], "goes with --from"),
        (["in", "--no-dicom", "--send-to", "dimse://A@localhost:1"], "nothing to send"),
        (["in", "--send-to", "ftp://localhost"], "ftp"),
    ],
)
def test_wrong_places_are_told_before_any_work(arguments, says, tmp_path, capsys):
    assert predict.main([*arguments, "--model", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_study_that_cannot_be_had_costs_itself(orthanc, tmp_path, monkeypatch):
    studies = fill(orthanc, tmp_path / "in")
    pacs = open_pacs(orthanc.dicomweb, retry=QUICK)
    real = Pacs.fetch

    def fetch(self, study_uid, folder, **named):
        if study_uid == studies[0]:
            raise PacsError("the PACS lost it")
        return real(self, study_uid, folder, **named)

    monkeypatch.setattr(Pacs, "fetch", fetch)
    got = receive(pacs, {}, tmp_path / "out", Wanted())
    assert (got.fetched, got.failed, got.why) == (2, 1, "the PACS lost it")


def test_a_pacs_that_has_nothing_is_no_fault(orthanc, bundle, tmp_path):
    command = ["--from", orthanc.dicomweb, "--model", str(bundle), "--output", str(tmp_path / "out")]
    assert predict.main([*command, "--send-to", orthanc.dicomweb]) == 0
