#!/usr/bin/env bash
# ONNX Runtime, operator Attention of opset 23 with `softcap` and a boolean mask, CPU: 1.26.0 masks the scores and then
# caps them, so a key that is masked out keeps the score -softcap and takes part in the answer; 1.31.1 caps and then
# masks, and it does not. The same file gives other answers, neither with a warning. Where the cap is far above the
# scores the leak is small: a test with a cap of 50 does not see it, one with a cap of 2 does.
# (Versions between the two were not tried.) Seen on Linux x86-64, Python 3.11.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
cat > softcap.py <<'PYTHON'
import sys
import numpy as np, onnx, onnx.helper as helper, onnxruntime

HEADS, SIZE, LENGTH, CAP, SCALE = 2, 4, 6, 2.0, 0.5
kinds = {"q": onnx.TensorProto.FLOAT, "k": onnx.TensorProto.FLOAT, "v": onnx.TensorProto.FLOAT}
inputs = [helper.make_tensor_value_info(name, kind, [2, LENGTH, HEADS * SIZE]) for name, kind in kinds.items()]
inputs.append(helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, [2, 1, LENGTH, LENGTH]))
node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["out"], q_num_heads=HEADS, kv_num_heads=HEADS,
                        softcap=CAP, scale=SCALE)
graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)

random = np.random.default_rng(0)
feeds = {name: (3 * random.normal(size=(2, LENGTH, HEADS * SIZE))).astype(np.float32) for name in kinds}
feeds["mask"] = np.ones((2, 1, LENGTH, LENGTH), bool)
feeds["mask"][0, ..., 4:] = False
feeds["mask"][1, ..., :2] = False

def expected(cap_first: bool) -> np.ndarray:
    q, k, v = (feeds[name].reshape(2, LENGTH, HEADS, SIZE).transpose(0, 2, 1, 3) for name in "qkv")
    scores = SCALE * q @ k.transpose(0, 1, 3, 2)
    capped = lambda values: CAP * np.tanh(values / CAP)
    masked = lambda values: np.where(feeds["mask"], values, -np.inf)
    scores = masked(capped(scores)) if cap_first else capped(masked(scores))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).transpose(0, 2, 1, 3).reshape(2, LENGTH, HEADS * SIZE)

session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
found = session.run(None, feeds)[0]
errors = {order: float(np.abs(found - expected(order == "cap, then mask")).max())
          for order in ("cap, then mask", "mask, then cap")}
best = min(errors, key=errors.get)
print(f"onnxruntime {onnxruntime.__version__}: {best} (errors {errors})")
assert errors[best] < 1e-5 < 1e-2 < max(errors.values())
assert best == sys.argv[1], "the behaviour changed"
PYTHON
for pair in "1.26.0=mask, then cap" "1.31.1=cap, then mask"; do
    version=${pair%%=*}
    python3 -m venv "$scratch/$version"
    "$scratch/$version/bin/python" -m pip install --quiet --disable-pip-version-check \
        "onnxruntime==$version" onnx==1.23.2 numpy==2.4.6
    "$scratch/$version/bin/python" softcap.py "${pair#*=}"
done
