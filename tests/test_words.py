"""One word a thing: earlier words do not come back into code and settings."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
EARLIER = {
    "relabel": r"teach|teaches|taught|teacher",
    "repair": r"mend|mends|mending",
    "estimate of the retrained model": r"foretold|foretell",
    "memorisation gap": r"memory gap",
    "memorised": r"known by heart|is_known",
    "query": r"sweep|sweeps",
    "retain clients": r"staying|everybody",
    "forget clients": r"leaving",
    "update": r"moved_by|movement",
    "task context, workspace": r"desk|laboratory",
    "message_dtype": r"wire",
    "class counts": r"class_mix",
    "applied": r"served",
    "fraction": r"head_share|round_share|input_share",
}


@pytest.mark.parametrize(("now", "before"), EARLIER.items(), ids=EARLIER)
def test_code_and_settings_use_the_words_of_the_field(now, before):
    listed = subprocess.run(
        ["git", "ls-files", "fedunlearn", "strategies", "simulations", "examples"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    texts = {name: (REPOSITORY / name).read_text() for name in listed if (REPOSITORY / name).is_file()}
    assert len(texts) > 100
    found = [
        f"{name}: {match[0]}"
        for name, text in texts.items()
        for match in re.finditer(rf"\b({before})\b", text, re.IGNORECASE)
    ]
    assert not found, f"say {now}"
