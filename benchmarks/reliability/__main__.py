"""Print every table on reliability, or some: `python -m benchmarks.reliability [replies liars kills ...]`."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.reliability import directions, liars, replies

COMMANDS = {"kills": "kill_points", "requests": "destructive", "storage": "storage"}  # processes of their own
TABLES = ("replies", "liars", "directions", *COMMANDS)


def main() -> None:
    """Choose tables."""
    p = argparse.ArgumentParser("python -m benchmarks.reliability", description=__doc__)
    p.add_argument("tables", nargs="*", default=TABLES, help=f"of {', '.join(TABLES)}; all by default")
    p.add_argument("--seeds", type=int, default=3, help="of the tables of liars and directions")
    p.add_argument("--folder", type=Path, help="keeps the base and the results of bad replies, and is gone on from")
    p.add_argument("--scenarios", nargs="*", help="of bad replies: training, or strategies, in place of all")
    options = p.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        p.error(f"{', '.join(sorted(unknown))}: there are {', '.join(TABLES)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if "replies" in options.tables:
            wanted = options.scenarios or replies.scenarios()
            replies.show(replies.measure(folder, folder / "replies.jsonl", wanted))
        if "liars" in options.tables:
            liars.measure(folder, options.seeds)
        if "directions" in options.tables:
            directions.measure(folder, options.seeds)
    for table, module in COMMANDS.items():
        if table in options.tables:
            subprocess.run([sys.executable, "-m", f"benchmarks.reliability.{module}"], check=True)


if __name__ == "__main__":
    main()
