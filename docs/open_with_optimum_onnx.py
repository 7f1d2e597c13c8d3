"""Open a merged bundle with optimum-onnx and compare its logits with those that the bundle carries.

For an environment of its own, as optimum-onnx needs an older transformers than this project uses:

    python3 -m venv optimum && optimum/bin/pip install 'optimum-onnx[onnxruntime]'
    optimum/bin/python docs/open_with_optimum_onnx.py BUNDLE
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from optimum.onnxruntime import ORTModelForSequenceClassification
from safetensors import safe_open


def read_cases(path: Path) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Name and arrays of every batch in `reference.safetensors`: the inputs, and PyTorch's `logits`."""
    with safe_open(path, framework="np") as file:
        names = json.loads(file.metadata()["cases"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    cases = []
    for index, name in enumerate(names):
        prefix = f"{index}."
        arrays = {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}
        cases.append((name, arrays))
    return cases


def main(bundle: Path) -> int:
    """Print the largest error of every batch; 0 where all of them are within the bound, 2 where it cannot be opened."""
    print(f"transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    inputs = [item["name"] for item in manifest["inputs"]]
    if manifest["kind"] != "merged" or "token_index" in inputs:
        what = "padding-free (it takes a token_index)" if manifest["kind"] == "merged" else "switchable"
        print(f"{bundle} is {what}: optimum feeds texts alone; export it with --merge and without --padding-free")
        return 2
    model = ORTModelForSequenceClassification.from_pretrained(bundle, trust_remote_code=False)
    cases = read_cases(bundle / "reference.safetensors")
    # That of the bundle's own check: fp16 and int8 come further from PyTorch than fp32 does.
    bound = float(manifest["parity"]["bound"])
    worst = 0.0
    for name, arrays in cases:
        inputs = {key: torch.from_numpy(array) for key, array in arrays.items() if key not in ("logits", "base_logits")}
        found = model(**inputs).logits.numpy()
        # NaN is larger than nothing, so it would pass unseen.
        error = float(np.nan_to_num(np.abs(found - arrays["logits"]), nan=np.inf).max())
        worst = max(worst, error)
        print(f"  {name:28} max abs error {error:.1e}")
    passed = worst <= bound
    print(f"{'passed' if passed else 'FAILED'}: max abs error {worst:.1e}, bound {bound:.1e}")
    return 0 if passed else 1


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"usage: {sys.argv[0]} BUNDLE, a folder that `export --merge` wrote")
    sys.exit(main(Path(sys.argv[1])))
