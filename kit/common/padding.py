"""Rows of token ids to one width."""

from __future__ import annotations


def padded(rows: list[list[int]], filler: int, left: bool = False) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of one width and their attention mask (1 for a token, 0 for padding).

    Padding stands on the right, where a causal model does not see it; on the left for generating, as an answer begins
    where its prompt ends.
    """
    width = max(map(len, rows))
    fill = [[filler] * (width - len(ids)) for ids in rows]
    none = [[0] * len(part) for part in fill]
    ones = [[1] * len(ids) for ids in rows]
    if left:
        return [part + ids for part, ids in zip(fill, rows, strict=True)], \
            [part + row for part, row in zip(none, ones, strict=True)]
    return [ids + part for part, ids in zip(fill, rows, strict=True)], \
        [row + part for part, row in zip(none, ones, strict=True)]
