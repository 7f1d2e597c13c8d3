"""How the models of a family that write text are built: what differs from Llama's. Needs no PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """What differs between families of decoders with Llama's layout, for graphs that are built without PyTorch.

    A checkpoint with tensors that its description does not name is refused, so a lack here does no harm.

    Attributes:
        attention: paths in a block of the projections of queries, keys and values, or of the one that has all three.
        output: the layer behind the heads.
        feed_forward: gate and what it is multiplied with, or the layer that has both.
        contract: the layer behind them.
        query_norm: of each head of the queries; empty: there is none.
        key_norm: of the keys, as `query_norm`.
        attention_norm: before the attention.
        after_attention: of what the attention gives, before it is added; empty: there is none.
        feed_forward_norm: before the feed-forward part.
        after_feed_forward: of what that gives, before it is added; empty: there is none.
        norm_offset: what is added to the weights of a norm.
        scaled_embedding: whether embeddings are multiplied by the square root of their width.
        windows: whether its attention heeds the `sliding_window` of a config.
    """

    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    feed_forward: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    contract: str = "mlp.down_proj"
    query_norm: str = ""
    key_norm: str = ""
    attention_norm: str = "input_layernorm"
    after_attention: str = ""
    feed_forward_norm: str = "post_attention_layernorm"
    after_feed_forward: str = ""
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    windows: bool = False
