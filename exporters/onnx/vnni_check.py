"""Whether this processor's products of 8-bit numbers lose large sums."""

import numpy as np
import onnx_ir
import onnxruntime

WIDTH = 64


def products_saturate() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 are wrong here where numbers are large.

    x86 processors without VNNI add two products in 16 bits, which 2 * 255 * 127 does not fit. It is tried out, on the
    largest numbers there are, since which instructions ONNX Runtime chooses is its own affair.
    """
    activations = onnx_ir.val("activations", onnx_ir.DataType.UINT8, (1, WIDTH))
    weight = onnx_ir.val("weight", const_value=onnx_ir.tensor(np.full((WIDTH, WIDTH), 127, dtype=np.int8)))
    product = onnx_ir.node("MatMulInteger", [activations, weight])
    product.outputs[0].name, product.outputs[0].type = "sums", onnx_ir.TensorType(onnx_ir.DataType.INT32)
    graph = onnx_ir.Graph(
        [activations], product.outputs, nodes=[product], initializers=[weight], opset_imports={"": 21}
    )
    model = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"activations": np.full((1, WIDTH), 255, dtype=np.uint8)})
    return bool((sums != WIDTH * 255 * 127).any())
