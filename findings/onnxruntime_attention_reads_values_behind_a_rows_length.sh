#!/usr/bin/env bash
# ONNX Runtime 1.31.1, operator Attention of opset 24, CPU: `nonpad_kv_seqlen` says how many keys and values of a row
# count, but those behind it are still multiplied, by weights of zero, and zero times NaN is NaN. So what a padded buffer
# holds behind a row's length (nothing that was ever written, or another row's numbers) can spoil that row, although
# numbers there, however large, change nothing. On CUDA (an H200) flash and memory-efficient attention are not
# affected, the kernel that writes all scores is. Fill such places with finite numbers, or with numbers of the same row.
# Seen on Linux x86-64, Python 3.11.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
cat > behind.py <<'PYTHON'
import numpy as np, onnx, onnx.helper as helper, onnxruntime

HEADS, SIZE, LENGTH, COUNT = 2, 4, 6, 3
kind = onnx.TensorProto.FLOAT
inputs = [helper.make_tensor_value_info(name, kind, [2, LENGTH, HEADS * SIZE]) for name in "qkv"]
inputs.append(helper.make_tensor_value_info("lengths", onnx.TensorProto.INT64, [2]))
node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["out"], q_num_heads=HEADS,
                        kv_num_heads=HEADS)
graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("out", kind, None)])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

random = np.random.default_rng(0)
feeds = {name: random.normal(size=(2, LENGTH, HEADS * SIZE)).astype(np.float32) for name in "qkv"}
feeds["lengths"] = np.array([LENGTH, COUNT], dtype=np.int64)

def answer(behind: float) -> np.ndarray:
    filled = {name: feeds[name].copy() for name in "kv"}
    for array in filled.values():
        array[1, COUNT:] = behind
    return session.run(None, feeds | filled)[0]

plain, large, nothing = answer(0.0), answer(1e6), answer(np.nan)
print(f"onnxruntime {onnxruntime.__version__}: 1e6 behind the row changes {np.abs(large - plain).max():.1e}; NaN makes "
      f"{np.isnan(nothing[1]).mean():.0%} of the row and {np.isnan(nothing[0]).mean():.0%} of the other one NaN")
assert np.abs(large - plain).max() < 1e-6 and np.isnan(nothing[1]).all() and np.isfinite(nothing[0]).all()
PYTHON
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
"$scratch/venv/bin/python" behind.py
