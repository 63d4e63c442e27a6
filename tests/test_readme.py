"""Every README block marked ``<!-- run -->`` is executed as it stands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- run -->\n```(bash|python)\n(.*?)```", README, re.DOTALL)


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
    if language == "bash":
        assert (tmp_path / "street.png").read_bytes().startswith(b"\x89PNG")
        assert len(list((tmp_path / "events").iterdir())) == 5
        assert (tmp_path / "labels.txt").read_text()
    else:
        assert (tmp_path / "street.tsv").read_text().startswith("filename\tonset\toffset\tevent_label")
