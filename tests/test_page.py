"""The page of ``htsat serve`` in a real browser, with the real server behind it.

What it shows is held against ``htsat detect``; its ports of the decoder and of the formats against the Python ones.
"""

import dataclasses
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from htsat.config import DecodingConfig
from htsat.detection.decoder import decode_events, median_at_least, median_frames
from htsat.events import Event
from htsat.formats import Detections, format_events, parse_events
from htsat.predict import Predictor

pytest.importorskip("fastapi")
sync = pytest.importorskip("playwright.sync_api")
expect = sync.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
#: the page writes ranges with a dash as long as an n
BETWEEN = " \N{EN DASH} "


# ---------------------------------------------------------------------------------------------------
# the server, the browser, a page


@pytest.fixture(scope="module")
def base():
    """Address of a server with the bundled model."""
    command = [sys.executable, "-m", "htsat", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        address, told, end = None, "", time.monotonic() + 60
        while address is None and time.monotonic() < end and run.poll() is None:
            if select.select([run.stderr], [], [], 1)[0]:
                told += run.stderr.readline()
                address = re.search(r"http://127\.0\.0\.1:\d+", told)
        try:
            assert address, told
            yield address[0]
        finally:
            run.terminate()
            run.stderr.read()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser whose microphone hears ``street.ogg``."""
    heard = tmp_path_factory.mktemp("microphone") / "street.wav"
    waveform, rate = soundfile.read(EXAMPLES / "street.ogg")
    soundfile.write(heard, waveform[: 12 * rate], rate, subtype="PCM_16")
    arguments = [
        "--no-sandbox",
        "--headless=new",
        "--autoplay-policy=no-user-gesture-required",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={heard}",
    ]
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=False, args=arguments, ignore_default_args=["--mute-audio"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, base):
    """Opens the page; nothing may leave the server, and nothing may be said on the console."""
    contexts, strangers, complaints = [], [], []

    def note(request):
        if not request.url.startswith((base, "blob:", "data:")):
            strangers.append(request.url)

    def open_page(width=1440, height=900, scheme="light", before=None, **settings):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", note)
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if before:
            before(page)
        page.goto(base)
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()
    assert not strangers
    assert not complaints


def detect(*arguments):
    """What ``htsat detect`` prints, asked beside the examples so that it calls them as the page does."""
    command = [sys.executable, "-m", "htsat", "detect", *arguments]
    return subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def street():
    """Events of ``street.ogg`` as the command line tells them."""
    return detect("street.ogg", "--format", "json")


@pytest.fixture(scope="module")
def predictor():
    """The model of the server."""
    return Predictor("default", threads=1)


@pytest.fixture(scope="module")
def posteriors(predictor):
    """What is decoded to these events."""
    return predictor.predict(EXAMPLES / "street.ogg", spectrogram=False)


def give(page, *names):
    page.set_input_files("#picker", [str(name) for name in names])


def with_street(page):
    """Upload ``street.ogg`` and wait until it is shown."""
    give(page, EXAMPLES / "street.ogg")
    expect(page.locator("#wave[data-ready]")).to_be_attached()
    expect(page.locator("#events tbody tr")).not_to_have_count(0)
    return page


def shown(page):
    """(label, from, to, probability) of each row of the table."""
    # at one moment: the table may be written anew
    rows = page.evaluate(
        """() => [...document.querySelector("#events").tBodies[0].rows].map(
            (row) => [...row.cells].map((cell) => cell.innerText))"""
    )
    return [(label.strip(), *times.split(BETWEEN), probability) for label, times, probability in rows]


def as_shown(events):
    """The rows that a table of these events would have."""

    def clock(seconds):
        hundredths = int(np.floor(seconds * 100 + 0.5))
        return f"{hundredths // 6000}:{hundredths // 100 % 60:02d}.{hundredths % 100:02d}"

    return [
        (
            event.event_label.replace("_", " "),
            clock(event.onset),
            clock(event.offset),
            f"{event.probability:.2f}",
        )
        for event in events
    ]


def events_of(text):
    """The events of a recording told as JSON."""
    (item,) = parse_events(text, "json", name="told.json")
    return item.events


def save(page, format):
    """What the page gives for download, and its name."""
    page.locator("#save summary").click()
    with page.expect_download() as waiting:
        page.locator(f"#save-list [data-format={format}]").click()
    return Path(waiting.value.path()).read_bytes().decode(), waiting.value.suggested_filename


def seconds_of(page):
    return page.evaluate("document.querySelector('audio').currentTime")


# ---------------------------------------------------------------------------------------------------
# the ports


def random_case(rng):
    """Posteriors and settings that meet each other's limits often."""
    frames, classes = int(rng.integers(1, 60)), int(rng.integers(1, 5))
    step = float(rng.choice([0.3125, 0.0390625, 0.1, 1 / 3]))
    boundaries = np.arange(frames + 1) * step
    boundaries[-1] -= float(rng.choice([0.0, 0.4 * step]))
    walk = np.cumsum(rng.normal(0, 0.25, (frames, classes)), axis=0) + 0.5
    posteriors = np.clip(np.round(walk, int(rng.integers(1, 7))), 0, 1).astype(np.float32)

    def settings():
        threshold = float(rng.choice([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, float(rng.choice(posteriors.ravel()))]))
        return {
            "threshold": threshold,
            "threshold_off": float(rng.choice([threshold, threshold * 0.4, 0.0])),
            "median_seconds": float(rng.choice([0.0, step, 3 * step, 0.5, 2.0])),
            "min_duration": float(rng.choice([0.0, step, 3 * step, 0.25])),
            "min_gap": float(rng.choice([0.0, step, 2 * step, 0.7])),
        }

    labels = [f"class {index}" for index in range(classes)]
    own = [label for label in labels if rng.random() < 0.4]
    per_class = {}
    for label in own:
        chosen = settings()
        # an exception that names some settings only must still fit the others
        per_class[label] = chosen if rng.random() < 0.7 else {"min_gap": chosen["min_gap"]}
    return posteriors, boundaries, labels, DecodingConfig(**settings(), per_class=per_class)


def plain(events):
    return [dataclasses.asdict(event) for event in events]


def test_the_decoder_of_the_page_gives_the_events_of_the_decoder(visit):
    rng = np.random.default_rng(6)
    cases, expected = [], []
    for _ in range(4000):
        posteriors, boundaries, labels, config = random_case(rng)
        cases.append([posteriors.T.tolist(), boundaries.tolist(), labels, dataclasses.asdict(config)])
        expected.append(plain(decode_events(posteriors, boundaries, labels, config)))
    assert sum(map(len, expected)) > 6000
    page = visit()
    found = page.evaluate(
        """async (cases) => {
            const { decodeEvents } = await import(new URL("assets/decoder.js", document.baseURI));
            return JSON.stringify(JSON.parse(cases).map(([columns, boundaries, labels, config]) => decodeEvents(
                columns.map((column) => Float32Array.from(column)), Float64Array.from(boundaries), labels, config)));
        }""",
        json.dumps(cases),
    )
    assert json.loads(found) == expected


def test_the_filter_of_the_page_and_the_threshold_for_all_classes_are_those_of_python(visit):
    rng = np.random.default_rng(7)
    filters = []
    for _ in range(300):
        column = rng.random(int(rng.integers(1, 30))).astype(np.float32)
        length = 2 * int(rng.integers(0, 20)) + 1
        filters.append([column.tolist(), float(rng.random()), length])
    lengths = [[float(rng.integers(0, 80)) / 16 * step, step] for step in (0.3125, 0.0390625, 0.1) for _ in range(50)]
    config = DecodingConfig(0.5, 0.2, per_class={"a": {"threshold": 0.9, "min_gap": 0.5}, "b": {"threshold_off": 0.1}})
    page = visit()
    medians, frames, changed = page.evaluate(
        """async ([filters, lengths, config]) => {
            const page = await import(new URL("assets/decoder.js", document.baseURI));
            return [
                filters.map(([column, ...rest]) => [...page.medianAtLeast(Float32Array.from(column), ...rest)]),
                lengths.map(([seconds, step]) => page.medianFrames(seconds, step)),
                page.withSettings(config, { threshold: 0.4, threshold_off: null }),
            ];
        }""",
        [filters, lengths, dataclasses.asdict(config)],
    )
    for (column, threshold, length), active in zip(filters, medians, strict=True):
        assert active == median_at_least(np.array(column, np.float32), threshold, length).astype(int).tolist()
    assert frames == [median_frames(*each) for each in lengths]
    assert changed == dataclasses.asdict(config.changed(threshold=0.4, threshold_off=None))


def test_downloads_are_written_as_python_writes_them(visit):
    rng = np.random.default_rng(8)
    labels = ["dog", "a\tb", ' "quoted" ', "Größe, Länge", "雨\u2028x", "\x85y\\"]
    cases = []
    for _ in range(400):
        several = []
        for number in range(int(rng.choice([1, 1, 3]))):
            onsets = rng.choice([0.0005, 0.0015, 1.0, 2e-7, 0.125, 1e-5, 12345.678, rng.random() * 100], 4)
            events = [
                Event(
                    str(rng.choice(labels)),
                    float(onset),
                    float(onset) + float(rng.choice([1e-7, 0.0005, 0.5, rng.random() + 1e-9])),
                    float(rng.choice([0.0, 1.0, 1e-5, 0.0078125, 0.0234375, np.float32(rng.random())])),
                )
                for onset in onsets[: int(rng.integers(0, 5))]
            ]
            events.sort(key=lambda event: event.onset)
            several.append(Detections(f'file "{number}"\\.wav', float(rng.choice([7.0, 0.1, 1 / 3, 3600.5])), events))
        cases.append(several)
    page = visit()
    found = page.evaluate(
        """async (cases) => {
            const { FORMATS } = await import(new URL("assets/formats.js", document.baseURI));
            return cases.map((several) => Object.fromEntries(Object.entries(FORMATS)
                .filter(([, { single }]) => !single || several.length === 1)
                .map(([name, { write }]) => [name, write(several)])));
        }""",
        [[dataclasses.asdict(each) for each in several] for several in cases],
    )
    for several, texts in zip(cases, found, strict=True):
        assert len(texts) == (4 if len(several) == 1 else 3)
        for format, text in texts.items():
            assert text == format_events(several, format)


# ---------------------------------------------------------------------------------------------------
# recordings


def test_an_upload_shows_the_events_of_the_command_line(visit, street):
    page = visit()
    expect(page.locator("#empty h1")).to_contain_text("Drop a recording")
    with_street(page)
    assert shown(page) == as_shown(events_of(street))
    events = events_of(street)
    expect(page.locator("#facts")).to_have_text(f"25 s · {len(events)} events")
    expect(page.locator("#points [aria-checked=true]")).to_have_text("Balanced")
    truth = parse_events((EXAMPLES / "events.tsv").read_text(), "tsv", name="events.tsv")
    said = next(event for item in truth if item.file == "street.ogg" for event in item.events)
    (label, onset, offset, _), *_ = shown(page)
    assert label == said.event_label == "speech"
    assert float(onset[2:]) == pytest.approx(said.onset, abs=0.3)
    assert float(offset[2:]) == pytest.approx(said.offset, abs=0.3)
    # regions lie where the events are: in the shadow tree of the waveform, over its whole length
    places = page.evaluate(
        """() => [...document.querySelector("#wave > div").shadowRoot.querySelectorAll("[part^='region ']")].map(
            (region) => [parseFloat(region.style.left), 100 - parseFloat(region.style.right)])"""
    )
    assert np.allclose(places, [[event.onset * 4, event.offset * 4] for event in events], atol=0.01)
    # each class has the colour that it has in pictures; the most probable tags are bars
    loudest = sorted(events, key=lambda event: -event.probability)
    ranked = list(dict.fromkeys(event.event_label.replace("_", " ") for event in loudest))
    assert page.locator("#names .name").all_inner_texts()[: len(ranked)] == ranked
    assert page.locator("#tags .tag").count() == 5
    assert page.title() == f"street.ogg{BETWEEN}htsat"


def test_an_event_is_heard_from_onset_to_offset(visit, street):
    page, events = with_street(visit()), events_of(street)
    last = len(events) - 1
    page.locator("#events tbody tr").first.click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    assert 1.4 < seconds_of(page) < 3
    expect(page.locator("#events tbody tr").first).to_have_class(re.compile("sounding"))
    expect(page.locator("#events tbody tr").first).to_have_attribute("aria-current", "true")
    # the next one starts at its own onset, and stops at its own offset
    page.evaluate(
        """() => {
            const audio = document.querySelector("audio");
            audio.playbackRate = 4;
            audio.addEventListener("seeking", () => (window.earliest ??= audio.currentTime));
        }"""
    )
    page.locator("#events tbody tr").nth(last).click()
    expect(page.locator("#events tbody tr").nth(last)).to_have_class(re.compile("sounding"))
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    assert seconds_of(page) == pytest.approx(events[last].offset, abs=0.001)
    assert page.evaluate("window.earliest") == pytest.approx(events[last].onset, abs=0.001)
    # a region of the waveform and a bar below it play too
    page.evaluate(
        """() => document.querySelector("#wave > div").shadowRoot.querySelector("[part='region event-1']").click()"""
    )
    expect(page.locator("#events tbody tr").nth(1)).to_have_attribute("aria-current", "true")
    box = page.locator("#posteriors").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 3 / 25, box["y"] + 10)
    expect(page.locator("#events tbody tr").first).to_have_attribute("aria-current", "true")
    # beside the bars the place is taken alone
    page.evaluate("document.querySelector('audio').pause()")
    page.mouse.click(box["x"] + box["width"] * 16 / 25, box["y"] + 10)
    expect(page.locator("#clock")).to_have_text("0:16.0 / 0:25.0")
    assert seconds_of(page) == pytest.approx(16, abs=0.1)


def test_the_threshold_acts_without_a_request(visit, predictor, posteriors):
    page = with_street(visit())
    requests = []
    page.on("request", lambda request: requests.append(request.url))

    def check(decoding):
        framewise, boundaries = posteriors.framewise_posteriors, posteriors.frame_boundaries
        expected = decode_events(framewise, boundaries, posteriors.labels, decoding)
        expect(page.locator("#events tbody tr")).to_have_count(len(expected))
        assert shown(page) == as_shown(expected)

    for threshold in (0.6, 0.35, 0.97):
        page.locator("#threshold").fill(str(threshold))
        expect(page.locator("#threshold-value")).to_have_text(f"{threshold:.2f}")
        check(predictor.config.decoding.changed(threshold=threshold, threshold_off=None))
    for name in ("High recall", "High precision", "Balanced"):
        page.get_by_role("radio", name=name).click()
        check(predictor.config.decoding_at(name.lower().replace(" ", "_")))
    assert requests == []


def test_classes_are_filtered(visit, street):
    page, events = with_street(visit()), events_of(street)
    page.locator("#chips [data-label=rain]").click()
    assert shown(page) == as_shown([event for event in events if event.event_label == "rain"])
    assert page.locator("#names .name").all_inner_texts() == ["rain"]
    page.locator("#chips [data-label=speech]").click()
    chosen = [event for event in events if event.event_label in ("rain", "speech")]
    assert shown(page) == as_shown(chosen)
    text, _ = save(page, "tsv")
    assert text == format_events([Detections("street.ogg", 25.0, chosen)], "tsv")
    page.locator("#chips [data-label=rain]").click()
    page.locator("#chips [data-label=speech]").click()
    assert shown(page) == as_shown(events)
    page.locator("#more-tracks").click()
    expect(page.locator("#names .name")).to_have_count(11)


def test_downloads_equal_the_command_line(visit, street):
    page = with_street(visit())
    names = {"tsv": "street.tsv", "json": "street.json", "audacity": "street.txt", "raven": "street.selections.txt"}
    for format, name in names.items():
        assert save(page, format) == (format_events(parse_events(street, "json", name="street.json"), format), name)
    assert save(page, "json")[0] == street


def test_several_recordings_and_a_bad_one(visit, tmp_path):
    text = tmp_path / "notes.wav"
    text.write_text("this is no sound\n" * 50)
    page = visit()
    give(page, EXAMPLES / "rain_and_clock.ogg", text, EXAMPLES / "waves.flac")
    expect(page.locator(".file.done")).to_have_count(2)
    expect(page.locator(".file.failed")).to_have_count(1)
    page.locator(".file.failed .file-open").click()
    expect(page.locator("#notice")).to_contain_text("notes.wav: this is text, not a recording; expected WAV")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    with page.expect_download() as waiting:
        page.locator("#save-all [data-format=tsv]").click()
    expected = detect("rain_and_clock.ogg", "waves.flac", "--format", "tsv")
    assert Path(waiting.value.path()).read_text() == expected
    page.get_by_role("button", name="Remove notes.wav").click()
    expect(page.locator("#title")).to_have_text("waves.flac")
    assert "sea waves" in {label for label, *_ in shown(page)}


def test_files_are_dropped_anywhere(visit):
    page = visit()
    page.evaluate(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(bytes)], "dropped.wav"));
            const tell = (type) => window.dispatchEvent(
                new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
            tell("dragenter");
            if (document.querySelector("#drop").hidden) throw new Error("nothing says that files can be dropped");
            tell("drop");
        }""",
        list((EXAMPLES / "clock.wav").read_bytes()),
    )
    expect(page.locator("#drop")).to_be_hidden()
    expect(page.locator("#title")).to_have_text("dropped.wav")
    expect(page.locator("#events tbody tr")).not_to_have_count(0)


def test_a_busy_server_is_asked_again(visit):
    def busy(page):
        told = []

        def answer(route):
            if told:
                route.continue_()
                return
            told.append(1)
            body = json.dumps({"error": {"code": "busy", "message": "too many requests"}})
            route.fulfill(status=503, body=body, headers={"Retry-After": "1", "Content-Type": "application/json"})

        page.route("**/v1/detect**", answer)

    page = visit(before=busy)
    give(page, EXAMPLES / "clock.wav")
    expect(page.locator("#waiting")).to_contain_text("again in 1 s")
    expect(page.locator("#events tbody tr")).not_to_have_count(0)
    assert all("503" in text for text in visit.complaints)  # the browser's own word for it
    visit.complaints.clear()


def test_a_token_is_asked_for_and_kept(visit):
    shown_tokens = []

    def locked(page):
        def answer(route):
            token = route.request.headers.get("authorization")
            shown_tokens.append(token)
            if token == "Bearer open-sesame":
                route.continue_()
            else:
                body = json.dumps({"error": {"code": "unauthorized", "message": "the token is missing"}})
                route.fulfill(status=401, body=body, headers={"Content-Type": "application/json"})

        page.route("**/v1/**", answer)

    page = visit(before=locked)
    for token in ("wrong", "open-sesame"):
        expect(page.locator("#token")).to_be_visible()
        page.locator("#token-value").fill(token)
        page.get_by_role("button", name="Continue").click()
    expect(page.locator("#token")).to_be_hidden()
    give(page, EXAMPLES / "clock.wav")
    expect(page.locator("#events tbody tr")).not_to_have_count(0)
    assert shown_tokens == [None, "Bearer wrong", *["Bearer open-sesame"] * 2]
    assert page.evaluate("sessionStorage.getItem('htsat-token')") == "open-sesame"
    assert all("401" in text for text in visit.complaints)
    visit.complaints.clear()


def test_what_the_browser_cannot_play_is_shown_all_the_same(visit, tmp_path):
    waveform, rate = soundfile.read(EXAMPLES / "clock.wav")
    soundfile.write(tmp_path / "clock.caf", waveform, rate)
    page = visit()
    give(page, tmp_path / "clock.caf")
    expect(page.locator("#events tbody tr")).not_to_have_count(0)
    expect(page.locator("#notice")).to_contain_text("cannot play")
    assert page.locator("#play").is_disabled()
    expect(page.locator("#wave[data-ready]")).to_be_attached()


def test_a_long_recording_is_drawn_piece_by_piece(visit, tmp_path):
    waveform, rate = soundfile.read(EXAMPLES / "clock.wav")
    soundfile.write(tmp_path / "long.flac", np.tile(waveform, 64), rate)
    page = visit()
    give(page, tmp_path / "long.flac")
    expect(page.locator("#wave[data-ready]")).to_be_attached()
    painted = """() => {
        const canvas = document.querySelector("#wave > div").shadowRoot.querySelector("canvas[style*=sticky]");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size;
    }"""
    page.wait_for_timeout(500)
    assert page.evaluate(painted) > 50
    expect(page.locator("#events tbody tr")).not_to_have_count(0)
    page.keyboard.press("+")
    page.keyboard.press("+")
    page.wait_for_timeout(300)
    assert page.evaluate(painted) > 50
    assert page.locator("#zoom").input_value() == "20"


# ---------------------------------------------------------------------------------------------------
# the microphone


def test_a_recording_of_the_microphone_is_heard(visit):
    page = visit()
    page.get_by_role("button", name="Record").first.click()
    expect(page.locator("#recorder")).to_be_visible()
    page.wait_for_timeout(4000)
    page.get_by_role("button", name="Stop and listen").click()
    expect(page.locator("#title")).to_have_text(re.compile(r"recording \d{4}-\d\d-\d\d \d\d\.\d\d\.\d\d\.wav"))
    expect(page.locator("#events tbody tr")).not_to_have_count(0)
    assert "speech" in {label for label, *_ in shown(page)}
    length = page.evaluate("document.querySelector('audio').duration")
    assert 3.5 < length < 6


def test_the_microphone_is_heard_live(visit):
    page = visit()
    page.get_by_role("tab", name="Live").click()
    page.get_by_role("button", name="Start listening").click()
    expect(page.locator("#live-title")).to_have_text("Listening")
    # speech from 1.5 to 5.5 s, told while it sounds, then closed
    row = page.locator("#log .event[data-label=speech]").first
    expect(row).to_have_class(re.compile("open"))
    expect(row).not_to_have_class(re.compile("open"))
    onset, offset = (
        float(part.split(":")[0]) * 60 + float(part.split(":")[1])
        for part in row.locator(".when").inner_text().split(BETWEEN)
    )
    assert 2 < offset - onset < 6
    expect(page.locator("#live-delay")).to_contain_text(" s")
    expect(page.locator("#live-tags .tag")).to_have_count(5)
    expect(page.locator("#live-names")).to_contain_text("speech")
    colours = page.evaluate(
        """() => {
            const canvas = document.querySelector("#live-spectrogram");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )
    assert colours > 50
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#live-title")).to_have_text("Listen to the microphone")
    page.locator("#live-save summary").click()
    with page.expect_download() as waiting:
        page.locator("#live-save-list [data-format=json]").click()
    (item,) = parse_events(Path(waiting.value.path()).read_text(), "json", name="live.json")
    assert "speech" in {event.event_label for event in item.events}


def test_a_lost_connection_is_made_again_and_told(visit):
    def break_first(page):
        page.add_init_script(
            """const Real = WebSocket;
            window.WebSocket = class extends Real {
                constructor(...rest) {
                    super(...rest);
                    window.sockets = (window.sockets ?? 0) + 1;
                    window.socket = this;
                }
            };"""
        )

    page = visit(before=break_first)
    page.get_by_role("tab", name="Live").click()
    page.get_by_role("button", name="Start listening").click()
    expect(page.locator("#live-delay")).to_contain_text(" s")
    page.evaluate("window.socket.close()")
    expect(page.locator("#live-notice")).to_contain_text("trying again")
    expect(page.locator("#live-title")).to_have_text("Listening")
    expect(page.locator("#log")).to_contain_text("s not heard")
    assert page.evaluate("window.sockets") == 2
    page.get_by_role("button", name="Stop").click()


# ---------------------------------------------------------------------------------------------------
# the page itself


def test_keys(visit, predictor):
    page = with_street(visit())
    page.keyboard.press("n")
    expect(page.locator("#events tbody tr").first).to_have_attribute("aria-current", "true")
    page.keyboard.press("n")
    page.keyboard.press("n")
    page.keyboard.press("p")
    expect(page.locator("#events tbody tr").nth(1)).to_have_attribute("aria-current", "true")
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    before = seconds_of(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert seconds_of(page) == pytest.approx(before + 6, abs=0.1)
    page.keyboard.press("ArrowLeft")
    assert seconds_of(page) == pytest.approx(before + 5, abs=0.1)
    page.keyboard.press("3")
    expect(page.locator("#points [aria-checked=true]")).to_have_text("High recall")
    page.keyboard.press("]")
    raised = predictor.config.decoding_at("high_recall").threshold + 0.01
    expect(page.locator("#threshold-value")).to_have_text(f"{raised:.2f}")
    page.keyboard.press("+")
    assert page.locator("#zoom").input_value() == "10"
    page.keyboard.press("0")
    assert page.locator("#zoom").input_value() == "0"
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    # everything can be reached with Tab, and its place is seen
    page.locator("body").click(position={"x": 5, "y": 895})
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        seen = "getComputedStyle(document.activeElement).outlineStyle === 'solid'"
        assert page.evaluate(f"document.activeElement === document.body || {seen}")
    assert {"play", "zoom", "threshold", "theme", "name", "chip"} <= reached


def test_nothing_is_wider_than_the_screen(visit):
    def two_models(page):
        def answer(route):
            response = route.fetch()
            (model,) = response.json()["models"]
            other = model | {"name": "another-model-with-a-long-name", "default": False}
            route.fulfill(response=response, json={"models": [model, other]})

        page.route("**/v1/models", answer)

    page = visit(360, 800, before=two_models, is_mobile=True, has_touch=True)

    def check():
        for width in (360, 390, 768, 1100):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0

    check()
    with_street(page)
    check()
    give(page, EXAMPLES / "clock.wav")
    expect(page.locator(".file.done")).to_have_count(2)
    check()
    page.get_by_role("tab", name="Live").click()
    check()


def test_dark_and_light(visit):
    def paper(page):
        return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    dark = visit(scheme="dark")
    assert paper(dark) == "rgb(19, 21, 27)"
    page = with_street(visit())
    light = paper(page)
    assert light == "rgb(252, 252, 253)"
    button = page.locator("#theme")
    for name, seen in (("light", light), ("dark", "rgb(19, 21, 27)")):
        button.click()
        expect(button).to_have_attribute("aria-label", f"Colours: {name}")
        assert paper(page) == seen
    page.reload()
    assert paper(page) == "rgb(19, 21, 27)"
