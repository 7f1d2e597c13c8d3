"""How many adapters PEFT has added after a time; a line of JSON.

python -m benchmarks.server.peers.adapters FOLDER SECONDS
"""

import json
import sys
import time
from pathlib import Path

from peft import LoraConfig, get_peft_model

from benchmarks.server.load import name_of
from qrlora_deploy.formats.basis import read_basis
from qrlora_deploy.models.checkpoint import open_checkpoint


def main() -> None:
    """Add adapters until the time is over."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    config = LoraConfig(r=8, target_modules=list(read_basis(folder / "basis.safetensors").ranks))
    model = get_peft_model(open_checkpoint(str(folder / "base")).load_model(), config, adapter_name=name_of(0))
    begin, samples = time.perf_counter(), [0.0]
    while sum(samples) < seconds:
        before = time.perf_counter()
        model.add_adapter(name_of(len(samples)), config)
        samples.append(time.perf_counter() - before)
    last = samples[-20:]
    told = {"adapters": len(samples), "seconds": time.perf_counter() - begin, "first_ms": 1e3 * samples[1]}
    print(json.dumps(told | {"last_ms": 1e3 * sum(last) / len(last)}))


if __name__ == "__main__":
    main()
