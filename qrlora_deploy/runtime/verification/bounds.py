"""What a precision may cost: how far logits may be from those of PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """What a precision may cost.

    Attributes:
        relative: largest error of a logit, by `max(1, max |logit|)`.
        effect_correlation: least cosine of the customers' effect with PyTorch's; None: not judged.
        label_agreement: least share of rows with PyTorch's label; None: not judged.
    """

    relative: float
    effect_correlation: float | None = None
    label_agreement: float | None = None


BOUNDS = {
    "fp32": Bounds(1e-4),
    "fp16": Bounds(1e-2, 0.99),
    "bf16": Bounds(8e-2, 0.95),
    "int8": Bounds(0.25, 0.95, 0.75),
}
"""fp32: sums of a few hundred products in another order differ by some 1e-6, six layers of them
by some 1e-5; a wrong mask or a lost customer by 1e-2 and more.

fp16 and bf16: each rounding is off by at most 2^-11 = 5e-4 and 2^-8 = 4e-3. Roundings of a layer
add up like a random walk, and the residual stream carries them on: encoders of 2 to 12 layers
come out 1 to 4 roundings off. The bounds are 20 of them. A customer that is lost entirely can stay
below such an error, so the effect is judged by itself: its noise is the same few roundings,
which are a small part of any effect that decides a label.

int8: a rounding of an activation is off by up to 1/510 of the range of its whole tensor, which a few
outliers make large. Six layers come out 0.04 to 0.12 off, and 0.18 in a row whose mask has holes; the
bound is above that and catches a wrong scale. What matters more is judged by itself. On a trained base
customers that are trained, or made up to be as strong, keep a correlation of 0.97 to 0.99, and of 0.96
at least with calibrated scales. At 0.95 a third of an effect is noise, and a base whose output layer
was never trained is below: 0.86 to 0.92. A lost customer has about 0. Labels agree in 86 to 100 % of
the rows while accuracy changes by a percent: of 35 rows and 150 labels five are near ties. A quarter of
other labels is more than that by two standard errors."""

DECODER_BOUNDS = {
    "fp32": Bounds(1e-4, label_agreement=0.99),
    "fp16": Bounds(5e-2, 0.99),
    "bf16": Bounds(0.4, 0.95),
    "int8": Bounds(1.5, 0.95, 0.75),
    "int4": Bounds(8.0, 0.6),
}
"""Of decoders, whose errors are measured by the logits' standard deviation; labels are the likeliest tokens.

fp32: 30 layers come out at 3e-5. fp16: 1.3e-2 on 16 layers, 3.4e-2 on 30, and bf16 rounds 8 times coarser. int8 and
int4 round weights in blocks: 30 layers of 576 come out 0.5 and 3.6 off where it is most, the customers' effect keeps a
correlation of 0.99 and of 0.78, and 94 and 58 % of the likeliest tokens stay. So int4 is checked for being the graph
that was meant; whether it is good enough is a matter of each customer's task."""

NEAR_TIES = {"fp32": 2e-4, "fp16": 5e-2, "bf16": 0.4, "int8": 5e-2, "int4": 5e-2}
"""Of decoders: two logits that are so near, by the standard deviation of all, may change places with the size of the
batch. In fp32 sums of another order alone differ. In fp16 and bf16 they are rounded, as bounded above; with int8 and
int4 so are activations, where a sum that ends just beyond a border is rounded the other way."""
