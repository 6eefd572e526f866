"""How close a run's GGUF is to its merged model: `python benchmarks/parity.py runs/quickstart [f16 q8_0 …]`.

Both read the same token ids of held-out conversations; compared are the next-token distributions where the answer
is predicted. KL is sum p (log p - log q), p from transformers in float32, q from llama.cpp, in nats per token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def compare(folder: Path, quantization: str, rows: int = 40) -> dict[str, float]:
    """Mean and largest KL and the share of equal likeliest tokens over `rows` held-out conversations."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kit.llama_child import LlamaChild
    from kit.masks import Formatter
    from kit.runs import Run
    from kit.splits import read_splits

    run = Run.open(folder)
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    model = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    _, held_out = read_splits(run.recipe)
    [file] = run.gguf.glob(f"*-{quantization}.gguf")
    kls, same = [], []
    with LlamaChild(file, n_ctx=run.recipe.max_seq_length, logits=True) as child, torch.no_grad():
        for ids, labels in Formatter(tokenizer, run.recipe).encode([row.messages for row in held_out[:rows]]):
            p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
            q = child.logprobs(ids).astype(np.float64)[:, : p.shape[1]]
            where = [i for i in range(len(ids) - 1) if labels[i + 1] != -100]
            kls += (np.exp(p[where]) * (p[where] - q[where])).sum(-1).tolist()
            same += (p[where].argmax(-1) == q[where].argmax(-1)).tolist()
    return {"mean_kl": float(np.mean(kls)), "max_kl": float(np.max(kls)), "top1": float(np.mean(same)),
            "tokens": len(kls)}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[2:] or ["f16", "q8_0"]:
        print(name, json.dumps(compare(Path(sys.argv[1]), name)))
