"""Says which versions of the peers a run compared with."""

import contextlib
from importlib import metadata


def pytest_terminal_summary(terminalreporter) -> None:
    for name in ("torch", "transformers", "peft", "trl", "tokenizers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            terminalreporter.write_line(f"peer: {name} {metadata.version(name)}")
