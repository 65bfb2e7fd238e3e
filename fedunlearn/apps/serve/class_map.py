"""Draw who has what, as only a simulation's auditor can know: a process of its own, since it needs the images."""

import json
import subprocess
import sys
from contextlib import closing

from fedunlearn.errors import UserError
from fedunlearn.runs.home import open_run
from fedunlearn.runs.page import Picture, embedded

SECONDS = 300


def drawn(name: str, home: str) -> Picture:
    """Have the map of a run drawn.

    Raises:
        UserError: the images are not here.
    """
    command = [sys.executable, "-m", "fedunlearn.apps.serve.class_map", name, home]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"nobody has drawn the map of run {name} within {SECONDS} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it ended without a word"]
        raise UserError(f"the map of run {name} cannot be drawn: {lines[-1]}")
    return Picture(**json.loads(done.stdout))


def main(name: str, home: str) -> int:
    """Print the map of a run, as JSON; gives 1, and says why on stderr, where there is none."""
    from fedunlearn.build import source_of
    from fedunlearn.federation.auditor import needed_auditor
    from fedunlearn.runs.figures import split_figure
    from fedunlearn.runs.ledger import TAKEN_UP
    from fedunlearn.runs.purge import known_class_counts

    try:
        run = open_run(name, home=home)
        with closing(run.ledger):
            config = run.config_here()
            if not source_of(config).store.is_dir():
                raise UserError("its decoded images are not in this state folder")
            auditor = needed_auditor(config)
            counts = known_class_counts(run, auditor.class_counts(portions=run.ledger.portions(TAKEN_UP)))
            names = run.names()
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    assert counts is not None
    print(json.dumps(embedded(split_figure(counts, auditor.class_names, names))._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
