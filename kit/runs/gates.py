"""Gates: checks that say pass or fail with their figure, the tolerance beside it, and the cause of a failure."""

import html
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from kit.common.errors import GateError, KitError, one_line
from kit.common.show import Table

UNEXPECTED = "if the files are whole, report it with that traceback"


@dataclass(frozen=True)
class Gate:
    """One check. `passed` is None for a figure that is only reported, or a check that does not apply here."""

    name: str
    passed: bool | None
    figure: str
    tolerance: str = ""
    detail: str = ""  # the cause of a failure, or a remark
    hint: str = ""  # what to change
    traceback: str = ""  # of an error that nobody foresaw

    @property
    def sign(self) -> str:
        return {True: "✓", False: "✗", None: "–"}[self.passed]


@dataclass(repr=False, eq=False)
class Gates:
    """The gates of one stage, in the order they were checked; shows itself as a table in notebook and terminal."""

    title: str
    gates: list[Gate] = field(default_factory=list)

    def check(self, name: str, passed: bool | None, figure: str, tolerance: str = "", detail: str = "",
              hint: str = "") -> bool:
        """Add a gate; returns whether it did not fail."""
        self.gates.append(Gate(name, passed, figure, tolerance, detail, hint))
        return passed is not False

    @contextmanager
    def guard(self, name: str, hint: str = "", kept_in: str = "verify.json") -> Iterator[None]:
        """An error inside becomes a failed gate of this name: what can't be read or loaded has not passed.

        `hint` replaces the error's own. One that is no KitError is told as unexpected; `kept_in` is the file that
        these gates are written to, with its traceback.
        """
        try:
            yield
        except KitError as error:
            self.check(name, False, "failed", detail=error.message, hint=hint or error.hint)
        except Exception as error:
            self.gates.append(Gate(
                name, False, "failed", detail=f"unexpected error in this check: {type(error).__name__}: "
                f"{one_line(error)}; this is a bug or a damaged file, the traceback is in {kept_in}",
                hint=UNEXPECTED, traceback=traceback.format_exc()))

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[Gate]:
        return [gate for gate in self.gates if gate.passed is False]

    def require(self) -> None:
        """GateError that names each failed gate with its cause; the first one's remedy is the hint."""
        if not self.failed:
            return
        causes = "; ".join(f"{gate.name}: {gate.detail or f'{gate.figure}, allowed {gate.tolerance}'}"
                           for gate in self.failed)
        raise GateError(f"{self.title}: {len(self.failed)} of {len(self.gates)} gates failed: {causes}",
                        next((gate.hint for gate in self.failed if gate.hint), ""))

    def as_json(self) -> list[dict[str, Any]]:
        """Each gate's fields; `traceback` where there is one."""
        return [{name: value for name, value in asdict(gate).items() if value or name != "traceback"}
                for gate in self.gates]

    @classmethod
    def from_json(cls, title: str, gates: list[dict[str, Any]]) -> Self:
        return cls(title, [Gate(**gate) for gate in gates])

    @property
    def verdict(self) -> str:
        """One line: how many passed, and which did not."""
        count = sum(gate.passed is True for gate in self.gates)
        passed = f"{count} gate{'' if count == 1 else 's'} passed"
        if self.failed:
            return f"FAILED: {', '.join(gate.name for gate in self.failed)} ({passed})"
        return passed if count < 2 else f"all {passed}"

    def _table(self, title: str) -> Table:
        rows = [[gate.sign, gate.name, gate.figure, gate.tolerance,
                 gate.detail + (f"\n→ {gate.hint}" if gate.hint and gate.passed is False else "")]
                for gate in self.gates]
        return Table(["", "gate", "measured", "allowed", "remarks"], rows, title)

    def __repr__(self) -> str:
        return repr(self._table(f"{self.title}: {self.verdict}"))

    def _repr_html_(self) -> str:
        """Folded behind the verdict; a gate that failed opens it."""
        summary = html.escape(f"{self.title}: {self.verdict}")
        return f"<details{' open' if self.failed else ''}><summary><b>{summary}</b></summary>" \
               f"{self._table('')._repr_html_()}</details>"
