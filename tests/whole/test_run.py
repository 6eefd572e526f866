"""The main path for real: the notebook with few steps, and every way a run can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kit.runs.run import Run, read_result
from support.command import FEW_STEPS, PROJECT, kit
from support.sabotage import copy_run

pytestmark = pytest.mark.slow


def test_the_run_folder_is_complete(finished_run: Path) -> None:
    result = read_result(finished_run)
    assert result["status"] == "finished"
    for name in ("recipe.yaml", "manifest.json", "log.jsonl", "notebook.ipynb", "adapter/adapter_model.safetensors",
                 "merged/model.safetensors", "gguf/quickstart-f16.gguf",
                 "gguf/quickstart-q8_0.gguf", "gguf/Modelfile", "figures/loss.png", "figures/lengths.png",
                 "figures/scores.png", "reference.safetensors", "verify.json", "report.html"):
        assert (finished_run / name).stat().st_size > 0, name
    assert not [p for p in finished_run.rglob("*") if p.name.endswith((".partial", ".old"))]
    lines = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert result["train"]["tokens"] > 500 and result["train"]["peak_memory_gb"] < 6
    assert set(result["scores"]) == {"before", "after", "q8_0"}
    assert set(result["gates"]) == {"export rehearsal", "before training", "first step"}
    assert {"first loss", "gradients"} == {gate["name"] for gate in result["gates"]["first step"]}
    assert set(result["forecast_score"]) == {"peak_memory_gb", "disk_gb", "steps", "train_seconds"}
    assert result["forecast_score"]["steps"] == 1
    manifest = json.loads((finished_run / "manifest.json").read_text())
    assert manifest["stop_token"] == "<|im_end|>" != manifest["pad_token"]
    assert len(manifest["data_sha256"]) == 2 and manifest["versions"]["unsloth"]
    assert "model.safetensors" in manifest["base_sha256"]
    assert "gguf/quickstart-q8_0.gguf" in manifest["artefacts"]


def test_what_the_terminal_showed(finished_run: Path) -> None:
    text = (finished_run / "terminal.txt").read_text()
    for words in ("── 10. Train ──", "6 steps in ", "adamw_torch_fused instead of adamw_8bit", "held-out score",
                  "forecast after two steps", "gates passed", "FROM ./quickstart-q8_0.gguf", "finished: "):
        assert words in text, words
    assert "Traceback" not in text


def test_the_executed_notebook_shows_pictures_tables_and_no_secret(finished_run: Path) -> None:
    notebook = json.loads((finished_run / "notebook.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    assert sum("image/png" in d for d in data) == 3
    pages = "".join("".join(d.get("text/html", "")) for d in data)
    assert "background:#c8e6c9" in pages and pages.count("<table>") >= 9
    assert not [output for output in outputs if output["output_type"] == "error"]
    streams = [output for output in outputs if output["output_type"] == "stream"]
    assert not [output["text"] for output in streams if output["name"] == "stderr"], "Jupyter paints that pink"
    assert streams and not any("\r" in "".join(output["text"]) for output in streams)
    assert pages.count("<details><summary>") == 3, "rehearsal, trainer and verdict passed, and are folded"
    injected = [c["source"] for c in notebook["cells"] if "injected-parameters" in c["metadata"].get("tags", [])]
    assert len(injected) == 1 and "max_steps = 6" in "".join(injected[0])


def test_one_template_everywhere(finished_run: Path) -> None:
    from transformers import AutoTokenizer

    from kit.gguf.child import LlamaChild

    tokenizer = AutoTokenizer.from_pretrained(finished_run / "adapter")
    assert AutoTokenizer.from_pretrained(finished_run / "merged").chat_template == tokenizer.chat_template
    for name in ("config.json", "generation_config.json"):
        assert json.loads((finished_run / "merged" / name).read_text())["eos_token_id"] == tokenizer.eos_token_id
    with LlamaChild(finished_run / "gguf" / "quickstart-q8_0.gguf") as child:
        meta = child.metadata()
        assert meta["tokenizer.chat_template"] == tokenizer.chat_template
        assert int(meta["tokenizer.ggml.eos_token_id"]) == tokenizer.eos_token_id
        messages = [{"role": "user", "content": "你好 12345 🙂\n\n  x"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert child.prompt_ids(messages) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_verdict(finished_run: Path, tmp_path: Path) -> None:
    """What the notebook found is written down, stands on the page, and a second look finds the same."""
    first = json.loads((finished_run / "verify.json").read_text())
    names = [gate["name"] for gate in first["gates"]]
    assert first["passed"] and not [gate for gate in first["gates"] if gate["passed"] is False]
    count = sum(gate["passed"] is True for gate in first["gates"])
    for name in ("export rehearsal", "before training", "first step", "sha256", "secrets", "labels", "stop token",
                 "in memory", "merged config", "merge", "parity adapter", "control: the base differs", "parity merged",
                 "template merged", "tokenizer f16",
                 "shape f16", "template f16", "parity f16", "origin q8_0", "parity q8_0",
                 "template Modelfile", "stops by itself", "held-out score"):
        assert name in names, name
    again = copy_run(finished_run, tmp_path).folder  # while it is at work there is no verdict, and others need one
    done = kit("verify", str(again))
    assert done.returncode == 0 and f"all {count} gates passed" in done.stdout, done.stdout + done.stderr
    assert [gate["name"] for gate in json.loads((again / "verify.json").read_text())["gates"]] == names
    assert "VERIFIED" in (again / "report.html").read_text()


def test_ask_every_engine(finished_run: Path) -> None:
    for engine in ("gguf", "merged", "adapter", "base"):
        done = kit("ask", str(finished_run), "Ticket to JSON: say hello.", "--engine", engine, timeout=200)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]
    file = finished_run / "gguf" / "quickstart-q8_0.gguf"
    assert kit("ask", str(file), "Hi").stdout.strip()
    assert "did you mean 'adapter'" in kit("ask", str(finished_run), "Hi", "--engine", "adaptor").stderr


def test_a_gguf_cut_in_half(finished_run: Path, tmp_path: Path) -> None:
    data = (finished_run / "gguf" / "quickstart-q8_0.gguf").read_bytes()
    cut = tmp_path / "half.gguf"
    cut.write_bytes(data[: len(data) // 2])
    done = kit("ask", str(cut), "Hi")
    assert done.returncode == 2 and "half.gguf" in done.stderr and "Traceback" not in done.stderr


def test_streams_token_by_token(finished_run: Path) -> None:
    from kit.answering.engines import stream
    from kit.answering.prompts import answer
    from kit.models.load import reload

    run = Run.open(finished_run)
    model, tokenizer = reload(run.merged, run.recipe)
    prompt = [{"role": "user", "content": "Ticket to JSON: order, product."}]
    pieces = list(stream(model, tokenizer, prompt, run.recipe))
    [reply] = answer(model, tokenizer, [prompt], run.recipe)
    assert "".join(pieces) == reply.text
    tokens = tokenizer(reply.text, add_special_tokens=False)["input_ids"]
    assert len(pieces) == len(tokens) > 5


def test_a_character_of_several_tokens_is_streamed_whole(starter: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kit.answering.engines import stream
    from kit.recipe.recipe import Recipe

    tokenizer = AutoTokenizer.from_pretrained(starter)
    text = "你好 🙂\nline two 猫"
    forced = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float32)
    steps = []

    def say(module: Any, arguments: Any, output: Any) -> Any:
        """The likeliest token is the next one of the text."""
        steps.append(1)
        output.logits[:] = 0
        output.logits[:, -1, forced[len(steps) - 1]] = 100
        return output

    model.register_forward_hook(say)
    pieces = list(stream(model, tokenizer, "x", Recipe.load({})))
    assert "".join(pieces) == text
    assert " 🙂" in pieces and "\ufffd" not in "".join(pieces)


def start(tmp_path: Path, model: Path, command: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "kit", command, "recipes/quickstart.yaml", f"output_dir={tmp_path}",
                             f"model_name={model}", "gguf=[]", "max_eval_samples=1", "max_new_tokens=4"], cwd=PROJECT,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_training(folder: Path, process: subprocess.Popen[str]) -> dict[str, Any]:
    for _ in range(600):
        if (folder / "log.jsonl").is_file() or process.poll() is not None:
            break
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()[0][-2000:]
    return read_result(folder)


def test_a_killed_kernel_is_a_failed_run(tiny_starter: Path, tmp_path: Path) -> None:
    process = start(tmp_path, tiny_starter, "run")
    result = wait_for_training(tmp_path / "quickstart", process)
    os.kill(result["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "stopped at 'train'" in output
    result = json.loads((tmp_path / "quickstart" / "result.json").read_text())
    assert (result["status"], result["stage"]) == ("stopped", "train")


@pytest.mark.parametrize("command", ["run", "train"])
def test_interrupting_ends_the_kernel_too(tiny_starter: Path, tmp_path: Path, command: str) -> None:
    process = start(tmp_path, tiny_starter, command)
    kernel = wait_for_training(tmp_path / "quickstart", process)["pid"]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output[-2000:]
    assert "Traceback" not in output[-500:]
    result = read_result(tmp_path / "quickstart")
    assert (result["status"], result["stage"]) == ("stopped", "train")
    for _ in range(50):
        if not Path(f"/proc/{kernel}").exists():
            break
        time.sleep(0.2)
    assert not Path(f"/proc/{kernel}").exists() or "Z" in Path(f"/proc/{kernel}/stat").read_text().split()[2]


@pytest.fixture
def changed_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the notebook with its fourth stage's code replaced by a line; (exit code, result)."""
    import jupytext

    from kit import batch

    def run(line: str, how: str) -> tuple[int, dict[str, Any]]:
        notebook = jupytext.read(batch.NOTEBOOK)
        for cell in notebook.cells:
            if 'run.stage("load")' in cell.source:
                cell.source = f'run.stage("load")\n{line}'
        jupytext.write(notebook, tmp_path / "01_finetune.py", fmt="py:percent")
        jupytext.write(notebook, tmp_path / "01_finetune.ipynb")
        monkeypatch.setattr(batch, "NOTEBOOK", tmp_path / "01_finetune.py")
        code = getattr(batch, how)("recipes/quickstart.yaml", {"output_dir": str(tmp_path / "runs"), "gguf": []}, False)
        return code, json.loads((tmp_path / "runs" / "quickstart" / "result.json").read_text())

    monkeypatch.chdir(PROJECT)
    return run


@pytest.mark.parametrize("how", ["run_notebook", "run_cells"])
@pytest.mark.parametrize("line, reason", [
    ("raise SystemExit(0)", "(0)"),
    ("import os; os._exit(0)", ""),
    ("raise kit.KitError('no such thing', 'mend it')", "no such thing"),
])
def test_every_early_end_is_a_failure_that_says_where(changed_notebook: Any, how: str, line: str, reason: str) -> None:
    if "_exit" in line and how == "run_cells":
        pytest.skip("this would end the test's own process")
    code, result = changed_notebook(line, how)
    assert code in (1, 2)
    assert result["status"] in ("failed", "stopped") and result["stage"] == "load"
    assert reason in result["reason"].replace(": 0", "(0)")


def test_a_command_takes_nothing_that_somebody_wrote_into_the_notebook(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Edited in JupyterLab and saved: `kit run` and `kit train` run what their command says."""
    import jupytext

    from kit import batch

    def parameters(notebook: Any) -> Any:
        return next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))

    notebook = jupytext.read(batch.NOTEBOOK)
    as_it_was = parameters(notebook).source
    parameters(notebook).source += '\ndataset = "my.csv"\nrun_name = "mine"'
    jupytext.write(notebook, tmp_path / "01_finetune.py", fmt="py:percent")
    monkeypatch.setattr(batch, "NOTEBOOK", tmp_path / "01_finetune.py")
    assert parameters(batch._notebook()).source == as_it_was.splitlines()[0], "and no form"
    assert "dataset, run_name" in capsys.readouterr().out


def test_plain_papermill(tmp_path: Path) -> None:
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", "notebooks/01_finetune.ipynb", str(out), "-p", "recipe",
               "recipes/quickstart.yaml", "-p", "learning_rate", "1e-4", "-p", "max_steps", "2", "-p", "output_dir",
               str(tmp_path), "-p", "max_eval_samples", "1", "-p", "max_new_tokens", "4", "-y", "gguf: []"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run.open(tmp_path / "quickstart")
    assert run.result["status"] == "finished" and run.recipe.learning_rate == 1e-4
    wrong = subprocess.run([*command[:4], str(tmp_path / "b.ipynb"), "-p", "learning_rat", "1e-4"], cwd=PROJECT,
                           capture_output=True, text=True, timeout=600)
    assert wrong.returncode != 0 and "did you mean" in wrong.stderr


def test_train_is_the_same_run_without_a_kernel(tiny_starter: Path, tmp_path: Path) -> None:
    done = kit("train", "recipes/quickstart.yaml", f"output_dir={tmp_path}", f"model_name={tiny_starter}", "gguf=[]",
               "learning_rate=2e-2", *FEW_STEPS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert read_result(tmp_path / "quickstart")["status"] == "finished"
    assert "── 10. Train ──" in done.stdout and "⟦" in done.stdout
