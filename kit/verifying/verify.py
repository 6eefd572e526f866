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
from kit.runs.gates import Gate, Gates
from kit.runs.provenance import COPY_AGAIN, about, check_hashes, check_origin, check_secrets, export_again
from kit.runs.report import write_report
from kit.runs.run import Run
from kit.runs.verdict import withdrawn
from kit.verifying.answers import Answer, check_answers, check_stops, gguf_answers
from kit.verifying.contents import check_contents, check_merge
from kit.verifying.parity import TOLERANCES, check_adapter, check_merged, compare, gguf_predictions, judge
from kit.verifying.reference import Evidence
from kit.verifying.template import check_folder_template, check_gguf_template, check_modelfile


def verify(run: Run | str | Path, trust_remote_code: bool = False) -> Gates:
    """Check a run's artefacts, write verify.json and report.html into its folder, and return the gates.

    `trust_remote_code` is your consent to Python code that came with a folder's model; a Run has its own. Nothing of a
    folder whose hashes are wrong is loaded. A failed gate is in the result, not an exception. Raises KitError when
    there is no such run, it made no model, or its folder can't be written; then verify.json says so, not what it said
    before.
    """
    run = run if isinstance(run, Run) else Run.open(run, trust_remote_code)
    with withdrawn(run):
        return _verify(run)


def _verify(run: Run) -> Gates:
    trained = run.adapter if (run.adapter / "adapter_config.json").is_file() else run.merged
    if not (trained / "tokenizer_config.json").is_file():
        raise KitError(f"{run.folder} holds no trained model ({run.result.get('status', 'not started')} at "
                       f"{run.result.get('stage', 'the start')})", "let the run come to its end first")
    began = time.perf_counter()
    gates = Gates(f"verify {run.folder.name}")
    scores = _check_all(gates, run, trained)
    write_json(run.folder / "verify.json", {
        "passed": gates.passed, "verdict": gates.verdict, "checked": timestamp(),
        "seconds": round(time.perf_counter() - began, 1), "gates": gates.as_json(), "scores": scores,
        "artefacts": read_json(run.folder / "manifest.json").get("artefacts"),
        "tolerances": {name: tolerance._asdict() for name, tolerance in TOLERANCES.items()}})
    write_report(run)
    return gates


def _check_all(gates: Gates, run: Run, trained: Path) -> dict[str, dict[str, float]]:
    """Every gate, the cheap ones first; returns the held-out scores by artefact."""
    with gates.guard("before training", COPY_AGAIN):  # what was checked then, a line for each stage
        stages = [Gates.from_json(name, recorded) for name, recorded in run.result.get("gates", {}).items()]
        gates.gates += [Gate(stage.title, stage.passed, stage.verdict, detail="; ".join(g.detail for g in stage.failed))
                        for stage in stages]
    whole = False
    with _stage(gates, "files", "sha256"):
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
                f"{sum(row.held_out for row in reference.rows)} held-out conversations, in {reference.precision}", "",
                "what the others are compared with")
    check_stops(gates, evidence)
    _check_folders(gates, evidence)
    return check_answers(gates, evidence, check_ggufs(gates, evidence))


def _check_folders(gates: Gates, evidence: Evidence) -> None:
    """The folders that transformers and PEFT load: adapter, merged model and its 4-bit copy."""
    run, merged = evidence.run, evidence.merged
    if evidence.trained == run.adapter:
        if merged:
            with _stage(gates, "merge", "merge"):
                check_merge(gates, base_folder(evidence.recipe), run.adapter, merged)
        with _stage(gates, "adapter and base", "parity adapter"):
            check_adapter(gates, evidence)
    if not merged:
        return
    with _stage(gates, "merged model", "parity merged"):
        check_merged(gates, evidence, merged, "merged from a quantised base" if evidence.recipe.quantised else "merged")
    with gates.guard("template merged"):
        check_folder_template(gates, merged, evidence.cases, evidence.recipe.trust_remote_code)
    if run.merged_4bit.is_dir():
        with _stage(gates, "4-bit model", "parity merged-4bit"):
            check_merged(gates, evidence, run.merged_4bit, "merged-4bit")
            check_folder_template(gates, run.merged_4bit, evidence.cases, evidence.recipe.trust_remote_code)


def check_ggufs(gates: Gates, evidence: Evidence) -> dict[str, dict[int, Answer]]:
    """The GGUFs and their Modelfile; returns the answers by quantisation and held-out row, of sound files."""
    answers = {}
    for path in evidence.ggufs if evidence.merged else []:
        with _stage(gates, path.name, f"file {path.stem}", export_again(quantization_of(path))):
            if replies := _check_gguf(gates, path, evidence):
                answers[quantization_of(path)] = replies
    if (evidence.run.gguf / "Modelfile").is_file() and not any(g.name == "template Modelfile" for g in gates.gates):
        gates.check("template Modelfile", False, "not checked", "the training's token ids",
                    "the GGUF that it names is not there or not sound",
                    f"{export_again()} makes what is missing, and the Modelfile")
    return answers


def _check_gguf(gates: Gates, path: Path, evidence: Evidence) -> dict[int, Answer]:
    """Add the gates of one GGUF, and of the Modelfile if it names this one; returns its answers by held-out row.

    There are none when the file is not sound. Raises KitError for a damaged file, GateError when llama.cpp fails.
    """
    run, reference = evidence.run, evidence.reference
    quantization = quantization_of(path)
    check_gguf(path)
    header = read_header(path)
    check_origin(gates, quantization, header, about(run))
    if not check_contents(gates, quantization, header, run.merged):
        return {}  # llama.cpp would split text in another way, or end its process
    longest = max(map(len, [*(row.ids for row in reference.rows), *(case.ids for case in evidence.cases)]))
    with LlamaChild(path, n_ctx=longest + 16, logits=True) as child:
        check_gguf_template(gates, quantization, child, evidence.tokenizer, evidence.cases)
        figures = compare(reference, gguf_predictions(child, reference))
        judge(gates, quantization, figures, quantization, reference.precision, evidence.remark)
        modelfile = run.gguf / "Modelfile"
        if modelfile.is_file() and f"FROM ./{path.name}\n" in modelfile.read_text(encoding="utf-8", errors="replace"):
            check_modelfile(gates, modelfile, child, evidence.tokenizer, evidence.cases, evidence.recipe)
    return gguf_answers(path, evidence, figures.answers)


@contextmanager
def _stage(gates: Gates, label: str, gate: str, hint: str = "") -> Iterator[None]:
    """Say what is being checked; an error inside becomes a failed gate, and the memory of models is given back."""
    print(f"verify: {label} …", flush=True)
    with gates.guard(gate, hint):
        yield
    free_memory()
