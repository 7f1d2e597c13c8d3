"""How long a run of so many tokens takes, learnt from the runs that there were."""

KEPT = 0.97
"""Of the weight of a run when another one has run: some thirty of them count."""

OUTLIER = 4.0
"""A run that took so many times what was expected counts less, the less the longer it took: something else had the
processor."""

PRIOR = 0.003
"""Runs that differ in size by less, as a share of the mean's square, are taken to cost nothing beside their tokens."""

LEAST_RUNS = 8
"""So many runs tell what a run costs beside its tokens."""


class RunTime:
    """Seconds of a run as a line: what every run costs, and what each of its tokens adds.

    On a GPU the first part is most of a small run, so twenty rows take about as long as one; on a CPU it is next to
    nothing. By the mean rate of runs of one row a queue of twenty would look twenty times as long as it is.
    For one thread at a time.

    Attributes:
        every_s: seconds of every run; 0 before the first one.
        each_s: seconds of each token; 0 before the first run.
        is_known: whether there were enough runs of different sizes to tell the two apart.
    """

    def __init__(self) -> None:
        self.every_s = self.each_s = 0.0
        self.is_known = False
        self._runs = 0
        self._forget()

    def _forget(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """A run of so many tokens, padded, took so long."""
        if self._runs == 1:
            # The first run of a session reserves its memory.
            self._forget()
        self._runs += 1
        expected = self.of(tokens)
        weight = min(1.0, OUTLIER * expected / seconds) if expected and seconds > 0 else 1.0
        self._weight = KEPT * self._weight + weight
        self._tokens = KEPT * self._tokens + weight * tokens
        self._seconds = KEPT * self._seconds + weight * seconds
        self._squares = KEPT * self._squares + weight * tokens * tokens
        self._products = KEPT * self._products + weight * tokens * seconds
        self._fit()

    def _fit(self) -> None:
        """Draw the line through what is remembered, by least squares; neither part of it is negative."""
        tokens, seconds = self._tokens / self._weight, self._seconds / self._weight
        prior = PRIOR * tokens * tokens
        spread = max(0.0, self._squares / self._weight - tokens * tokens)
        together = self._products / self._weight - tokens * seconds
        slope = (together + prior * seconds / tokens) / (spread + prior)
        self.each_s = min(max(0.0, slope), seconds / tokens)
        self.every_s = seconds - self.each_s * tokens
        self.is_known = self._runs >= LEAST_RUNS and spread > prior

    def padding_tokens(self, most: int) -> int | None:
        """The tokens that take as long as what every run costs: so much padding is as dear as a run of its own.

        Args:
            most: where tokens cost next to nothing.

        Returns:
            None: it is not known yet.
        """
        if not self.is_known:
            return None
        return most if self.each_s * most <= self.every_s else int(self.every_s / self.each_s)

    def of(self, tokens: float, runs: float = 1) -> float:
        """Seconds of so many tokens in so many runs."""
        return runs * self.every_s + tokens * self.each_s
