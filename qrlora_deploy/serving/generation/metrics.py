"""What Prometheus reads of the engines that write text."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from qrlora_deploy.serving.generation.counting import BOUNDS_S, WriterStats

COUNTERS = {
    "qrlora_prompt_tokens": ("Tokens of prompts that were answered.", "prompt_tokens"),
    "qrlora_reused_tokens": ("Of these, those that were not read again.", "reused_tokens"),
    "qrlora_answer_tokens": ("Tokens that were written.", "answer_tokens"),
    "qrlora_cancelled_answers": ("Answers that ended early: nobody waited, or they failed.", "cancelled"),
}

ENDS = (*map(str, BOUNDS_S), "+Inf")


def writer_metrics(stats: Mapping[str, WriterStats]) -> Iterator[Metric]:
    """One family of metrics after the other, with the label `model`; none where no model writes text."""
    if not stats:
        return
    for name, (text, attribute) in COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=["model"])
        for model, it in stats.items():
            counter.add_metric([model], getattr(it, attribute))
        yield counter
    gauge = GaugeMetricFamily("qrlora_running_answers", "Answers that are being written.", labels=["model"])
    for model, it in stats.items():
        gauge.add_metric([model], it.running)
    yield gauge
    yield _first_token(stats.items())


def _first_token(stats: Iterable[tuple[str, WriterStats]]) -> HistogramMetricFamily:
    text = "From the queue to an answer's first token."
    histogram = HistogramMetricFamily("qrlora_first_token_seconds", text, labels=["model"])
    for model, it in stats:
        upto = list(zip(ENDS, accumulate(it.first_token_counts), strict=True))
        histogram.add_metric([model], upto, it.first_token_s)
    return histogram
