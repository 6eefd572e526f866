"""The README's commands as a newcomer gives them: in their order, after `make demo` alone, in a clone.

The clone is a stand-in with the recipes, the data and the demo's run. A training that takes minutes is shortened by
fields on top, `make lab` is asked what it would do, and `ollama`, which is not here, is a script that looks at what it
is given: a Modelfile, and the file that it names.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kit.runs.run import read_result
from support.command import PROJECT
from support.documents import DOCUMENTS, scripts, text_of

pytestmark = pytest.mark.slow
DEMO = PROJECT / "runs" / "quickstart"
SHORTER = "max_steps=2 max_eval_samples=2 max_new_tokens=8"
TINY = "max_steps=8 max_eval_samples=2 max_new_tokens=8 learning_rate=1.0e-2 gguf=[q8_0] model_name="
MAKE = f"""#!/bin/sh
case "$1" in
    demo) test -f runs/quickstart/result.json ;;
    *) exec /usr/bin/make -C "{PROJECT}" -n "$@" ;;
esac
"""
KIT = f"""#!/bin/sh
if [ "$1" = run ]; then set -- "$@" $MORE; fi
exec "{sys.executable}" -m kit "$@"
"""
OLLAMA = """#!/bin/sh
case "$1 $3" in
    "create -f") file=$(sed -n 's/^FROM //p' "$4") && test -s "$file" && echo "$2" >> "$CREATED" ;;
    "run ") grep -qx "$2" "$CREATED" ;;
    *) exit 2 ;;
esac
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone in which only `make demo` has been run, and a file of the user's rows."""
    if read_result(DEMO).get("status") != "finished":
        pytest.skip("make demo has not been run here")
    clone = tmp_path / "clone"
    shutil.copytree(DEMO, clone / "runs" / "quickstart", copy_function=os.link)
    for name in ("recipes", "data", "notebooks"):
        (clone / name).symlink_to(PROJECT / name)
    program(tmp_path / "programs" / "make", MAKE)
    program(tmp_path / "programs" / "ollama", OLLAMA)
    program(clone / ".venv" / "bin" / "kit", KIT)
    (clone / ".venv" / "bin" / "activate").write_text(f'PATH="{clone}/.venv/bin:$PATH"\n', encoding="utf-8")
    rows = [json.loads(line) for line in (PROJECT / "data" / "tickets-train.jsonl").read_text().splitlines()[:40]]
    with (clone / "my-rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows([row["instruction"] + "\n\n" + row["input"], row["output"]] for row in rows)
    return clone


def give(clone: Path, script: str, more: str) -> str:
    """What the script printed, `kit run` with these fields on top; each line ends with 0, or the test fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"PATH": f"{clone.parent}/programs:/usr/bin:/bin", "PYTHONPATH": str(PROJECT), "MORE": more,
                    "CREATED": str(clone.parent / "created")}
    done = subprocess.run(["bash", "-euxc", script], cwd=clone, env=environment, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("model", ["tiny", pytest.param("starter", marks=pytest.mark.long)])
def test_every_command_in_its_order(clone: Path, model: str, request: pytest.FixtureRequest) -> None:
    """As it stands there but for few steps; without `make test-all` a model of two layers is trained."""
    more = SHORTER if model == "starter" else TINY + str(request.getfixturevalue("tiny_starter"))
    said = give(clone, "\n".join(scripts("README.md")), more)
    assert '"order":12345' in said
    assert (clone / "my-rows.html").is_file()
    assert read_result(clone / "runs" / "mine")["status"] == "finished"
    assert (clone.parent / "created").read_text() == "mine\n"


def test_a_run_leaves_what_the_page_says(clone: Path) -> None:
    tree = re.findall(r"```\n(runs/<name>/.*?)```", text_of("docs/run-folder.md"), re.DOTALL)[0]
    names = [line.removeprefix("runs/<name>/").split()[0] for line in tree.splitlines()]
    assert len(names) == 14
    for name in names:
        assert list((clone / "runs" / "quickstart").glob(name.rstrip("/"))), name


def test_no_page_has_a_block_that_is_no_script() -> None:
    for page in DOCUMENTS:
        for script in scripts(page):
            checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
            assert checked.returncode == 0, f"{page}: {checked.stderr}"
