#!/usr/bin/env bash
# ONNX Runtime 1.31.1, CPU: a weight of 4 or 8 bits that DequantizeLinear widens in blocks, before a MatMul of fp32, is a
# way to store the weight: by the operators' definitions the product is fp32's. The default optimisations fuse the two into
# MatMulNBits with the accuracy level of `session.qdq_matmulnbits_accuracy_level`, which is 4 where nobody sets it: then
# the activations are rounded to 8 bits too, in silence, and the answer is off by some thousandths. With the option at
# "1", or without optimisations, it is fp32's. No file says which of the two a session does, so a parity check that was
# made with one setting says nothing of the other.
# Seen on Linux x86-64, Python 3.11.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
cat > rounded.py <<'PYTHON'
import numpy as np, onnx, onnx.helper as helper, onnxruntime
from onnx import TensorProto, numpy_helper

ROWS, INPUTS, OUTPUTS, BLOCK = 4, 64, 32, 32
random = np.random.default_rng(0)
levels, scales = random.integers(-8, 8, (INPUTS, OUTPUTS)), random.random((INPUTS // BLOCK, OUTPUTS), dtype=np.float32)
x = random.normal(size=(ROWS, INPUTS)).astype(np.float32)
exact = x.astype(np.float64) @ (levels * scales.repeat(BLOCK, 0).astype(np.float64))


def off(kind: int, level: str | None, optimised: bool = True) -> float:
    """The largest difference to the product in fp64, by the largest answer."""
    nodes = [helper.make_node("DequantizeLinear", ["w", "scales"], ["wide"], axis=0, block_size=BLOCK),
             helper.make_node("MatMul", ["x", "wide"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROWS, size])
            for name, size in (("x", INPUTS), ("y", OUTPUTS))]
    weights = [helper.make_tensor("w", kind, [INPUTS, OUTPUTS], levels.ravel()), numpy_helper.from_array(scales, "scales")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights),
                              opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return float(np.abs(session.run(None, {"x": x})[0] - exact).max() / np.abs(exact).max())


for name, kind in (("int4", TensorProto.INT4), ("int8", TensorProto.INT8)):
    silent, asked, plain = off(kind, None), off(kind, "1"), off(kind, None, optimised=False)
    print(f"onnxruntime {onnxruntime.__version__}, {name}: nobody says {silent:.1e}, level 1 {asked:.1e}, "
          f"not optimised {plain:.1e} of the largest answer")
    assert silent > 1e-3 > 1e-5 > max(asked, plain)
PYTHON
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
"$scratch/venv/bin/python" rounded.py
