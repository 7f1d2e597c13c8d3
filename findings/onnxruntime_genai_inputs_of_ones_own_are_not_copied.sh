#!/usr/bin/env bash
# onnxruntime-genai 0.18.0 with onnxruntime 1.32.0: `Generator.set_model_input(name, array)` copies nothing. What is written
# into the NumPy array afterwards is what the model reads at its next step, in the middle of an answer and without another
# call. Seen on Linux, Python 3.11, CPU.
#
# Expected by a reader who knows onnxruntime's `InferenceSession.run`: the values at the time of the call. It can be used on
# purpose, to change an input between two tokens for nothing; whoever reuses an array for the next generator changes the
# answers of the one before.
#
# The model here answers with the argmax of an input `bias [8]`, whatever the tokens are. `bias` points at 3, and after the
# second token the array is made to point at 5:
#
#     tokens: [3, 3, 5, 5]
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$scratch"
"$scratch/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
from onnx import TensorProto, helper

VOCABULARY, TENSORS = 8, ("key", "value")
value, node = helper.make_tensor_value_info, helper.make_node

nodes = [
    node("Shape", ["input_ids"], ["rows"], start=0, end=1),
    node("Shape", ["input_ids"], ["tokens"], start=1, end=2),
    node("Concat", ["rows", "tokens", "vocabulary"], ["shape"], axis=0),
    node("Expand", ["bias", "shape"], ["logits"]),
]
for part in TENSORS:
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
    nodes += [
        node("Concat", ["rows", "one", "tokens", "size"], [f"shape_{part}"], axis=0),
        node("ConstantOfShape", [f"shape_{part}"], [f"new_{part}"], value=zero),
        node("Concat", [f"past_key_values.0.{part}", f"new_{part}"], [f"present.0.{part}"], axis=2),
    ]
constants = [
    helper.make_tensor(name, TensorProto.INT64, [1], [number])
    for name, number in (("vocabulary", VOCABULARY), ("one", 1), ("size", 2))
]
inputs = [
    value("input_ids", TensorProto.INT64, ["batch", "tokens"]),
    value("attention_mask", TensorProto.INT64, ["batch", "all"]),
    value("bias", TensorProto.FLOAT, [VOCABULARY]),
    *(value(f"past_key_values.0.{part}", TensorProto.FLOAT, ["batch", 1, "past", 2]) for part in TENSORS),
]
outputs = [
    value("logits", TensorProto.FLOAT, ["batch", "tokens", VOCABULARY]),
    *(value(f"present.0.{part}", TensorProto.FLOAT, ["batch", 1, "all", 2]) for part in TENSORS),
]
graph = helper.make_graph(nodes, "bias", inputs, outputs, constants)
place = Path("model")
place.mkdir()
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), place / "model.onnx")
decoder = {
    "session_options": {"provider_options": []},
    "filename": "model.onnx",
    "head_size": 2,
    "hidden_size": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
}
about = {"type": "llama", "vocab_size": VOCABULARY, "context_length": 64, "decoder": decoder}
tokens = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
search = {"max_length": 64, "past_present_share_buffer": False, "do_sample": False}
(place / "genai_config.json").write_text(json.dumps({"model": about | tokens, "search": search}))

model = og.Model(str(place))
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=16, batch_size=1, do_sample=False)
generator = og.Generator(model, parameters)
bias = np.zeros(VOCABULARY, np.float32)
bias[3] = 1
generator.set_model_input("bias", bias)
generator.append_tokens(np.array([[1, 2]], np.int32))
found = []
for step in range(4):
    generator.generate_next_token()
    found.append(int(generator.get_next_tokens()[0]))
    if step == 1:
        bias[3], bias[5] = 0, 1
print("tokens:", found)
assert found == [3, 3, 5, 5], found
PYTHON
