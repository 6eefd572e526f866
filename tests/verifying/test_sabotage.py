"""Every gate after training can fail: a run is damaged in one way at a time, and the gate meant for it says so.

After the damage the run is sealed again, so that its hashes are right and the gate has to find the cause by itself.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import pytest

import kit
from kit.export.adapter import save_4bit
from kit.gguf.formats import read_header
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gate, Gates
from kit.runs.provenance import about, check_hashes, check_origin, check_secrets
from kit.runs.run import Run
from kit.verifying.answers import check_labels, check_stops
from kit.verifying.contents import check_merge
from kit.verifying.reference import Evidence
from kit.verifying.verify import check_ggufs
from support.command import kit as command
from support.sabotage import copy_run, edit_gguf, edit_json, edit_tensors, edit_text, overwrite_gguf, replace
from support.tiny_models import tiny_tokenizer
from support.tiny_runs import ASKED

pytestmark = pytest.mark.slow

F16, Q8_0, MODELFILE = "gguf/tiny-f16.gguf", "gguf/tiny-q8_0.gguf", "gguf/Modelfile"
SHIPPED = (F16, Q8_0, MODELFILE)
ENDOFTEXT, IM_END = 151643, 151645  # in Qwen's vocabulary


@pytest.fixture(scope="module")
def finished(sure_run: Path) -> Path:
    return sure_run


@pytest.fixture(scope="module")
def another(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter, merged model and f16 file of a run that differs in its seeds only."""
    folder = tmp_path_factory.mktemp("another")
    chosen = Recipe.load(str(finished / "recipe.yaml"), seed=1, random_state=1, max_steps=20, output_dir=str(folder))
    run = Run.start(chosen)
    model, tokenizer = kit.load_model(chosen)
    run.manifest(chosen, tokenizer, [])
    model = kit.add_lora(model, chosen)
    kit.train(kit.make_trainer(model, tokenizer, kit.load_data(chosen, tokenizer), chosen), chosen)
    merged = kit.merge(kit.save_adapter(model, tokenizer, run), run, chosen)
    kit.export_gguf(merged, run.gguf, ["f16"], chosen.run_name, kit.about(run))
    run.finish()
    return run.folder


def failed(run: Run) -> dict[str, Gate]:
    """{name: gate} of those that `kit verify` finds failed; each says what to change."""
    gates = {gate.name: gate for gate in kit.verify(run.folder).failed}
    assert all(gate.hint for gate in gates.values()), [gate.name for gate in gates.values() if not gate.hint]
    return gates


@pytest.fixture(scope="module")
def evidence(finished: Path) -> Evidence:
    return Evidence.load(Run.open(finished), finished / "adapter")


def of_ggufs(run: Run, evidence: Evidence) -> Gates:
    """The gates of GGUFs and Modelfile: `kit verify` without the models that transformers loads."""
    gates = Gates("")
    evidence = replaced(evidence, run=run)
    check_stops(gates, evidence)
    check_ggufs(gates, evidence)
    assert all(gate.hint for gate in gates.failed), [gate.name for gate in gates.failed if not gate.hint]
    return gates


def by_name(cases: list[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test; the sabotage that comes first names it."""
    return [pytest.param(*case, id=case[0].__name__) for case in cases]


def test_an_untouched_run_passes(finished: Path, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path)
    done = command("verify", str(run.folder))
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((run.folder / "verify.json").read_text(encoding="utf-8"))
    assert said["passed"] is True
    assert said["verdict"] in done.stdout
    assert all(set(gate) == {"name", "passed", "figure", "tolerance", "detail", "hint"} for gate in said["gates"])
    assert {gate["passed"] for gate in said["gates"]} <= {True, None}
    names = {gate["name"] for gate in said["gates"]}
    assert names >= {"sha256", "secrets", "labels", "stop token", "merged config", "merge", "template Modelfile",
                     "template merged",
                     "control: the base differs", "parity adapter", "parity merged", "stops by itself"}
    assert names >= {f"{gate} {kind}" for gate in ("origin", "tokenizer", "shape", "template", "parity", "trained")
                     for kind in ("f16", "q8_0")}
    assert {name: values["exact"] for name, values in said["scores"].items()} == {
        "adapter": 1.0, "f16": 1.0, "q8_0": 1.0}


def test_without_the_merged_model_and_the_data(finished: Path, tmp_path: Path) -> None:
    """To free the disk, and on another machine: the GGUFs are compared with what the model in memory held."""
    run = copy_run(finished, tmp_path)
    shutil.rmtree(run.merged)
    gates = {gate.name: gate for gate in kit.verify(run.folder).gates}
    assert not [gate for gate in gates.values() if gate.passed is False]
    assert gates["parity f16"].passed and gates["trained q8_0"].passed and gates["template Modelfile"].passed
    assert "parity merged" not in gates and "merged/ not looked at" in gates["sha256"].detail
    recipe = run.recipe
    replace(run.folder / "recipe.yaml", recipe.model_copy(update={"dataset": "/not/here.jsonl"}).dump())
    kit.seal(run)
    assert kit.verify(run.folder).passed


# The merged model


def not_merged(run: Run) -> None:
    shutil.copyfile(base(run) / "model.safetensors", run.folder / "new")
    os.replace(run.folder / "new", run.merged / "model.safetensors")


def merged_twice(run: Run) -> None:
    from kit.export.adapter import merge_adapter

    again = run.folder.with_name("again")
    merge_adapter(run.merged, run.adapter, again)
    os.replace(again / "model.safetensors", run.merged / "model.safetensors")


def head_of_its_own(run: Run) -> None:
    edit_tensors(run.merged / "model.safetensors",
                 lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))


def embedding_trained(run: Run) -> None:
    edit_tensors(run.merged / "model.safetensors", lambda tensors: tensors["model.embed_tokens.weight"].mul_(2))


def tie_untied(run: Run) -> None:
    edit_json(run.merged / "config.json", tie_word_embeddings=False)


def another_rope(run: Run) -> None:
    edit_json(run.merged / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})


def one_element(run: Run) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5

    edit_tensors(run.merged / "model.safetensors", change)


def one_bit_of_a_norm(run: Run) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"].view(torch.int16)[7] ^= 1

    edit_tensors(run.merged / "model.safetensors", change)


def base(run: Run) -> Path:
    return Path(run.recipe.model_name)


@pytest.mark.parametrize(("sabotage", "gate", "cause"), by_name([
    (not_merged, "merge", "^merged/ equals the base model: the adapter was not merged$"),
    (merged_twice, "merge", "^the adapter was added twice"),
    (head_of_its_own, "merge", r"^lm_head\.weight is only in merged/ .*the tie is broken"),
    (embedding_trained, "merge",
     r"^model\.embed_tokens\.weight differs from the base.*a tied embedding is the output head too"),
    (tie_untied, "merged config", "tie_word_embeddings is False, in the base model True"),
    (another_rope, "merged config", r"rope_parameters is .*10000\.0.*, in the base model .*1000000\.0"),
    (one_element, "merge", r"^model\.layers\.1\.mlp\.up_proj\.weight is not the base plus the adapter"),
    (one_bit_of_a_norm, "merge", r"^model\.norm\.weight differs from the base, though the adapter does not touch it"),
]))
def test_the_merged_model(finished: Path, tmp_path: Path, sabotage: Callable[[Run], None], gate: str,
                          cause: str) -> None:
    run = copy_run(finished, tmp_path, without=SHIPPED)
    sabotage(run)
    gates = Gates("")
    check_merge(gates, base(run), run.adapter, run.merged)
    [found] = gates.failed
    assert found.name == gate
    assert re.search(cause, found.detail), found.detail
    assert found.hint


# The adapter and the stop token in folders


def adapter_of_another_run(run: Run, another: Path) -> None:
    replace(run.adapter / "adapter_model.safetensors", (another / "adapter/adapter_model.safetensors").read_bytes())


def adapter_without_effect(run: Run, another: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if ".lora_B." in name:
                tensors[name].zero_()

    edit_tensors(run.adapter / "adapter_model.safetensors", change)


def untrained(run: Run, another: Path) -> None:
    """A training that learnt nothing: what the model in memory held, adapter and merged model are all the base's."""
    from kit.models.precision import in_float32
    from kit.verifying.reference import Reference, predict

    adapter_without_effect(run, another)
    not_merged(run)
    model, _ = kit.reload(run.adapter, run.recipe)
    path = run.folder / "reference.safetensors"
    reference = Reference.load(path)
    with in_float32(model):
        predictions = predict(model, reference.rows)
    reference._replace(predictions=predictions).save(path)


def base_models_eos(run: Run, another: Path) -> None:
    edit_json(run.merged / "generation_config.json", eos_token_id=ENDOFTEXT)


def another_template_in_merged(run: Run, another: Path) -> None:
    path = run.merged / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    path.write_text(text + "{{ ' ' }}", encoding="utf-8")


def pad_is_the_stop(run: Run, another: Path) -> None:
    edit_json(run.adapter / "tokenizer_config.json", pad_token="<|im_end|>")


def base_in_4bit(run: Run, another: Path) -> None:
    save_4bit(base(run), run.merged_4bit, run.recipe)


@pytest.mark.parametrize(("sabotage", "gates", "cause"), by_name([
    (adapter_of_another_run, ["parity adapter", "merge"],
     "^adapter does not predict what the trained model predicts: its logits"),
    (adapter_without_effect, ["parity adapter", "merge"],
     "^adapter does not predict what the trained model predicts: its logits"),
    (untrained, ["control: the base differs"], "^the adapter changes nothing: the base model predicts the same"),
    (base_models_eos, ["stop token"],
     r"^merged/generation_config\.json has <\|endoftext\|> \(151643\), trained is <\|im_end\|> \(151645\)"),
    (another_template_in_merged, ["template merged"], r"^one turn: the training has '.*', merged '.* '"),
    (base_in_4bit, ["parity merged-4bit"], "^merged-4bit does not predict what the trained model predicts: its logits"),
    (pad_is_the_stop, ["labels"], r"^the pad token is the stop token <\|im_end\|> \(151645\)"),
]))
def test_the_folders(finished: Path, another: Path, tmp_path: Path, sabotage: Callable[[Run, Path], None],
                     gates: list[str], cause: str) -> None:
    run = copy_run(finished, tmp_path, without=SHIPPED)
    sabotage(run, another)
    kit.seal(run)
    found = failed(run)
    assert set(found) >= set(gates)
    assert re.search(cause, found[gates[0]].detail), found[gates[0]].detail


# GGUF files


def another_rope_base(run: Run, another: Path) -> None:
    edit_gguf(run.folder / F16, qwen3__rope__freq_base=10_000.0)


def shuffled_merges(run: Run, another: Path) -> None:
    merges = read_header(run.folder / F16).fields["tokenizer.ggml.merges"]
    edit_gguf(run.folder / F16, tokenizer__ggml__merges=[*merges[:7], merges[8], merges[7], *merges[9:]])


def declared_sentencepiece(run: Run, another: Path) -> None:
    edit_gguf(run.folder / F16, tokenizer__ggml__model="llama")


def split_as_gpt2(run: Run, another: Path) -> None:
    edit_gguf(run.folder / F16, tokenizer__ggml__pre="gpt-2")


def no_template(run: Run, another: Path) -> None:
    edit_gguf(run.folder / F16, tokenizer__chat_template=None)


def one_newline_less(run: Run, another: Path) -> None:
    template = read_header(run.folder / F16).fields["tokenizer.chat_template"]
    changed = template.replace(r"'<|im_start|>assistant\n'", "'<|im_start|>assistant'")
    assert changed != template
    edit_gguf(run.folder / F16, tokenizer__chat_template=changed)


def template_of_llama(run: Run, another: Path) -> None:
    edit_gguf(run.folder / F16, tokenizer__chat_template=tiny_tokenizer("llama").chat_template)


def base_models_eos_in_gguf(run: Run, another: Path) -> None:
    edit_gguf(run.folder / F16, tokenizer__ggml__eos_token_id=ENDOFTEXT)


def cut_in_the_tensors(run: Run, another: Path) -> None:
    replace(run.folder / F16, (run.folder / F16).read_bytes()[:-100_000])


def random_bytes(run: Run, another: Path) -> None:
    overwrite_gguf(run.folder / F16, "blk.0.ffn_down.weight", random.Random(0).randbytes(64 * 1024))


def file_of_another_run(run: Run, another: Path) -> None:
    replace(run.folder / F16, (another / F16).read_bytes())


@pytest.mark.parametrize(("sabotage", "gates", "cause"), by_name([
    (another_rope_base, ["shape f16", "parity f16"],
     r"^qwen3\.rope\.freq_base is 10000, rope_theta of the model 1e\+06"),
    (shuffled_merges, ["tokenizer f16"], "^merge 7 is 'Ġ a', in the trained tokenizer 'o n'"),
    (declared_sentencepiece, ["tokenizer f16"],
     r"^it declares a tokenizer of the kind 'llama', the trained one is byte-level \(gpt2\)"),
    (split_as_gpt2, ["template f16"],
     r"^code and numbers: after '.*' \(token \d+\) the training has \[.*, the GGUF \[.*"),
    (no_template, ["template f16"], "^the GGUF holds no chat template"),
    (one_newline_less, ["template f16"],
     r"^one turn: the training has '.*<\|im_start\|>assistant\\n<think>.*', the GGUF '.*assistant<think>"),
    (template_of_llama, ["template f16"],
     r"^one turn: the training has '<\|im_start\|>user\\n.*, the GGUF '<\|endoftext\|><\|start_header_id\|>"),
    (base_models_eos_in_gguf, ["stop token"], r"^eos of f16 has <\|endoftext\|> \(151643\), trained is <\|im_end\|>"),
    (cut_in_the_tensors, ["file tiny-f16"], "is cut short: 100000 of [0-9]+ bytes are missing$"),
    (random_bytes, ["parity f16"], "^f16 does not predict what the trained model predicts: its logits are nan"),
    (file_of_another_run, ["origin f16", "parity f16"],
     "^it was made from 'tiny: .*adapter [0-9a-f]{12}', this run is 'tiny: .*: it is another run's file"),
]))
def test_a_gguf(finished: Path, another: Path, tmp_path: Path, sabotage: Callable[[Run, Path], None],
                gates: list[str], cause: str, evidence: Evidence) -> None:
    run = copy_run(finished, tmp_path, without=(Q8_0, MODELFILE))
    sabotage(run, another)
    kit.seal(run)
    # One of them by the whole of `kit verify`: the gates reach its verdict.
    verdict = kit.verify(run.folder) if sabotage is file_of_another_run else of_ggufs(run, evidence)
    found = {gate.name: gate for gate in verdict.failed}
    assert set(found) >= set(gates)
    assert re.search(cause, found[gates[0]].detail), found[gates[0]].detail
    if sabotage is declared_sentencepiece:
        # llama.cpp ends its process over such a file: it must not have been loaded.
        assert set(found) == {"tokenizer f16"} and "parity f16" not in {gate.name for gate in verdict.gates}


def test_a_gguf_of_unknown_origin(finished: Path, tmp_path: Path) -> None:
    run = Run.open(copy_run(finished, tmp_path).folder.rename(tmp_path / "renamed"))
    gates = Gates("")
    assert check_origin(gates, "f16", read_header(run.folder / F16), about(run))
    edit_gguf(run.folder / F16, general__description=None)
    check_origin(gates, "f16", read_header(run.folder / F16), about(run))
    [gate] = gates.failed
    assert gate.name == "origin f16"
    assert "does not say what it was made from" in gate.detail
    assert gate.hint


# The Modelfile


def newline_less_in_a_text(path: Path) -> None:
    edit_text(path, r'{{ "<|im_start|>user\n" }}', '{{ "<|im_start|>user" }}')


def space_outside_a_text(path: Path) -> None:
    edit_text(path, '(eq .Role "user") }}{{ "<|im_start|>user', '(eq .Role "user") }} {{ "<|im_start|>user')


def no_stop(path: Path) -> None:
    edit_text(path, 'PARAMETER stop "<|im_end|>"\n', "")


def from_another_file(path: Path) -> None:
    edit_text(path, "FROM ./tiny-q8_0.gguf", "FROM ./tiny-q4_k_m.gguf")


def second_template(path: Path) -> None:
    edit_text(path, "PARAMETER num_ctx", 'TEMPLATE """{{ .Prompt }}"""\nPARAMETER num_ctx')


def no_system_prompt(path: Path) -> None:
    edit_text(path, 'SYSTEM """Be brief."""\n', "")


def carriage_returns(path: Path) -> None:
    replace(path, path.read_bytes().replace(b"\n", b"\r\n"))


def cut_at_the_end(path: Path) -> None:
    replace(path, path.read_bytes().rpartition(b"PARAMETER")[0])


@pytest.mark.parametrize(("sabotage", "gates", "cause"), by_name([
    (newline_less_in_a_text, ["template Modelfile"], r"^line \d+ .*<\|im_start\|>user\" }}.*<\|im_start\|>user\\\\n"),
    (space_outside_a_text, ["template Modelfile"], r"^line \d+ .*}} {{"),
    (no_stop, ["stop token", "template Modelfile"], r"^the Modelfile has none, trained is <\|im_end\|> \(151645\)"),
    (from_another_file, ["template Modelfile"], "the GGUF that it names is not there"),
]))
def test_the_modelfile(finished: Path, evidence: Evidence, tmp_path: Path, sabotage: Callable[[Path], None],
                       gates: list[str], cause: str) -> None:
    run = copy_run(finished, tmp_path, without=(F16,))
    sabotage(run.folder / MODELFILE)
    found = {gate.name: gate for gate in of_ggufs(run, evidence).failed}
    assert set(found) == set(gates)
    assert re.search(cause, found[gates[0]].detail), found[gates[0]].detail


CALL = [{"role": "user", "content": "北京现在多少度？"}, {"role": "assistant", "content": '{"name": "weather"}'},
        {"role": "tool", "content": '{"celsius": 21}'}, {"role": "assistant", "content": "21 度。"}]
CALLS = [CALL, [*CALL[:3], *CALL[1:]]]


@pytest.mark.parametrize(("sabotage", "cause"), by_name([
    (second_template, "^line .*TEMPLATE.*PARAMETER num_ctx"), (no_system_prompt, "^line .*PARAMETER stop.*SYSTEM"),
    (carriage_returns, r"^line 1 .*\\r"), (cut_at_the_end, "^line .*''.*PARAMETER num_ctx"),
]))
def test_another_text_of_the_modelfile(finished: Path, tmp_path: Path, sabotage: Callable[[Path], None],
                                       cause: str) -> None:
    from transformers import AutoTokenizer

    from kit.export.modelfile import modelfile_of
    from kit.gguf.child import LlamaChild
    from kit.verifying.template import cases, check_modelfile

    run = copy_run(finished, tmp_path)
    recipe = run.recipe.model_copy(update={"system_prompt": "Be brief."})
    tokenizer, path, gates = AutoTokenizer.from_pretrained(run.merged), run.folder / MODELFILE, Gates("")
    replace(path, modelfile_of(recipe, tokenizer).text(Path(Q8_0).name))
    every = list(cases(tokenizer, recipe, CALLS))
    with LlamaChild(run.folder / Q8_0) as child:
        check_modelfile(gates, path, child, tokenizer, every, recipe)
        assert gates.passed and gates.gates[0].figure == f"{sum(c.usual for c in every)} conversations", gates
        sabotage(path)
        check_modelfile(gates, path, child, tokenizer, every, recipe)
    [gate] = gates.failed
    assert gate.name == "template Modelfile" and gate.hint
    assert re.search(cause, gate.detail), gate.detail


def test_bos_twice_in_ollama(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's template writes the BOS that Ollama puts before every prompt; the Modelfile must leave it out."""
    from transformers import AutoTokenizer

    from kit.export import modelfile
    from kit.gguf.child import LlamaChild
    from kit.verifying.template import cases, check_modelfile

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    recipe = Recipe.load({}, num_ctx=256)
    every = list(cases(tokenizer, recipe, CALLS))  # its results of tools are JSON in JSON, which Ollama's can't be
    [gguf] = kit.export_gguf(tiny("llama"), tmp_path, ["q8_0"], "tiny")
    path = kit.write_modelfile(tmp_path / "Modelfile", gguf.name, tokenizer, 256)
    with LlamaChild(gguf) as child:
        gates = Gates("as written")
        check_modelfile(gates, path, child, tokenizer, every, recipe)
        assert gates.passed, gates
        # If the kit itself wrote it, the file would be as expected, but not what it makes of a conversation.
        monkeypatch.setattr(modelfile, "added_bos", lambda tokenizer: "")
        kit.write_modelfile(path, gguf.name, tokenizer, 256)
        check_modelfile(gates, path, child, tokenizer, every, recipe)
    [gate] = gates.failed
    assert gate.name == "template Modelfile"
    assert re.search(r"the training has '<\|begin_of_text\|><\|start.*, the Modelfile '<\|begin_of_text\|><\|begin_of",
                     gate.detail), gate.detail
    assert gate.hint


# Labels


@pytest.fixture(scope="module")
def llama_rows() -> tuple[Any, list[tuple[list[int], list[int]]]]:
    """Llama's tokenizer, and rows as training encodes them."""
    from kit.data.masks import Formatter
    from kit.models.template import prepare_tokenizer
    from kit.recipe.recipe import Recipe

    recipe = Recipe.load({})
    tokenizer = prepare_tokenizer(tiny_tokenizer("llama"), recipe)
    talks = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
             for asked, answer in ASKED.items()]
    return tokenizer, list(Formatter(tokenizer, recipe).encode(talks))


def labels_of(tokenizer: Any, rows: list[tuple[list[int], list[int]]]) -> Gate:
    gates = Gates("")
    check_labels(gates, tokenizer, rows)
    [gate] = gates.gates
    return gate


def test_labels(llama_rows: tuple[Any, list[tuple[list[int], list[int]]]]) -> None:
    from copy import deepcopy

    tokenizer, rows = llama_rows
    assert labels_of(tokenizer, rows).passed
    pad_is_stop = deepcopy(tokenizer)
    pad_is_stop.pad_token = tokenizer.eos_token
    # Rendered with the BOS of the template, then encoded with the BOS of the tokenizer.
    twice = [(tokenizer(tokenizer.decode(ids))["input_ids"], [-100, *labels]) for ids, labels in rows]
    cut = [(ids[:-1], labels[:-1]) for ids, labels in rows]
    mixed = [rows[0], *cut[1:]]
    nothing = [(ids, [-100] * len(ids)) for ids, _ in rows]
    for which, encoded, cause in [
        (tokenizer, twice, r"rows begin with two BOS tokens \(<\|begin_of_text\|>\)"),
        (tokenizer, twice[:1] + rows, "rows begin with two BOS tokens"),
        (tokenizer, nothing, "every label is masked: nothing was trained"),
        (tokenizer, nothing[:1] + rows, r"answers end with 2 different tokens: none, <\|eot_id\|>"),
        (tokenizer, cut[:1], "which is no special token"),
        (tokenizer, mixed, "answers end with [0-9] different tokens: .*eot_id"),
        (tokenizer, [], "answers end with 0 different tokens"),
        (pad_is_stop, rows, r"the pad token is the stop token <\|eot_id\|>"),
    ]:
        gate = labels_of(which, encoded)
        assert gate.passed is False, cause
        assert re.search(cause, gate.detail), gate.detail
        assert gate.hint


# Hashes and secrets


def test_hashes(finished: Path, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path)
    for path in (run.folder / F16, run.merged / "model.safetensors"):
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        replace(path, bytes(whole))
    (run.adapter / "chat_template.jinja").unlink()
    (run.gguf / "tiny-q4_k_m.gguf").write_bytes(b"GGUF")
    gates = Gates("")
    check_hashes(gates, run)
    [gate] = gates.failed
    assert gate.detail == (f"merged/model.safetensors is changed since the run; {F16} is changed since the run; "
                           "adapter/chat_template.jinja is gone; gguf/tiny-q4_k_m.gguf is not made by the run")
    assert gate.name == "sha256"
    assert gate.hint


def test_a_run_that_was_never_sealed(finished: Path, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path, without=SHIPPED)
    edit_json(run.folder / "manifest.json", artefacts={})
    gates = Gates("")
    check_hashes(gates, run)
    assert "holds no artefacts" in gates.failed[0].detail


HF_LIKE = "hf_" + "a1B2c3D4" * 5
OTHERS = {"recipe.yaml": "sk-" + "a1B2c3D4" * 5, "log.jsonl": "ghp_" + "a1B2c3D4" * 5,
          "gguf/Modelfile": "AKIA" + "A1B2" * 4, "adapter/README.md": HF_LIKE, "report.html": HF_LIKE,
          "manifest.json": HF_LIKE}


@pytest.mark.parametrize("name", [*OTHERS, "notebook.ipynb"])
def test_a_planted_secret(finished: Path, tmp_path: Path, name: str) -> None:
    run = copy_run(finished, tmp_path)
    path, token = run.folder / name, OTHERS.get(name, HF_LIKE)
    if name == "notebook.ipynb":
        output = {"output_type": "stream", "name": "stdout", "text": ["token:\n", f"'{token}'\n"]}
        replace(path, json.dumps({"cells": [{"cell_type": "code", "source": [], "outputs": [output]}]}))
    else:
        replace(path, path.read_text(encoding="utf-8") + f"\n# {token}\n")
    gates = Gates("")
    check_secrets(gates, run)
    [gate] = gates.failed
    assert gate.name == "secrets"
    assert gate.detail.startswith(f"{name} holds ")
    assert token[:8] not in repr(gates) + json.dumps(gates.as_json())
    assert "revoke" in gate.hint


def test_the_value_of_a_token_in_the_environment(finished: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy_run(finished, tmp_path)
    gates = Gates("")
    monkeypatch.setenv("HF_TOKEN", "of-no-known-form-0815")
    check_secrets(gates, run)
    assert gates.passed, gates
    replace(run.log, run.log.read_text(encoding="utf-8") + '{"note": "of-no-known-form-0815"}\n')
    check_secrets(gates, run)
    assert gates.failed[0].detail == "log.jsonl holds the value of HF_TOKEN"
    assert "0815" not in repr(gates)


# The reference


def test_the_reference(finished: Path, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path)
    path = run.folder / "reference.safetensors"
    whole = path.read_bytes()
    for content, cause in [(None, "no reference.safetensors in .*: what the model in memory answered was not kept"),
                           (whole[:-1000], "reference.safetensors is damaged"), (b"", "is damaged"),
                           (without_metadata(whole), "is damaged.*'reference'")]:
        path.unlink() if content is None else replace(path, content)
        kit.seal(run)
        found = failed(run)
        assert set(found) == {"reference"}
        assert re.search(cause, found["reference"].detail), found["reference"].detail


def without_metadata(file: bytes) -> bytes:
    (size,) = struct.unpack_from("<Q", file)
    header = json.loads(file[8:8 + size])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + file[8 + size:]


# The command


def test_exit_codes(finished: Path, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path, without=SHIPPED)
    not_merged(run)
    kit.seal(run)
    done = command("verify", str(run.folder))
    assert done.returncode == 1
    assert "FAILED: merge, parity merged" in done.stdout
    said = json.loads((run.folder / "verify.json").read_text(encoding="utf-8"))
    assert said["passed"] is False
    assert [gate["name"] for gate in said["gates"] if gate["passed"] is False] == [
        "merge", "parity merged", "trained merged"]
    assert "FAILED: merge, parity merged" in (run.folder / "report.html").read_text(encoding="utf-8")

    done = command("verify", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "is no run folder" in done.stderr
    for made in (run.adapter, run.merged):
        shutil.rmtree(made)
    edit_json(run.folder / "result.json", status="stopped", stage="train")
    done = command("verify", str(run.folder))
    assert done.returncode == 2
    assert "holds no trained model (stopped at train)" in done.stderr
    assert "Traceback" not in done.stderr
