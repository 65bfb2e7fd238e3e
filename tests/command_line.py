"""Commands of `fedunlearn` in this process."""

from pathlib import Path

import pytest

from fedunlearn.cli import main


def command(*words: str | Path) -> int:
    """The status with which `fedunlearn` ends."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code
