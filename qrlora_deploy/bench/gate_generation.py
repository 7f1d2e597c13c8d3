"""The gate's rules on decoders: how long tokens take, and how many come."""

from collections.abc import Iterator

from qrlora_deploy.bench.gate_file import GateRules, GenerationRule
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import GOODPUT, ITL, TOKENS, TPOT, TTFT, Measurement, Verdict
from qrlora_deploy.bench.verdicts import compared, limited, missing, title, verdict


def judge_generation(report: Report, rules: GateRules, rule: GenerationRule, subject: str) -> Iterator[Verdict]:
    """Every limit on what was measured of a decoder's tokens."""
    for what, statistic, limit, fewest in (
        (TTFT, rule.statistic, rule.max_ttft_ms, False),
        (TPOT, rule.statistic, rule.max_tpot_ms, False),
        (ITL, rule.statistic, rule.max_itl_ms, False),
        (TOKENS, "p50", rule.min_tokens_per_s, True),
        (GOODPUT, "p50", rule.min_goodput_per_s, True),
    ):
        if limit is not None:
            name = f"generation.min_{what}_per_s" if fewest else f"generation.max_{what}_ms"
            found = _measured(report, rule, subject, what)
            yield from _unless(found, name, subject, rule, what)
            for item in found:
                yield limited(rules, item, statistic, name, f"{statistic} of {title(item)}", limit, fewest)
    yield from _ratios(report, rules, rule, subject)


def _ratios(report: Report, rules: GateRules, rule: GenerationRule, subject: str) -> Iterator[Verdict]:
    for what, at_most, at_least in (
        (TTFT, rule.max_ttft_ratio, None),
        (TPOT, rule.max_tpot_ratio, None),
        (TOKENS, None, rule.min_tokens_ratio),
    ):
        if at_most is None and at_least is None:
            continue
        name = f"generation.{'min' if at_most is None else 'max'}_{what}_ratio"
        found = _measured(report, rule, subject, what)
        yield from _unless(found, name, subject, rule, what)
        for item in found:
            yield compared(report, rules, item, "p50", name, f"p50 of {title(item)}", at_most, at_least)


def _measured(report: Report, rule: GenerationRule, subject: str, what: str) -> list[Measurement]:
    return [
        item
        for item in report.of("generation")
        if (item.subject, item.variant) == (subject, what) and rule.shape in (None, item.shape)
    ]


def _unless(found: list[Measurement], name: str, subject: str, rule: GenerationRule, what: str) -> Iterator[Verdict]:
    """An unknown verdict where nothing was measured."""
    if not found:
        yield verdict(name, subject, "unknown", missing("generation", rule.shape, what))
