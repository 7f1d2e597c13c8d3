"""The page for people in a real browser: its numbers, the keyboard, in the dark, on a phone, without a server."""

import re
import time
from collections.abc import Iterator

import pytest

from qrlora_deploy.serving.access import Access
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.live.totals import RequestCounts
from qrlora_deploy.serving.live.window import Window
from qrlora_deploy.serving.refusals import UnauthenticatedError
from qrlora_deploy.serving.served import Models
from tests.serving.browser import Browser, found_browser
from tests.serving.running import running

COMMAND = found_browser()
pytestmark = pytest.mark.skipif(COMMAND is None, reason="needs Chromium: apt-get install chromium")

CURVES = "document.querySelectorAll('svg .curve').length"
STATE = "document.getElementById('state').textContent"
CONTRAST = """
(() => {
  const light = text => {
    const parts = text.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
      .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = element => {
    const color = getComputedStyle(element).backgroundColor;
    return color === 'rgba(0, 0, 0, 0)' ? behind(element.parentElement) : color;
  };
  const ratios = [...document.querySelectorAll('h1,h2,dt,dd,strong,b,th,td,button,.legend,#state,#uptime,svg text')]
    .filter(element => element.getClientRects().length).map(element => {
      const style = getComputedStyle(element);
      const [one, other] = [light(element.closest('svg') ? style.fill : style.color), light(behind(element))].sort();
      return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    });
  return Math.min(...ratios);
})()
"""


class Keys:
    """One key."""

    @staticmethod
    def access(key: str | None) -> Access:
        if key != "secret":
            raise UnauthenticatedError("give a key that is known")
        return Access("id")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert COMMAND is not None
    with Browser(COMMAND) as browser:
        yield browser


@pytest.fixture
def front(models: Models) -> Front:
    """With five minutes behind it, in which 20 requests a second took 10 ms and some were refused."""
    counts, offset_s = RequestCounts(), -400
    window = Window(counts.totals, models.stats, lambda: time.monotonic() + offset_s)
    for _ in range(200):
        offset_s += 2
        for _ in range(40):
            counts.count(0.010, 3)
        counts.count(0.001, 1, "overloaded")
        window.look()
    front = Front(models, counts=counts, window=window)
    front.life.begin()
    return front


def test_it_shows_what_the_server_does(front: Front, browser: Browser) -> None:
    browser.complaints.clear()
    with running(front) as run:
        browser.open(run.server.http.url)
        browser.wait_for(STATE, lambda state: state == "ready")
        tiles = browser.ask(
            "Object.fromEntries([...document.querySelectorAll('#now div')].map(div => [div.children[0].textContent, "
            "div.children[1].textContent]))"
        )
        assert 15 <= int(tiles["Requests a second"]) <= 20 and tiles["Latency, p50"] == "10 ms"
        assert tiles["Refused a second"] in ("0.4", "0.5")
        assert browser.ask("document.getElementById('models').textContent").startswith("tinyready")
        assert re.search(r"was full(2\d|30)$", browser.ask("document.getElementById('refused').textContent"))
        assert browser.ask(CURVES) >= 7 and browser.ask("document.querySelectorAll('figure').length") == 9
        # It asks again by itself.
        before = browser.ask("performance.getEntriesByName(location.origin + '/live.json').length")
        browser.wait_for(f"performance.getEntriesByName(location.origin + '/live.json').length > {before}")
    assert browser.complaints == []


def test_a_server_that_stops_to_answer_is_told_and_found_again(front: Front, models: Models, browser: Browser) -> None:
    with running(front) as run:
        browser.open(run.server.http.url)
        browser.wait_for(f"{CURVES} > 0")
        # As if the network had gone: the browser itself refuses.
        browser.call("Network.enable")
        browser.call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        try:
            browser.wait_for(STATE, lambda state: state == "no answer")
            assert "has given no answer since" in browser.ask("document.querySelector('[role=alert]').textContent")
            assert browser.ask("document.body.classList.contains('stale')") and browser.ask(CURVES) > 0
        finally:
            browser.call(
                "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
            )
        browser.wait_for(STATE, lambda state: state == "ready")
        assert browser.ask("document.getElementById('trouble').hidden")
        front.life.drain()
        browser.wait_for(STATE, lambda state: state == "ending")


def test_with_keys_it_asks_for_one_and_keeps_it_nowhere(models: Models, browser: Browser) -> None:
    front = Front(models, keys=Keys())
    front.life.begin()
    with running(front) as run:
        browser.open(run.server.http.url)
        browser.wait_for("document.activeElement.id", lambda focused: focused == "key")
        for key, told in (("wrong", "This key is not known"), ("secret", "")):
            browser.call("Input.insertText", text=key)
            browser.press("Enter", 13, "\r")
            browser.wait_for("document.getElementById('key').value", lambda value: value == "")
            browser.wait_for("document.getElementById('trouble').textContent", lambda text, t=told: text.startswith(t))
        browser.wait_for(STATE, lambda state: state == "ready")
        assert browser.ask("document.getElementById('key-form').hidden && !document.getElementById('main').hidden")
        assert browser.ask("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        browser.open(run.server.http.url)
        browser.wait_for("document.activeElement.id", lambda focused: focused == "key")


def test_it_can_be_read_with_the_keyboard_alone(front: Front, browser: Browser) -> None:
    with running(front) as run:
        browser.open(run.server.http.url)
        browser.wait_for(f"{CURVES} > 0")
        reached = []
        for _ in range(12):
            browser.press("Tab", 9)
            reached.append(
                browser.ask("document.activeElement.getAttribute('aria-label') || document.activeElement.id")
            )
        assert reached[0] == "pause"
        assert reached[1].startswith("Requests a second, now: answered ")
        assert sum("now:" in name for name in reached) == 9
        browser.ask("document.querySelector('svg').focus()")
        for key in ("ArrowLeft", "ArrowLeft", "Home"):
            browser.press(key, {"ArrowLeft": 37, "Home": 36}[key])
        assert "s ago: answered 20" in browser.ask("document.activeElement.getAttribute('aria-label')")
        assert browser.ask("document.querySelectorAll('svg .cursor').length") == 1
        browser.ask("document.getElementById('pause').focus()")
        browser.press(" ", 32, " ")
        assert browser.ask("document.getElementById('pause').getAttribute('aria-pressed')") == "true"


def test_everything_has_a_name_for_a_screen_reader(front: Front, browser: Browser) -> None:
    with running(front) as run:
        browser.open(run.server.http.url)
        browser.wait_for(f"{CURVES} > 0")
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        named = {"image", "button", "region", "heading", "columnheader", "rowheader"}
        found = [(it["role"]["value"], it.get("name", {}).get("value", "")) for it in nodes if not it["ignored"]]
        found = [(role, name) for role, name in found if role in named]
        assert {role for role, _ in found} == named and all(name for _, name in found), found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1440])
def test_it_fits_the_screen_and_can_be_read(front: Front, browser: Browser, width: int, scheme: str) -> None:
    with running(front) as run:
        browser.screen(width, 800, scheme)
        try:
            browser.open(run.server.http.url)
            browser.wait_for(f"{CURVES} > 0")
            assert browser.ask("document.documentElement.scrollWidth") <= width
            ground = browser.ask("getComputedStyle(document.body).backgroundColor")
            assert (int(ground[4:].split(",")[0]) > 128) == (scheme == "light")
            # What WCAG asks of text at level AA.
            assert browser.ask(CONTRAST) >= 4.5
            sizes = browser.ask(
                "[...document.querySelectorAll('svg text')].map(it => it.getBoundingClientRect().height)"
            )
            assert min(sizes) >= 10
        finally:
            browser.call("Emulation.clearDeviceMetricsOverride")
