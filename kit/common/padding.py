"""Rows of token ids to one width."""

from __future__ import annotations


def padded(rows: list[list[int]], filler: int, left: bool = False) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of one width and their attention mask (1 for a token, 0 for padding).

    Padding stands on the right, where a causal model does not see it; on the left for generating, as an answer begins
    where its prompt ends.
    """
    width = max(map(len, rows))
    ids, masks = [], []
    for row in rows:
        padding = width - len(row)
        before, after = (padding, 0) if left else (0, padding)
        ids.append([filler] * before + row + [filler] * after)
        masks.append([0] * before + [1] * len(row) + [0] * after)
    return ids, masks
