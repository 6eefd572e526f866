# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,cellView,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ACCOUNT_OF_THIS_REPOSITORY/unsloth-kit/blob/main/notebooks/01_finetune.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ACCOUNT_OF_THIS_REPOSITORY/unsloth-kit/blob/main/notebooks/01_finetune.ipynb)
#
# # Fine-tune a model and ship a GGUF you can trust
#
# One recipe in, one run folder out: load → LoRA → format → answers before → train → answers after → save → merge →
# GGUF → a verdict: is what you ship what you trained? Run the cells from top to bottom. Every choice is a field of the
# recipe; `docs/recipe.md` lists them all.
#
# Nothing here is a wrapper: `model` is PEFT's model, `trainer` is TRL's `SFTTrainer`, so you can leave the kit at
# any cell and go on with what you know.

# %% [markdown]
# ## 1. Set up
#
# Nothing happens where `make lab` or `make setup` has run. On Colab, Kaggle, AutoDL or ModelScope this fetches the kit,
# installs the packages, builds llama-cpp-python once (a few minutes), and says what it set on that host; on a machine
# of your own packages go only into an environment made for it. Asked to restart the kernel? Do so and run all again.
# `drive` is for Colab: Google Drive keeps the checkpoints and the compiled llama.cpp. All hosts: `docs/hosts.md`.

# %% cellView="form"
# @title Fetch the kit, where this notebook was opened alone
import glob
import os
import shutil
import subprocess
import sys
import urllib.request
from importlib.util import find_spec

KIT = "https://github.com/ACCOUNT_OF_THIS_REPOSITORY/unsloth-kit"  # the variable KIT_SOURCE names another, or a folder
if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: choose a newer runtime or kernel")
disk = next((path for path in ("/root/autodl-tmp", "/mnt/workspace") if os.path.isdir(path)), ".")  # with room
folder = os.path.abspath(f"{disk}/unsloth-kit")
there = [path for path in (".", "..", "unsloth-kit", folder) if os.path.isfile(f"{path}/kit/common/packages.py")]
if not there and find_spec("kit") is None:
    attached = [path for depth in ("*", "*/*/*") for path in glob.glob(f"/kaggle/input/{depth}/unsloth-kit")]
    source = os.environ.get("KIT_SOURCE") or next(iter(attached), KIT)
    if os.path.exists(folder):
        sys.exit(f"{folder} is there and is not the kit, so it is left alone: rename it, then run this cell again")
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if os.path.isdir(source):
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(".git", ".venv", "runs"))
    elif shutil.which("git"):
        done = subprocess.run(["git", "clone", "--depth", "1", source, partial], capture_output=True, text=True,
                              env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})
        if done.returncode:
            sys.exit(f"git could not fetch {source}: {done.stderr.strip()}\nKIT_SOURCE can name another address, or a "
                     "folder that you have put there; on AutoDL a terminal can: source /etc/network_turbo; git clone …")
    else:
        shutil.unpack_archive(urllib.request.urlretrieve(f"{source}/archive/HEAD.tar.gz")[0], partial, "gztar")
        partial = glob.glob(f"{partial}/*")[0]
    os.rename(partial, folder)
    there = [folder]
os.chdir(there[0] if there else ".")
if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())

# %% cellView="form"
drive = False  # @param {type:"boolean"}

import kit

kit.install_packages(drive=drive)

# %% tags=["every-process"]
import kit
from kit import Recipe, Run, plots

# %% [markdown]
# ## 2. Choose a recipe
#
# A recipe states what differs from the defaults. To try something, fill in a field below or add a line such as
# `max_seq_length = 1024`; papermill does the same with `-p learning_rate 1e-4`. An empty field is as in the recipe. To
# start over from here, change `run_name`.
#
# For a GPU with 16 GB, `recipes/qwen3-4b-alpaca.yaml` is the usual Qwen3-4B QLoRA set-up, explained line by line.

# %% cellView="form" tags=["parameters"]
recipe = "recipes/quickstart.yaml"  # @param {type:"string"}
model_name = ""  # @param {type:"string"}
hub = ""  # @param ["", "huggingface", "modelscope"]
dataset = ""  # @param {type:"string"}
max_steps = ""  # @param {type:"string"}
learning_rate = ""  # @param {type:"string"}
gguf = ""  # @param {type:"string"}

# %% tags=["every-process"]
recipe = Recipe.load(recipe, **Recipe.given(globals()))
kit.preflight(recipe)
run = Run.start(recipe)
print(f"everything this run makes lies in {run.folder}")

# %% [markdown]
# ## 3. What this machine is, and what follows from it

# %% tags=["every-process"]
run.stage("machine")
machine, settings = kit.machine(), kit.resolved(recipe)
print(f"{machine.device_name}: {machine.cores} cores, {machine.memory_gb:.0f} GB memory, "
      f"{machine.free_disk_gb:.0f} GB disk free")
for note in settings.notes:
    print("-", note)

# %% [markdown]
# ## 4. Check the data
#
# Every row as this recipe would train on it: lengths, what is trained, and what is wrong with which row. An error here
# stops the run before you spend compute. `data.html` in the run folder shows the rows token by token, to search and
# to filter; `notebooks/02_your_data` goes through all this with a file of your own.

# %%
run.stage("check")
checked = kit.lint(recipe)
kit.show(checked)
for tokens in checked.examples(2):
    kit.show(tokens)
checked.save(run.folder / "data.html")
run.note(data=checked.summary())
checked.require()

# %% [markdown]
# ## 5. Rehearse the export
#
# Before you spend compute, a tiny model of the same architecture, with the real tokenizer and template, goes through
# merge, conversion, quantisation and llama.cpp. What could not be exported after training stops here.

# %%
run.stage("rehearsal")
rehearsal = kit.rehearse(recipe)
kit.show(rehearsal)
run.gate(rehearsal)

# %% [markdown]
# ## 6. Load the model and its tokenizer
#
# The tokenizer carries the chat template of the recipe's `prompt_style` from here on: training, the answers below,
# the merged model, the GGUF and the Modelfile all use this one template and its stop token.

# %% tags=["every-process"]
run.stage("load")
model, tokenizer = kit.load_model(recipe)
run.manifest(recipe, tokenizer, settings.notes)
print(f"{kit.model_label(recipe)}: {kit.trainable_share(model)[1]:,} parameters, stop token {tokenizer.eos_token!r}, "
      f"pad token {tokenizer.pad_token!r}")

# %% [markdown]
# ## 7. Add LoRA
#
# The base model stays frozen; two small matrices per layer learn the difference. `r` is their rank, `lora_alpha / r`
# their strength. More rank learns more and costs memory; the usual range is 8 to 64.

# %% tags=["every-process"]
run.stage("lora")
model = kit.add_lora(model, recipe)
trainable, total = kit.trainable_share(model)
print(f"{trainable:,} of {total:,} parameters are trained: {trainable / total:.2%}")
run.note(trainable_parameters=trainable, parameters=total)

# %% [markdown]
# ## 8. Format the data
#
# Look at this before you train. Highlighted is what the model learns to write: the answer and the token
# that ends it. If the highlight is missing, cut off or covers the question, training can't repair it.

# %% tags=["every-process"]
run.stage("format")
data = kit.load_data(recipe, tokenizer)
prompts, references = data["test"]["prompt"], data["test"]["reference"]
scored_by = recipe.metric if prompts else "none"
if not prompts:  # then some trained rows are answered, to be looked at, and not scored
    prompts, references = data["train"]["prompt"][:3], data["train"]["reference"][:3]
print(f"{len(data['train']):,} rows to train on, {len(data['test']):,} held out")
kit.show(kit.Tokens(tokenizer, data["train"][0]))

# %%
kit.show(plots.lengths(data["train"], recipe.max_seq_length, run.figures / "lengths.png"))

# %% [markdown]
# What the run will need on this machine. `result.json` compares it with what happened.

# %%
forecast = kit.forecast(recipe, data)
kit.show(forecast)
run.note(forecast=forecast.as_json())

# %% [markdown]
# ## 9. Answers before training
#
# The held-out rows, which training never sees, answered by the untrained model. Where that would take longer than
# `answer_seconds`, the first of them; every later score is then over the rows that all stages answered.

# %%
run.stage("before")
before = kit.answer(model, tokenizer, prompts, recipe, seconds=recipe.answer_seconds)
answered = {"rows": len(prompts), "before": len(before)}
scores = kit.score_stages(references, scored_by, before=before)
kit.show(kit.side_by_side(prompts, references, before=before))
kit.show(kit.scores(answered, **scores))
run.note(score_before=scores["before"], answered=answered)

# %% [markdown]
# ## 10. Train
#
# TRL's `SFTTrainer`. The loss counts the answers only (`train_on_responses_only`). One optimiser step sees
# `per_device_train_batch_size × gradient_accumulation_steps` rows on each device.
#
# A checkpoint is written every `save_minutes`, and when you interrupt the kernel or a signal comes. A run that was
# stopped resumes from its newest sound checkpoint: run the notebook or the same command again.
#
# First a look at what the trainer was really given: the precision of the layers, the adapters, the labels of its first
# batch, and settings that a library changed.

# %% tags=["every-process"]
run.stage("train")
trainer = kit.make_trainer(model, tokenizer, data, recipe)
checks = kit.check_trainer(trainer, tokenizer, recipe)
kit.show(checks)
run.gate(checks)

# %% tags=["every-process"]
result = kit.train(trainer, recipe)
print(f"{result.steps} steps in {result.train_seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s, "
      f"peak memory {result.peak_memory_gb:.1f} GB")
run.note(train=result.figures())
run.gate(result.gates)
model = kit.whole_model(trainer, recipe)

# %% [markdown]
# A healthy curve falls fast, then slowly. Flat from the start: `learning_rate` too low, or nothing is trained (look
# at step 8). Falling to nearly zero: the rows are learnt by heart; train shorter or on more rows. Jumping up:
# lower `learning_rate`, or raise `warmup_steps`.

# %%
kit.show(plots.loss(result, run.figures / "loss.png"))

# %% [markdown]
# ## 11. Answers after training
#
# One answer streamed as it is written, then the same held-out rows as before.

# %%
run.stage("after")
for piece in kit.stream(model, tokenizer, prompts[0], recipe):
    print(piece, end="", flush=True)
print()

# %%
after = kit.answer(model, tokenizer, prompts[:len(before)], recipe, seconds=recipe.answer_seconds)
answered["after"] = len(after)
scores = kit.score_stages(references, scored_by, before=before, after=after)
kit.show(kit.side_by_side(prompts, references, before=before, after=after))
kit.show(kit.scores(answered, **scores))
run.note(score_before=scores["before"], score_after=scores["after"], answered=answered,
         stopped_after=sum(reply.stopped for reply in after) / len(after),
         answers=kit.side_by_side(prompts, references, 5, before=before, after=after).as_json())

# %% [markdown]
# ## 12. Save the adapter
#
# Before the model leaves memory, what it holds of some held-out rows is written down: its next-token distributions and
# its answers. The verdict at the end compares everything that is shipped with this.

# %%
run.stage("save")
saved = kit.save_adapter(model, tokenizer, run)
print(kit.record(model, tokenizer, data, after, recipe, run))
del model, trainer
kit.free_memory()

# %% [markdown]
# ## 13. Merge into a 16-bit model
#
# The adapter is added to the base model's own 16-bit weights, also after 4-bit or 8-bit training. `merged/` is a
# complete Hugging Face folder for vLLM or transformers.

# %%
run.stage("merge")
merged = kit.merge(saved, run, recipe)
print(merged or "save_merged is none: no merged model, no GGUF")

# %% [markdown]
# ## 14. GGUF for llama.cpp and Ollama
#
# llama.cpp's own converter and quantiser, from the source archive of the installed llama-cpp-python: no clone, no
# compiler, nothing fetched.

# %%
run.stage("gguf")
files = kit.export_gguf(merged, run.gguf, recipe.gguf, recipe.run_name, kit.about(run)) if recipe.gguf else []
rows = [[path.name, kit.size(path.stat().st_size)] for path in files]
kit.show(kit.Table(["file", "size"], rows))

# %% [markdown]
# ## 15. Answers of llama.cpp
#
# The last file of the list, loaded by llama-cpp-python in a process of its own, answers the held-out rows.

# %%
run.stage("ask")
replies = {"before": before, "after": after}
for path in files[-1:]:
    name = path.stem.rpartition("-")[2]
    replies[name] = kit.answer(path, None, prompts[:len(after)], recipe, seconds=recipe.answer_seconds)
    answered[name] = len(replies[name])
    kit.show(kit.side_by_side(prompts, references, llama_cpp=replies[name]))
scores = kit.score_stages(references, scored_by, **replies)
kit.show(kit.scores(answered, **scores))
run.note(scores=scores, answered=answered)

# %%
figure = plots.before_after(scores, run.figures / "scores.png", min(answered.values()))
kit.show(figure or "no metric, no figure")

# %% [markdown]
# ## 16. Modelfile for Ollama
#
# Written from the trained template, so that `ollama create` gives a model that sees the prompts it was trained on.

# %%
run.stage("modelfile")
for path in files[-1:]:
    modelfile = kit.write_modelfile(run.gguf / "Modelfile", path.name, tokenizer,
                                    recipe.num_ctx or recipe.max_seq_length, kit.template_kwargs(recipe),
                                    recipe.system_prompt or "")
    print(modelfile.read_text(encoding="utf-8"))

# %% [markdown]
# ## 17. Is what you ship what you trained?
#
# Everything is read back from the disk and compared with what the trained model held: the adapter, the merged model
# (tensor by tensor, and as a model), and each GGUF with its tokenizer, template, stop token and Modelfile. `kit verify`
# does the same later, on this machine or another.

# %%
run.stage("verify")
kit.seal(run)
verdict = kit.verify(run)
kit.show(verdict)
print("FAILED" if verdict.failed else "VERIFIED: what is shipped is what was trained")
run.note(verdict=verdict.verdict)
verdict.require()

# %% [markdown]
# ## 18. Push to a hub
#
# Only what passed, and only what `push_to_hub` names: adapter, merged, merged-4bit, gguf, each in a private repository
# with a card that carries the verdict. Log in with `HF_TOKEN` or `hf auth login`; a token is never a field of the
# recipe.

# %%
run.stage("push")
for address in kit.push(run):
    print(address)

# %% [markdown]
# ## 19. What lies where, and what to do next

# %%
run.finish()
print(f"the run's page, with the verdict on top: {kit.write_report(run)}")
made = run.result["files"]
rows = [[name, kit.size(size)] for name, size in made.items() if not name.startswith("checkpoints/")]
kit.show(kit.Table(["file", "size"], rows, title=str(run.folder), of=len(made)))
print(f"ask it:     kit ask {run.folder}")
if files:
    name = kit.ollama_name(recipe.run_name)
    print(f"in Ollama:  cd {run.gguf} && ollama create {name} -f Modelfile && ollama run {name}")

# %% [markdown]
# - **Answers are poor?** Read the table of step 11 field by field, then add rows that show what is missing. More and
#   better rows beat every other setting. Still learning when it stopped: more `num_train_epochs` or `max_steps`.
#   Good in training, poor on held-out rows: fewer epochs, `lora_dropout: 0.05`, or smaller `r`.
# - **Out of memory?** In this order: `load_in_4bit: true`, `use_gradient_checkpointing: unsloth`, half of
#   `per_device_train_batch_size` with twice `gradient_accumulation_steps`, a shorter `max_seq_length`, fewer
#   `target_modules`, a smaller `r`.
# - **Your own data:** a `.jsonl` with `instruction`, `input`, `output`, or with `messages`; set `dataset` to it and
#   `test_size: 0.1` to hold a tenth out.
