"""The bundled model on the example recordings, whose events are known because they were synthesised."""

from pathlib import Path

import pytest

import htsat
from htsat.config import CalibrationConfig
from htsat.formats import read_events
from htsat.model.checkpoint import read_config
from htsat.model.hub import resolve
from htsat.training.recipe import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
TRUTH = {item.file: item.events for item in read_events(EXAMPLES / "events.tsv")}


@pytest.fixture(scope="module")
def predictor():
    return htsat.Predictor("default", device="cpu", threads=1)


def test_the_bundled_model_is_the_recipes():
    config, recipe = read_config(resolve("default")), load_recipe("everyday")
    assert (config.frontend, config.model) == (recipe.frontend, recipe.model)
    assert (config.labels, config.inference) == (recipe.data.labels, recipe.inference)
    assert config.provenance["steps"] == recipe.train.steps
    # Thresholds and probabilities were found with a model of the same recipe that held a fold out.
    assert config.provenance["calibration"]["taken_over"] and config.provenance["calibration"]["decoding"]
    assert list(config.operating_points) == ["high_precision", "balanced", "high_recall"]
    assert config.decoding == config.operating_points["balanced"] and config.calibration != CalibrationConfig()
    assert resolve("default").stat().st_size < 16_000_000


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("clock.wav", {"clock_tick"}),
        ("rain_and_clock.ogg", {"clock_tick", "rain"}),
        ("waves.flac", {"sea_waves"}),
        ("street.ogg", {"speech", "helicopter", "rain"}),
    ],
)
def test_tags(predictor, file, expected):
    tags = predictor.predict(EXAMPLES / file, spectrogram=False).tags
    # One other may be among them: its sounds are synthesised, and it has heard recordings alone.
    assert expected <= {tag.label for tag in tags[: len(expected) + 1]}


@pytest.mark.parametrize(
    ("file", "label"),
    [
        ("clock.wav", "clock_tick"),
        ("rain_and_clock.ogg", "rain"),
        ("waves.flac", "sea_waves"),
        ("helicopter_over_fire.ogg", "crackling_fire"),
        ("street.ogg", "speech"),
        ("street.ogg", "helicopter"),
    ],
)
def test_first_event_of_a_class_begins_when_it_begins(predictor, file, label):
    events = predictor.predict(EXAMPLES / file, spectrogram=False).events
    found = min((e for e in events if e.event_label == label), key=lambda e: e.onset)
    true = min((e for e in TRUTH[file] if e.event_label == label), key=lambda e: e.onset)
    assert abs(found.onset - true.onset) <= 0.625  # two tokens
    assert found.onset < true.offset and true.onset < found.offset
