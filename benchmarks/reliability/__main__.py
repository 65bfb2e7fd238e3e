"""Print the tables: `python -m benchmarks.reliability [--only replies|liars]`."""

import argparse
import tempfile
from pathlib import Path

from benchmarks.reliability import liars, replies


def main() -> None:
    """Choose tables."""
    p = argparse.ArgumentParser("python -m benchmarks.reliability", description=__doc__)
    p.add_argument("--only", choices=("replies", "liars"), help="one table of the two")
    p.add_argument("--seeds", type=int, default=3, help="of the liars' table")
    p.add_argument("--folder", type=Path, help="keeps the base and the results of cases, and is gone on from")
    p.add_argument("--scenarios", nargs="*", help="training, or strategies, in place of all")
    options = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.only != "liars":
            wanted = options.scenarios or replies.scenarios()
            replies.show(replies.measure(folder, folder / "replies.jsonl", wanted))
        if options.only != "replies":
            liars.measure(folder, options.seeds)


if __name__ == "__main__":
    main()
