"""Every tolerance of the tests, with its reason. Compare whole arrays: `np.testing.assert_allclose(a, b, **NAME)`.

Both rtol and atol are always given: numpy's defaults differ between functions.
"""

from typing import TypedDict


class Tolerance(TypedDict):
    """Bounds of `numpy.testing.assert_allclose` and `torch.testing.assert_close`."""

    rtol: float
    atol: float


EXACT: Tolerance = {"rtol": 0.0, "atol": 0.0}
"""Same operations in the same order: zero coefficients, reading back, A -> B -> A in one session."""

ORTHONORMAL: Tolerance = {"rtol": 0.0, "atol": 1e-12}
"""`Q^T Q = I` in fp64. Householder QR loses about eps * sqrt(k): 6e-15 at k = 768."""

ENERGIES: Tolerance = {"rtol": 0.0, "atol": 1e-10}
"""Cumulated energy shares of two fp64 factorizations. Both are backward stable, so the diagonals
differ by about eps * k relative to the largest; squares and sums keep that order."""

RECONSTRUCTION: Tolerance = {"rtol": 0.0, "atol": 1e-12}
"""`||QR - W|| / ||W||` element by element in fp64, after division by the largest element."""

BASIS_FP32: Tolerance = {"rtol": 6e-8, "atol": 1e-12}
"""fp64 factors after their one cast to fp32: half a unit in the last place is 2^-24 = 6e-8."""

FP32_SIDE_BRANCH: Tolerance = {"rtol": 1e-5, "atol": 1e-5}
"""Merged weights against the side branch through 2 to 12 layers of fp32: sums in another order,
about eps * sqrt(width) per layer, 1e-6 at 32 columns, with a factor of ten for depth."""

GRADIENT_OF_FP32: Tolerance = {"rtol": 2e-6, "atol": 1e-9}
"""A gradient of fp32 coefficients in an fp64 model: one rounding each of the coefficients, the gradient and the scale,
2^-24 = 6e-8, with a factor of ten for what the model makes of the first."""

FP32_ONNX: Tolerance = {"rtol": 1e-4, "atol": 1e-4}
"""ONNX Runtime against PyTorch in fp32 with TF32 off: fused kernels use other exponentials and
other sums. The same bound as the bundle's parity check: 1e-4 * max(1, max |logit|)."""

ONE_ROUNDING: dict[str, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Relative error of one rounding to a storage dtype (unit round-off), the bound on merge and unmerge per weight."""

FP16_ROWS: Tolerance = {"rtol": 5e-3, "atol": 5e-3}
"""A row of an fp16 graph alone and among others: other shapes give sums in another order, whose
last bits decide roundings of 2^-11 = 5e-4; a few of them through the layers."""

FP16_DEVICES: Tolerance = {"rtol": 0.0, "atol": 2e-2}
"""An fp16 graph on a CPU against a GPU, logits of the order of 1: each is within the parity bound of 1e-2 of
PyTorch's fp32."""

FP16_TABLE: Tolerance = {"rtol": 2e-3, "atol": 2e-3}
"""An fp16 table against an fp32 one under the same fp32 graph: each coefficient is off by at most 2^-11 = 5e-4
of itself, and a logit by about as much of the customer's effect, which is up to a few units."""

INT8_ROWS: Tolerance = {"rtol": 0.0, "atol": 0.1}
"""A row of an int8 graph alone and among others: activations get one scale for the whole tensor, so
other rows move it by up to 1/510 of the tensor's range in every layer. 0.06 at logits of 1.1 in the
tiny model of two layers; two customers differ there by 0.77."""

CALIBRATED_ROWS: Tolerance = {"rtol": 0.0, "atol": 0.02}
"""As `INT8_ROWS` with constant scales: only a rounding that is a tie in fp32 may fall to the other side."""

DECODER_FP32: Tolerance = {"rtol": 0.0, "atol": 1e-4}
"""Logits of a decoder in fp32 by their standard deviation: other sums and another softmax, through the cache too."""

DECODER_FP16: Tolerance = {"rtol": 0.0, "atol": 0.05}
"""As `DECODER_FP32` in fp16: roundings of 2^-11 = 5e-4 through three layers with random weights, 0.02 at most."""

ANSWER_LOSS = 1e-4
"""Of the mean loss of an answer's token, ONNX Runtime's decoder against PyTorch's in fp32; losses are 3 to 6."""
