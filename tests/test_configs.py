from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cache.errors import ConfigError
from configs.changes import default_settings, flat
from configs.load import CONFIG_FOLDER, find_config, load_settings
from configs.schema import Device, Precision


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_says_what_it_is(path: Path) -> None:
    settings = load_settings(str(path))
    assert settings.name == path.stem
    header = "".join(takewhile(lambda line: line.startswith("#"), path.open()))
    assert "Expected AP" in header and "make " in header


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_states_only_what_differs_from_the_defaults(path: Path) -> None:
    defaults, stated = flat(default_settings()), flat(OmegaConf.load(path))
    assert [key for key, value in stated.items() if value == defaults[key]] == []


@pytest.mark.parametrize("dataset", ["ytvis2019", "ytvis2021", "ovis"])
@pytest.mark.parametrize(("model", "edge"), [("r50", 360), ("r101", 360), ("swinl", 448)])
def test_configs_of_the_benchmarks(dataset: str, model: str, edge: int) -> None:
    settings = load_settings(f"{dataset}_{model}")
    assert settings.detector.short_edge == edge
    assert settings.evaluate.top_k == (20 if dataset == "ovis" else 10)
    assert settings.train.frame_range == (8 if dataset == "ovis" else 20)
    assert settings.data.holdout == 0.1


def test_overrides_reach_nested_values_with_their_types() -> None:
    wanted = ["train.learning_rate=3e-4", "device=cpu", "data.valid_labels=null", "data.valid_frames=null"]
    settings = load_settings("demo", [*wanted, "train.decay_steps=[5,7]", "train.precision=float32"])
    assert settings.train.learning_rate == 3e-4
    assert settings.device is Device.cpu
    assert settings.train.precision is Precision.float32
    assert settings.data.valid_labels is None
    assert settings.train.decay_steps == [5, 7]


def test_a_path_may_begin_at_home(tmp_path: Path) -> None:
    """`~` alone is YAML's null."""
    overrides = ["cache.path=~/a", "cache.stage_to=~", "runs=b~/c", "train.mix=[{cache: ~/d}]"]
    file = tmp_path / "own.yaml"
    file.write_text("cache: {path: ~/a, stage_to: ~}\nruns: b~/c\ntrain: {mix: [{cache: ~/d}]}\n")
    for settings in (load_settings("demo", overrides), load_settings(str(file))):
        assert (settings.cache.path, settings.cache.stage_to) == (str(Path.home() / "a"), None)
        assert (settings.runs, settings.train.mix[0].cache) == ("b~/c", str(Path.home() / "d"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.iteration=5", "did you mean train.iterations"),
        ("trian.iterations=5", "did you mean train"),
        ("iterations=5", "train.iterations"),
        ("learning_rate=5", "train.learning_rate"),
        ("train.iterations=many", "train.iterations"),
        ("device=tpu", "device"),
        ("train.iterations=0", "more than 0"),
        ("train.learning_rate=-1", "more than 0"),
        ("data.holdout=1.5", "0 <= x < 1"),
        ("head.num_heads=0", "more than 0"),
        ("head.num_heads=7", "divisor of head.hidden_dim"),
        ("detector.short_edge=5", "32 to 1333"),
        ("train.decay_steps=[9,3]", "increasing"),
        ("name=../elsewhere", "folder name"),
        ("data.valid_labels=null", "both"),
        ("no_equals_sign", "key=value"),
        ("data.views=[{flip: true", "not valid YAML"),
        ("data.views=[{crop: 2}]", "data.views: crop"),
    ],
)
def test_what_cannot_be_meant_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")) as refused:
        load_settings("demo", [override])
    assert str(refused.value).startswith("command line") or words == "both", "not blamed on the file"


def test_a_label_file_that_is_typed_must_be_there(tmp_path: Path) -> None:
    words = [f"data.root={tmp_path}", "data.train_labels=nope.json"]
    with pytest.raises(ConfigError, match=rf"no such label file: {tmp_path}/nope.json(.|\n)*that the cache carries"):
        load_settings("demo", words)
    (tmp_path / "nope.json").touch()
    assert load_settings("demo", words).data.train_labels == "nope.json"
    path = tmp_path / "mine.yaml"  # of an experiment whose data set is elsewhere: the cache carries its labels
    path.write_text("data: {root: /elsewhere, train_labels: labels.json}\n")
    assert load_settings(str(path), ["seed=1"]).data.root == "/elsewhere"


def test_a_yaml_file_is_checked_like_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {iteratons: 5}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml.*iteratons(.|\n)*train.iterations"):
        load_settings(str(path))
    path.write_text("train: {iterations: 0, warmup: many}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml, setting train.warmup"):
        load_settings(str(path), ["seed=1"])
    path.write_text("train: {iterations: 0}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: impossible value of train.iterations"):
        load_settings(str(path), ["seed=1"])
    path.write_text("train: [1, 2\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_settings(str(path))
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_settings(str(path))


def test_an_unknown_config_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean ytvis2019_r50"):
        find_config("ytvis2019_r5")
