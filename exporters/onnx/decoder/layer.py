"""The blocks of a decoder: attention with its cache in place, feed-forward parts, norms fused with residuals."""

import numpy as np

from exporters.onnx.decoder.branches import names_in_block
from exporters.onnx.decoder.nodes import MICROSOFT, Nodes
from exporters.onnx.decoder.products import Products
from exporters.onnx.decoder.rotary import rotary_tables
from exporters.onnx.decoder.shape import Shape
from exporters.onnx.decoder.tensors import Tensors

SEQLENS, TOTAL = "seqlens_k", "total_sequence_length"
NORM = "SimplifiedLayerNormalization"


class Blocks:
    """Adds the blocks of a decoder, from the first to the last.

    Args:
        nodes: the graph.
        tensors: of the base.
        products: of its layers.
        shape: sizes and settings.
    """

    def __init__(self, nodes: Nodes, tensors: Tensors, products: Products, shape: Shape) -> None:
        self._nodes, self._tensors, self._products, self._shape = nodes, tensors, products, shape

    def add_all(self, embedded: str) -> str:
        """From embeddings to the normed output of the last block, both `[batch, tokens, hidden]`."""
        shape, family = self._shape, self._shape.family
        residual, hidden = embedded, self.norm(embedded, self._gain(0, family.attention_norm))
        for layer in range(shape.layers):
            attended = self._attend(layer, hidden)
            attended = self._behind(layer, attended, family.after_attention)
            hidden, residual = self._add_and_norm(attended, residual, self._gain(layer, family.feed_forward_norm))
            grown = self._behind(layer, self._feed_forward(layer, hidden), family.after_feed_forward)
            last = layer + 1 == shape.layers
            gain = "model.norm" if last else self._gain(layer + 1, family.attention_norm)
            hidden, residual = self._add_and_norm(grown, residual, gain)
        return hidden

    def norm(self, x: str, gain: str) -> str:
        """`x` by its root mean square, times the weights `gain`."""
        return self._nodes.add(NORM, [x, self._norm_weight(gain)], axis=-1, epsilon=self._shape.epsilon, stash_type=1)

    def _behind(self, layer: int, x: str, path: str) -> str:
        return self.norm(x, self._gain(layer, path)) if path else x

    def _add_and_norm(self, x: str, residual: str, gain: str) -> tuple[str, str]:
        """The normed sum, and the sum."""
        count = len(self._nodes.nodes)
        hidden, _, _, total = self._nodes.add_many(
            f"Skip{NORM}",
            [x, residual, self._norm_weight(gain)],
            [f"normed_{count}", "", "", f"residual_{count}"],
            MICROSOFT,
            epsilon=self._shape.epsilon,
        )
        return hidden, total

    def _attend(self, layer: int, hidden: str) -> str:
        shape, nodes = self._shape, self._nodes
        projected = self._products.multiply(hidden, names_in_block(layer, shape.family.attention))
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        cos, sin = self._positions(layer)
        inputs = [*self._norm_heads(layer, projected), *past, SEQLENS, TOTAL, cos, sin]
        outputs = [f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"]
        attended = nodes.add_many("GroupQueryAttention", inputs, outputs, MICROSOFT, **self._settings(layer))[0]
        return self._products.one(attended, names_in_block(layer, [shape.family.output])[0])

    def _settings(self, layer: int) -> dict[str, float]:
        """Attributes of the attention of a layer; what is as the operator has it by itself is left out."""
        shape = self._shape
        window = shape.windows[layer]
        found: dict[str, float] = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "do_rotary": 1}
        found |= {"local_window_size": window} if window else {}
        found |= {"scale": shape.scale} if shape.scale else {}
        found |= {"softcap": shape.softcap} if shape.softcap else {}
        return found

    def _norm_heads(self, layer: int, projected: list[str]) -> list[str]:
        """Queries, keys and values; where queries and keys have norms head by head they come apart.

        The attention has inputs for these norms, which its kernel for the CPU refuses.
        """
        shape, family, nodes = self._shape, self._shape.family, self._nodes
        if not family.query_norm:
            return projected if len(projected) > 1 else [*projected, "", ""]
        if len(projected) == 1:
            sizes = nodes.constant("attention_sizes", [shape.queries, shape.keys, shape.keys], np.int64)
            projected = nodes.add_many("Split", [*projected, sizes], 3, axis=-1)
        queries, keys, values = projected
        apart = nodes.constant("apart", [0, 0, -1, shape.head_size], np.int64)
        joined = nodes.constant("joined", [0, 0, -1], np.int64)

        def normed(x: str, path: str) -> str:
            heads = nodes.add("Reshape", [x, apart])
            return nodes.add("Reshape", [self.norm(heads, self._gain(layer, path)), joined])

        return [normed(queries, family.query_norm), normed(keys, family.key_norm), values]

    def _positions(self, layer: int) -> tuple[str, str]:
        """Cosines and sines of a layer; layers with the same settings share them."""
        settings, shape = self._shape.rotary[layer], self._shape
        kind = self._shape.rotary.index(settings)

        def table(index: int) -> np.ndarray:
            return rotary_tables(settings, shape.rotary_size, shape.positions)[index]

        return (
            self._nodes.weight(f"rotary.{kind}.cos", lambda: table(0)),
            self._nodes.weight(f"rotary.{kind}.sin", lambda: table(1)),
        )

    def _feed_forward(self, layer: int, hidden: str) -> str:
        nodes, family = self._nodes, self._shape.family
        expanded = self._products.multiply(hidden, names_in_block(layer, family.feed_forward))
        if len(expanded) == 1:
            expanded = nodes.add_many("Split", expanded, 2, axis=-1, num_outputs=2)
        gate, up = expanded
        grown = nodes.add("Mul", [self._activate(gate), up])
        return self._products.one(grown, names_in_block(layer, [family.contract])[0])

    def _activate(self, gate: str) -> str:
        if self._shape.activation == "gelu_tanh":
            return self._nodes.add("FastGelu", [gate], MICROSOFT)
        if self._nodes.dtype == np.float32 or self._nodes.dtype == np.float16:
            return self._nodes.add("QuickGelu", [gate], MICROSOFT, alpha=1.0)
        # It has no kernel for bf16.
        return self._nodes.add("Mul", [gate, self._nodes.add("Sigmoid", [gate])])

    def _gain(self, layer: int, path: str) -> str:
        return names_in_block(layer, [path])[0]

    def _norm_weight(self, path: str) -> str:
        offset = self._shape.family.norm_offset
        return self._nodes.weight(
            f"{path}.weight", lambda: self._tensors.read(f"{path}.weight").astype(np.float32) + offset
        )
