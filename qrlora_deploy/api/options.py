"""Keywords of training, with the types of the settings they become; what is not given is the settings' default."""

from typing import TypedDict


class RunOptions(TypedDict, total=False):
    """Keywords of every run: see `RunSettings`."""

    epochs: int
    batch_size: int
    max_length: int
    seed: int
    device: str
    task: str


class WarmupOptions(RunOptions, total=False):
    """Keywords of `warmup`: see `WarmupSettings`."""

    mode: str
    learning_rate: float | None


class FleetTrainOptions(RunOptions, total=False):
    """Keywords of how each customer of a fleet is trained: see `TrainSettings`."""

    learning_rate: float | None
    head_learning_rate: float
    patience: int
    head: str
    metric: str | None
    tune_thresholds: bool


class TrainOptions(FleetTrainOptions, total=False):
    """Keywords of `train`: see `TrainSettings`."""

    dropout: bool
    trunk_cache: str
    packing: bool
    base_dtype: str
