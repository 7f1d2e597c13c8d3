"""Ranks of the paper's smallest set-up on MPNet-base: the query projections of the last 4 layers at tau = 0.5.

    python benchmarks/mpnet_ranks.py CHECKPOINT [-o benchmarks/results/mpnet_ranks.json]

Expected: 158 + 163 + 163 + 157 = 641 coefficients. Exits with 1 where the ranks differ.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from qrlora_deploy.bench.environment import describe_environment
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.io.files import write_json
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare

TAU = 0.5
LAST_LAYERS = 4
QUERY = "attention.attn.q"
EXPECTED_RANKS = [158, 163, 163, 157]


def measure(checkpoint_folder: str) -> dict[str, Any]:
    """Factorize the four projections and return the record that is written."""
    checkpoint = open_checkpoint(checkpoint_folder)
    names = choose_targets(checkpoint.skeleton(), [QUERY], LAST_LAYERS)
    start = time.perf_counter()
    basis = factorize(checkpoint, names, EnergyShare(TAU))
    elapsed_s = time.perf_counter() - start
    return {
        "model": Path(checkpoint_folder).name,
        "tau": TAU,
        "targets": [
            {
                "name": target.name,
                "weight_sha256": target.weight_digest,
                "rank": target.rank,
                "energy": target.energy,
                "condition": target.condition,
            }
            for target in basis.targets
        ],
        "total_rank": basis.total_rank,
        "expected_ranks": EXPECTED_RANKS,
        "as_expected": [target.rank for target in basis.targets] == EXPECTED_RANKS,
        "elapsed_s": round(elapsed_s, 3),
        "environment": describe_environment().model_dump(mode="json"),
    }


def main() -> int:
    """Parse, measure, print, and write the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of an MPNet-base checkpoint in safetensors")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    record = measure(options.checkpoint)
    for target in record["targets"]:
        print(f"{target['name']}  rank {target['rank']}  energy {target['energy']:.6f}")
    print(f"total {record['total_rank']}, expected {sum(EXPECTED_RANKS)}")
    if options.output:
        write_json(options.output, record)
    return 0 if record["as_expected"] else 1


if __name__ == "__main__":
    sys.exit(main())
