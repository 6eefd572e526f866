"""report_to: what transformers knows, several at once, and what is said before a run of one that is not ready."""

import ast
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.readiness.doctor import preflight
from kit.recipe.recipe import Recipe
from kit.recipe.trackers import LOGINS, TRACKERS, check_trackers


def test_the_trackers_are_those_of_transformers() -> None:
    spec = importlib.util.find_spec("transformers")
    assert spec and spec.origin
    source = (Path(spec.origin).parent / "integrations" / "integration_utils.py").read_text("utf-8")
    tables = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)
              and getattr(node.targets[0], "id", "") == "INTEGRATION_TO_CALLBACK"]
    assert [{ast.literal_eval(key) for key in table.keys} for table in tables] == [{*TRACKERS}]  # type: ignore[attr-defined]
    assert {*LOGINS} <= {*TRACKERS}


@pytest.mark.parametrize("value, taken", [
    ("none", "none"), (None, "none"), (False, "none"), ([], "none"), ("wandb", "wandb"), (["swanlab"], "swanlab"),
    ("wandb, swanlab", ["wandb", "swanlab"]), (["wandb", "tensorboard", "wandb"], ["wandb", "tensorboard"])])
def test_one_or_several_trackers(value: Any, taken: Any) -> None:
    assert Recipe.load({}, report_to=value).report_to == taken


@pytest.mark.parametrize("value, words", [
    ("nonsense", "'nonsense' is no tracker; there are: none, azure_ml, "), ("all", "name them"), ({}, "report_to"),
    ("tensorbord", "did you mean 'tensorboard'?"), ("none,wandb", "`none` stands alone"),
    (True, "'True' is no tracker")])
def test_what_is_no_tracker_is_refused_by_the_recipe(value: Any, words: str) -> None:
    with pytest.raises(KitError) as caught:
        Recipe.load({}, report_to=value)
    assert words in caught.value.message


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home without any login, where the packages of all trackers seem to be installed."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SWANLAB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("wandb", "swanlab", "mlflow"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    return tmp_path


def test_a_tracker_that_is_not_installed_names_the_package(nowhere: Path) -> None:
    for name, package in (("clearml", "clearml"), ("azure_ml", "azureml-core"), ("comet_ml", "comet-ml"),
                          ("dagshub", "dagshub mlflow")):
        with pytest.raises(KitError, match=f"{name} is not installed") as caught:
            check_trackers(name)
        assert f"-m pip install {package}, or report_to: none" in caught.value.hint
    assert check_trackers(["mlflow"]) == ["mlflow"] and check_trackers("none") == []
    with pytest.raises(KitError, match="clearml is not installed"):
        preflight(Recipe.load({}, report_to="mlflow,clearml", output_dir=str(nowhere)))


def test_a_tracker_without_a_login_is_told_and_each_way_to_have_one_counts(
        nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, ways in {"wandb": ("WANDB_API_KEY=x", "WANDB_MODE=offline"),
                       "swanlab": ("SWANLAB_API_KEY=x", "SWANLAB_MODE=offline")}.items():
        with pytest.raises(KitError, match=f"{name} has no login here") as caught:
            check_trackers(name)
        assert all(way.partition("=x")[0] in caught.value.hint for way in ways)
        for way in ways:
            with monkeypatch.context() as patch:
                patch.setenv(*way.split("="))
                assert check_trackers(name) == [name]
    (nowhere / ".netrc").write_text("machine api.wandb.ai\n login user\n password x\n")
    (nowhere / ".netrc").chmod(0o600)
    assert check_trackers("wandb") == ["wandb"]
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    with pytest.raises(KitError, match="no login"):
        check_trackers("wandb")
    (nowhere / "wandb").mkdir()
    (nowhere / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # `wandb offline` writes it
    assert check_trackers("wandb") == ["wandb"]
    (nowhere / ".swanlab").mkdir()
    (nowhere / ".swanlab" / ".netrc").touch()
    assert check_trackers("swanlab") == ["swanlab"]
