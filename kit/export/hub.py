"""Push what `kit verify` passed to a hub: adapter, merged model and GGUFs, each with a card, private by default."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kit.common.errors import GateError, KitError
from kit.common.files import PROJECT, cache_dir, read_json, unwritable, write_json, write_text
from kit.common.show import size
from kit.export.hub_card import HUB_ID, base_of, write_card
from kit.export.hub_sites import Site, hub_errors, login
from kit.export.modelfile import go_template, modelfile_of
from kit.gguf.formats import quantization_of, read_header
from kit.models.saved import saved_tokenizer
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.provenance import NOT_TEXT, check_hashes, check_secrets
from kit.runs.run import Run, read_manifest

# The usual names on a hub: a merged model has the plain one.
SUFFIX = {"adapter": "-lora", "merged": "", "merged-4bit": "-bnb-4bit", "gguf": "-GGUF"}
WEIGHTS = (".safetensors", ".gguf")
# Where configurations keep the place a model was loaded from. Of an adapter's base the public name is written.
BASE, PLACES = "base_model_name_or_path", {"_name_or_path", "name_or_path"}


def push(run: Run | str | Path, what: Sequence[str] | None = None, repo_id: str | None = None,
         private: bool | None = None, base_model: str | None = None, trust_remote_code: bool = False) -> list[str]:
    """Push a verified run's artefacts to the recipe's hub; returns the repositories' URLs, [] for nothing to push.

    `what` is of adapter, merged, merged-4bit and gguf, `repo_id` is user/name or a name in the login's own account,
    `private` is for repositories that are made; by default they are push_to_hub, hub_model_id (or run_name) and
    hub_private_repo of the recipe. Each kind has a repository of its own: <id>-lora, <id>, <id>-bnb-4bit and <id>-GGUF.
    `base_model` is the hub id of a base model that was trained from a folder, `trust_remote_code` your consent to code
    that a folder's tokenizer needs.

    Pushed are the files that the run sealed, without paths of this machine, and a README.md with the verdict; with
    GGUFs the Modelfile, and its template, system prompt and parameters as `ollama run hf.co/<id>` reads them. What is
    there already is not sent again. Raises GateError for what was not verified, was changed since, or would give a
    secret or a path away; KitError without a login, for a public repository when a private one is asked for, and for
    what the hub refuses. Nothing is sent before all of that is known, and the run is never changed.
    """
    run = run if isinstance(run, Run) else Run.open(run, trust_remote_code)
    recipe = run.recipe
    kinds = _kinds(run, recipe.push_to_hub if what is None else what)
    if not kinds:
        return []
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise KitError(f"base_model: {base_model!r} is no hub id", "write it as user/name, for example Qwen/Qwen3-4B")
    site = login(recipe.hub)
    ids = repositories(repo_id or recipe.hub_model_id or recipe.run_name, site.user, kinds)
    private = recipe.hub_private_repo if private is None else private
    verdict = _verdict(run, kinds)
    exists = {kind: _exists(site, name, private) for kind, name in ids.items()}
    with tempfile.TemporaryDirectory(prefix="kit-push-") as staging:
        folders = {kind: _stage(run, kind, Path(staging) / kind, recipe, base_model) for kind in kinds}
        for kind, folder in folders.items():
            write_text(folder / "README.md", write_card(run, kind, ids, site.address, verdict, base_model))
            _check_contents(run, kind, folder, recipe)
        return [_send(site, ids[kind], folders[kind], private, exists[kind], recipe.run_name) for kind in kinds]


def made_by(run: Run) -> list[str]:
    """Which of adapter, merged, merged-4bit and gguf the run holds."""
    return [kind for kind in SUFFIX if any((run.folder / kind).glob("*.*"))]


def _kinds(run: Run, what: Sequence[str]) -> list[str]:
    for kind in what:
        if kind not in SUFFIX:
            raise KitError(f"push: no artefact {kind!r}", f"choose from {', '.join(SUFFIX)}")
    made = made_by(run)
    if missing := [kind for kind in what if kind not in made]:
        raise KitError(f"push: {run.folder} holds no {', '.join(missing)}", f"it holds: {', '.join(made) or 'nothing'}")
    return [kind for kind in SUFFIX if kind in what]


def repositories(name: str, user: str, kinds: Sequence[str]) -> dict[str, str]:
    """{kind: user/name with the kind's suffix}; a suffix that `name` has already is not doubled.

    Raises KitError for a name that hubs don't take.
    """
    stem = re.sub("-(lora|bnb-4bit|GGUF)$", "", name if "/" in name else f"{user}/{name}")
    ids = {kind: stem + SUFFIX[kind] for kind in kinds}
    for repo_id in ids.values():
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise KitError(f"push: {repo_id} is no name for a repository: {error}",
                           "set hub_model_id (or --to) to user/name of ASCII letters, digits, ., - and _") from None
    return ids


def _verdict(run: Run, kinds: Sequence[str]) -> dict[str, Any]:
    """verify.json of a run that passed, covers each file of `kinds`, and has not changed since; else GateError."""
    gates = Gates(f"push {run.folder.name}")
    verdict = read_json(run.folder / "verify.json")
    try:
        checked = Gates.from_json("verify", verdict["gates"])
    except (KeyError, TypeError):
        raise GateError(f"push {run.folder.name}: verified: there is no verdict (verify.json)",
                        f"kit verify {run.folder}") from None
    # Not the summary alone: the gates are what the card shows.
    passed = verdict.get("passed") is True and checked.passed
    said = checked.verdict if checked.failed else str(verdict.get("verdict", ""))
    gates.check("verified", passed, said, "every gate", "" if passed else said,
                f"kit verify {run.folder} says cause and remedy; only what passed is pushed")
    gates.check("verdict", verdict.get("artefacts") == read_manifest(run.folder).get("artefacts"), "", "of these files",
                "the files were sealed again after kit verify looked at them", f"kit verify {run.folder}")
    sound = {gate.name for gate in checked.gates if gate.passed}
    names = {"gguf": [quantization_of(path) for path in sorted(run.gguf.glob("*.gguf"))]}
    for name in (name for kind in kinds for name in names.get(kind, [kind])):
        gates.check(f"verified {name}", f"parity {name}" in sound, "", "its parity gate",
                    f"kit verify has not compared {name} with the trained model", f"kit verify {run.folder}")
    check_hashes(gates, run)
    gates.require()
    return verdict


def _exists(site: Site, repo_id: str, private: bool) -> bool:
    """Whether the hub has the repository; KitError when it is public and a private one is asked for."""
    with hub_errors(repo_id):
        is_private = site.private(repo_id)
    if is_private is False and private:
        raise KitError(f"push: {site.url(repo_id)} is there already, and is public",
                       "to publish, say so: --public or hub_private_repo: false; else name another repository (--to)")
    if is_private and not private:
        print(f"{repo_id} is private and stays so; on its page on the hub you can make it public", flush=True)
    return is_private is not None


def _stage(run: Run, kind: str, folder: Path, recipe: Recipe, base_model: str | None) -> Path:
    """Lay out what is pushed: weights as links, configurations without the places models were loaded from."""
    with unwritable(folder, "free room, or set TMPDIR to a folder on another disk"):
        folder.mkdir()
        for path in (p for p in (run.folder / kind).iterdir() if p.is_file()):
            target = folder / path.name
            if path.suffix in WEIGHTS:
                with suppress(OSError, NotImplementedError):  # Windows asks for a privilege, some mounts have no links
                    target.symlink_to(path.resolve())
            if not target.exists():
                shutil.copyfile(path, target)
            if path.suffix == ".json" and path.name not in NOT_TEXT:
                config = read_json(target)
                if {BASE, *PLACES} & set(config):
                    write_json(target, {key: base_of(recipe, base_model)[1] if key == BASE else value
                                        for key, value in config.items() if key not in PLACES})
        if (folder / "Modelfile").is_file():
            _for_ollama(run, folder, recipe)
    return folder


def _for_ollama(run: Run, folder: Path, recipe: Recipe) -> None:
    """`template`, `system` and `params`, which Ollama takes from a hub's repository instead of guessing.

    See https://huggingface.co/docs/hub/ollama: without them a template that is none of the known ones is replaced.
    """
    modelfile = modelfile_of(recipe, saved_tokenizer(run.merged, recipe.trust_remote_code))
    write_text(folder / "template", go_template(modelfile.joints))
    if modelfile.system:
        write_text(folder / "system", modelfile.system)
    write_json(folder / "params", {"stop": modelfile.stops, "num_ctx": modelfile.num_ctx})


def _check_contents(run: Run, kind: str, folder: Path, recipe: Recipe) -> None:
    """GateError when something in the folder holds a secret, or a path of this machine."""
    gates = Gates(f"push {run.folder.name} {kind}")
    check_secrets(gates, Run(folder))
    places = _places(run, recipe)
    causes = [f"{path.name} holds {match[0]}" for path in sorted(folder.iterdir())
              if (match := places.search(_text(path)))]
    gates.check("paths", not causes, f"{len(causes)} files", "none", "; ".join(causes[:3]),
                "take the path out of that file and run again, or report it: a path should never get there")
    gates.require()


def _places(run: Run, recipe: Recipe) -> re.Pattern[str]:
    """Matches the folders and files of this machine that nothing pushed may name."""
    names = [recipe.model_name, *recipe.sources,
             *filter(None, (recipe.eval_dataset, recipe.adapter_name_or_path, recipe.chat_template))]
    local = [path for name in names for file in {name, name.rpartition("#")[0]} - {""}
             if (path := Path(file).expanduser()).exists()]
    folders = [run.folder, Path.home(), Path.cwd(), PROJECT, cache_dir(), Path(tempfile.gettempdir())]
    paths = [path.resolve() for path in [*folders, *local]]
    # As a whole, so that /work is not found in a web address or in /workflow.
    every = "|".join(re.escape(str(path)) for path in paths if len(path.parts) > 1)
    return re.compile(rf"(?<![\w.])(?:{every})(?![\w.-])")


def _text(path: Path) -> str:
    """What a file says in words; of weights what their metadata says."""
    if path.suffix == ".gguf":
        return "\n".join(value for value in read_header(path).fields.values() if isinstance(value, str))
    if path.suffix in WEIGHTS or path.name in NOT_TEXT:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _send(site: Site, repo_id: str, folder: Path, private: bool, exists: bool, run_name: str) -> str:
    """Send the folder to the repository, which is made if need be; returns its URL."""
    files = [path.stat().st_size for path in folder.iterdir()]
    print(f"{repo_id}: {len(files)} files, {size(sum(files))} …", flush=True)
    with hub_errors(repo_id):
        if not exists:
            site.create(repo_id, private)
            # An organisation's settings can overrule the wish.
            if private and not site.private(repo_id):
                raise KitError(f"push: {site.url(repo_id)} was made, but not private; nothing has been sent",
                               "remove it on the hub, look at the organisation's settings, and push to another account")
        changed = site.upload(repo_id, folder, f"{run_name}, pushed by unsloth-kit")
    print(f"{site.url(repo_id)}" + ("" if changed else ": already there, nothing sent"), flush=True)
    return site.url(repo_id)
