"""How the models of a family that write text are built: what differs from Llama's. Needs no PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """What differs between families of decoders with Llama's layout, for graphs that are built without PyTorch.

    A checkpoint with tensors that its description does not name is refused, so a lack here does no harm.

    Attributes:
        query: path in a block of the projection of queries; key and value are beside it. Empty: `packed` has all three.
        query_norm: of each head of the queries; key_norm: of the keys. Empty: there are none.
        gate: the feed-forward part's gate; up: beside it. Empty: `packed_feed_forward` has both, gate first.
        attention_norm: before the attention.
        after_attention: of what the attention gives, before it is added. Empty: there is none.
        feed_forward_norm: before the feed-forward part.
        after_feed_forward: of what that gives, before it is added. Empty: there is none.
        norm_offset: what is added to the weights of a norm.
        scaled_embedding: whether embeddings are multiplied by the square root of their width.
        windows: whether a `sliding_window` of the config is in force where no `use_sliding_window` denies it.
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
