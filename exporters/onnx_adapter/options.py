"""What the exporter of ONNX Runtime's adapters can be told; light enough for `--help`."""

from dataclasses import dataclass

from exporters.head_labels import check_head_labels, head_labels_option


@dataclass(frozen=True)
class AdapterOptions:
    """Options of the exporter "onnx-adapter".

    Attributes:
        head_labels: the number that the switchable bundle was exported with; 0: none.
    """

    head_labels: int = head_labels_option("The number that the switchable bundle was exported with.")

    def __post_init__(self) -> None:
        """Refuse a table that no memory holds, by an InputError."""
        check_head_labels(self.head_labels)
