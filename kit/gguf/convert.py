"""GGUF files: converted by llama.cpp's own converter, quantised and checked, each step in a child process."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kit.common.debug import debugging
from kit.common.errors import GateError, KitError
from kit.common.files import existing, read_json, whole_file, write_json
from kit.common.weight_files import read_weights_header, weight_files
from kit.gguf.child import WORKER, child_environment, how_it_ended, last_trouble
from kit.gguf.formats import QUANTIZATIONS, check_gguf, check_quantizations, needed_bytes
from kit.gguf.setup import converter_dir

# The 16-bit GGUF that holds a safetensors dtype with the least loss. float32 goes to f16: trained weights lie
# within its range, and it keeps three bits more than bf16.
LOSSLESS = {"BF16": "bf16", "F16": "f16", "F32": "f16"}


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise KitError if the disk of `folder` (which need not exist yet) has less than `needed_bytes` free."""
    folder = existing(folder)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise KitError(f"too little disk for the export: {needed_bytes / 1e9:.2f} GB needed, "
                       f"{free / 1e9:.2f} GB free at {folder}",
                       "free some room, ask for fewer or smaller quantisations, or put the run on another disk")


def export_gguf(merged: Path, folder: Path, quantizations: Sequence[str], name: str, about: str = "") -> list[Path]:
    """Write `folder/<name>-<quant>.gguf` for each quantisation from the merged 16-bit model; return the paths.

    `name` becomes general.name of the files, `about` their general.description. The converter runs once, and q8_0 and
    the k-quants are made from its 16-bit file. A file appears under its name only when whole; a failure (GateError)
    leaves an earlier export of that name as it was, and no partial file.
    """
    check_quantizations(quantizations)
    merged, folder = Path(merged), Path(folder)
    files = {quantization: folder / f"{name}-{quantization}.gguf" for quantization in quantizations}
    if not files:
        return []
    parameters, dtype = merged_weights(merged)
    best = LOSSLESS.get(dtype, "f16")
    # bf16 weights survive f16 (3 bits more, overflow only above 65504), but f16 weights do not survive bf16.
    source_type = best if best in files or "f16" not in files else "f16"
    converted = [quantization for quantization in files if quantization in ("f16", "bf16")]
    quantised = [quantization for quantization in files if quantization not in converted]
    check_disk(folder, needed_bytes(parameters, [*files, source_type] if quantised else list(files)))
    folder.mkdir(parents=True, exist_ok=True)

    temporary = folder / f"{name}-{source_type}.source.partial"
    try:
        for quantization in converted:
            with _checked(files[quantization]) as partial:
                _convert(merged, partial, quantization, name, about)
        source = files.get(source_type, temporary)
        if quantised and source is temporary:
            _convert(merged, temporary, source_type, name, about)
        for quantization in quantised:
            with _checked(files[quantization]) as partial:
                _run([*WORKER, "quantize", str(source), str(partial), str(QUANTIZATIONS[quantization].file_type)],
                     f"making {files[quantization].name}")
    finally:
        temporary.unlink(missing_ok=True)
    return list(files.values())


@contextmanager
def _checked(path: Path) -> Iterator[Path]:
    """`whole_file`, checked before it takes its name; its size and seconds are printed."""
    start = time.monotonic()
    with whole_file(path) as partial:
        yield partial
        check_gguf(partial)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s", flush=True)


def merged_weights(merged: Path) -> tuple[int, str]:
    """(number of weights, most used dtype such as 'BF16') of a Hugging Face folder, from its safetensors headers.

    Raises KitError if the folder holds no model.
    """
    if not any(merged.glob("*.safetensors")) or not (merged / "config.json").is_file():
        raise KitError(f"no merged model at {merged} (config.json and *.safetensors are looked for)",
                       "merge first: save_merged=16bit")
    counts: Counter[str] = Counter()
    for file in weight_files(merged):
        for tensor in read_weights_header(file).tensors.values():
            counts[tensor.dtype] += math.prod(tensor.shape)
    return counts.total(), counts.most_common(1)[0][0]


def _convert(merged: Path, target: Path, file_type: str, name: str, about: str) -> None:
    script = converter_dir() / "convert_hf_to_gguf.py"
    with tempfile.TemporaryDirectory(prefix="kit-gguf-") as folder:
        metadata = Path(folder) / "metadata.json"
        metadata.write_text(json.dumps({"general.name": name, "general.description": about or name}), encoding="utf-8")
        source = _without_code(merged, Path(folder) / merged.name)
        _run([sys.executable, "-m", "kit.gguf.tied", str(script), str(source), "--outfile", str(target),
              "--outtype", file_type, "--metadata", str(metadata)], f"converting {merged} to {file_type}")


def _without_code(merged: Path, view: Path) -> Path:
    """The folder itself, or where its files name Python code (auto_map) a view of it that names none.

    For some architectures the converter loads the tokenizer with trust_remote_code=True, whoever wrote it.
    """
    configs = {path.name: read_json(path) for path in merged.glob("*.json")}
    if not any("auto_map" in config for config in configs.values()):
        return merged
    view.mkdir()
    for path in merged.iterdir():
        if "auto_map" in configs.get(path.name, {}):
            write_json(view / path.name, {key: value for key, value in configs[path.name].items() if key != "auto_map"})
        elif path.suffix != ".py":
            (view / path.name).symlink_to(path.resolve())
    return view


def _run(command: list[str], what: str) -> None:
    """Run a child to its end; its last error line becomes the GateError's reason. Ctrl-C ends it too."""
    # HF_HUB_OFFLINE: an export reads the merged folder and nothing else.
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
                          env={**child_environment(), "HF_HUB_OFFLINE": "1"})
    if debugging():
        print(done.stdout, file=sys.stderr)
    if done.returncode:
        raise GateError(f"{what} failed ({how_it_ended(done.returncode)}): {last_trouble(done.stdout)}",
                        "mend the cause and export again; nothing has to be trained again")
