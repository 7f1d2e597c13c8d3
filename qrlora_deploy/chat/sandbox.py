"""jinja2's immutable sandbox with bounds: what a chat template may use, and how much of it.

The sandbox keeps a template from Python's insides and from changing what it is given. It bounds neither time nor
memory, so filters and methods that can make much out of little are left out, and loops, calls and texts are counted.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from qrlora_deploy.chat.budget import MAX_BITS, MAX_NODES, MAX_TEXT, budget

TEXT_METHODS = {
    *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "split", "rsplit", "splitlines", "partition"),
    *("rpartition", "startswith", "endswith", "find", "rfind", "index", "count", "lower", "upper", "title"),
    *("capitalize", "casefold", "swapcase", "isdigit", "isalpha", "isalnum", "isspace", "isupper", "islower"),
    *("isnumeric", "isdecimal", "replace", "join"),
}
METHODS: dict[type, set[str]] = {
    str: TEXT_METHODS,
    dict: {"keys", "values", "items", "get"},
    list: {"index", "count"},
    tuple: {"index", "count"},
    **{kind: set() for kind in (int, float, bool, bytes, type(None))},
}
"""By the type of a value, its methods that a template may call."""

KEPT_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length"),
    *("list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "select", "selectattr"),
    *("sort", "sum", "title", "trim", "unique", "upper"),
)
MAX_INDENT = 16

STEPS, PARTS, TEXT = "counted steps", "counted parts", "counted text"
"""Filters that `_Counted` puts into a template; no template can write their names."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates count what they do in the `budget` of their rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, Generation],
            finalize=_finalize,
            cache_size=0,
        )
        self.filters = {name: FILTERS[name] for name in KEPT_FILTERS} | OWN_FILTERS
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}

    def bounded(self, source: str) -> Any:
        """The template of a text.

        Raises:
            TemplateError: it is none.
            SecurityError: it has recursive loops.
        """
        tree = _Counted().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None), None)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have `obj.attr`."""
        allowed = METHODS.get(type(obj))
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format` is no method that a template may call."""
        return None

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, which is refused before it is computed where it would be large."""
        _check_operator(operator, left, right)
        return budget().value(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """What a method, macro or function returns, counted."""
        own = getattr(__obj, "__self__", None)
        if isinstance(own, str) and __obj.__name__ == "replace":
            return _replace(__context, own, *args, **kwargs)
        if isinstance(own, str) and __obj.__name__ == "join":
            return _joined(__context, own, *args, **kwargs)
        budget().take()
        return budget().value(super().call(__context, __obj, *args, **kwargs))


class _Counted(NodeTransformer):
    """Puts counting into a template: each step of a loop, each list that is written, each joining of texts."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        if node.recursive:
            raise SecurityError("recursive loops are not supported")
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node, *args, **kwargs)
        node.iter = _filtered(node.iter, STEPS, written)
        return node

    def visit_Macro(self, node: nodes.Macro, *args: Any, **kwargs: Any) -> nodes.Node:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node, *args, **kwargs)
        # What stands in it as it is, counted at each call.
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(""), TEXT, written)))
        return node

    def visit_List(self, node: nodes.List, *args: Any, **kwargs: Any) -> nodes.Node:
        return _filtered(self.generic_visit(node, *args, **kwargs), PARTS)

    def visit_Dict(self, node: nodes.Dict, *args: Any, **kwargs: Any) -> nodes.Node:
        return _filtered(self.generic_visit(node, *args, **kwargs), PARTS)

    def visit_Tuple(self, node: nodes.Tuple, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        return _filtered(node, PARTS) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        first, *others = (_filtered(part, TEXT) for part in node.nodes)
        for other in others:
            first = nodes.Add(first, other)
        return first


def _filtered(node: Any, name: str, *arguments: int) -> Any:
    return nodes.Filter(node, name, [nodes.Const(argument) for argument in arguments], [], None, None)


@pass_context
def _steps(_: Any, values: Any, written: int) -> Iterator[Any]:
    for value in values:
        budget().take(written)
        yield value


@pass_context
def _parts(_: Any, value: Any) -> Any:
    return budget().value(value)


@pass_context
def _text(_: Any, value: Any, written: int = 0) -> str:
    budget().take(written)
    return budget().text(value)


@pass_context
def _finalize(_: Any, value: Any) -> str:
    return budget().text(value)


@pass_context
def _replace(_: Any, text: Any, old: str, new: str, count: int | None = None) -> str:
    text = budget().text(text)
    found = text.count(old)
    if found * len(new) > MAX_TEXT:
        raise SecurityError("it replaces too much")
    result: str = budget().value(text.replace(old, new, -1 if count is None else count))
    return result


@pass_context
def _join_filter(context: Any, values: Any, separator: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = FILTERS["map"](context, values, attribute=attribute)
    return _joined(context, separator, values)


def _joined(_: Any, separator: str, values: Any) -> str:
    parts = []
    for value in values:
        budget().take(len(separator))
        parts.append(budget().text(value))
    result: str = budget().value(separator.join(parts))
    return result


@pass_context
def _json(_: Any, value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    """As transformers' `tojson`: characters stay as they are, and none is written for HTML."""
    length = indent if isinstance(indent, int) else len(indent or "")
    if length > MAX_INDENT:
        raise SecurityError(f"it indents by more than {MAX_INDENT}")
    known = {name: options[name] for name in ("separators", "sort_keys") if name in options}
    parts = []
    for part in json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **known).iterencode(value):
        budget().take(len(part))
        parts.append(part)
    return "".join(parts)


OWN_FILTERS: dict[str, Callable[..., Any]] = {
    STEPS: _steps,
    PARTS: _parts,
    TEXT: _text,
    "string": _text,
    "replace": _replace,
    "join": _join_filter,
    "tojson": _json,
}


class Generation(Extension):
    """`{% generation %}`, by which transformers marks answers; what is in it is written as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    if len(form) > 100 or re.search(r"%\W*\d", form):
        raise SecurityError("its form of a date has widths")
    return datetime.datetime.now().strftime(form)


def _check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse an operator whose result would be large, by a SecurityError."""
    if operator == "+":
        if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            large = len(left) + len(right) > MAX_NODES
        else:
            large = isinstance(left, str) and isinstance(right, str) and len(left) + len(right) > MAX_TEXT
    elif operator == "%":
        large = isinstance(left, str) and re.search(r"\*|\d{3}", left) is not None
    else:
        large = _product_is_large(operator, left, right)
    if large:
        raise SecurityError(f"its {operator} makes too much")


def _product_is_large(operator: str, left: Any, right: Any) -> bool:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, (str, list, tuple)) and isinstance(other, int):
            return len(one) * other > (MAX_TEXT if isinstance(one, str) else MAX_NODES)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return (bits * max(right, 0) if operator == "**" else bits + right.bit_length()) > MAX_BITS
    return False
