"""Every README block marked ``<!-- run -->`` is executed as it stands."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- run -->\n```(bash|python)\n(.*?)```", README, re.DOTALL)
#: what is said to a server, by language
ASKED = dict(re.findall(r"<!-- ask: (\w+) -->\n```\w+\n(.*?)```", README, re.DOTALL))


def test_the_readme_has_blocks_to_run():
    assert [language for language, _ in BLOCKS].count("bash") >= 1
    assert [language for language, _ in BLOCKS].count("python") >= 1


def test_the_set_up_commands_are_found_by_ci():
    for name in ("main", "tests"):
        assert re.search(rf"<!-- ci: {name} -->\n```bash\npython3 -m venv .venv && [^\n]+\n```", README)


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_block(language, code, tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    assert run.stdout
    if "--plot" in code:
        assert (tmp_path / "street.png").read_bytes().startswith(b"\x89PNG")
        assert len(list((tmp_path / "events").iterdir())) == 5
        assert (tmp_path / "labels.txt").read_text()
    if language == "python":
        assert (tmp_path / "street.tsv").read_text().startswith("filename\tonset\toffset\tevent_label")


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


def labels_of(answer):
    return [event["event_label"] for event in answer["events"]]


def asked(language, server):
    assert "http://127.0.0.1:8000" in ASKED[language]
    return ASKED[language].replace("http://127.0.0.1:8000", server.address)


@pytest.fixture(scope="module")
def expected(server):
    return labels_of(server.post("/v1/detect", "street.ogg").json())


def test_what_curl_asks(server, expected):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    answers = []
    for line in asked("bash", server).splitlines():
        run = subprocess.run(["bash", "-c", f"{line} -fsS"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        answers.append(json.loads(run.stdout))
    detected, tagged = answers
    assert labels_of(detected) == expected and len(detected["tags"]) == 3
    assert tagged["tags"][0]["label"] in expected


def test_what_python_asks(server, expected):
    code = asked("python", server)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"event_label='(\w+)'", run.stdout) == expected


def test_what_javascript_asks(server, expected):
    """In a browser, on a page of the server itself."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    recording = base64.b64encode((ROOT / "examples" / "street.ogg").read_bytes()).decode()
    code = f"""async (bytes) => {{
        const content = Uint8Array.from(atob(bytes), (character) => character.charCodeAt(0));
        const file = new File([content], "street.ogg");
        {asked("javascript", server)}
        return events.map((event) => event.event_label);
    }}"""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(server.address)
        assert page.evaluate(code, recording) == expected
        browser.close()
