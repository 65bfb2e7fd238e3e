"""Take pictures of the reports, and of the page that `fedunlearn serve` shows before, during and after a request.

    python docs/pictures.py                 # runs everything in a temporary folder, some ten minutes on two cores
    python docs/pictures.py --home FOLDER   # keeps it there, and next time uses what it finds
    python docs/pictures.py page            # only the page, of a run that is watched while it trains

It needs `chromium` (or $CHROMIUM), for the page `chromedriver` too, and writes into `docs/pictures/`. Every report is
taken as wide as a desk's screen and as a phone's, light and dark. One that can be scrolled sideways is an error.
"""

import argparse
import html
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

HERE = Path(__file__).parent / "pictures"
WIDTHS = {1200: 1500, 390: 1800}  # pixels: how wide the page is, and how much of its height is shown
SCHEMES = {"dark": 0, "light": 1}  # as Chromium numbers them
LARGE, LARGE_PAGE = 300_000, 150_000  # bytes

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

WATCHED = [*RUN, "rounds=14", "run=demo", "partition.dirichlet_alpha=0.1"]
ASKED_AFTER, CLIENT = 6, 7

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
    parser.add_argument("only", nargs="*", choices=[*PAGES, "page"], help="what to take pictures of; else everything")
    parser.add_argument("--home", type=Path, help="state folder; by default a temporary one")
    parser.add_argument("--out", type=Path, default=HERE, help="where the pictures go")
    parser.add_argument("--whole", action="store_true", help="show pages to their end")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = chosen.home or Path(temporary)
        wanted = chosen.only or [*PAGES, "page"]
        if "page" in wanted:
            take_page(Path(temporary) / "watched", chosen.out)
        for name, words in PAGES.items():
            if name not in wanted:
                continue
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


def take_page(home: Path, out: Path) -> None:
    """Watch a run in the browser while it trains, ask it to forget a client, and take pictures on the way."""
    home.mkdir(parents=True)
    environment = os.environ | {"FEDUNLEARN_HOME": str(home)}
    program = [sys.executable, "-m", "fedunlearn"]
    with (
        subprocess.Popen([*program, *WATCHED], env=environment) as run,
        subprocess.Popen(
            [*program, "serve", "--port", "0"], env=environment, stderr=subprocess.PIPE, text=True
        ) as page,
        browser() as driver,
    ):
        assert page.stderr is not None
        found = re.search(r" at (http://\S+) ", page.stderr.readline())
        assert found is not None

        def wait_for(text: str) -> None:
            WebDriverWait(driver, 600, 0.2).until(lambda d: text in d.find_element(By.TAG_NAME, "main").text)

        def shoot(name: str, width: int = 1000, height: int = 1100) -> None:
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
            )
            file = out / f"{name}.png"
            with Image.open(io.BytesIO(driver.get_screenshot_as_png())) as image:
                image.convert("RGB").quantize(128).save(file, optimize=True)
            print(f"{file}: {file.stat().st_size:,} bytes")
            if file.stat().st_size > LARGE_PAGE:
                raise ValueError(f"{file.name} is too large")

        while not (home / "runs" / "demo" / "metrics.jsonl").exists():
            run.poll()
        driver.get(found[1] + "runs/demo")
        wait_for(f"After round {ASKED_AFTER} the model")
        shoot("page-before", height=900)
        driver.find_element(By.ID, "ask").click()
        driver.find_element(By.ID, "clients").send_keys(str(CLIENT))
        driver.find_element(By.ID, "by").send_keys("Hospital 7")
        driver.find_element(By.ID, "right").send_keys("Art. 17 GDPR")
        driver.find_element(By.ID, "next").click()
        shoot("page-asked", height=800)
        driver.find_element(By.ID, "file").click()
        wait_for("COLLECTING")
        shoot("page-during")
        run.wait()
        wait_for("valid, signed by this run")
        wait_for("Idle")
        shoot("page-after", height=1250)
        shoot("page-390", width=390, height=1500)
        page.terminate()


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Give a browser without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = os.environ.get("CHROMIUM") or shutil.which("chromium") or "chromium"
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-proxy-server"):
        options.add_argument(option)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


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
