"""Text in, labels or embeddings out, from a bundle alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qrlora_deploy.errors import InputError, MalformedInputError, MismatchError, UnknownCustomerError, argument
from qrlora_deploy.runtime.bundle.bundle import Bundle, check_no_decoder
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.prediction.tokenizing import TextEncoder, as_texts, batches, check_texts
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.runners import make_runner, open_graph
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from qrlora_deploy.tasks.answering import Answering
from qrlora_deploy.tasks.base import Span
from qrlora_deploy.tasks.registry import task_named
from qrlora_deploy.tokenization.words import NO_TOKEN, LocatedWords


@dataclass(frozen=True)
class Prediction:
    """The answer for one text; shown without its logits, which may be hundreds of numbers.

    Attributes:
        label: the name of the most likely output; of a regression the name of its only one; of tagged words that of the
            surest span.
        score: its probability; of a regression the value itself.
        logits: what the model gave, one per label of the customer; of tagged words so many for each word, none for one
            that was cut off.
        labels: the names of all outputs that apply; of tagged words the tag of each.
        spans: what was found in the text, where words are tagged.
    """

    label: str
    score: float
    logits: tuple[float, ...] | tuple[tuple[float, ...], ...] = field(repr=False)
    labels: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()


class Predictor:
    """A bundle made ready to answer.

    Args:
        bundle: an open bundle, merged or switchable; or an open session, with its bundle and customers.
        provider: "cpu", "cuda", "cuda:1" or "tensorrt", or a `Device` with options; "cpu" if None.
            A session has its own.
        threads: threads within an operator. A session has its own.
        buckets: run in these shapes only; on CUDA as captured graphs. A session has its own.
        session: of this very bundle, as an earlier version wanted it beside the bundle.

    Attributes:
        task: of the bundle.
        switchable: the session that customers are loaded into; None for a merged bundle.

    Raises:
        InputError: the session is of another bundle, or an option is given that it has already.
        ProviderError: the provider does not load.
        FileFormatError: the tokenizer or model cannot be opened.
    """

    def __init__(
        self,
        bundle: Bundle | SwitchableSession,
        provider: str | Device | None = None,
        threads: int | None = None,
        buckets: Buckets | None = None,
        session: SwitchableSession | None = None,
    ) -> None:
        if isinstance(bundle, SwitchableSession):
            if session is not None and session is not bundle:
                raise InputError("two sessions were given; give the one that is to answer")
            session = bundle
            bundle = session.bundle
        if session is not None:
            _check_session(bundle, session, {"provider": provider, "threads": threads, "buckets": buckets})
        self.bundle = bundle
        self.task = task_named(bundle.manifest.task)
        check_no_decoder(bundle)
        self.encoder = TextEncoder(bundle)
        self.switchable = session
        provider = provider or "cpu"
        if bundle.manifest.kind == "merged":
            opened = open_graph(bundle, provider, threads, cuda_graph=buckets is not None)
            self._merged = make_runner(opened, bundle, provider, buckets, threads=threads)
        elif session is None:
            self.switchable = SwitchableSession(bundle, provider, threads=threads, buckets=buckets)

    def predict(
        self,
        texts: Iterable[str],
        pairs: Iterable[str] | None = None,
        batch_size: int = 32,
        customers: Iterable[str | None] | None = None,
    ) -> list[Prediction]:
        """Answer every text, in the order given.

        Args:
            texts: the texts, or the first ones of the pairs.
            pairs: the second texts, one per text; a task such as text-ranking needs them.
            batch_size: rows per run. Texts of similar length share a batch, so little is padded.
            customers: of a switchable bundle, one per text, None being the base; all base if None.

        Raises:
            InputError: the numbers of texts, pairs and customers differ, the batch size is not
                positive, a customer is not there, or a text cannot be read (its index is named):
                see `TextEncoder.encode`.
            QrloraError: the model fails.
        """
        if not self.task.has_labels:
            raise MalformedInputError(f"{self.bundle.folder} answers with embeddings, not labels; call embed()")
        texts = as_texts(texts, "texts")
        pairs = None if pairs is None else as_texts(pairs, "pairs")
        if self.task.needs_pairs and pairs is None:
            what = f"a bundle for {self.task.name} scores pairs of texts"
            raise MalformedInputError(f"{what}; give the second texts too, by {argument('pairs')}")
        if pairs is not None and self.task.answers_words:
            raise MalformedInputError(f"a {self.task.name} tags the words of one text and takes no pairs")
        rows = self._rows(texts, pairs, batch_size, customers)
        found = {row: self._prediction(logits, labels, words) for row, logits, labels, words in rows}
        return [found[index] for index in range(len(texts))]

    def embed(
        self, texts: Iterable[str], batch_size: int = 32, customers: Iterable[str | None] | None = None
    ) -> np.ndarray:
        """The embedding of every text, in the order given.

        Args:
            texts: as in `predict`.
            batch_size: as in `predict`.
            customers: as in `predict`.

        Returns:
            `[n, width]` fp32, of length 1 where the base's are.

        Raises:
            InputError: as `predict`; or the bundle answers with labels.
            QrloraError: the model fails.
        """
        if self.task.has_labels:
            raise MalformedInputError(f"{self.bundle.folder} answers with labels, not embeddings; call predict()")
        texts = as_texts(texts, "texts")
        found = np.empty((len(texts), self.bundle.manifest.width), dtype=np.float32)
        for row, embedding, *_ in self._rows(texts, None, batch_size, customers):
            found[row] = embedding
        return found

    def _rows(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        batch_size: int,
        customers: Iterable[str | None] | None,
    ) -> Iterator[tuple[int, np.ndarray, Answering, LocatedWords | None]]:
        """The number of each text, what the model gave, how that is answered, and its words where these are;
        rows of similar length together."""
        owners = [None] * len(texts) if customers is None else _owners(customers)
        if len(owners) != len(texts):
            raise MalformedInputError(f"there are {len(texts)} texts but {len(owners)} customers")
        # All of them before the first runs, and before their lengths are compared.
        check_texts(texts, range(len(texts)), "text")
        check_texts(pairs or (), range(len(texts)), "pair")
        for rows in batches(texts, pairs, batch_size):
            firsts = [texts[row] for row in rows]
            words: Sequence[LocatedWords | None] = [None] * len(rows)
            if self.task.answers_words:
                inputs, words = self.encoder.encode_words(firsts, rows)
            else:
                inputs = self.encoder.encode(firsts, None if pairs is None else [pairs[row] for row in rows], rows)
            yield from zip(rows, *self._answer(inputs, [owners[row] for row in rows]), words, strict=True)

    def _answer(
        self, inputs: dict[str, np.ndarray], owners: Sequence[str | None]
    ) -> tuple[np.ndarray, Sequence[Answering]]:
        if self.switchable is not None:
            return self.switchable.run(inputs, owners)
        if any(owner is not None for owner in owners):
            raise UnknownCustomerError(
                f"{self.bundle.folder} is a merged bundle: it holds one customer, who has no name in it"
            )
        return self._merged.run(inputs), [self.bundle.manifest.answering] * len(owners)

    def _prediction(self, logits: np.ndarray, answering: Answering, words: LocatedWords | None) -> Prediction:
        answer = answering.answer(self.task, logits, words)
        own = answering.own(logits)
        shown = _floats(own) if words is None else _of_words(own, words)
        return Prediction(answer.label, answer.score, shown, answer.labels, answer.spans)


def _of_words(logits: np.ndarray, words: LocatedWords) -> tuple[tuple[float, ...], ...]:
    return tuple(() if token == NO_TOKEN else _floats(logits[token]) for token in words.tokens)


def _floats(logits: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in logits.reshape(-1))


def _check_session(bundle: Bundle, session: SwitchableSession, options: Mapping[str, object]) -> None:
    same = bundle is session.bundle or (
        bundle.folder.resolve() == session.bundle.folder.resolve() and bundle.manifest == session.bundle.manifest
    )
    if not same:
        raise MismatchError(
            f"the session is of {session.bundle.folder}, not of {bundle.folder}; give Predictor the session alone"
        )
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(f"{', '.join(given)}: the session has its own; give it to SwitchableSession instead")


def _owners(customers: Iterable[str | None]) -> list[str | None]:
    if isinstance(customers, (str, bytes)):
        raise MalformedInputError("customers must be a list with one for each text, not one name; repeat it in a list")
    owners = list(customers)
    for number, owner in enumerate(owners):
        if owner is not None and not isinstance(owner, str):
            raise MalformedInputError(f"customer {number} is of the type {type(owner).__name__}, not a name")
    return owners
