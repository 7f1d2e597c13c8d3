"""`train-fleet` as a user runs it: killed and resumed, in shards, by torchrun, with bad customers."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qrlora_deploy.cli.train_fleet import parse_shard
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.coefficients import read_coefficients
from qrlora_deploy.io.files import digest_file
from tests.cli.running import environment, run, run_here, succeed
from tests.training.fleet.making import AS_ALONE_AFTER_LONG, check_same, random_rows, without_dropout, write_rows

CUSTOMERS = 12
OPTIONS = ["base", "--basis", "basis.safetensors", "--batch-size", 4, "--max-length", 16, "--device", "cpu"]
ALL = ["train-fleet", *OPTIONS, "--data", "all.tsv", "--customer-column", "id"]


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, tiny_basis_file: Path) -> Path:
    """A folder with a base, its basis and twelve customers in one file."""
    without_dropout(tiny_base, tmp_path / "base")
    shutil.copy(tiny_basis_file, tmp_path / "basis.safetensors")
    rows = [(f"c{number:02}", *row) for number in range(CUSTOMERS) for row in random_rows(5 + number, number)]
    write_rows(tmp_path / "all.tsv", rows, ("id", "text", "label"))
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    """Digest of each customer's file."""
    return {path.stem: digest_file(path) for path in folder.glob("*.safetensors")}


def test_killed_and_resumed_without_losing_who_was_done(place: Path) -> None:
    whole = succeed([*ALL, "--epochs", 40, "-o", "whole"], place)
    assert (whole["trained"], whole["failed"], whole["skipped"]) == (CUSTOMERS, 0, 0)
    # Two customers side by side, and many epochs: some are done long before the others.
    command = [*ALL, "--epochs", 40, "--rows-per-step", 8, "-o", "cut"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qrlora_deploy.cli", *map(str, command)],
        cwd=place,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len(files(place / "cut")) < 3 and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before its end"
    done = files(place / "cut")
    assert 3 <= len(done) < CUSTOMERS
    ran = run(*command, cwd=place)
    assert ran.code == 2 and "pass over finished ones by --resume" in ran.err
    resumed = succeed([*command, "--resume"], place)
    assert resumed["trained"] == CUSTOMERS - len(done) and resumed["skipped"] == len(done)
    after = files(place / "cut")
    assert len(after) == CUSTOMERS and done.items() <= after.items()
    for name in after:
        found, whole_one = (read_coefficients(place / folder / f"{name}.safetensors") for folder in ("cut", "whole"))
        check_same(found, whole_one, AS_ALONE_AFTER_LONG)
    assert {path.name for path in (place / "cut").iterdir()} == {f"{n}.safetensors" for n in after} | {"summary.jsonl"}


def test_bad_customers_are_named_and_the_others_done(place: Path) -> None:
    with (place / "all.tsv").open("a", encoding="utf-8") as file:
        file.write("../out\tbook a flight\ttravel\nstranger\tbook a flight\tunheard of\n\trice\ttravel\n")
        file.write("single\tbook a flight\ttravel\nhollow\t\ttravel\nhollow\trice\t\n")
    ran = run(*ALL, "--epochs", 1, "-o", "out", "--json", cwd=place)
    assert ran.code == 1 and ran.json["trained"] == CUSTOMERS + 1 and ran.json["failed"] == 4
    assert ran.err.splitlines()[-1] == "Error: 4 customers failed; out/summary.jsonl says why"
    assert f"of {CUSTOMERS + 5} customers" in ran.err and "a minute" in ran.err
    lines = {line["customer"]: line for line in map(json.loads, (place / "out" / "summary.jsonl").open())}
    reasons = {name: line["reason"] for name, line in lines.items() if line["status"] == "failed"}
    assert reasons.keys() == {"../out", "stranger", "", "hollow"}
    assert "no customer id" in reasons["../out"] and reasons[""] == "these rows have no customer id"
    assert "unknown label 'unheard of'" in reasons["stranger"] and "row 2 has no label" in reasons["hollow"]
    assert lines["single"]["rows"] == 1 and not (place / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "all.tsv"], ["all.tsv", "--customer-column"]),
        (["--data", "all.tsv", "--customer-column", "who"], ["who", "id, text, label"]),
        (["--data", "nothing"], ["nothing: no such file or folder"]),
        (["--data", "void"], ["holds no .tsv"]),
        (["--data", "all.tsv", "--customer-column", "id", "--shard", "3/3"], ["--shard 3/3", "0/4"]),
        (["--data", "all.tsv", "--customer-column", "id", "--shard", "one"], ["--shard one", "0/4"]),
        (
            ["--data", "all.tsv", "--customer-column", "id", "--eval", "all.tsv", "--metric", "bleu"],
            ["bleu", "accuracy"],
        ),
        (["--data", "all.tsv", "--customer-column", "id", "--label-column", "tag"], ["tag"]),
    ],
)
def test_what_is_wrong_for_all_is_one_line(place: Path, arguments: list[str], words: list[str]) -> None:
    (place / "void").mkdir()
    ran = run_here("train-fleet", *OPTIONS, *arguments, "-o", "out", cwd=place)
    assert ran.code == 2 and len(ran.err.splitlines()) == 1, ran.err
    assert [word for word in words if word not in ran.err] == []
    assert not (place / "out").exists()


def test_shards_cover_every_customer_once(place: Path) -> None:
    for index in range(3):
        before = len(files(place / "out"))
        ran = run_here(*ALL, "--epochs", 1, "--shard", f"{index}/3", "-o", "out", cwd=place)
        assert ran.code == 0, ran.err
        assert len(files(place / "out")) > before
    assert len(files(place / "out")) == CUSTOMERS
    lines = [
        json.loads(line)
        for path in (place / "out").glob("summary-*-of-3.jsonl")
        for line in path.read_text().split("\n")[:-1]
    ]
    assert sorted(line["customer"] for line in lines) == [f"c{number:02}" for number in range(CUSTOMERS)]


def test_a_launcher_gives_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert parse_shard(None) == (0, 1) and parse_shard("2/5") == (2, 5)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse_shard(None) == (3, 8)
    with pytest.raises(InputError, match="leave it out under a launcher, whose 8 workers"):
        parse_shard("0/8")


@pytest.mark.slow
def test_two_workers_of_torchrun(place: Path) -> None:
    with (place / "all.tsv").open("a", encoding="utf-8") as file:
        file.write("stranger\tbook a flight\tunheard of\n")
    whole = run(*ALL, "--epochs", 4, "-o", "whole", cwd=place)
    assert whole.code == 1
    command = [*ALL, "--epochs", 4, "-o", "out"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qrlora_deploy.cli"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *map(str, command)],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    # The worker with the failed customer ends well: torchrun would stop the other one.
    assert done.returncode == 0, done.stderr
    assert "Warning: 1 customer failed" in done.stderr
    names = [path.name for path in sorted((place / "out").glob("summary*"))]
    assert names == ["summary-0-of-2.jsonl", "summary-1-of-2.jsonl"]
    assert files(place / "out").keys() == files(place / "whole").keys()
    for name in files(place / "out"):
        check_same(*(read_coefficients(place / folder / f"{name}.safetensors") for folder in ("out", "whole")))
