"""`qrlora_deploy.bench.plan` as it was: today's settings under their former name."""

from qrlora_deploy.bench.settings import PEERS, BenchSettings

__all__ = ["PEERS", "Plan"]

Plan = BenchSettings
