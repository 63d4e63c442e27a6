"""Label sets and class maps against facts that can be looked up."""

from pathlib import Path

import pytest
from shared_data import shared

from htsat.errors import DataError, UsageError
from htsat.labels import LABEL_SETS, audioset_mids, desed_map, label_set, read_labels, resolve_labels


@pytest.mark.parametrize(
    ("name", "count"), [("audioset", 527), ("esc50", 50), ("esc10", 10), ("speech_commands_v2", 35), ("desed", 10)]
)
def test_label_sets_have_their_size_and_no_repetition(name: str, count: int) -> None:
    labels = label_set(name)
    assert len(labels) == len(set(labels)) == count
    assert all(label == label.strip() and label for label in labels)
    assert name in LABEL_SETS


def test_audioset_is_in_the_published_order() -> None:
    """Indices as in AudioSet's class_labels_indices.csv."""
    names = label_set("audioset")
    known = {
        0: "Speech",
        16: "Laughter",
        72: "Animal",
        81: "Cat",
        137: "Music",
        300: "Vehicle",
        370: "Water tap, faucet",
    }
    known |= {288: "Water", 310: "Car alarm", 377: "Vacuum cleaner", 500: "Silence", 526: "Field recording"}
    assert {index: names[index] for index in known} == known
    mids = audioset_mids()
    assert len(set(mids)) == 527
    assert (mids[0], mids[74], mids[137], mids[526]) == ("/m/09x0r", "/m/0bt9lr", "/m/04rlf", "/m/07hvw1")


def test_esc_labels_are_in_target_order() -> None:
    """Targets as in ESC-50's meta/esc50.csv."""
    names = label_set("esc50")
    assert {i: names[i] for i in (0, 10, 14, 20, 41, 49)} == {
        0: "dog",
        10: "rain",
        14: "chirping_birds",
        20: "crying_baby",
        41: "chainsaw",
        49: "hand_saw",
    }
    table = shared("data/esc50_fold4/metadata.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in table]
    assert {(int(row[2]), row[3]) for row in rows} == set(enumerate(names))
    assert {row[3] for row in rows if row[4] == "True"} == set(label_set("esc10"))


def test_speech_commands_and_desed_are_alphabetical() -> None:
    assert list(label_set("speech_commands_v2")) == sorted(label_set("speech_commands_v2"))
    assert {"backward", "yes", "zero", "visual"} < set(label_set("speech_commands_v2"))
    assert list(label_set("desed")) == sorted(label_set("desed"))


def test_unknown_set_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'audioset'"):
        label_set("audioste")


def names(which: str) -> dict[str, set[str]]:
    audioset = label_set("audioset")
    return {label: {audioset[i] for i in members} for label, members in desed_map(which).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["published", "corrected"])
def test_desed_maps_cover_each_class_once(which: str) -> None:
    mapping = desed_map(which)  # type: ignore[arg-type]
    assert tuple(sorted(mapping)) == label_set("desed")
    members = [index for group in mapping.values() for index in group]
    assert len(members) == len(set(members))
    assert all(0 <= index < 527 for index in members)


def test_desed_maps_differ_where_the_published_one_is_wrong() -> None:
    published, corrected = names("published"), names("corrected")
    assert published["Frying"] == {"Chopping (food)", "Frying (food)", "Microwave oven"}
    assert corrected["Frying"] == {"Frying (food)"}
    assert "Rain" in published["Running_water"] - corrected["Running_water"]
    assert {"Water tap, faucet", "Sink (filling or washing)", "Bathtub (filling or washing)", "Toilet flush"} == (
        corrected["Running_water"] - published["Running_water"]
    )
    assert corrected["Electric_shaver_toothbrush"] > published["Electric_shaver_toothbrush"]
    assert "Whimper (dog)" in corrected["Dog"] - published["Dog"]
    assert "Doorbell" in corrected["Alarm_bell_ringing"]
    assert "Foghorn" in published["Alarm_bell_ringing"] - corrected["Alarm_bell_ringing"]
    with pytest.raises(UsageError, match="published, corrected"):
        desed_map("better")  # type: ignore[arg-type]


def test_reading_label_files(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("# mine\ncar, horn\n\n  dog \n")
    assert read_labels(path) == ("car, horn", "dog")
    path.write_text('index,mid,display_name\n0,/m/1,"Male speech, man"\n1,/m/2,Dog\n', encoding="utf-8-sig")
    assert read_labels(path) == ("Male speech, man", "Dog")
    path.write_text("label,colour\na,red\nb,blue\n")
    assert read_labels(path) == ("a", "b")
    path.write_text("index,display_name\n1,a\n0,b\n")
    with pytest.raises(DataError, match="must count 0, 1, 2"):
        read_labels(path)
    path.write_text("index,display_name\n0\n")
    with pytest.raises(DataError, match="lacks its display_name"):
        read_labels(path)
    path.write_text("\n# nothing\n")
    with pytest.raises(DataError, match="no labels"):
        read_labels(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_labels(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "absent.txt")
    with path.open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(DataError, match="larger than"):
        read_labels(path)


def test_resolving_labels(tmp_path: Path) -> None:
    assert resolve_labels("esc10") == label_set("esc10")
    assert resolve_labels(["b", "a"]) == ("b", "a")
    (tmp_path / "x.txt").write_text("p\nq\n")
    assert resolve_labels(str(tmp_path / "x.txt")) == resolve_labels(tmp_path / "x.txt") == ("p", "q")
    with pytest.raises(DataError, match="did you mean 'esc50'"):
        resolve_labels("esc5")
