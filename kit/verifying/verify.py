"""`kit verify`: is what a run ships what it trained? Every gate over a run folder, and the verdict.

Checked are the files (hashes, secrets, origin), the merge tensor by tensor, tokenizer, shape, template and stop token
of each artefact, and parity: the trained model's next-token distributions, kept by `kit.record`, against the adapter
loaded again, the merged model and each GGUF.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.common.errors import KitError
from kit.common.files import read_json, timestamp, write_json
from kit.gguf.child import LlamaChild
from kit.gguf.formats import check_gguf, quantization_of, read_header
from kit.models.fetch import base_folder
from kit.models.load import free_memory
from kit.recipe.machine import machine
from kit.runs.gates import Gate, Gates
from kit.runs.provenance import COPY_AGAIN, about, check_hashes, check_origin, check_secrets, export_again
from kit.runs.report import write_report
from kit.runs.run import Run
from kit.runs.verdict import withdrawn
from kit.verifying.answers import Shipped, check_ends, check_scores, check_stops, gguf_answers
from kit.verifying.contents import check_contents, check_merge
from kit.verifying.parity import check_adapter, check_merged, compare, gguf_predictions, judge_gguf
from kit.verifying.reference import Evidence
from kit.verifying.template import check_folder_template, check_gguf_template, check_modelfile


def verify(run: Run | str | Path, trust_remote_code: bool = False) -> Gates:
    """Check a run's artefacts, write verify.json and report.html into its folder, and return the gates.

    `trust_remote_code` is your consent to Python code that came with a folder's model; a Run has its own. Nothing of a
    folder whose hashes are wrong is loaded. A failed gate is in the result, not an exception. Raises KitError when
    there is no such run, it made no model, this machine can't compute, or its folder can't be written; then verify.json
    says so, not what it said before.
    """
    run = run if isinstance(run, Run) else Run.open(run, trust_remote_code)
    with withdrawn(run):
        return _verify(run)


def _verify(run: Run) -> Gates:
    trained = run.adapter if (run.adapter / "adapter_config.json").is_file() else run.merged
    if not (trained / "tokenizer_config.json").is_file():
        raise KitError(f"{run.folder} holds no trained model ({run.result.get('status', 'not started')} at "
                       f"{run.result.get('stage', 'the start')})", "let the run come to its end first")
    machine()  # one that can't compute is no fault of the run's: refused here, not inside a gate
    began = time.perf_counter()
    gates = Gates(f"verify {run.folder.name}")
    scores = _check_all(gates, run, trained)
    write_json(run.folder / "verify.json", {
        "passed": gates.passed, "verdict": gates.verdict, "checked": timestamp(),
        "seconds": round(time.perf_counter() - began, 1), "gates": gates.as_json(), "scores": scores,
        "artefacts": read_json(run.folder / "manifest.json").get("artefacts")})
    write_report(run)
    return gates


class Steps:
    """The long steps of a verify, and what of them is still to come."""

    def __init__(self, run: Run) -> None:
        models = [folder.name for folder in (run.adapter, run.merged, run.merged_4bit) if folder.is_dir()]
        self.names = ["files", *models, *(quantization_of(path) for path in sorted(run.gguf.glob("*.gguf")))]

    @contextmanager
    def step(self, name: str, gates: Gates, gate: str, hint: str = "") -> Iterator[None]:
        """Say that it begins; an error inside becomes a failed gate, and the memory of models is given back."""
        place = self.names.index(name)
        later = self.names[place + 1:]
        print(f"verify {place + 1}/{len(self.names)}: {name} …" + (f" (then {', '.join(later)})" if later else ""),
              flush=True)
        with gates.guard(gate, hint):
            yield
        free_memory()


def _check_all(gates: Gates, run: Run, trained: Path) -> dict[str, dict[str, float]]:
    """Every gate, the cheap ones first; returns the held-out scores by artefact."""
    with gates.guard("before training", COPY_AGAIN):  # what was checked then, a line for each stage
        stages = [Gates.from_json(name, recorded) for name, recorded in run.result.get("gates", {}).items()]
        gates.gates += [Gate(stage.title, stage.passed, stage.verdict, detail="; ".join(g.detail for g in stage.failed))
                        for stage in stages]
    whole, steps = False, Steps(run)
    with steps.step("files", gates, "sha256"):
        whole = check_hashes(gates, run)
    with gates.guard("secrets"):
        check_secrets(gates, run)
    if not whole:  # it may be anybody's: a model, a tokenizer or a template is not even opened
        gates.check("all other gates", None, "not checked", detail="the files are not those of the run")
        return {}
    evidence = None
    with gates.guard("reference"):
        evidence = Evidence.load(run, trained)
    if evidence is None:
        return {}
    reference = evidence.reference
    figures = compare(reference, reference.predictions)
    gates.check("in memory", None, f"NLL {figures.nll:.4f} on {figures.tokens:,} answer tokens of "
                f"{sum(row.held_out for row in reference.rows)} "
                f"{'held-out ' * evidence.recipe.holds_out}conversations, in {reference.precision}", "",
                "what the others are compared with")
    check_stops(gates, evidence)
    _check_folders(gates, evidence, steps)
    shipped = check_ggufs(gates, evidence, steps)
    check_ends(gates, evidence, shipped)
    return check_scores(gates, evidence, shipped)


def _check_folders(gates: Gates, evidence: Evidence, steps: Steps) -> None:
    """The folders that transformers and PEFT load: adapter, merged model and its 4-bit copy."""
    run, merged = evidence.run, evidence.merged
    if evidence.trained == run.adapter:
        if merged:
            with gates.guard("merge"):
                check_merge(gates, base_folder(evidence.recipe), run.adapter, merged)
        with steps.step("adapter", gates, "parity adapter"):
            check_adapter(gates, evidence)
    if merged:
        with steps.step("merged", gates, "parity merged"):
            check_merged(gates, evidence, merged)
        with gates.guard("template merged"):
            check_folder_template(gates, merged, evidence.cases, evidence.tokenizer_in(merged))
    if run.merged_4bit.is_dir():
        with steps.step("merged-4bit", gates, "parity merged-4bit"):
            check_merged(gates, evidence, run.merged_4bit)
            check_folder_template(gates, run.merged_4bit, evidence.cases,
                                  evidence.tokenizer_in(run.merged_4bit))


def check_ggufs(gates: Gates, evidence: Evidence, steps: Steps | None = None) -> dict[str, Shipped]:
    """The GGUFs and their Modelfile; returns the sound files by quantisation."""
    steps = steps or Steps(evidence.run)
    shipped = {}
    for path in evidence.ggufs:
        name = quantization_of(path)
        with steps.step(name, gates, f"file {path.stem}", export_again(name)):
            if one := _check_gguf(gates, path, evidence):
                shipped[name] = one
    if (evidence.run.gguf / "Modelfile").is_file() and not any(g.name == "template Modelfile" for g in gates.gates):
        gates.check("template Modelfile", False, "not checked", "the training's token ids",
                    "the GGUF that it names is not there or not sound",
                    f"{export_again()} makes what is missing, and the Modelfile")
    return shipped


def _check_gguf(gates: Gates, path: Path, evidence: Evidence) -> Shipped | None:
    """Add the gates of one GGUF, and of the Modelfile if it names this one; None when the file is not sound.

    Raises KitError for a damaged file, GateError when llama.cpp fails.
    """
    run, reference = evidence.run, evidence.reference
    quantization = quantization_of(path)
    check_gguf(path)
    header = read_header(path)
    check_origin(gates, quantization, header, about(run))
    if not check_contents(gates, quantization, header, evidence.trained, evidence.config):
        return None  # llama.cpp would split text in another way, or end its process
    longest = max(map(len, [*(row.ids for row in reference.rows), *(case.ids for case in evidence.cases)]))
    with LlamaChild(path, n_ctx=longest + 16, logits=True) as child:
        check_gguf_template(gates, quantization, child, evidence.tokenizer, evidence.cases)
        predictions = list(gguf_predictions(child, reference))
        modelfile = run.gguf / "Modelfile"
        if modelfile.is_file() and f"FROM ./{path.name}\n" in modelfile.read_text(encoding="utf-8", errors="replace"):
            check_modelfile(gates, modelfile, child, evidence.tokenizer, evidence.cases, evidence.recipe)
    figures = compare(reference, predictions)
    allowed = judge_gguf(gates, quantization, header, figures, predictions, evidence)
    return Shipped(figures, allowed, gguf_answers(path, evidence, figures.answers))
