import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from medvit.config import ModelConfig, TtaConfig
from medvit.data.pipelines import prepare_slices
from medvit.inference import STUDIES_AT_ONCE, Encoder, Model, load_bundle, softmax
from medvit.models.bundle import open_bundle, save_bundle
from medvit.models.bundle_info import BundleInfo, TrainingRange
from medvit.models.classifier import build_classifier
from medvit.models.reference import know
from medvit.records import Preprocessing, ReasonCode, Scan, ScanError, ScanHeader, UsageError

PREPROCESSING = Preprocessing(windows=("soft_tissue", (-600.0, 1500.0)), size=32, predict_slices=5)
MEAN, STD = (0.4, 0.3), (0.2, 0.25)
ARCHITECTURE = ModelConfig(
    name="vit_tiny_patch16_224",
    weights="none",
    options={"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "proj_drop_rate": 0.2},
    dropout=0.3,
    drop_path=0.2,
)


def scan(seed: int, slices: int = 9) -> Scan:
    rng = np.random.default_rng(seed)
    hu = rng.normal(40 * seed, 150, (slices, 32, 32)).astype(np.float32)
    affine = np.diag([1.0, 1.0, 2.5, 1.0])
    return Scan(
        hu=hu, affine=affine, header=ScanHeader(patient_id=f"Anna{seed}", series_uid=f"1.2.{seed}", site="North")
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a bundle in it, trained on nothing."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    classifier, _ = build_classifier(ARCHITECTURE, size=32, channels=2, classes=2)
    info = BundleInfo(
        architecture=ARCHITECTURE,
        preprocessing=PREPROCESSING,
        mean=MEAN,
        std=STD,
        classes=("none", "bleed"),
        threshold=0.5,
        temperature=1.5,
    )
    save_bundle(folder / "bundle", classifier, info)
    return folder


@pytest.fixture
def model(run) -> Model:
    return load_bundle(run)


def probability(model: Model, *scans: Scan) -> list[float]:
    return [prediction.probabilities["bleed"] for prediction in model.predict(scans)]


@torch.inference_mode()
def by_hand(run, one: Scan) -> np.ndarray:
    """Windows, normalisation, middle slice of each fifth, network, temperature: all spelled out."""
    classifier, info = open_bundle(run)
    count = len(one.hu)
    chosen = range(count) if count <= 5 else [int((k + 0.5) * count / 5) for k in range(5)]
    planes = torch.from_numpy(prepare_slices(one, PREPROCESSING)[list(chosen)].astype(np.float32))
    channels = []
    for (level, width), mean, std in zip(((40, 400), (-600, 1500)), MEAN, STD, strict=True):
        channels.append((((planes - (level - width / 2)) / width).clamp(0, 1) - mean) / std)
    logits = classifier(torch.stack(channels, dim=1)[None], torch.ones(1, len(planes), dtype=torch.bool)).logits[0]
    return (logits / info.temperature).softmax(dim=0).numpy()


@pytest.mark.parametrize("slices", [1, 5, 9])
def test_prediction_equals_the_computation_by_hand(slices, run, model):
    (prediction,) = model.predict([scan(1, slices)])
    np.testing.assert_allclose(list(prediction.probabilities.values()), by_hand(run, scan(1, slices)), atol=1e-5)


@pytest.mark.parametrize("batch_slices", [1, 2, 4])
def test_chunks_do_not_change_the_prediction(batch_slices, run, model):
    chunked = load_bundle(run, batch_slices=batch_slices)
    np.testing.assert_allclose(probability(chunked, scan(1)), probability(model, scan(1)), atol=1e-5)


def test_prediction_does_not_depend_on_other_scans(model):
    together = probability(model, scan(1), scan(2, 3), scan(3, 20))
    assert together == [*probability(model, scan(1)), *probability(model, scan(2, 3)), *probability(model, scan(3, 20))]


def test_scans_differ(model):
    assert len(set(probability(model, scan(1), scan(2), scan(3)))) == 3


def test_prediction_is_the_same_twice(model):
    assert probability(model, scan(1)) == probability(model, scan(1))


def test_bundle_and_run_folder_give_the_same_model(run, model):
    assert probability(load_bundle(run / "bundle"), scan(1)) == probability(model, scan(1))


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"bundle\.json"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("slices", [1, 3, 5, 6, 40])
def test_looks_at_no_more_slices_than_set(slices, model):
    (prediction,) = model.predict([scan(1, slices)])
    seen = [index for index, _ in prediction.slice_weights]
    assert len(seen) == len(set(seen)) == min(slices, 5)
    assert set(seen) <= set(range(slices))


def test_slice_weights_sum_to_one(model):
    (prediction,) = model.predict([scan(1)])
    assert sum(weight for _, weight in prediction.slice_weights) == pytest.approx(1, abs=1e-5)


def test_probabilities_sum_to_one(model):
    (prediction,) = model.predict([scan(1)])
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [0.1, 0.2, 0.3]])
def test_softmax_is_finite_and_sums_to_one(logits):
    found = softmax(np.array(logits, np.float32))
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize(("threshold", "decision"), [(0.0, "bleed"), (1.0, "none")])
def test_threshold_of_the_bundle_decides(threshold, decision, model):
    model = dataclasses.replace(model, info=model.info.model_copy(update={"threshold": threshold}))
    assert model.predict([scan(1)])[0].predicted == decision


def test_threshold_itself_is_positive(model):
    predictions = model.predict([scan(1)])
    at = predictions[0].probabilities["bleed"]
    assert dataclasses.replace(predictions[0], threshold=at).predicted == "bleed"


def test_prediction_carries_the_hash_of_the_model(run, model):
    assert model.predict([scan(1)])[0].model_sha256 == open_bundle(run)[1].weights_sha256


def test_prediction_carries_no_identifier_of_the_patient(model):
    (prediction,) = model.predict([scan(1)])
    assert "Anna1" not in str(prediction)
    assert prediction.patient_id
    assert prediction.site == "North"


def test_features_are_of_the_slices_that_a_prediction_looks_at(model):
    (features,) = model.features([scan(1)])
    ((logits, *_),) = model.encoder.studies([features])
    np.testing.assert_allclose(softmax(logits, 1.5)[1], probability(model, scan(1))[0], atol=1e-6)


@pytest.mark.parametrize("batch_slices", [1, 4, 12, 100])
def test_mean_features_of_many_cases_are_those_of_each(batch_slices, model):
    scans = [scan(seed, slices) for seed, slices in enumerate((1, 9, 3, 1, 2))]
    encoder = dataclasses.replace(model.encoder, batch_slices=batch_slices)
    found = list(encoder.means(prepare_slices(one, PREPROCESSING) for one in scans))
    assert len(found) == len(scans)
    for mean, features in zip(found, model.features(scans), strict=True):
        np.testing.assert_allclose(mean, features.mean(axis=0), atol=1e-5)


def test_encoding_in_the_middle_of_training_has_no_dropout_and_leaves_training_mode(run):
    classifier = open_bundle(run)[0].train()
    encoder = Encoder(classifier, PREPROCESSING, MEAN, STD)
    slices = prepare_slices(scan(1), PREPROCESSING)
    np.testing.assert_array_equal(encoder.encode(slices), encoder.encode(slices))
    assert classifier.training
    assert classifier.backbone.training


def test_studies_of_any_length_beside_each_other_come_out_as_alone(model):
    rng = np.random.default_rng(0)
    width = model.encoder.classifier.backbone.width
    features = [rng.normal(size=(1 + index % 5, width)).astype(np.float32) for index in range(STUDIES_AT_ONCE + 3)]
    together = model.encoder.studies(features)
    assert len(together) == len(features)
    for one, (logits, weights, *_) in zip(features, together, strict=True):
        (alone,) = model.encoder.studies([one])
        np.testing.assert_allclose(logits, alone.logits, atol=1e-5)
        np.testing.assert_allclose(weights, alone.weights, atol=1e-6)


STILL = TtaConfig(views=4, scale=(1, 1), crop=False, shift=0, rotate_deg=0, window_jitter=0)


def test_views_that_change_nothing_change_no_bit(model):
    (plain,), (still,) = model.predict([scan(1)]), model.with_views(STILL).predict([scan(1)])
    assert still.spread == 0
    assert dataclasses.replace(still, spread=None) == plain


def test_prediction_is_the_mean_of_the_logits_of_all_views(model):
    tta = TtaConfig(views=3, scale=(0.75, 1.25), rotate_deg=20)
    augmented = model.with_views(tta)
    prepared = prepare_slices(scan(1), PREPROCESSING)
    logits = []
    for view in augmented.encoder.views:
        alone = dataclasses.replace(model.encoder, views=(view,))
        logits.append(alone.study(prepared)[1].logits)
    assert len({tuple(one) for one in logits}) == 3
    (prediction,) = augmented.predict([scan(1)])
    expected = softmax(np.mean(logits, axis=0), 1.5)
    assert prediction.probabilities["bleed"] == pytest.approx(expected[1], abs=1e-6)
    each = [softmax(one, 1.5)[1] for one in logits]
    assert prediction.spread == pytest.approx(np.std(each), abs=1e-6)
    assert augmented.predict([scan(1)]) == [prediction]  # no chance left in it


def test_views_travel_in_the_bundle(run, model, tmp_path):
    info = model.info.model_copy(update={"tta": TtaConfig(views=3)})
    save_bundle(tmp_path, model.encoder.classifier, info)
    assert load_bundle(tmp_path).predict([scan(1)]) != model.predict([scan(1)])
    assert len(load_bundle(tmp_path).encoder.views) == 3
    assert len(load_bundle(run).encoder.views) == 1


def test_features_are_those_of_the_slices_as_they_are(model):
    (plain,), (several,) = model.features([scan(1)]), model.with_views(TtaConfig()).features([scan(1)])
    assert (plain == several).all()


def test_a_scan_unlike_all_training_scans_is_flagged_or_refused(model):
    seen = TrainingRange(body_parts=("CHEST",), kernels=("B30f",))
    info = model.info.model_copy(update={"training_range": seen, "refuse": ("body_part",)})
    model = dataclasses.replace(model, info=info)
    known, sharp, head = (
        dataclasses.replace(scan(1), header=dataclasses.replace(scan(1).header, body_part=part, kernel=kernel))
        for part, kernel in (("CHEST", "B30f"), ("CHEST", "B70f"), ("HEAD", "B30f"))
    )
    assert [prediction.flags for prediction in model.predict([known, sharp])] == [(), ("UNSEEN_KERNEL",)]
    with pytest.raises(ScanError, match="body_part HEAD") as refusal:
        model.predict([head])
    assert refusal.value.code == ReasonCode.NOT_FOR_MODEL


@pytest.mark.parametrize(
    ("trained_on", "part", "refused"),
    [
        (("CHEST",), "chest ", False),
        (("CHEST",), "THORAX", True),  # words are compared, and not what they mean
        (("CHEST",), "", False),  # what nobody wrote is unlike nothing
        ((), "HEAD", False),
    ],
)
def test_only_what_headers_say_is_refused(model, trained_on, part, refused):
    """As README and the model card say: change them with it."""
    seen = TrainingRange(body_parts=trained_on)
    info = model.info.model_copy(update={"training_range": seen, "refuse": ("body_part",)})
    given = dataclasses.replace(scan(1), header=dataclasses.replace(scan(1).header, body_part=part))
    with pytest.raises(ScanError, match="body_part") if refused else nullcontext():
        (prediction,) = dataclasses.replace(model, info=info).predict([given])
        assert prediction.flags == ()


def test_features_far_from_the_reference_are_flagged(model):
    features = np.stack([model.encoder.study(prepare_slices(scan(i), PREPROCESSING))[1].pooled for i in range(1, 9)])
    (near,) = dataclasses.replace(model, reference=know(features)).predict([scan(1)])
    assert near.flags == ()
    assert near.ood_score == pytest.approx(know(features).score(features[:1])[0], rel=1e-4)
    strict = dataclasses.replace(know(features), threshold=near.ood_score / 2)
    (far,) = dataclasses.replace(model, reference=strict).predict([scan(1)])
    assert far.flags == ("OUT_OF_DISTRIBUTION",)
