"""Captured programs for ONNX without a second trace.

`torch.onnx` traces what it captured twice more, to decompose operators that it has no ONNX function for: half of the
time that an export takes. The graphs of most encoders hold a handful of such operators, each of which is another one
by a second name, or nothing at all in a model in use. Those are replaced here; any other graph takes torch's own way.

It computes all of it once more to write promotions of dtypes out, though the trace noted every value; they are taken.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.fx import Graph

ATEN = torch.ops.aten

RENAMED = {
    ATEN.__and__.Tensor: ATEN.bitwise_and.Tensor,
    ATEN.__or__.Tensor: ATEN.bitwise_or.Tensor,
    ATEN.min.other: ATEN.minimum.default,
    ATEN.max.other: ATEN.maximum.default,
}
"""Operators that are others by a second name."""

CASTS = (ATEN.to.dtype, ATEN.to.device, ATEN.to.dtype_layout)

PLAIN = (ATEN.contiguous.default, ATEN.detach.default, ATEN.alias.default)
"""Operators that change no number."""

ASSERTIONS = (
    ATEN._assert_scalar.default,
    ATEN._assert_tensor_metadata.default,
    ATEN.sym_constrain_range_for_size.default,
)
"""What holds of sizes; torch leaves it out of the graph, too."""


@contextmanager
def rewritten_programs() -> Iterator[None]:
    """Let programs whose graphs can be rewritten be exported without torch's decompositions, while this lasts."""
    decompose = torch.export.ExportedProgram.run_decompositions

    def rewrite_or_decompose(program: Any, table: Mapping[Any, Any] | None = None, **options: Any) -> Any:
        if not can_be_rewritten(program.graph, table or {}):
            return decompose(program, table, **options)
        rewrite(program)
        return program

    with patch.object(torch.export.ExportedProgram, "run_decompositions", rewrite_or_decompose), _noted_values():
        yield


def _noted_values() -> AbstractContextManager[Any]:
    """Let torch's pass for promotions of dtypes take the values that the trace noted, while this lasts."""
    try:
        from torch.onnx._internal.fx.passes import type_promotion
    except ImportError:
        # It is no public part of torch: where it lies elsewhere, it computes.
        return nullcontext()
    interpreter = type_promotion._TypePromotionInterpreter
    run_node = interpreter.run_node

    def take_noted(promoting: Any, node: Any) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return run_node(promoting, node)
        rule = type_promotion.get_type_promotion_rule(node, promoting.type_promotion_table)
        if rule is not None:
            with promoting._set_current_node(node):
                promoting._maybe_promote_node(node, rule)
        return node.meta["val"]

    return patch.object(interpreter, "run_node", take_noted)


def can_be_rewritten(graph: Graph, table: Mapping[Any, Any]) -> bool:
    """Whether `rewrite` leaves no operator that `table` decomposes or that writes to its input, and no inner graph."""
    known = {*RENAMED, *CASTS, *PLAIN, ATEN.dropout.default, ATEN.add_.Tensor}
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if node.op == "get_attr" or node.op.startswith("call") and not _is_plain_call(node):
            return False
        if node.target in known:
            if not _is_as_expected(node):
                return False
        elif node.target in table or _writes(node):
            return False
    return True


def rewrite(program: torch.export.ExportedProgram) -> None:
    """Replace, in place, the operators of a program whose graph `can_be_rewritten`."""
    graph = program.graph
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if node.target in RENAMED:
            node.target = RENAMED[node.target]
        elif node.target in CASTS and not _keeps_dtype(node):
            node.target, node.args = ATEN._to_copy.default, node.args[:1]
            node.kwargs = {"dtype": node.meta["val"].dtype}
        elif node.target in CASTS or node.target in PLAIN or node.target is ATEN.dropout.default:
            node.replace_all_uses_with(node.args[0])
            program.graph_signature.replace_all_uses(node.name, node.args[0].name)
        elif node.target in ASSERTIONS:
            graph.erase_node(node)
        elif node.target is ATEN.add_.Tensor:
            node.target = ATEN.add.Tensor
            # It took the place of its input: who read that afterwards reads the sum.
            node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)
    graph.eliminate_dead_code()


def _is_plain_call(node: Any) -> bool:
    """A call of one operator, or of a function of sizes, such as a sum of them."""
    if node.op != "call_function":
        return False
    return isinstance(node.target, torch._ops.OpOverload) or node.target.__module__ in ("_operator", "math", "torch")


def _is_as_expected(node: Any) -> bool:
    """Whether an operator is what `rewrite` makes of it."""
    if node.target is ATEN.dropout.default:
        return node.args[2] is False
    if node.target is ATEN.add_.Tensor:
        written = node.args[0]
        # Nobody else may see the memory that is written to.
        return _is_fresh(written) and all(_is_fresh(user) or user is node or user > node for user in written.users)
    return True


def _is_fresh(node: Any) -> bool:
    """Whether a node's value has memory of its own."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and not any(value.alias_info for value in schema.returns)


def _writes(node: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _keeps_dtype(node: Any) -> bool:
    kept: bool = node.meta["val"].dtype == node.args[0].meta["val"].dtype
    return kept
