"""Configuration: typed, with the nearest name for what is misspelt, and every shipped file loads."""

import re

import pytest
import yaml
from pydantic import ValidationError

from medvit.config import AugmentConfig, Config, PricesConfig, TtaConfig, load_config, shipped_configs
from medvit.records import EXIT_USAGE, ClaheSettings, UsageError


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  stages:\n  - {name: head, trainable: head}\n  - {name: all}\n")
    return path


def test_an_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("training.batchsize=4", "training.batch_size"),
        ("trainning.batch_size=4", "'training'"),
        ("data.fold=5", "data.folds"),
        ("batch_size=4", "training.batch_size"),
        ("preprocessing.window=[lung]", "preprocessing.windows"),
        ("training.stages.0.learning_rate=1", "config key"),
        ("data.augment.rotate=3", "data.augment.rotate_deg"),
    ],
)
def test_unknown_keys_give_the_nearest_name(empty, override, near):
    with pytest.raises(UsageError) as caught:
        load_config(empty, [override])
    assert near in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


def get(config, key):
    node = config
    for part in key.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.stages.0.lr=1e-3", 1e-3),  # YAML 1.1 reads this as text
        ("training.stages.1.lr=5.0e-4", 5e-4),
        ("training.stages.1.epochs=7", 7),
        ("training.batch_size=4", 4),
        ("data.holdout_sites=[North, South]", ("North", "South")),
        ("preprocessing.windows=[lung, [40, 81]]", ("lung", (40, 81))),
        ("preprocessing.clahe={}", None),
        ("preprocessing.size=98", 98),
        ("data.augment=null", None),
        ("data.augment.flip=true", True),
        ("model.weights=none", "none"),
        ("model.options={depth: 4}", {"depth": 4}),
        ("evaluation.sensitivity=0.9", 0.9),
        ("evaluation.robustness.minutes=0.5", 0.5),
        ("evaluation.robustness=null", None),
    ],
)
def test_overrides_are_read_as_yaml(empty, override, value):
    config = load_config(empty, [override])
    found = get(config, override.partition("=")[0])
    if override == "preprocessing.clahe={}":
        assert found.clip_limit == 2.0
    else:
        assert found == value


@pytest.mark.parametrize(
    ("source", "override", "section"),
    [
        ("baseline", "inference.tta.views=9", TtaConfig(views=9)),
        ("baseline", "preprocessing.clahe.clip_limit=3", ClaheSettings(clip_limit=3)),
        ("baseline", "evaluation.prices.studies_per_year=3", PricesConfig(studies_per_year=3)),
        ("frozen", "data.augment.flip=true", AugmentConfig(flip=True)),
    ],
)
def test_an_override_below_a_null_section_begins_it_with_its_defaults(source, override, section):
    place = override.partition("=")[0].rpartition(".")[0]
    assert get(load_config(source), place) is None
    assert get(load_config(source, [override]), place) == section


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.acceleration.symmetric=true", "'objective.acceleration.schedule': Field required"),
        ("inference.tta.view=9", "Did you mean 'inference.tta.views'?"),
        ("data.cache_dir.x=1", "config key 'data.cache_dir'"),
    ],
)
def test_what_is_missing_or_wrong_below_null_is_named(override, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_config(None, [override])


def test_later_overrides_win_and_leave_the_rest(empty):
    config = load_config(empty, ["training.batch_size=4", "training.batch_size=5"])
    assert config.training.batch_size == 5
    assert [stage.name for stage in config.training.stages] == ["head", "all"]


@pytest.mark.parametrize(
    "override",
    [
        "training.batch_size",
        "=4",
        "training.stages.9.lr=1",
        "training.batch_size.x=1",
        "training.stages.a.lr=1",
        "a=[1",
    ],
)
def test_malformed_overrides_are_wrong_usage(empty, override):
    with pytest.raises(UsageError):
        load_config(empty, ["training.batch_size=4", override])


@pytest.mark.parametrize(
    "override",
    [
        "training.batch_size=0",
        "training.batch_size=x",
        "data.folds=1",
        "data.test_fraction=1.5",
        "training.stages=[]",
        "training.stages.0.lr=nan",
        "preprocessing.windows=[lungs]",
        "training.precision=fp8",
    ],
)
def test_values_out_of_range_name_the_key(empty, override):
    with pytest.raises(UsageError) as caught:
        load_config(empty, [override])
    assert override.split(".")[0] in str(caught.value) or "folds" in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b\n", "just text", "\x00"])
def test_what_is_no_yaml_of_sections_is_wrong_usage(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match="config"):
        load_config(tmp_path / "bad.yaml")


def test_missing_config_is_wrong_usage():
    with pytest.raises(UsageError, match="nowhere"):
        load_config("nowhere.yaml")


def test_config_is_frozen():
    with pytest.raises(ValidationError):
        Config().data.folds = 3


def test_resolved_config_reads_back_the_same(tmp_path, empty):
    config = load_config(
        empty, ["preprocessing.windows=[lung, [40, 81]]", "data.cache_dir=/x", "preprocessing.clahe={}"]
    )
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config
    assert set(yaml.safe_load(config.to_yaml())) == set(Config.model_fields)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads_and_opens_with_what_it_is(name):
    path = shipped_configs()[name]
    assert load_config(name) == load_config(path)
    assert path.read_text().startswith("#")


def test_a_rule_about_several_keys_does_not_recite_the_config():
    with pytest.raises(UsageError, match=r"leave out data\.folds") as raised:
        load_config("dann", ["data.target_sites=[Harbour]", "data.folds=2"])
    assert len(str(raised.value)) < 200


def test_last_stage_is_of_the_size_that_the_model_is_used_at(empty):
    early = load_config(empty, ["training.stages.0.size=112", "training.stages.1.size=224"])
    assert [stage.size for stage in early.training.stages] == [112, 224]
    with pytest.raises(UsageError, match=r"the last one trains at 112 px.*leave out its size"):
        load_config(empty, ["training.stages.1.size=112"])
