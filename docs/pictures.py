"""Take pictures of the reports: of a finished run, of a failed request, and of a federated study.

    python docs/pictures.py                 # runs everything in a temporary folder, some ten minutes on two cores
    python docs/pictures.py --home FOLDER   # keeps it there, and next time uses what it finds

It needs `chromium` (or $CHROMIUM) and writes into `docs/pictures/`. Every page is taken as wide as a desk's screen and
as a phone's, light and dark. A page that can be scrolled sideways is an error.
"""

import argparse
import html
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent / "pictures"
WIDTHS = {1200: 1500, 390: 1800}  # pixels: how wide the page is, and how much of its height is shown
SCHEMES = {"dark": 0, "light": 1}  # as Chromium numbers them
LARGE = 300_000  # bytes

SILENT = '''
"""A strategy for the picture of a failed request: a forget client that does not answer."""

from fedunlearn import NotNowError, Strategy


class Silent(Strategy):
    label = "a strategy that needs the client"

    def forget(self, federation, forget):
        raise NotNowError(f"client {forget.clients[0]} did not answer within 60 s")
'''

# Without crops the model learns these images by heart as far as it can
RUN = ["run", "digits", "--engine", "local", "train.crop_padding=0"]
PAGES = {
    "run": [*RUN, "rounds=20", "run=run", "forget.schedule={16:[3]}"],
    "failed": [
        *RUN, "rounds=4", "run=failed", "forget.schedule={3:[3]}", "strategy=silent:Silent", "forget.attempts=1",
    ],
    "study": [
        "study", "federated", "dataset=digits", "rounds=10", "study.strategies=[subset,ssd,leave]",
        "study.after=[0,1,3]", "study.seeds=[0,1]", "study.workers=1", "study.name=study",
    ],
}  # fmt: skip

# Chromium's own windows are never narrower than some 500 pixels; a frame is as narrow as it is told to be
FRAME = """<!doctype html>
<style>html, body {{ margin: 0; overflow: hidden }} iframe {{ border: 0; display: block }}</style>
<iframe width="{width}" height="600" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const frame = document.querySelector("iframe"), inner = frame.contentDocument.documentElement
  const found = `wide=${{inner.scrollWidth}} shown=${{inner.clientWidth}} high=${{inner.scrollHeight}}`
  frame.height = inner.scrollHeight
  document.body.setAttribute("data-found", found)
}}</script>"""


def main() -> int:
    """Make the runs that are missing, then the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="state folder; by default a temporary one")
    parser.add_argument("--out", type=Path, default=HERE, help="where the pictures go")
    parser.add_argument("--whole", action="store_true", help="show pages to their end")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = chosen.home or Path(temporary)
        for name, words in PAGES.items():
            page = report_of(home, name, words)
            for width, height in WIDTHS.items():
                for scheme in SCHEMES:
                    file = chosen.out / f"{name}-{width}-{scheme}.png"
                    take(page.read_text(), file, width, scheme, 10**5 if chosen.whole else height)
                    print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


def report_of(home: Path, name: str, words: list[str]) -> Path:
    """Run a command, unless its report is there; returns the report's path."""
    page = home / ("studies" if words[0] == "study" else "runs") / name / "report" / "index.html"
    if not page.exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "silent.py").write_text(SILENT)
        environment = os.environ | {"FEDUNLEARN_HOME": str(home), "PYTHONPATH": str(home)}
        subprocess.run([sys.executable, "-m", "fedunlearn", *words], env=environment, check=False)
    return page


def take(page: str, file: Path, width: int, scheme: str, height: int) -> None:
    """Take a picture of a page that is exactly `width` pixels wide.

    Raises:
        ValueError: the page is wider than that, or the frame is not.
    """
    with tempfile.TemporaryDirectory() as temporary:
        frame = Path(temporary) / "frame.html"
        frame.write_text(FRAME.format(width=width, page=html.escape(page)))
        found = re.search(r"wide=(\d+) shown=(\d+) high=(\d+)", chromium(frame, scheme, "--dump-dom"))
        assert found is not None
        wide, shown, high = map(int, found.groups())
        if (wide, shown) != (width, width):
            raise ValueError(f"{file.name}: the page is {wide} pixels wide, the frame {shown}, not {width}")
        shot = Path(temporary) / "shot.png"
        chromium(frame, scheme, f"--screenshot={shot}", f"--window-size={max(width, 600)},{min(high, height)}")
        file.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(shot) as image:
            picture = image.convert("RGB").crop((0, 0, width, min(high, height)))
        picture.save(file, optimize=True)
        if file.stat().st_size > LARGE:
            picture.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(file, optimize=True)


def chromium(page: Path, scheme: str, *options: str) -> str:
    """Run Chromium without a window on a page; returns what it prints."""
    command = [
        os.environ.get("CHROMIUM", "chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--virtual-time-budget=5000", *options,
        page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


if __name__ == "__main__":
    sys.exit(main())
