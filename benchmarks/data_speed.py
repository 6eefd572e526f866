"""How fast rows are read, rendered, tokenised and masked, and what the data check costs.

    python benchmarks/data_speed.py                      52,000 rows through load_data
    python benchmarks/data_speed.py --lint 10000 100000  the data check on files of so many rows, a process each
    python benchmarks/data_speed.py --from rows.json     with copies of real rows instead of made ones

Made rows are random words in lengths like Alpaca's: a median of about 160 tokens with the starter's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def words(count: int, random_: random.Random) -> str:
    """Words of a plain text, common ones often."""
    return " ".join(VOCABULARY[min(int(random_.expovariate(0.01)), len(VOCABULARY) - 1)] for _ in range(count))


VOCABULARY = sorted(set((Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8").split()), key=len)


def write(path: Path, rows: int, source: str | None) -> None:
    random_ = random.Random(0)
    real = json.loads(Path(source).read_text(encoding="utf-8")) if source else None
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            if real:
                row = {**real[i % len(real)], "instruction": f"{real[i % len(real)]['instruction']} ({i})"}
            else:
                row = {"instruction": f"{words(12, random_)} {i}", "input": words(8, random_) if i % 3 else "",
                       "output": words(int(min(random_.lognormvariate(3.9, 0.9), 400)) + 2, random_)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def load(path: Path) -> None:
    from kit import Recipe, load_data, load_tokenizer

    recipe = Recipe.load({}, dataset=str(path))
    tokenizer = load_tokenizer(recipe)
    began = time.perf_counter()
    data = load_data(recipe, tokenizer)["train"]
    seconds = time.perf_counter() - began
    tokens = sum(len(ids) for ids in data.with_format("arrow")["input_ids"])
    print(f"load_data: {len(data):,} rows of {tokens / len(data):.0f} tokens in {seconds:.1f} s: "
          f"{len(data) / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s, peak memory {peak():.2f} GB")


def check(path: Path) -> None:
    from kit import Recipe, load_tokenizer
    from kit.data.lint import lint

    recipe = Recipe.load({}, dataset=str(path))
    tokenizer = load_tokenizer(recipe)
    began = time.perf_counter()
    report = lint(recipe, tokenizer)
    seconds = time.perf_counter() - began
    rows = report.figures["rows"]
    print(f"lint: {rows:,} rows ({path.stat().st_size / 1e6:,.0f} MB) in {seconds:.1f} s: "
          f"{rows / seconds:,.0f} rows/s, peak memory {peak():.2f} GB")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--lint", type=int, nargs="*")
    parser.add_argument("--from", dest="source")
    parser.add_argument("--one", choices=["load", "check"], help=argparse.SUPPRESS)
    parser.add_argument("path", nargs="?", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        (load if chosen.one == "load" else check)(Path(chosen.path))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for rows in chosen.lint or [chosen.rows]:
            write(path, rows, chosen.source)
            # A process each, so that its peak memory is its own.
            what = "check" if chosen.lint else "load"
            subprocess.run([sys.executable, __file__, "--one", what, str(path)], check=True)


if __name__ == "__main__":
    main()
