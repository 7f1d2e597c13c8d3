"""A customer of another task than the bundle's: what the message says to do."""

from dataclasses import replace
from pathlib import Path

import pytest

from qrlora_deploy.errors import MismatchError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime.bundle.bundle import TensorRecord, open_bundle
from qrlora_deploy.runtime.bundle.compatibility import check_customer_fits


@pytest.mark.parametrize(
    ("customer", "bundle", "outputs", "message"),
    [
        ("text-ranking", "text-regression", 1, "text-regression; export the bundle with task='reranker'"),
        ("text-regression", "text-ranking", 1, "text-ranking; export the bundle with task='regression'"),
        ("text-ranking", "text-classification", 4, "the bundle a text-classification"),
        ("feature-extraction", "text-classification", 4, "the bundle a text-classification"),
    ],
)
def test_another_task_is_offered_where_it_has_the_same_output(
    customer: str, bundle: str, outputs: int, message: str, switchable: Path, tiny_customer: Coefficients
) -> None:
    output = TensorRecord(name="logits", dtype="float32", shape=("batch", outputs))
    manifest = open_bundle(switchable).manifest.model_copy(update={"task": bundle, "outputs": (output,)})
    with pytest.raises(MismatchError) as caught:
        check_customer_fits(replace(tiny_customer, task=customer), manifest, "rr")
    assert str(caught.value).endswith(message)
