"""Each host imitated in an empty folder: its folders, variables and packages, and the notebooks' first cells as they
stand. git clones from this checkout, and in place of pip and the build a recorder runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jupytext
import pytest
import tqdm

from kit.batch import _notebook, _parameters
from kit.common import hosts
from kit.recipe.recipe import Recipe
from support.command import PROJECT

NOTEBOOKS = ("01_finetune", "02_your_data")
BASE = getattr(sys, "_base_executable", sys.executable)
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "COLAB_RELEASE_TAG": "release-colab-external-images"}
COLAB = {"COLAB_RELEASE_TAG": "release-colab-external-images"}
NEEDS_GIT = pytest.mark.skipif(shutil.which("git") is None, reason="no git here")


def cells(notebook: str) -> list[str]:
    """The two cells of set-up."""
    code = [cell.source for cell in jupytext.read(PROJECT / "notebooks" / f"{notebook}.py").cells
            if cell.cell_type == "code"]
    return code[:2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit as it would be published: what lies in this checkout, with a recorder for `pip` and the build."""
    folder = tmp_path_factory.mktemp("published") / "unsloth-kit"
    folder.mkdir()
    for name in ("kit", "notebooks", "recipes", "data"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in PROJECT.glob("*.txt"):
        shutil.copy(path, folder)
    recorder = "import json, os, sys\nwith open(os.environ['RECORD'], 'a') as file:\n" \
               "    file.write(json.dumps([sys.argv[1:], os.environ.get('PIP_FIND_LINKS'), os.getcwd()]) + '\\n')\n" \
               "print('recorded')\n"
    (folder / "pip.py").write_text(recorder)
    shutil.copytree(Path(tqdm.__file__).parent, folder / "tqdm")  # the first that the kit imports of what pip brings
    (folder / "kit" / "gguf" / "setup.py").write_text(recorder)
    if shutil.which("git"):
        for command in (["init", "-q"], ["add", "-A"],
                        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "all"]):
            subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


class Opened:
    """A notebook opened alone in an empty folder of a machine below `root`."""

    def __init__(self, root: Path, where: str, source: Path, address: str) -> None:
        self.root, self.folder, self.record = root, root / where, root / "record"
        self.folder.mkdir(parents=True)
        self.record.touch()
        self.variables = {"PATH": os.environ["PATH"], "HOME": str(root / "home"), "RECORD": str(self.record),
                          "KIT_SOURCE": address, "PYTHONDONTWRITEBYTECODE": "1"}
        self.before, self.source = "", source

    def run(self, notebook: str = "01_finetune", after: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """Its set-up cells in a bare Python, as in a new kernel; paths of the host's disks lead below `root`."""
        fetch, install = cells(notebook)
        for place in ("/kaggle/input", "/root/autodl-tmp", "/mnt/workspace"):
            fetch = fetch.replace(f'"{place}', f'"{self.root}{place}').replace(f'(f"{place}', f'(f"{self.root}{place}')
        # Where the kit looks for the host's folders is the one thing that is told to it.
        moved = "import pathlib, kit.common.hosts as hosts\n" \
                f"hosts.ROOT = pathlib.Path({str(self.root)!r})\nhosts.settled = hosts.settle()\n"
        script = "\n".join([self.before, fetch, moved, install, after])
        return subprocess.run([BASE, "-I", "-c", script], cwd=self.folder, env={**self.variables, **variables},
                              capture_output=True, text=True, timeout=120)

    @property
    def ran(self) -> list[Any]:
        return [json.loads(line) for line in self.record.read_text().splitlines()]


@pytest.fixture
def opened(tmp_path: Path, source: Path) -> Callable[..., Opened]:
    probe = "import importlib.util as i, sys; sys.exit(i.find_spec('unsloth') is not None)"
    if sys.executable == BASE or subprocess.run([BASE, "-I", "-c", probe], check=False).returncode:
        pytest.skip("no bare Python here")
    return lambda where, address=None: Opened(tmp_path / "machine", where, source, address or str(source))


# --- fetching ---


@NEEDS_GIT
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_opened_alone_on_colab_it_clones_installs_and_works_again_after_a_restart(
        opened: Callable[..., Opened], source: Path, notebook: str) -> None:
    here = opened("content", source.as_uri())
    after = "import os\nfrom kit.common.hosts import environment\nprint(environment(), os.getcwd())"
    done = here.run(notebook, after, **COLAB)
    clone = here.folder / "unsloth-kit"
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"colab {clone}", done
    assert (clone / ".git").is_dir() and "host: colab" in done.stdout and "recorded" in done.stdout
    assert sorted(path.name for path in here.folder.iterdir()) == ["unsloth-kit"]
    assert {cwd for _, _, cwd in here.ran} == {str(clone)}
    (clone / "mine.txt").touch()
    again = here.run(notebook, after, **COLAB, PATH="/nowhere")  # a new kernel, in the notebook's folder again
    assert again.stdout.splitlines()[-1] == f"colab {clone}" and (clone / "mine.txt").exists(), again


def test_a_folder_of_that_name_that_is_not_the_kit_is_left_alone(opened: Callable[..., Opened]) -> None:
    here = opened("content")
    own = here.folder / "unsloth-kit" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    done = here.run(**COLAB)
    assert done.returncode == 1 and "is not the kit, so it is left alone" in done.stderr, done
    assert "Traceback" not in done.stderr
    assert own.read_text() == "mine" and [path.name for path in own.parent.iterdir()] == ["notes.txt"]


def test_an_old_python_stops_before_anything_is_fetched(opened: Callable[..., Opened]) -> None:
    here = opened("content")
    here.before = "import sys\nsys.version_info, sys.version = (3, 10, 12), '3.10.12 (main)'"
    done = here.run(**COLAB)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("Python 3.11 or newer is needed, this is 3.10.12") and not list(here.folder.iterdir())


@NEEDS_GIT
def test_what_cannot_be_fetched_is_said_and_leaves_nothing(opened: Callable[..., Opened]) -> None:
    here = opened("content", (Path("/nowhere") / "kit.git").as_uri())
    done = here.run(**COLAB)
    assert done.returncode == 1 and "git could not fetch file:///nowhere/kit.git" in done.stderr
    assert "Traceback" not in done.stderr and not list(here.folder.iterdir())


def test_without_git_the_archive_is_taken(opened: Callable[..., Opened], source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "pack" / "unsloth-kit-main", ignore=shutil.ignore_patterns(".git"))
    (tmp_path / "site" / "archive").mkdir(parents=True)
    shutil.make_archive(str(tmp_path / "site" / "archive" / "HEAD"), "gztar", tmp_path / "pack")
    here = opened("content", (tmp_path / "site").as_uri())
    done = here.run(**COLAB, PATH=str(tmp_path))
    assert done.returncode == 0 and (here.folder / "unsloth-kit" / "kit" / "cli.py").is_file(), done.stderr


def test_both_notebooks_fetch_with_one_cell() -> None:
    first, second = (cells(notebook)[0] for notebook in NOTEBOOKS)
    assert first == second


# --- each host ---


def test_kaggle_without_the_internet_takes_kit_wheels_and_models_from_what_is_attached(
        opened: Callable[..., Opened], source: Path) -> None:
    here = opened("kaggle/working", "")
    house = here.root / "kaggle/input/datasets/somebody/my-wheels"
    shutil.copytree(source, house / "unsloth-kit")
    for name in ("unsloth-2026.10.9-py3-none-any.whl", "llama_cpp_python-0.3.36.tar.gz.kept"):
        (house / name).write_text(name)
    model = here.root / "kaggle/input/qwen-3/transformers/0.6b/1"
    model.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).touch()
    rows = here.root / "kaggle/input/my-rows/train.jsonl"
    rows.parent.mkdir()
    rows.touch()
    after = "import os\nfrom kit.common.hosts import environment\nprint(environment(), os.getcwd())"
    done = here.run(after=after, **KAGGLE, PATH="/nowhere")
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1] == f"kaggle {here.folder / 'unsloth-kit'}", "not colab, whose image it is"
    assert f"on the disk, for model_name: {model}\n" in done.stdout, done.stdout
    assert f"on the disk, for dataset: {rows}\n" in done.stdout and "20 GB" in done.stdout
    assert len(here.ran) == 3
    for _, links, _ in here.ran:
        first, second = links.split()
        assert first == str(house) and second != first, "the archive under its own name"


def test_autodl_works_on_the_data_disk_with_its_accelerator(opened: Callable[..., Opened]) -> None:
    here = opened("root")
    (here.root / "root/autodl-tmp").mkdir()
    model = here.root / "root/autodl-pub/Qwen3-4B"
    model.mkdir(parents=True)
    for name in ("config.json", "model-00001-of-00003.safetensors"):
        (model / name).touch()
    (here.root / "etc").mkdir()
    (here.root / "etc/network_turbo").write_text(
        "export no_proxy=localhost,127.0.0.1\nexport http_proxy=http://172.20.0.113:12798 && "
        "export https_proxy=http://172.20.0.113:12798\nexport REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt\n"
        f"touch {here.root}/was-run\necho set\n")
    show = "import json, os\nprint(json.dumps(dict(os.environ)))"
    done = here.run(after=show)
    assert done.returncode == 0, done.stderr
    disk = here.root / "root/autodl-tmp"
    there = json.loads(done.stdout.splitlines()[-1])
    assert (there["HF_HOME"], there["KIT_CACHE"]) == (f"{disk}/huggingface", f"{disk}/kit-cache")
    assert there["MODELSCOPE_CACHE"] == f"{disk}/modelscope"
    assert there["https_proxy"] == there["http_proxy"] == "http://172.20.0.113:12798"
    assert "127.0.0.1" in there["no_proxy"] and ".modelscope.cn" in there["no_proxy"]
    assert not (here.root / "was-run").exists(), "its text is read, not run"
    assert (disk / "unsloth-kit" / "kit").is_dir() and {cwd for _, _, cwd in here.ran} == {str(disk / "unsloth-kit")}
    for said in ("host: autodl", f"HF_HOME: {disk}/huggingface", "AutoDL's accelerator", f"model_name: {model}"):
        assert said in done.stdout, done.stdout


@pytest.mark.parametrize(("variable", "value"), [
    ("HF_HOME", "/elsewhere"), ("KIT_CACHE", "/elsewhere"), ("HTTPS_PROXY", "http://mine:1"),
    ("HF_ENDPOINT", "https://hf-mirror.com"), ("KIT_NETWORK", "direct")])
def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str,
                                     value: str) -> None:
    _autodl(tmp_path, monkeypatch)
    monkeypatch.setenv(variable, value)
    said = hosts.settle()
    assert os.environ[variable] == value and not any(line.startswith(variable) for line in said)
    assert ("https_proxy" in os.environ) is variable.endswith(("HOME", "CACHE"))


def test_a_cache_that_is_in_use_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token may lie there, and models; a folder on the data disk from an earlier day counts more."""
    _autodl(tmp_path, monkeypatch)
    (tmp_path / "home/.cache/huggingface").mkdir(parents=True)
    (tmp_path / "home/.cache/huggingface/token").touch()
    assert not any(line.startswith("HF_HOME") for line in hosts.settle()) and "KIT_CACHE" in os.environ
    (tmp_path / "root/autodl-tmp/huggingface").mkdir()
    assert any(line.startswith("HF_HOME") for line in hosts.settle())


def test_an_accelerator_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _autodl(tmp_path, monkeypatch)
    (tmp_path / "etc/network_turbo").write_text("export https_proxy=$(choose_one)\nexport http_proxy=http://$HOST:1\n")
    assert "holds no plain https_proxy" in hosts.settle()[-1] and "https_proxy" not in os.environ


def _autodl(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = [*hosts.PROXIES, "all_proxy"]
    for name in ("HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE", "KIT_CACHE", "HF_ENDPOINT", "KIT_NETWORK", *KAGGLE,
                 *proxies, *map(str.upper, proxies)):
        monkeypatch.setenv(name, "")  # so that what settle() sets is taken back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(root / "home"))
    monkeypatch.setattr(hosts, "ROOT", root)
    monkeypatch.setattr(hosts, "accelerated", [])
    (root / "root/autodl-tmp").mkdir(parents=True)
    (root / "etc").mkdir()
    lines = [f'export {name}="http://10.0.0.1:1"\n' for name in ("http_proxy", "https_proxy")]
    (root / "etc/network_turbo").write_text("".join(lines))


def test_modelscope_notebooks_keep_things_on_their_disk(opened: Callable[..., Opened]) -> None:
    here = opened("mnt/workspace")
    show = "import os\nfrom kit.common.hosts import environment\nprint(environment(), os.environ['HF_HOME'])"
    done = here.run(after=show, MODELSCOPE_CACHE="/mnt/workspace/.cache/modelscope")
    assert done.stdout.splitlines()[-1] == f"modelscope {here.folder}/huggingface", done
    assert 'set hub = "modelscope"' in done.stdout and (here.folder / "unsloth-kit").is_dir()
    assert hosts.environment() == "local"


# --- Colab's own packages ---


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """google.colab with a secret, and a Drive that is mounted below the folder."""
    secret = "hf_" + "s3cr3t" * 5
    mounted: list[str] = []

    def mount(where: str) -> None:
        mounted.append(where)
        (Path(where) / "MyDrive").mkdir(parents=True, exist_ok=True)

    modules = {"google": ModuleType("google"), "google.colab": ModuleType("google.colab"),
               "google.colab.drive": SimpleNamespace(mount=mount),
               "google.colab.userdata": SimpleNamespace(get={"HF_TOKEN": secret}.__getitem__)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in (*KAGGLE, "HF_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(hosts, "ROOT", tmp_path)
    monkeypatch.setattr(hosts, "fields", {})
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    return SimpleNamespace(secret=secret, mounted=mounted, userdata=modules["google.colab.userdata"])


def test_colabs_secret_goes_into_the_environment_and_nowhere_else(google: Any) -> None:
    said = "\n".join(hosts.arrive())
    assert os.environ["HF_TOKEN"] == google.secret and google.secret not in said and "secrets" in said
    assert google.mounted == [], "the Drive is mounted when the user says so"
    os.environ["HF_TOKEN"] = "own"
    assert "secrets" not in "\n".join(hosts.arrive()) and os.environ["HF_TOKEN"] == "own"


def test_a_secret_that_is_not_given_is_no_error(google: Any) -> None:
    google.userdata.get = {}.__getitem__
    assert "HF_TOKEN" not in "\n".join(hosts.arrive()) and "HF_TOKEN" not in os.environ


def test_the_drive_keeps_checkpoints_and_what_was_built(google: Any, tmp_path: Path) -> None:
    list(hosts.arrive(drive=True))
    assert google.mounted == [str(tmp_path / "content/drive")]
    wheel = Path("wheels/llama-cpp-python-0.3.36-cp313/llama.whl")
    for path in (wheel, Path("llama.cpp-0.3.36/convert_hf_to_gguf.py"), Path("starter/model.safetensors"),
                 Path("llama.cpp-0.3.37.partial/half.py")):
        (tmp_path / "cache" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / path).write_text("made")
    hosts.leave()
    kept = tmp_path / "content/drive/MyDrive/unsloth-kit"
    assert {str(path.relative_to(kept / "kit-cache")) for path in kept.rglob("*") if path.is_file()} == {
        str(wheel), "llama.cpp-0.3.36/convert_hf_to_gguf.py"}
    shutil.rmtree(tmp_path / "cache")  # the next machine
    list(hosts.arrive(drive=True))
    assert (tmp_path / "cache" / wheel).read_text() == "made"
    assert Recipe.given({"max_steps": 3}) == {"max_steps": 3, "checkpoint_dir": str(kept / "checkpoints")}
    assert Recipe.given({"checkpoint_dir": "mine"}) == {"checkpoint_dir": "mine"}


# --- the form of step 2 ---


def test_an_empty_field_of_the_form_is_as_in_the_recipe() -> None:
    parameters = next(cell.source for cell in jupytext.read(PROJECT / "notebooks" / "01_finetune.py").cells
                      if "parameters" in cell.metadata.get("tags", []))
    variables: dict[str, Any] = {}
    exec(parameters, variables)
    assert Recipe.given(variables) == {}
    assert {"model_name", "dataset", "max_steps", "learning_rate", "gguf", "hub"} <= set(variables)
    # As Colab writes what is typed into a field.
    variables.update(max_steps="60", learning_rate="1e-4", gguf="q4_k_m, q8_0")
    recipe = Recipe.load("recipes/quickstart.yaml", **Recipe.given(variables))
    assert (recipe.max_steps, recipe.learning_rate, recipe.gguf) == (60, 1e-4, ["q4_k_m", "q8_0"])


def test_a_commands_empty_value_is_not_an_empty_field(capsys: pytest.CaptureFixture[str]) -> None:
    """`kit run R gguf=''` asks for no GGUF, whatever the recipe says."""
    assert _parameters("r.yaml", {"gguf": "", "max_steps": 3}) == {"recipe": "r.yaml", "gguf": None, "max_steps": 3}
    assert Recipe.load("recipes/quickstart.yaml", **Recipe.given({"gguf": None})).gguf == []
    cell = next(cell for cell in _notebook().cells if "parameters" in cell.metadata.get("tags", []))
    assert cell.source.startswith("recipe = ") and "\n" not in cell.source
    assert capsys.readouterr().out == "", "fields left empty are no lines of the user"


def test_the_kit_stays_light() -> None:
    """What `import kit` does on every host costs nothing; torch and the hubs' libraries read the variables later."""
    code = "import sys, kit\nassert not {'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=60)
