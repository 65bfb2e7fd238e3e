"""The page in a browser: watched, asked with the keyboard alone, on a narrow screen. Skipped where there is none."""

import json
import shutil

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fedunlearn.runs.ledger import State
from test_serve import finished, page  # noqa: F401
from test_serve_trouble import set_aside

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    """The browser; what it complains of, as of the page's own policy, fails the test."""
    chromium.set_window_size(1200, 900)
    yield chromium
    complaints = [entry["message"] for entry in chromium.get_log("browser") if " 422 " not in entry["message"]]
    chromium.get("about:blank")
    assert complaints == []


def wait(browser, seconds, condition):
    return WebDriverWait(browser, seconds, 0.1, [StaleElementReferenceException]).until(condition)


def text_of(browser, part):
    """The text that a part of the page shows; read in one step, since news may replace what is in it."""
    return browser.execute_script("return document.getElementById(arguments[0])?.innerText ?? ''", part)


def press(browser, *keys):
    """Type into whatever has the focus, as somebody without a mouse does."""
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def tab_to(browser, element):
    """Go on with the tab key until an element has the focus."""
    for _ in range(25):
        if browser.switch_to.active_element.get_attribute("id") == element:
            return
        press(browser, Keys.TAB)
    raise AssertionError(f"the tab key does not reach {element}")


def test_a_run_is_watched_while_it_goes_on(finished, page, browser):  # noqa: F811
    browser.get(f"{page.url}/runs/test")
    wait(browser, 10, lambda b: "Live" in text_of(b, "connection"))
    curve = browser.find_element(By.CSS_SELECTOR, "#curves polyline").get_attribute("points")
    row = finished.run().metrics()[-1] | {"round": 4, "loss": 0.5}
    with (finished.folder() / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    wait(browser, 10, lambda b: "0.500" in text_of(b, "curves"))
    assert browser.find_element(By.CSS_SELECTOR, "#curves polyline").get_attribute("points") != curve
    wait(browser, 10, lambda b: "After round 4 the model" in text_of(b, "now"))


def test_with_the_keyboard_alone_a_client_is_forgotten_and_what_came_of_it_is_read(finished, page, browser):  # noqa: F811
    browser.get(page.url)
    press(browser, Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the content"
    assert browser.switch_to.active_element.is_displayed()
    press(browser, Keys.ENTER)
    tab_to(browser, "run-test")
    press(browser, Keys.ENTER)
    tab_to(browser, "ask")
    press(browser, Keys.ENTER)
    tab_to(browser, "clients")
    press(browser, "9", Keys.ENTER)
    wait(browser, 10, lambda b: "client 9 is not in 0..3" in b.find_element(By.TAG_NAME, "main").text)
    assert browser.switch_to.active_element.get_attribute("id") == "clients"
    press(browser, Keys.CONTROL + "a", "1")
    tab_to(browser, "by")
    press(browser, "Ada", Keys.ENTER)
    wait(browser, 10, lambda b: b.find_element(By.TAG_NAME, "h1").text == "Forget client 1?")
    tab_to(browser, "file")
    press(browser, Keys.ENTER)
    wait(browser, 10, lambda b: "fedunlearn forget --run=test --client=1 --by=Ada" in text_of(b, "now"))
    wait(browser, 200, lambda b: "The last one, r2, is COMPLETED." in text_of(b, "said"))
    assert "asked\nAda" in text_of(browser, "r2")
    wait(browser, 20, lambda b: "valid, signed by this run" in text_of(b, "r2"))
    assert "The process that this page had started is done" in wait(browser, 60, lambda b: _done(text_of(b, "now")))
    tab_to(browser, "read-r2.json")
    press(browser, Keys.ENTER)
    wait(browser, 10, lambda b: "Receipt of request r2" in b.find_element(By.TAG_NAME, "h1").text)
    assert finished.requests()[-1].state == State.COMPLETED


def _done(text):
    return text if "is done" in text else None


def test_on_a_narrow_screen_nothing_has_to_be_scrolled_sideways(finished, page, browser):  # noqa: F811
    shutil.copytree(finished.folder(), finished.folder("damaged-run-with-a-very-long-name-" + "x" * 60))
    finished.run().request([0], by="A" * 200, right="Art. 17 GDPR")
    accept = set_aside(finished)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    for path in ("/", "/runs/test", "/runs/test/ask", "/runs/nope", "/runs/test/receipts/r1.html", accept):
        browser.get(f"{page.url}{path}")
        width = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert width == [390, 390], path
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get_log("browser")  # /runs/nope is not there
