"""`bench` of decoders: what is measured token by token, accuracy against PyTorch, and what the gate makes of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.bench.generation.load import answer_load
from qrlora_deploy.bench.report import read_report
from qrlora_deploy.bench.report_parts import GOODPUT, ITL, TOKENS, TPOT, TTFT
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.session import GenerationSession
from tests.cli.running import Ran, run_here
from tests.runtime.generation.written import END, Written, write_everything
from tests.tolerances import ANSWER_LOSS

pytestmark = pytest.mark.makes

ROWS = [
    {"prompt": "play some music", "completion": " please now"},
    {"prompt": "what is the", "completion": " weather"},
    {"prompt": "hello", "completion": " bank account"},
]
SHORT = (
    "bench bundle --customers customers --batch 2 --prompt-tokens 8 --new-tokens 4 --threads 1 --samples 6 -o report"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_everything(tmp_path_factory.mktemp("written"))


@pytest.fixture
def place(tmp_path: Path, written: Written, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bundle").symlink_to(written.bundle)
    written.copied(tmp_path / "customers")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "one.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(place: Path, *arguments: object) -> Ran:
    return run_here(*SHORT.split(), "--seconds", "0.5", *arguments, cwd=place)


def by_torch(written: Written, customer: str | None) -> dict[str, float]:
    """`nll` and `exact_match` of transformers' own forward on rows made by transformers' tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qrlora_deploy.models.adapter import insert, set_coefficients

    made = written.made
    tokenizer = AutoTokenizer.from_pretrained(made.checkpoint.folder)
    model = AutoModelForCausalLM.from_pretrained(made.checkpoint.folder, dtype=torch.float32).eval()
    set_coefficients(insert(model, made.basis), made.basis, made.values[made.number(customer)])
    losses, right = [], []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        # This tokenizer puts an end behind every text, which is none of a prompt.
        prompt = prompt[:-1] if prompt[-1] == END else prompt
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], END]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").numpy())
        right.append(logits.argmax(-1).tolist() == answer)
    return {"nll": float(np.concatenate(losses).mean()), "exact_match": float(np.mean(right))}


def test_tokens_are_timed(written: Written) -> None:
    asked = [GenerationRequest([5, 6, 7], customer, max_tokens=5, ignore_end=True) for customer in ("one", None, "two")]
    with GenerationSession.open(written.bundle, written.customers, prefix_bytes=0, max_rows=2) as session:
        timelines, cut = answer_load(session, asked)
    assert not cut and [len(one.tokens) for one in timelines] == [5, 5, 5]
    for one in timelines:
        assert one.due < one.tokens[0] and one.tokens == sorted(one.tokens)
        assert one.tpot_s == pytest.approx(np.mean(one.itl_s))
        assert one.ttft_s == one.tokens[0] - one.due
    # Two rows: the third waits until one of the others has left.
    assert timelines[2].tokens[0] > timelines[0].tokens[-1]


def test_arrivals_are_waited_for(written: Written) -> None:
    asked = [GenerationRequest([5, 6], max_tokens=2, ignore_end=True)] * 3
    with GenerationSession.open(written.bundle) as session:
        timelines, cut = answer_load(session, asked, [0.0, 0.2, 0.3])
        assert not cut and timelines[1].due - timelines[0].due == pytest.approx(0.2)
        assert all(one.tokens[0] >= one.due for one in timelines)
        late, cut = answer_load(session, asked * 20, [0.0] * 60, give_up_s=0.0)
        assert cut and len(late) < 60


def test_a_decoder_is_measured_and_passes(place: Path, written: Written) -> None:
    (place / "gate.toml").write_text(
        "allow_unstable = true\n[[generation]]\nstatistic = 'p50'\nmax_ttft_ms = 60000\nmax_tpot_ms = 60000\n"
        "max_itl_ms = 60000\nmin_tokens_per_s = 0.001\nmin_goodput_per_s = 0.001\n[accuracy]\nmax_nll = 1000.0\n"
    )
    budgets = ["--ttft-ms", "60000", "--tpot-ms", "60000"]
    ran = bench(place, "--gate", "gate.toml", "--labelled", "dev", *budgets, "--json")
    assert ran.code == 0, ran.err
    report = read_report(place / "report" / "report.json")
    items = {item.variant: item for item in report.of("generation")}
    assert set(items) == {TTFT, TPOT, ITL, TOKENS, GOODPUT} and report.gate is not None and report.gate.passed
    runs = len(items[TOKENS].samples)
    assert len(items[TTFT].samples) == 2 * runs and len(items[ITL].samples) == 2 * 3 * runs
    assert items[TOKENS].unit == "tokens/s" and items[TTFT].unit == "ms"
    # All are within such budgets: two answers of four tokens, so a half of the tokens' rate by two.
    np.testing.assert_allclose(np.array(items[GOODPUT].samples) * 4, items[TOKENS].samples, rtol=1e-6)
    (found,) = report.accuracy
    own, base = by_torch(written, "one"), by_torch(written, None)
    assert found.nll == pytest.approx(own["nll"], abs=ANSWER_LOSS)
    assert found.base_nll == pytest.approx(base["nll"], abs=ANSWER_LOSS)
    assert abs(own["nll"] - base["nll"]) > 10 * ANSWER_LOSS
    assert (found.accuracy, found.rows) == (own["exact_match"], len(ROWS))
    assert "TTFT p99 ms" in (place / "report" / "report.md").read_text()
    assert "Time to first token, 2x8" in (place / "report" / "report.html").read_text()


def test_exact_answers_are_right(place: Path, written: Written) -> None:
    """Rows whose completions are what the customer writes greedily."""
    rows = []
    for prompt in ("play some music", "hello", "what is the"):
        text = written.greedy(prompt, "one", 6)
        rows.append({"prompt": prompt, "completion": f" {text}"})
    (place / "dev" / "one.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert bench(place, "--labelled", "dev").code == 0
    (found,) = read_report(place / "report" / "report.json").accuracy
    assert found.nll is not None and found.base_nll is not None and found.nll < found.base_nll


def test_broken_rules_end_with_1(place: Path) -> None:
    (place / "gate.toml").write_text("[[generation]]\nstatistic = 'p50'\nmax_tpot_ms = 0.000001\n")
    ran = bench(place, "--gate", "gate.toml")
    assert ran.code == 1 and ran.err.startswith(
        "Error: the gate gate.toml failed: switchable: p50 of generation 2x8 tpot: "
    )
    (place / "gate.toml").write_text(
        "[accuracy]\nmin = 1.0\nmax_nll = 0.0001\n[accuracy.data]\none = 'dev/one.jsonl'\n"
    )
    ran = bench(place, "--gate", "gate.toml")
    assert ran.code == 1 and "switchable one: accuracy" in ran.err and len(ran.err.splitlines()) == 1


def test_a_server_of_answers(place: Path) -> None:
    budgets = ["--ttft-ms", "5000", "--tpot-ms", "5000"]
    ran = bench(place, "--scenario", "server", "--server-runs", 2, *budgets)
    assert ran.code == 0, ran.err
    report = read_report(place / "report" / "report.json")
    (capacity,) = report.capacities
    assert (capacity.budget_ms, capacity.tpot_ms, capacity.batch) == (5000, 5000, 2)
    assert all(item.goodput_per_s for item in report.of("server") if not item.saturated)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--scenario", "offline"], "--scenario offline"),
        (["--scenario", "server"], "needs --ttft-ms"),
        (["--new-tokens", "1000"], "takes at most 128 tokens"),
        (["--peer", "peft", "--base", "customers"], "a decoder has no peers"),
    ],
)
def test_what_is_not_for_decoders(arguments: list[str], text: str, place: Path) -> None:
    ran = bench(place, *arguments)
    assert ran.code == 2 and text in ran.err and len(ran.err.splitlines()) == 1, ran.err


def test_what_is_for_decoders_alone(place: Path, switchable: Path) -> None:
    ran = run_here("bench", str(switchable), "--ttft-ms", "3", cwd=place)
    assert ran.code == 2 and "--ttft-ms 3" in ran.err and "is for decoders" in ran.err
    ran = run_here("bench", "bundle", str(switchable), cwd=place)
    assert ran.code == 2 and "measure them apart" in ran.err
