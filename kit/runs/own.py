"""What in a run's folder is the kit's own: only that is ever removed, and a run begins where nothing else is lost.

A run folder is known by its result.json, which is there from the first second. Checkpoints that lie elsewhere
(checkpoint_dir) are known by the MARK beside them, or each by its manifest.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from kit.common.errors import KitError
from kit.common.files import read_json, timestamp, write_json

MODELS = ("adapter", "merged", "merged-4bit", "gguf")  # the folders that hold weights
SEALED = ("recipe.yaml", "reference.safetensors", "log.jsonl", *MODELS)  # what is shipped, and its witnesses
FILES = ("recipe.yaml", "reference.safetensors", "log.jsonl", "manifest.json", "result.json", "notebook.ipynb",
         "data.html", "verify.json", "report.html")
EARLY = ("recipe.yaml", "notebook.ipynb")  # what is there before result.json
# Names of the files in each folder, as save_pretrained, the converter, the trainer and its engines write them.
_MODEL = (r"(README\.md|Modelfile|.*\.(safetensors|safetensors\.index\.json|gguf|jinja|tiktoken|py|partial)|"
          r"(config|generation_config|adapter_config|quantization_config|preprocessor_config|processor_config|"
          r"tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|"
          r"(merges|vocab)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|additional_chat_templates)")
_CHECKPOINT = _MODEL[:-1] + (r"|(trainer_state|kit-manifest|accumulated_\d+)\.json|log\.jsonl|latest|"
                             r".*\.(pt|pth|bin|distcp)|\.metadata|global_step\d+|(pytorch_model|optimizer)_fsdp.*)")
FOLDERS = {**dict.fromkeys(MODELS, _MODEL), "gathered": _CHECKPOINT, "figures": r"(loss|lengths|scores)\.png"}
PASSING = (".ipynb_checkpoints", ".DS_Store", "Thumbs.db", "desktop.ini")  # what other programs leave in any folder
CHECKPOINT = re.compile(r"checkpoint-\d+(\.broken)?")
MANIFEST = "kit-manifest.json"  # the last file of a whole checkpoint, with the names of the others
MARK = "kit-checkpoints.json"


def check_own(folder: Path, checkpoints: Path) -> None:
    """Raise KitError, naming them, for files that no run made where a run would remove or overwrite them."""
    proven = {"status", "stage"} <= read_json(folder / "result.json").keys()
    inside = checkpoints == folder / "checkpoints"
    theirs = [path.relative_to(folder).as_posix() for path in _foreign(folder, proven)]
    theirs += [f"{checkpoints.name}/{path.relative_to(checkpoints).as_posix()}"
               for path in _foreign_checkpoints(checkpoints, (proven and inside) or (checkpoints / MARK).is_file())]
    if theirs:
        where = folder if inside or not checkpoints.is_dir() else f"{folder} or {checkpoints}"
        raise KitError(f"{where} holds what no run made: {', '.join(theirs[:5])}" + ", …" * (len(theirs) > 5),
                       "move that away, or give another run_name, output_dir or checkpoint_dir; nothing was removed")


def _foreign(folder: Path, proven: bool) -> Iterator[Path]:
    """Beside a run's files others may lie, and stay; inside its folders, which are replaced as a whole, none may."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not proven:
            if path.name not in (*EARLY, *PASSING) and path.suffix != ".partial":
                yield path
        elif path.name in FOLDERS and path.is_dir() and not path.is_symlink():
            yield from (inner for inner in _walk(path) if not re.fullmatch(FOLDERS[path.name], inner.name))


def _foreign_checkpoints(folder: Path, proven: bool) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and CHECKPOINT.fullmatch(path.name):
            listed = read_json(path / MANIFEST).get("files")
            known = {MANIFEST, *listed} if isinstance(listed, dict) else set()
            if not proven and not known:
                yield path
            yield from (inner for inner in _walk(path) if inner.relative_to(path).as_posix() not in known
                        and inner.is_file() and not (proven and re.fullmatch(_CHECKPOINT, inner.name)))
        elif path.name not in (MARK, *PASSING) and not (proven and path.name == "README.md"):  # TRL writes one
            yield path


def _walk(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if not set(PASSING) & set(path.relative_to(folder).parts)]


def mark(folder: Path) -> None:
    """Say of a folder for checkpoints that it is the kit's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARK, {"made": timestamp()})


def clear(folder: Path, checkpoints: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove what a run made in its folder, and its checkpoints; nothing else. KitError where that can't be told."""
    check_own(folder, checkpoints)
    for name in (*FILES, *FOLDERS, "checkpoints"):
        path = checkpoints if name == "checkpoints" else folder / name
        if name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
