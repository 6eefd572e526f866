"""Two models' answers to the same questions: how many are equal, and where they differ."""

from typing import NamedTuple

from kit.answering.question_files import Questions
from kit.common.show import Table

SHOWN, NUMBERED = 3, 20  # rows that differ: shown with both answers, named
LONGEST = 300  # characters of a cell


class Comparison(NamedTuple):
    """`same` is "yes" or "no" by place, of rows that both answered; `first` are the first rows that differ."""

    same: dict[int, str]
    first: Table

    def __str__(self) -> str:
        different = [str(place + 1) for place in sorted(self.same) if self.same[place] == "no"]
        line = f"the same answer: {len(self.same) - len(different):,} of {len(self.same):,} rows"
        if not different:
            return line
        return f"{line}; another one: row {', '.join(different[:NUMBERED])}" + \
            ", …" * (len(different) > NUMBERED) + f"\n{self.first}"


def compare(questions: Questions, answers: dict[int, str], others: dict[int, str],
            names: tuple[str, str]) -> Comparison:
    """Answers are equal where their texts are; `names` say whose they are."""
    same = {place: "yes" if answers[place] == others[place] else "no"
            for place in sorted(answers.keys() & others.keys())}
    rows = [[place + 1, *(text if len(text) <= LONGEST else f"{text[:LONGEST]}…" for text in
                          (str(questions.asked[place][-1]["content"]), answers[place], others[place]))]
            for place in [place for place, equal in same.items() if equal == "no"][:SHOWN]]
    return Comparison(same, Table(["row", "question", *names], rows))
