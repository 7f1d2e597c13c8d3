"""The page of a report: complete in itself, and in a real browser with all its figures and no text over another."""

import json
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qrlora_deploy.bench.gate import judge
from qrlora_deploy.bench.gate_file import EXAMPLE, read_gate
from qrlora_deploy.bench.page import render_page
from qrlora_deploy.bench.plots import NAME, short
from qrlora_deploy.bench.report import Report
from tests.bench.fixed import good_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VOID = {"meta", "br", "img", "hr", "link", "input"}

LOOK = """
<script>addEventListener("load", () => {
  const found = {figures: [], over: [], wide: document.documentElement.scrollWidth - innerWidth,
    back: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    small: [], tables: document.querySelectorAll("table").length};
  for (const figure of document.querySelectorAll("figure")) {
    const box = figure.querySelector("svg").getBoundingClientRect();
    found.figures.push([figure.querySelector("figcaption").textContent, box.width, box.height,
      figure.querySelectorAll("path").length]);
    const texts = [...figure.querySelectorAll("svg text")].map(
      text => [text.textContent, text.getBoundingClientRect()]);
    for (const [text, a] of texts) {
      if (a.height < 8) found.small.push(text);
      if (a.left < box.left - 1 || a.right > box.right + 1 || a.top < box.top - 1 || a.bottom > box.bottom + 1)
        found.over.push(["outside", text]);
      for (const [other, b] of texts)
        if (a !== b && a.left + 1 < b.right && b.left + 1 < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
          found.over.push([text, other]);
    }
  }
  parent.document.body.dataset.found = JSON.stringify(found);
})</script>"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report with a gate and a name that is long."""
    file = tmp_path_factory.mktemp("gate") / "gate.toml"
    file.write_text(EXAMPLE)
    report = good_report()
    return report.model_copy(update={"gate": judge(report, read_gate(file), "gate.toml"), "notes": ["a note"]})


class Reader(HTMLParser):
    """Checks that tags close, and collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_complete_in_itself(judged: Report) -> None:
    page = render_page(judged)
    found = read(page)
    assert found.loaded == [] or all(item.startswith("#") for item in found.loaded)
    assert "script" not in found.count and "@import" not in page and "url(http" not in page
    assert found.count["figure"] == found.count["svg"] == 4
    assert len(page) < 1_000_000


def test_names_cannot_become_markup_or_formulas(judged: Report) -> None:
    evil = "<script>alert(1)</script>$\\frac$"
    subjects = [judged.subjects[0], judged.subjects[1].model_copy(update={"name": evil})]
    measurements = [
        item.model_copy(update={"subject": evil}) if item.subject == "new" else item for item in judged.measurements
    ]
    changed = judged.model_copy(update={"subjects": subjects, "measurements": measurements, "comparisons": []})
    page = render_page(changed.model_copy(update={"notes": ["<img src=x onerror=y>"]}))
    found = read(page)
    assert "script" not in found.count and "img" not in found.count


def test_a_report_of_one_scenario_has_one_figure(judged: Report) -> None:
    single = [item for item in judged.measurements if item.scenario == "single-stream" and item.subject == "new"]
    alone = judged.model_copy(
        update={"measurements": single, "comparisons": [], "capacities": [], "accuracy": [], "gate": None}
    )
    assert read(render_page(alone)).count["figure"] == 1
    assert "figure" not in read(render_page(alone.model_copy(update={"measurements": []}))).count


def test_long_names_are_shortened_in_the_middle() -> None:
    assert short("acme") == "acme"
    assert short("a" * 20 + "z" * 20) == "a" * 12 + "…" + "z" * 12 and NAME == 26


def look(page: str, width: int, folder: Path, dark: bool = False) -> dict:
    """What a browser makes of the page in a window so wide."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser to look at the page: none of {', '.join(BROWSERS)} is installed")
    (folder / "page.html").write_text(page.replace("</body>", f"{LOOK}</body>"))
    # Browsers without a screen have a least width of a window, a frame has none.
    frame = f'<body style="margin:0"><iframe src="page.html" style="width:{width}px;height:4000px;border:0"></iframe>'
    (folder / "frame.html").write_text(frame)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += [
        "--disable-sync",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        f"--user-data-dir={folder}/user",
    ]
    options += ["--force-dark-mode"] if dark else []
    command = [browser, *options, "--virtual-time-budget=3000", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(done.stdout.partition('data-found="')[2].partition('"')[0]))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)], ids=["desk", "phone-dark"])
def test_a_browser_shows_every_figure(judged: Report, width: int, dark: bool, tmp_path: Path) -> None:
    long = "a-bundle-with-a-name-that-is-as-long-as-they-get"
    renamed = {"new": long}
    page = render_page(
        judged.model_copy(
            update={
                "subjects": [
                    item.model_copy(update={"name": renamed.get(item.name, item.name)}) for item in judged.subjects
                ],
                "measurements": [
                    item.model_copy(update={"subject": renamed.get(item.subject, item.subject)})
                    for item in judged.measurements
                ],
                "comparisons": [
                    item.model_copy(update={"subject": renamed.get(item.subject, item.subject)})
                    for item in judged.comparisons
                ],
            }
        )
    )
    found = look(page, width, tmp_path, dark)
    titles = {title for title, *_ in found["figures"]}
    assert titles == {
        "Latency of single runs, 1x32",
        "Throughput by batch, 32 tokens",
        "Latency by arrival rate",
        "Ratio to the baseline",
    }
    assert all(wide > 280 and high > 100 and paths > 10 for _, wide, high, paths in found["figures"]), found["figures"]
    assert found["over"] == [] and found["small"] == []
    assert found["wide"] <= 0 and found["tables"] == 10
    assert (found["back"], found["ink"]) == (
        ("rgb(21, 24, 28)", "rgb(228, 232, 236)") if dark else ("rgb(255, 255, 255)", "rgb(28, 33, 38)")
    )
