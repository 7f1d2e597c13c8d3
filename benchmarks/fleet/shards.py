"""Customers for the benchmark: samples of real labelled text, and bases of a shape with random weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.common.shapes import SHAPES, random_classifier
from qrlora_deploy.data.examples import Examples, read_examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.names import label_names

SPECIAL = ("[UNK]", "[PAD]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Shards:
    """What the customers' rows are drawn from.

    Attributes:
        domains: examples by name; each customer is a sample of one.
        labels: of all domains.
    """

    domains: dict[str, Examples]
    labels: tuple[str, ...]

    def write(self, path: Path, numbers: Iterable[int], rows: int) -> None:
        """One TSV file with a column of ids: each customer has `rows` rows of one domain, none twice."""
        names = sorted(self.domains)
        lines = ["customer\ttext\tlabel"]
        for number in numbers:
            examples = self.domains[names[number % len(names)]]
            for row in np.random.default_rng(number).permutation(len(examples))[:rows]:
                lines.append(f"{customer_name(number)}\t{examples.texts[row]}\t{examples.labels[row]}")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def customer_name(number: int) -> str:
    """The id of a customer."""
    return f"c{number:05}"


def read_shards(folder: Path) -> Shards:
    """Every `*train.tsv` of a folder, or of its subfolders: CLINC150's domains, banking77 and others.

    Raises:
        InputError: there is none.
    """
    files = sorted([*folder.glob("*train.tsv"), *folder.glob("*/train.tsv")])
    files = [file for file in files if not file.parent.name.startswith("_")]
    if not files:
        raise InputError(f"{folder} holds no *train.tsv")
    domains = {file.relative_to(folder).as_posix(): read_examples(file) for file in files}
    return Shards(
        domains, label_names([label for examples in domains.values() for label in Classification().named(examples)])
    )


def save_shape(folder: Path, shape: str, shards: Shards) -> None:
    """A base of a shape with random weights, and a tokenizer of the words in the data: enough for times."""
    words = sorted({word for examples in shards.domains.values() for text in examples.texts for word in text.split()})
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    family, sizes = SHAPES[shape]
    names = {
        "id2label": dict(enumerate(shards.labels)),
        "label2id": {label: index for index, label in enumerate(shards.labels)},
    }
    model = random_classifier(family, sizes | names | {"vocab_size": len(vocabulary), "pad_token_id": 1})
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
