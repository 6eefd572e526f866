"""Rows of token ids to one width."""


def padded(rows: list[list[int]], filler: int, left: bool = False) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of one width and their attention mask (1 for a token, 0 for padding).

    Padding stands on the right, where a causal model does not see it; on the left for generating, as an answer begins
    where its prompt ends.
    """
    width = max(map(len, rows))

    def full(row: list[int], filler: int) -> list[int]:
        padding = [filler] * (width - len(row))
        return padding + row if left else row + padding

    return [full(row, filler) for row in rows], [full([1] * len(row), 0) for row in rows]
