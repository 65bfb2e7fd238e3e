"""Delete folders so that nobody takes what a crash leaves of them for the whole."""

import os
import shutil
from pathlib import Path

GONE = ".gone-"
"""How names of folders begin that are being deleted."""


def remove_folder(folder: Path) -> None:
    """Delete a folder of `data/`; what a crash leaves of it, `remove_leftovers` finds."""
    gone = folder.rename(folder.with_name(f"{GONE}{folder.name}-{os.getpid()}"))
    shutil.rmtree(gone)
