"""`qrlora-deploy predict`."""

from pathlib import Path

import click

from qrlora_deploy.cli.options import common, provider_option
from qrlora_deploy.cli.output import Output, Table


@click.command("predict")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--text", "texts", multiple=True, required=True, help="A text; repeatable.")
@click.option("--pair", "pairs", multiple=True, help="The second text of each, for a task on pairs; repeatable.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@provider_option
@common
def command(bundle: Path, texts: tuple[str, ...], pairs: tuple[str, ...], batch_size: int, provider: str) -> Output:
    """Run texts through BUNDLE: ONNX Runtime and a tokenizer, no PyTorch.

    \b
    Example:
      qrlora-deploy predict acme-bundle --text "where is my parcel?" --text "cancel my order"
    """
    if pairs and len(pairs) != len(texts):
        raise click.UsageError(f"--pair was given {len(pairs)} times and --text {len(texts)} times; give as many")
    from qrlora_deploy.runtime.bundle import open_bundle
    from qrlora_deploy.runtime.predictor import Predictor

    predictor = Predictor(open_bundle(bundle), provider)
    answers = predictor.predict(list(texts), list(pairs) or None, batch_size)
    rows = [[text, answer.label, answer.score] for text, answer in zip(texts, answers, strict=True)]
    return Output(answers, tables=[Table(["text", "label", "score"], rows)])
