"""`kit verify`: is what a run ships what it trained? Every gate over a run folder, and the verdict.

Checked are the files (hashes, secrets, origin), the merge tensor by tensor, tokenizer, shape, template and stop token
of each artefact, and parity: the trained model's next-token distributions, kept by `kit.record`, against the adapter
loaded again, the merged model and each GGUF.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import kit.common.unsloth

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.answering.infer import answer
from kit.answering.score import score
from kit.common.errors import KitError
from kit.common.files import write_json
from kit.data.formatting import fit
from kit.data.masks import Formatter
from kit.data.splits import read_splits
from kit.export.modelfile_reader import read_modelfile
from kit.gguf.child import LlamaChild
from kit.gguf.formats import quantization_of
from kit.gguf.header import check_gguf, read_header
from kit.models.fetch import base_folder
from kit.models.load import free_memory, reload
from kit.models.precision import in_float32
from kit.models.template import Message
from kit.recipe.recipe import Recipe
from kit.runs.folder import read_manifest
from kit.runs.gates import Gates
from kit.runs.provenance import about, check_hashes, check_origin, check_secrets
from kit.runs.report import write_report
from kit.runs.run import Run
from kit.verifying.contents import check_contents
from kit.verifying.merge import check_merge
from kit.verifying.parity import DIFFERS, TOLERANCES, compare, gguf_engine, itself, judge
from kit.verifying.reference import Reference, greedy, reread, torch_engine
from kit.verifying.stop import Stops, check_rates
from kit.verifying.template import Case, cases, check_folder_template, check_gguf_template, check_modelfile

TRAINING_ROWS = 200  # whose labels are made again and looked at
POINTS = 0.05  # by which a GGUF's held-out score may be below the adapter's


class Held(NamedTuple):
    """What the run held out, and the trained tokenizer with some rows as it encodes them."""

    tokenizer: Any
    talks: list[list[Message]]
    encoded: list[tuple[list[int], list[int]]]


def verify(run: Run | str | Path) -> Gates:
    """Check a run's artefacts, write verify.json and report.html into its folder, and return the gates.

    A failed gate is in the result, not an exception. Raises KitError when there is no such run, or it made no model.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    recipe = run.recipe
    saved = run.adapter if (run.adapter / "adapter_config.json").is_file() else run.merged
    if not (saved / "tokenizer_config.json").is_file():
        raise KitError(f"{run.folder} holds no trained model ({run.result.get('status', 'not started')} at "
                       f"{run.result.get('stage', 'the start')})", "let the run come to its end first")
    began = time.perf_counter()
    gates = Gates(f"verify {run.folder.name}", _recorded(run))
    scores = _check_all(gates, run, recipe, saved)
    write_json(run.folder / "verify.json", {
        "passed": gates.passed, "verdict": gates.verdict, "checked": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(time.perf_counter() - began, 1), "gates": gates.as_json(), "scores": scores,
        "artefacts": read_manifest(run.folder).get("artefacts"),
        "tolerances": {name: tolerance._asdict() for name, tolerance in TOLERANCES.items()}})
    write_report(run)
    return gates


def _recorded(run: Run) -> list[Any]:
    """The gates that passed before training, a line for each stage."""
    summary = Gates("")
    for stage, found in run.result.get("gates", {}).items():
        earlier = Gates.from_json(stage, found)
        summary.check(stage, earlier.passed, earlier.verdict, "", "; ".join(gate.detail for gate in earlier.failed))
    return summary.gates


def _check_all(gates: Gates, run: Run, recipe: Recipe, saved: Path) -> dict[str, dict[str, float]]:
    """Every gate, the cheap ones first; returns the held-out scores by artefact."""
    _say("files")
    with gates.guard("sha256"):
        check_hashes(gates, run)
    check_secrets(gates, run)
    reference = held = None
    with gates.guard("reference"):
        reference = Reference.load(run.folder / "reference.safetensors")
        held = _held(saved, recipe)
    if reference is None or held is None:
        return {}
    own = itself(reference)
    conversations = sum(row.held_out for row in reference.rows)
    gates.check("in memory", None, f"NLL {own.nll:.4f} on {own.tokens:,} answer tokens of {conversations} held-out "
                f"conversations, in {reference.precision}", "", "what the others are compared with")
    merged = run.merged if (run.merged / "config.json").is_file() else None
    files = sorted(run.gguf.glob("*.gguf"))
    _check_stops(gates, run, recipe, held, merged, files)
    if saved == run.adapter:
        if merged:
            _say("merge")
            with gates.guard("merge"):
                check_merge(gates, base_folder(recipe), saved, merged)
        _say("adapter and base")
        with gates.guard("parity adapter"):
            _check_adapter(gates, saved, recipe, reference)
    if merged:
        _say("merged model")
        with gates.guard("parity merged"):
            reference = _check_merged(gates, merged, recipe, reference)
    every = list(cases(held.tokenizer, recipe, held.talks))
    if merged:
        with gates.guard("template merged"):
            check_folder_template(gates, merged, every)
    else:
        files = []
    if merged and run.merged_4bit.is_dir():
        _say("4-bit model")
        with gates.guard("parity merged-4bit"):
            _check_4bit(gates, run.merged_4bit, recipe, reference)
            check_folder_template(gates, run.merged_4bit, every)
    modelfile = run.gguf / "Modelfile"
    shipped = {}
    for path in files:
        _say(path.name)
        with gates.guard(f"file {path.stem}"):
            replies = _check_file(gates, path, run, recipe, reference, held, every, modelfile)
            if replies:
                shipped[quantization_of(path)] = replies
    if modelfile.is_file() and not any(gate.name == "template Modelfile" for gate in gates.gates):
        gates.check("template Modelfile", False, "not checked", "the training's token ids",
                    "the GGUF that it names is not there or not sound", "export again")
    return _check_answers(gates, recipe, reference, held, shipped)


def _say(what: str) -> None:
    print(f"verify: {what} …", flush=True)


def _held(saved: Path, recipe: Recipe) -> Held:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    formatter = Formatter(tokenizer, recipe)
    train, held_out = read_splits(recipe)
    first = [row.messages for row in train[:TRAINING_ROWS]]

    def kept(talks: list[list[Message]]) -> list[list[Message]]:
        """As kit.load_data numbers them: without those that are too long, or shortened."""
        fitted = [fit(formatter, talk, *tokens) for talk, tokens in zip(talks, formatter.encode(talks), strict=True)]
        return [row.messages for row in fitted if row.ids]

    talks = kept([row.messages for row in held_out]) or kept(first)
    return Held(tokenizer, talks, list(formatter.encode(first + talks[:TRAINING_ROWS])))


def _check_stops(gates: Gates, run: Run, recipe: Recipe, held: Held, merged: Path | None,
                 files: list[Path]) -> None:
    with gates.guard("stop token"):
        stops = Stops(held.tokenizer, held.encoded, not recipe.train_on_responses_only)
        for folder in (run.adapter, merged, run.merged_4bit):
            if folder and folder.is_dir():
                stops.add_folder(folder)
        # Of a file that can't be read its own gate says what is wrong with it.
        for path in files:
            with suppress(KitError):
                stops.add_gguf(quantization_of(path), read_header(path).fields)
        if (run.gguf / "Modelfile").is_file():
            with suppress(KitError):
                stops.add_modelfile(read_modelfile(run.gguf / "Modelfile").stops)
        stops.check(gates)


def _check_adapter(gates: Gates, adapter: Path, recipe: Recipe, reference: Reference) -> None:
    """The adapter from disk against the one in memory, and, as a control, the base without it."""
    model, _ = reload(adapter, recipe)
    with in_float32(model):
        judge(gates, "adapter", compare(reference, torch_engine(model)), "adapter", reference.precision)
        with model.disable_adapter():
            base = compare(reference, torch_engine(model))
    del model
    free_memory()
    changed = base.mean_kl > DIFFERS
    gates.check("control: the base differs", changed, str(base), f"mean KL > {DIFFERS:g}", "" if changed else
                "the adapter changes nothing: the base model predicts the same", "train longer, or with a higher "
                "learning_rate; a loss that does not fall says the same")


def _check_merged(gates: Gates, merged: Path, recipe: Recipe, reference: Reference) -> Reference:
    """The merged folder in transformers. Returns what is made from it is to be compared with.

    An adapter trained on a quantised base and merged into the 16-bit one gives another model than was trained; files
    made from it are then compared with it, not with the model in memory.
    """
    model = _in_transformers(merged, recipe)
    with in_float32(model) as precision:
        kind = "merged from a quantised base" if recipe.quantised else "merged"
        judge(gates, "merged", compare(reference, torch_engine(model)), kind, reference.precision)
        if recipe.quantised:
            reference = reread(model, reference)._replace(precision=precision)
    del model
    free_memory()
    return reference


def _check_4bit(gates: Gates, folder: Path, recipe: Recipe, reference: Reference) -> None:
    model = _in_transformers(folder, recipe)
    with in_float32(model):
        judge(gates, folder.name, compare(reference, torch_engine(model)), "merged-4bit", reference.precision,
              _against(recipe))
    del model
    free_memory()


def _in_transformers(folder: Path, recipe: Recipe) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=recipe.trust_remote_code,
                                                device_map=device)


def _against(recipe: Recipe) -> str:
    return "against merged, whose base was quantised in training" if recipe.quantised else ""


def _check_file(gates: Gates, path: Path, run: Run, recipe: Recipe, reference: Reference, held: Held,
                every: list[Case], modelfile: Path) -> dict[int, tuple[str, bool]]:
    """One GGUF, from its bytes to its answers; returns {held-out row: (answer, stopped)}, {} when it is not sound."""
    quantization = quantization_of(path)
    check_gguf(path)
    header = read_header(path)
    check_origin(gates, quantization, header, about(run))
    if not check_contents(gates, quantization, header, run.merged):
        return {}  # llama.cpp would split text in another way, or end its process
    longest = max(max(len(row.ids) for row in reference.rows), *(len(case.ids) for case in every))
    with LlamaChild(path, n_ctx=longest + 16, logits=True) as child:
        check_gguf_template(gates, quantization, child, held.tokenizer, every)
        figures = compare(reference, gguf_engine(child))
        judge(gates, quantization, figures, quantization, reference.precision, _against(recipe))
        if modelfile.is_file() and f"FROM ./{path.name}\n" in modelfile.read_text(encoding="utf-8", errors="replace"):
            check_modelfile(gates, modelfile, child, held.tokenizer, every, recipe.system_prompt or "")
    return _answers(path, recipe, reference, held, figures.answers)


def _answers(path: Path, recipe: Recipe, reference: Reference, held: Held,
             same: dict[int, bool]) -> dict[int, tuple[str, bool]]:
    """The GGUF's greedy answers to the reference's rows; only those that differ from the adapter's are generated."""
    replies = {number: reference.answers[number] for number, equal in same.items() if equal}
    others = [number for number, equal in same.items() if not equal]
    if others:
        found = answer(path, None, [held.talks[number][:-1] for number in others], greedy(recipe))
        replies |= {number: (reply.text, reply.stopped) for number, reply in zip(others, found, strict=True)}
    return replies


def _check_answers(gates: Gates, recipe: Recipe, reference: Reference, held: Held,
                   shipped: dict[str, dict[int, tuple[str, bool]]]) -> dict[str, dict[str, float]]:
    """Stop rates and held-out scores of adapter and GGUFs over the rows that all of them answered."""
    numbers = sorted({row.number for row in reference.rows if row.own})
    if not numbers:
        return {}
    replies = {"adapter": {number: reference.answers[number] for number in numbers}, **shipped}
    rates = {name: sum(answers[n][1] for n in numbers) / len(numbers) for name, answers in replies.items()}
    references = [held.talks[number][-1]["content"] for number in numbers]
    fits = any(len(held.tokenizer(text, add_special_tokens=False)["input_ids"]) < recipe.max_new_tokens
               for text in references)
    check_rates(gates, rates.pop("adapter"), rates, len(numbers), fits)
    scores = {name: score([answers[n][0] for n in numbers], references, recipe.metric)
              for name, answers in replies.items()}
    if recipe.metric == "none":
        return {}
    adapter = scores["adapter"]["exact"]
    least = adapter - max(POINTS, 1 / len(numbers)) - 1e-9  # one answer of a few is no trend
    low = [name for name in ("f16", "bf16", "q8_0") if name in scores and scores[name]["exact"] < least]
    gates.check("held-out score", not low,
                ", ".join(f"{name} {values['exact']:.1%}" for name, values in scores.items()),
                f"f16, bf16, q8_0: at most {100 * POINTS:.0f} points, or one answer, below the adapter",
                f"{len(numbers)} rows" + "".join(f"; {name} is below" for name in low),
                "export again; a k-quant that loses too much: q8_0" if low else "")
    return scores
