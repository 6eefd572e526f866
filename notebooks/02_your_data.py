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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ACCOUNT_OF_THIS_REPOSITORY/unsloth-kit/blob/main/notebooks/02_your_data.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/ACCOUNT_OF_THIS_REPOSITORY/unsloth-kit/blob/main/notebooks/02_your_data.ipynb)
#
# # Your own data, and no doubt about what is trained on
#
# A file in, a checked file out: read it, see what is wrong with which row, repair what can be repaired safely, decide
# the rest, and look at the very tokens the model will learn. Nothing is trained here and no model is loaded, so it
# takes seconds. Run the cells from top to bottom with the file that is set below, then with yours.

# %% [markdown]
# ## 1. Set up
#
# Nothing happens where `make lab` or `make setup` has run; on Colab, Kaggle, AutoDL or ModelScope this fetches the kit
# and installs the packages. Asked to restart the kernel? Do so and run all again.

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

# %%
import kit

kit.install_packages(llama_cpp=False)

# %%
from itertools import islice
from pathlib import Path

from kit import Recipe, plots

# %% [markdown]
# ## 2. Which file?
#
# `.json`, `.jsonl`, `.csv`, `.tsv`, `.txt` (question, tab, answer), `.xlsx`, `.parquet`, a folder of them, or a data
# set's name on a hub. `columns` says which of your columns is what, when the names differ from the usual ones:
#
# | shape | fields |
# |---|---|
# | Alpaca | `instruction`, `output`, and optionally `input`, `system`, `history` |
# | messages | `messages`: a list of `role` and `content` |
# | ShareGPT | `conversations`: a list of `from` and `value` |
# | pairs | `prompt` and `completion`, or `question` and `answer` |

# %% cellView="form" tags=["parameters"]
dataset = "data/messy-faq.csv"  # @param {type:"string"}
columns = {"prompt": "问题", "completion": "答案"}
max_seq_length = 128  # @param {type:"integer"}

# %%
recipe = Recipe.load({}, **Recipe.given(globals()))
folder = Path(recipe.output_dir) / "your_data"
folder.mkdir(parents=True, exist_ok=True)
print(f"{recipe.dataset}, with the tokens and the template of {kit.model_label(recipe)}")

# %% [markdown]
# ## 3. What a row is, and what becomes of it
#
# Whatever the file looks like, every row becomes a list of messages. A row that can't is told with what is wrong.

# %%
for row in islice(kit.rows_of(recipe.dataset, recipe), 8):
    print(f"{row.place}:", row.messages or [fault.message for fault in row.faults])

# %% [markdown]
# ## 4. The check
#
# Errors are rows that would not be trained, or not as they are meant. Warnings are for you to judge. The same from the
# command line: `kit lint data/messy-faq.csv 'columns={prompt: 问题, completion: 答案}'`.

# %%
tokenizer = kit.load_tokenizer(recipe)
checked = kit.lint(recipe, tokenizer)
kit.show(checked)

# %% [markdown]
# ## 5. Look at the rows
#
# Green is what the model learns to write, dark green the token that ends the answer; grey is context, violet are
# control tokens, red is what does not fit into `max_seq_length`. The page shows rows of every finding, to search and to
# filter: open it in a browser.

# %%
for tokens in checked.examples(3):
    kit.show(tokens)
checked.save(folder / "data.html")
print(f"page: {folder / 'data.html'}")

# %% [markdown]
# ## 6. Safe repairs
#
# A copy with what can be mended without guessing: names that are nearly right, numbers as text, control characters,
# line ends; second copies and rows without an answer are left out. Your file stays as it is.

# %%
fixed = folder / "fixed.jsonl"
fixed.unlink(missing_ok=True)
done = kit.fix(recipe.dataset, fixed, recipe)
kit.show(kit.Table(["repair", "rows"], done.most_common()))

# %%
repaired = Recipe.load(recipe, dataset=str(fixed), columns={})
checked = kit.lint(repaired, tokenizer)
kit.show(checked)

# %% [markdown]
# ## 7. Your decisions
#
# What is left needs a person: which of two answers is right, what a garbled word was, whether an address may be learnt.
# Open `fixed.jsonl` in an editor for that. Here the rows with an error are simply left out.

# %%
bad = checked.bad_rows.get(str(fixed), set())
lines = fixed.read_text(encoding="utf-8").splitlines()
final = folder / "final.jsonl"
final.write_text("".join(line + "\n" for number, line in enumerate(lines, 1) if number not in bad), encoding="utf-8")
print(f"{len(lines) - len(bad)} of {len(lines)} rows are kept: {final}")

# %% [markdown]
# ## 8. How long may a row be?
#
# `max_seq_length` costs memory; a row beyond it is left out (`overlong_rows: drop`) or has the middle of its prompt
# shortened (`truncate_prompt`). An answer is never cut. The check says which length keeps 95, 99 and 100 % of the rows
# whole. Here all are to be kept.

# %%
chosen = Recipe.load(repaired, dataset=str(final), max_seq_length=checked.figures["lengths"]["keep"]["100"])
checked = kit.lint(chosen, tokenizer)
checked.require()
print(checked.verdict)

# %%
data = kit.load_data(Recipe.load(chosen, test_size=0.2), tokenizer)
kit.show(plots.lengths(data["train"], chosen.max_seq_length, folder / "lengths.png"))
print(f"{len(data['train'])} rows to train on, {len(data['test'])} held out; equal prompts stay on one side")

# %% [markdown]
# ## 9. One row in each prompt style
#
# The template decides what the model sees. It is the same in training, in the answers, in the GGUF and the Modelfile.
# `chat` is the model's own and the right one for a model that chats already; `chatml` and `alpaca` are for base models.

# %%
for style in ("chat", "chatml", "alpaca"):
    styled = Recipe.load(chosen, prompt_style=style)
    shown = kit.load_data(styled.model_copy(update={"max_train_samples": 1, "max_seq_length": 512}),
                          kit.load_tokenizer(styled))["train"][0]
    print(f"prompt_style: {style}")
    kit.show(kit.Tokens(tokenizer, shown))

# %% [markdown]
# ## 10. Train on it
#
# These lines are a recipe: put them into a file, choose a model, and run it. `kit lint --recipe` checks it again with
# that model's tokenizer and template.

# %%
yaml = folder / "recipe.yaml"
yaml.write_text(f"""model_name: {chosen.model_name}
dataset: {final}
test_size: 0.2          # a fifth is held out; rows with one prompt stay together
max_seq_length: {chosen.max_seq_length}
""", encoding="utf-8")
print(yaml.read_text(encoding="utf-8"))
print(f"kit lint --recipe {yaml}\nkit run {yaml} run_name=mine max_steps=60 gguf=[q8_0]")
