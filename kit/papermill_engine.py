"""papermill's engine with one difference: what the notebook shows is also seen where it was started."""

from __future__ import annotations

from typing import Any

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines


class SpeakingClient(PapermillNotebookClient):
    """Prints each heading as its cells begin, and the text form of tables."""

    def execute_cell(self, cell: Any, cell_index: int, **options: Any) -> Any:
        from kit.batch import heading

        if cell.cell_type == "markdown" and (title := heading(cell.source)):
            self.stdout_file.write(f"\n── {title} ── cell {cell_index + 1} of {len(self.nb.cells)}\n")
            self.stdout_file.flush()
        return super().execute_cell(cell, cell_index, **options)

    def log_output_message(self, output: Any) -> None:
        super().log_output_message(output)
        data = output.get("data", {})
        if "text/plain" in data and "image/png" not in data:
            self.stdout_file.write("".join(data["text/plain"]) + "\n")
            self.stdout_file.flush()


class SpeakingEngine(NBClientEngine):
    """NBClientEngine with the client above; its remaining options are papermill's own."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, log_output: bool = False, stdout_file: Any = None,
                                 stderr_file: Any = None, start_timeout: int = 60,
                                 execution_timeout: int | None = None, **_: Any) -> Any:
        from papermill.log import logger

        client = SpeakingClient(nb_man, kernel_name=kernel_name, log=logger, log_output=log_output,
                                stdout_file=stdout_file, stderr_file=stderr_file, startup_timeout=start_timeout,
                                timeout=execution_timeout, coalesce_streams=True,
                                extra_arguments=["--log-level=40"])
        return client.execute()


def register() -> None:
    """Make `engine_name="kit"` known to papermill."""
    papermill_engines.register("kit", SpeakingEngine)
