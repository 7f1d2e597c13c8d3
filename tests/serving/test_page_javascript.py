"""The examples of docs/client-javascript.md against a server: in Node, and where nothing of Node is there."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime import Predictor, open_bundle
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.serving.process import Served

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs the command node")

PAGE = Path(__file__).parents[2] / "docs" / "client-javascript.md"
TEXTS = ["where is my parcel?", "cancel my order"]

BROWSER = """
import { readFileSync } from "node:fs";
import vm from "node:vm";

// A context has nothing of Node: no process, no require, no Buffer; what a browser has is lent to it.
const text = { value: process.argv[3], addEventListener(_, listener) { this.change = listener; } };
const elements = { text, answer: {} };
const origin = process.argv[2];
const lent = {
  AbortSignal, setTimeout, document: { getElementById: (id) => elements[id] },
  fetch: (url, options) => fetch(new URL(url, origin), options),
};
const module = readFileSync("classify.mjs", "utf-8").replaceAll("export ", "");
const script = readFileSync("page.html", "utf-8").match(/<script type="module">([^]*?)<\\/script>/)[1];
vm.runInNewContext(module + script.replace(/^ *import .*$/m, ""), lent);
await elements.text.change();
console.log(elements.answer.textContent);
"""


@pytest.fixture(scope="module")
def place(switchable: Path, customers: dict[str, Coefficients], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, a bundle and the customer acme."""
    folder = tmp_path_factory.mktemp("javascript")
    module, ask = re.findall(r"^```js\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (page,) = re.findall(r"^```html\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for name, text in {"classify.mjs": module, "ask.mjs": ask, "page.html": page, "browser.mjs": BROWSER}.items():
        (folder / name).write_text(text, "utf-8")
    (folder / "customers").mkdir()
    write_coefficients(customers["acme"], folder / "customers" / "acme.safetensors")
    shutil.copytree(switchable, folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Served]:
    with Served("bundle", "--customers", "customers", cwd=place) as server:
        yield server


def node(place: Path, *arguments: str, **variables: str) -> str:
    ran = subprocess.run(
        ["node", *arguments],
        cwd=place,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def expected(place: Path, texts: list[str], owners: list[str | None]) -> list[tuple[str, float]]:
    session = SwitchableSession(open_bundle(place / "bundle"), threads=1)
    session.load("acme", place / "customers" / "acme.safetensors")
    return [(one.label, one.score) for one in Predictor(session).predict(texts, customers=owners)]


def test_the_program_for_node(place: Path, server: Served) -> None:
    lines = node(place, "ask.mjs", QRLORA_URL=server.url).splitlines()
    wanted = expected(place, TEXTS, ["acme", None])
    for line, who, (label, score) in zip(lines, ("acme", "the base"), wanted, strict=False):
        assert line.startswith(f"{who} {label} ")
        assert float(line.split()[-1]) == pytest.approx(score, abs=2e-4)
    assert lines[2] == "4"


def test_the_page_needs_nothing_of_node(place: Path, server: Served) -> None:
    ((label, score),) = expected(place, TEXTS[:1], ["acme"])
    assert node(place, "browser.mjs", server.url, TEXTS[0]).strip() == f"{label} ({score:.2f})"


def test_a_refusal_is_thrown_with_the_servers_words(place: Path, server: Served) -> None:
    program = """
import { classify } from "./classify.mjs";
try { await classify(process.argv[1], ["a"], "nobody"); } catch (error) { console.log(error.message); }
"""
    said = node(place, "--input-type=module", "-e", program, server.url)
    assert said.startswith("404: no customer of that name is known here")
