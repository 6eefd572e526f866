"""The tokenizers that the template tests use give exactly the ids of llama.cpp's own test vectors."""

from __future__ import annotations

import pytest

from kit.common.errors import KitError
from kit.gguf.setup import converter_dir
from support.vocabularies import SPLITS, real_tokenizer

# Besides those that split by an expression, the three of SentencePiece's kind. The other vocabularies there have no
# vectors (aquila, baichuan, gpt-neox, nomic-bert-moe) or belong to a model that writes no text (bert-bge).
VOCABULARIES = [*SPLITS, "llama-spm", "phi-3", "gemma-4"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_ids_are_those_of_the_vectors(vocab: str) -> None:
    try:
        models = converter_dir() / "models"
    except KitError as error:
        pytest.skip(f"the vocabularies come with llama.cpp's converter: {error}")
    file = models / f"ggml-vocab-{vocab}.gguf"
    texts = file.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = file.with_suffix(".gguf.out").read_bytes().decode().split("\n")
    # Both files end in a line break; the text behind the last one is empty, and its ids are none. Only gemma-4's
    # texts end without one.
    assert len(lines) - len(texts) == (vocab == "gemma-4")
    tokenizer = real_tokenizer(vocab)
    for text, line in zip(texts, lines, strict=False):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == [int(number) for number in line.split()], text
        assert tokenizer.decode(ids) == text
