"""`qrlora-deploy predict`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrlora_deploy.cli.options import EXISTING_FILE, FOLDER, CustomerId, common, provider_option, refuse_idle
from qrlora_deploy.cli.output import Output, Table, in_words
from qrlora_deploy.cli.ranges import COUNT
from qrlora_deploy.errors import InputError

if TYPE_CHECKING:
    from qrlora_deploy.runtime.customers.store import CustomerStore
    from qrlora_deploy.runtime.prediction.predictor import Predictor
    from qrlora_deploy.runtime.prediction.requests import Request

SHOWN = 4
"""Numbers of an embedding that a person is shown."""


@click.command("predict")
@click.argument("bundle", type=FOLDER)
@click.option("--text", "texts", multiple=True, help="A text; repeatable.")
@click.option("--pair", "pairs", multiple=True, help="The second text of each, for a task on pairs; repeatable.")
@click.option("--requests", type=EXISTING_FILE, help='JSON Lines with "text", "customer" and "pair".')
@click.option(
    "--customers",
    type=FOLDER,
    help="Folder of coefficients files, <customer>.safetensors, of a switchable bundle.",
)
@click.option(
    "--customer", "names", multiple=True, type=CustomerId(), help="Whose the texts are: once, or once per text."
)
@click.option("--repl", is_flag=True, help="Type texts and switch customers; new files go live at once.")
@click.option("--batch-size", type=COUNT, default=32, show_default=True, help="Texts of a run.")
@provider_option
@common
def command(
    bundle: Path,
    texts: tuple[str, ...],
    pairs: tuple[str, ...],
    requests: Path | None,
    customers: Path | None,
    names: tuple[str, ...],
    repl: bool,
    batch_size: int,
    provider: str,
) -> Output:
    """Run texts through BUNDLE: ONNX Runtime and a tokenizer, no PyTorch.

    In a switchable bundle each text is answered for its customer, or by the base where none is named.

    \b
    Examples:
      qrlora-deploy predict acme-bundle --text "where is my parcel?" --text "cancel my order"
      qrlora-deploy predict bundle --customers customers --customer acme --text "where is my parcel?"
      qrlora-deploy predict bundle --customers customers --requests requests.jsonl
      qrlora-deploy predict bundle --customers customers --repl
    """
    if sum((bool(texts), requests is not None, repl)) != 1:
        raise click.UsageError("give the texts by one of --text, --requests and --repl")
    if pairs and len(pairs) != len(texts):
        raise click.UsageError(f"--pair was given {len(pairs)} times and --text {len(texts)} times; give as many")
    if texts and len(names) not in (0, 1, len(texts)):
        raise click.UsageError(f"--customer was given {len(names)} times and --text {len(texts)} times")
    if names and customers is None:
        raise click.UsageError("--customer needs --customers, the folder with the coefficients files")
    if names and requests is not None:
        raise click.UsageError("--customer and --requests exclude each other: each request names its own")
    refuse_idle(["batch_size"], not repl, "the texts are given: --repl answers them one by one")
    if repl and click.get_current_context().params["as_json"]:
        raise click.UsageError("--repl prints a line per answer and no --json; give --requests a file for that")
    from qrlora_deploy.runtime.bundle.bundle import open_bundle
    from qrlora_deploy.runtime.prediction.predictor import Predictor

    asked = [] if repl else _requests(texts, pairs, names, requests)
    if customers is None and any(request.customer is not None for request in asked):
        raise InputError(f"{requests} names customers; give --customers, the folder with the coefficients files")
    predictor = Predictor(open_bundle(bundle), provider)
    store = _open_store(predictor, customers) if customers is not None else None
    if repl:
        from qrlora_deploy.cli.repl import converse

        return Output([], live=lambda stream: converse(predictor, store, names[0] if names else None, stream))
    return _answer(predictor, asked, batch_size)


def _open_store(predictor: "Predictor", folder: Path) -> "CustomerStore":
    from qrlora_deploy.cli.repl import report
    from qrlora_deploy.runtime.customers.store import CustomerStore

    if predictor.switchable is None:
        raise InputError(f"{predictor.bundle.folder} is a merged bundle and takes no --customers")
    return CustomerStore(predictor.switchable, folder, report)


def _requests(
    texts: tuple[str, ...], pairs: tuple[str, ...], names: tuple[str, ...], file: Path | None
) -> "list[Request]":
    from qrlora_deploy.runtime.prediction.requests import Request, read_requests

    if file is not None:
        return read_requests(file)
    for text in (*texts, *pairs):
        # Bytes of the command line that are no text arrive as surrogates.
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise InputError(f"{text!a} is not UTF-8 text")
    owners = [names[index % len(names)] if names else None for index in range(len(texts))]
    seconds: list[str | None] = [*pairs] or [None] * len(texts)
    return [
        Request(text=text, pair=pair, customer=owner) for text, pair, owner in zip(texts, seconds, owners, strict=True)
    ]


def _answer(predictor: "Predictor", requests: "list[Request]", batch_size: int) -> Output:
    pairs = [request.pair for request in requests if request.pair is not None]
    owners = [request.customer for request in requests]
    if not predictor.task.has_labels:
        if pairs:
            raise InputError(f"{predictor.bundle.folder} embeds single texts; leave the second ones out")
        return _embed(predictor, requests, batch_size)
    answers = predictor.predict([request.text for request in requests], pairs or None, batch_size, owners)
    record = [
        {"customer": request.customer, "text": request.text}
        | ({"pair": request.pair} if pairs else {})
        | {"label": answer.label}
        | {"labels": answer.labels, "score": answer.score, "logits": answer.logits}
        | ({"spans": answer.spans} if predictor.task.answers_words else {})
        for request, answer in zip(requests, answers, strict=True)
    ]
    rows = [
        [request.text, *([request.pair] if pairs else []), in_words(answer, predictor.task.answers_words), answer.score]
        for request, answer in zip(requests, answers, strict=True)
    ]
    columns = ["text", *(["pair"] if pairs else []), "label", "score"]
    if predictor.switchable is not None:
        columns = ["customer", *columns]
        rows = [[request.customer, *row] for request, row in zip(requests, rows, strict=True)]
    return Output(record, tables=[Table(columns, rows)])


def _embed(predictor: "Predictor", requests: "list[Request]", batch_size: int) -> Output:
    """Embeddings: whole under --json, their first numbers for a person."""
    owners = [request.customer for request in requests]
    found = predictor.embed([request.text for request in requests], batch_size, owners)
    record = [
        {"customer": request.customer, "text": request.text, "embedding": embedding.tolist()}
        for request, embedding in zip(requests, found, strict=True)
    ]
    rows = [
        [request.customer or "base", request.text, " ".join(f"{value:.4f}" for value in embedding[:SHOWN]) + " ..."]
        for request, embedding in zip(requests, found, strict=True)
    ]
    columns = ["customer", "text", f"embedding, {SHOWN} of {found.shape[1]} numbers"]
    start = 0 if predictor.switchable is not None else 1
    return Output(record, tables=[Table(columns[start:], [row[start:] for row in rows])])
