import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import sklearn.metrics

from medvit.config import EvaluationConfig
from medvit.evaluation.curves import Curve, Level, NotMeasured, Robustness
from medvit.evaluation.decision import Cost, Latency, measure_gain
from medvit.evaluation.drift import Drift
from medvit.evaluation.explained import Explanation, Faithfulness, Picture
from medvit.evaluation.further import Further
from medvit.evaluation.metrics import Interval
from medvit.evaluation.overlays import draw_overlay
from medvit.evaluation.predictions import check_predictions, read_predictions
from medvit.evaluation.predictions_csv import write_predictions
from medvit.evaluation.report import write_report

QUICK = EvaluationConfig(bootstrap=100)
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects headings and addresses, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.addresses, self.tags = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for key, value in attrs if key.split(":")[-1] in ("src", "href", "action", "data")]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write(frame, tmp_path, **options):
    report = write_report(frame, tmp_path, QUICK, **options)
    return report, report.path.read_text(encoding="utf-8"), (tmp_path / "metrics.json").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def whole(cohort, tmp_path_factory):
    """One ordinary report, written once."""
    frame = cohort()
    return frame, *write(frame, tmp_path_factory.mktemp("report"), about={"Model": "tiny <vit>"})


def test_report_is_self_contained(whole):
    *_, html, _ = whole
    page = Page(html)
    assert page.open == []
    assert all(address.startswith("#") for address in page.addresses)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?:|//\w|url\((?!#)|@import", html)


def test_report_is_accessible(whole):
    *_, html, _ = whole
    page = Page(html)
    assert '<html lang="en">' in html
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert html.count("<figcaption>") == html.count("<figure") == len(re.findall("<figure[^>]* aria-label=", html)) == 4
    drawn = r"#[mp][0-9a-f]{8}"  # matplotlib's own
    targets = {address[1:] for address in page.addresses if not re.match(drawn, address)}
    assert {"performance", "fairness", "worth", "limits", "made"} <= targets
    assert all(f'id="{target}"' in html for target in targets)
    # what scrolls can be reached with the keyboard
    assert html.count('class="scroll"') == html.count('class="scroll" tabindex="0"') > 5


def test_it_is_read_from_the_top(whole):
    """Verdict, three figures, one picture; then the details."""
    *_, html, _ = whole
    top = html[html.index("<body>") : html.index("<h2")]
    assert top.index("summary") < top.index('class="cards"') < top.index("<figure")
    assert top.count('class="card"') == 3
    assert top.count("<figure") == 1
    assert "What is it worth?" in html
    assert html.count("not told") == 3


def test_headline_numbers(whole):
    frame, report, html, _ = whole
    truth, score = frame["label"] == "bleed", frame["p_bleed"]
    called = score >= 0.41
    assert report.auroc.point == pytest.approx(sklearn.metrics.roc_auc_score(truth, score), abs=1e-12)
    assert report.sensitivity.point == pytest.approx(called[truth].mean(), abs=1e-12)
    assert report.specificity.point == pytest.approx((~called)[~truth].mean(), abs=1e-12)
    assert report.auroc_within_folds.low < report.auroc.point < report.auroc_within_folds.high
    assert report.thresholds == (0.41,)
    assert (report.cases, report.patients) == (len(frame), frame["patient_id"].nunique())
    assert report.confusion["bleed"]["bleed"] == (called & truth).sum()
    assert f"{report.auroc.point:.2f}" in html
    assert report.summary.startswith("The scores tell bleed from none better than chance")


def test_json_has_the_numbers_of_the_report(whole):
    _, report, _, text = whole
    numbers = json.loads(text)
    assert numbers["auroc"] == {"point": report.auroc.point, "low": report.auroc.low, "high": report.auroc.high}
    assert "path" not in numbers
    fairness = json.loads((report.path.parent / "fairness.json").read_text(encoding="utf-8"))
    assert [table["attribute"] for table in fairness["tables"]] == ["site", "sex", "age_band", "site_by_sex"]
    gap = fairness["tables"][0]["equalized_odds"]["point"]
    assert gap == report.fairness[0].equalized_odds.point
    assert numbers["schema_version"] == fairness["schema_version"] == 1


def test_patients_are_named_nowhere(whole):
    frame, report, html, text = whole
    for identifier in {"Mueller", "Anna", *frame["case_id"]}:
        assert not re.search(rf"\b{identifier}\b", html + text + repr(report))


def test_given_text_is_escaped(cohort, tmp_path):
    evil = "<script>alert(1)</script>"
    frame = cohort(60, sites=(evil, "$x_$"))
    _, html, _ = write(frame.replace({"label": {"none": "<b>$no"}}).rename(columns={"p_none": "p_<b>$no"}), tmp_path)
    assert "script" not in Page(html).tags
    assert "&lt;script&gt;" in html


def test_the_same_input_gives_the_same_bytes(cohort, tmp_path):
    pages = [write(cohort(80), tmp_path / name)[1] for name in "ab"]
    assert pages[0] == pages[1]


def test_read_and_given_frames_give_the_same_report(cohort, tmp_path):
    frame = cohort(80).round({"p_none": 6, "p_bleed": 6})
    write_predictions(frame, tmp_path / "predictions.csv")
    read, _, _ = write(read_predictions(tmp_path / "predictions.csv"), tmp_path / "a")
    given, _, _ = write(frame, tmp_path / "b")
    assert (read.auroc, read.fairness, read.summary) == (given.auroc, given.fairness, given.summary)


def test_no_positives(cohort, tmp_path):
    report, html, text = write(cohort(60).assign(label="none"), tmp_path)
    assert np.isnan(report.auroc.point)
    assert "AUROC is undefined" in report.summary
    assert Page(html).open == []
    assert json.loads(text)["auroc"]["point"] is None
    assert "NaN" not in text


def test_twenty_cases_claim_little(cohort, tmp_path):
    report, html, _ = write(cohort(20), tmp_path)
    assert {table.verdict for table in report.fairness} == {"cannot tell"}
    assert "Groups with few patients" in html


def test_chance_is_called_chance(cohort, tmp_path):
    frame = cohort(80)
    report, _, _ = write(frame.assign(label=frame["label"].sample(frac=1, random_state=3).to_numpy()), tmp_path)
    assert report.summary.startswith("These cases do not show")


def test_columns_that_are_absent_are_noted(cohort, tmp_path):
    frame = cohort(80).drop(columns=["sex", "age", "fold", "patient_id", "threshold"])
    report, html, _ = write(frame, tmp_path)
    assert [table.attribute for table in report.fairness] == ["site"]
    assert report.auroc_within_folds is None
    for part in ("No column `sex`", "no patient_id", "No threshold was given"):
        assert part in html.replace("&#39;", "'")


def test_three_classes(three_classes, tmp_path):
    report, html, _ = write(three_classes(), tmp_path)
    assert report.positive == ("none", "benign", "malign")
    assert len(report.fairness) == 3
    assert "each against the rest" in html
    assert Page(html).open == []


def test_confounding_is_named(cohort, tmp_path):
    frame = cohort(200)
    frame.loc[frame["site"] == "North", "label"] = "bleed"
    _, html, _ = write(frame, tmp_path)
    assert "Confounding by site." in html


def test_chance_is_told_from_a_gap(cohort, tmp_path):
    _, even, _ = write(cohort(600, harm=0.0), tmp_path / "even")
    assert "Chance alone can make equal groups this uneven" in even
    report, uneven, _ = write(cohort(900, harm=2.5), tmp_path / "uneven")
    site = next(table for table in report.fairness if table.attribute == "site")
    assert site.no_gap_p < site.no_gap_p_adjusted < 0.05
    assert "Chance alone hardly makes the groups this uneven" in uneven


def test_every_pair_of_groups_is_on_the_page(whole):
    *_, html, _ = whole
    for pair in ("North less South", "North less West", "South less West", "F less M"):
        assert pair in html


def robustness():
    """Noise costs something, drift may be chance, an attack everything; PGD was too slow."""

    def curve(name, *changes):
        levels = tuple(
            Level(severity=k + 1.0, auroc=0.9 + change.point, change=change, moved=0.1, flipped=0.2)
            for k, change in enumerate(changes)
        )
        clean = Interval(0.9, 0.8, 1.0)
        return Curve(name, "HU", "fewer photons", cases=20, patients=18, seconds=9.0, clean=clean, levels=levels)

    return Robustness(
        curves=(
            curve("dose", Interval(-0.01, -0.02, 0.0), Interval(-0.2, -0.3, -0.1)),
            curve("drift", Interval(-0.3, -0.7, 0.1)),
            curve("FGSM", Interval(-0.9, -1.0, -0.8)),
        ),
        not_measured=(NotMeasured("PGD", "12 cases take 120 s, and 35 s were left"),),
        available=40,
        refused=0,
        case_cap=60,
        slices=4,
        minutes=2.0,
        seconds=100.0,
        seed=0,
        draws=100,
        confidence=0.95,
    )


@pytest.fixture(scope="session")
def looked_into(cohort, tmp_path_factory):
    """A report with all that a model adds, its maps shown to be better than both rivals, or not."""
    picture = Picture(
        case_id="abc",
        kind="missed",
        target="bleed",
        probability=0.2,
        label="bleed",
        slice_number=3,
        slices=9,
        weight=0.6,
        png=draw_overlay(np.zeros((32, 32), np.int16), np.eye(4), ("brain",)),
    )

    def make(low):
        gradient = Faithfulness(
            deletion=0.2, insertion=0.8, over_random=Interval(0.3, 0.2, 0.4), over_centre=Interval(0.1, low, 0.2)
        )
        explanation = Explanation(
            maps={"gradient": gradient}, cases=5, available=9, slices=3, seconds=61.0, pictures=(picture,)
        )
        latency = Latency(median=0.31, slowest=0.9, cases=10, slices=7.5, device="cpu", threads=2)
        cost = Cost(currency="CHF", years=5, training=100.0, operation=2000.0, maintenance=30000.0, per_study=1.234)
        gain = measure_gain(frame, frame.assign(p_bleed=0.5, p_none=0.5), "guessing", QUICK)
        drift = Drift(discrepancy=0.1, p=0.0005, patients=30, reference=200)
        return Further(
            explanation=explanation, latency=latency, cost=cost, gain=gain, robustness=robustness(), drift=drift
        )

    frame = check_predictions(cohort(80))
    folder = tmp_path_factory.mktemp("looked")
    return {low: write(frame.copy(), folder / str(low), further=make(low)) for low in (0.05, -0.05)}


def test_maps_that_do_better_than_their_rivals_are_shown(looked_into):
    _, html, text = looked_into[0.05]
    assert "may be looked at" in html
    assert "<details><summary>Show the slices" not in html
    assert "5 of 9 called cases" in html
    assert Page(html).open == []
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in Page(html).addresses)
    numbers = json.loads(text)["explanation"]
    assert numbers["maps"]["gradient"]["over_centre"]["low"] == 0.05
    assert "pictures" not in numbers


def test_maps_that_do_not_are_not_shown_by_default(looked_into):
    _, html, _ = looked_into[-0.05]
    assert "not shown by default" in html
    hidden = html[html.index("<details><summary>Show the slices") :]
    assert "data:image/png" in hidden[: hidden.index("</details>")]
    assert html.count("data:image/png") == 1


def test_what_breaks_it_is_what_is_not_chance_and_happens_in_hospitals(looked_into):
    _, html, text = looked_into[0.05]
    breaks = html[html.index('id="robustness"') :]
    assert "dose costs most: at 2 HU" in breaks
    assert "20 of 40 labelled cases (at most 60) in 100 s" in breaks
    assert "Not measured: PGD (12 cases take 120 s, and 35 s were left)." in breaks
    assert json.loads(text)["robustness"]["curves"][2]["levels"][0]["change"]["point"] == -0.9


def test_a_shift_of_the_whole_is_named(looked_into):
    _, html, text = looked_into[0.05]
    assert "As a whole these cases are not like those that the model knows" in html
    assert json.loads(text)["drift"]["patients"] == 30


def test_rollout_is_shown_where_it_alone_beats_both(looked_into, tmp_path, cohort):
    good, poor = (Faithfulness(deletion=0.2, insertion=0.8, over_random=i, over_centre=i) for i in (GOOD, POOR))
    seen = Explanation(maps={"rollout": good, "gradient": poor}, cases=6, available=9, slices=3, seconds=1.0)
    assert seen.shown == "rollout"
    _, html, _ = write(cohort(60), tmp_path, further=Further(explanation=seen))
    assert "Patches that attention rollout names matter" in html
    assert "do not show that gradient rollout names what matters" in html


GOOD, POOR = Interval(0.2, 0.1, 0.3), Interval(0.0, -0.1, 0.1)


def test_three_figures_for_a_decision(looked_into):
    _, html, text = looked_into[0.05]
    for part in ("AUROC over guessing", "0.31 s", "32,100 CHF", "1.23 per study"):
        assert part in html
    numbers = json.loads(text)
    assert numbers["latency"]["median"] == 0.31
    assert numbers["cost"]["maintenance"] == 30000.0
    assert numbers["gain"]["baseline"] == "guessing"
