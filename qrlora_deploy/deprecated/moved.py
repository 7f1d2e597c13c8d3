"""Modules that have moved: an import of the old name gives the new module and a DeprecationWarning.

The names go with release 0.3.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "qrlora_deploy.adapter": "qrlora_deploy.models.adapter",
    "qrlora_deploy.basis": "qrlora_deploy.formats.basis",
    "qrlora_deploy.bench.plan": "qrlora_deploy.deprecated.bench_plan",
    "qrlora_deploy.bench.record": "qrlora_deploy.deprecated.bench_record",
    "qrlora_deploy.bench.tables": "qrlora_deploy.bench.sections",
    "qrlora_deploy.capacity": "qrlora_deploy.models.capacity",
    "qrlora_deploy.checkpoint": "qrlora_deploy.models.checkpoint",
    "qrlora_deploy.coefficients": "qrlora_deploy.formats.coefficients",
    "qrlora_deploy.combining": "qrlora_deploy.merging.combining",
    "qrlora_deploy.completeness": "qrlora_deploy.models.completeness",
    "qrlora_deploy.config_file": "qrlora_deploy.formats.config_file",
    "qrlora_deploy.doctor": "qrlora_deploy.inspection.doctor",
    "qrlora_deploy.factorizing": "qrlora_deploy.factorization.from_checkpoint",
    "qrlora_deploy.families": "qrlora_deploy.models.families",
    "qrlora_deploy.files": "qrlora_deploy.io.files",
    "qrlora_deploy.folding": "qrlora_deploy.merging.arithmetic",
    "qrlora_deploy.inspecting": "qrlora_deploy.inspection.describe",
    "qrlora_deploy.loading": "qrlora_deploy.models.loading",
    "qrlora_deploy.locating": "qrlora_deploy.models.locating",
    "qrlora_deploy.model_config": "qrlora_deploy.models.model_config",
    "qrlora_deploy.output_names": "qrlora_deploy.models.output_names",
    "qrlora_deploy.outputs": "qrlora_deploy.io.outputs",
    "qrlora_deploy.pivoted_qr.kernel": "qrlora_deploy.factorization.pivoted_qr.kernel",
    "qrlora_deploy.pivoted_qr.order": "qrlora_deploy.factorization.pivoted_qr.order",
    "qrlora_deploy.pivoted_qr.orthonormal": "qrlora_deploy.factorization.pivoted_qr.orthonormal",
    "qrlora_deploy.pivoted_qr.panel": "qrlora_deploy.factorization.pivoted_qr.panel",
    "qrlora_deploy.plotting": "qrlora_deploy.inspection.plots",
    "qrlora_deploy.provenance": "qrlora_deploy.formats.provenance",
    "qrlora_deploy.quickstart.data": "qrlora_deploy.data.sample",
    "qrlora_deploy.rank_rule": "qrlora_deploy.deprecated.rank_rule",
    "qrlora_deploy.reading": "qrlora_deploy.io.reading",
    "qrlora_deploy.runtime.backlog": "qrlora_deploy.runtime.customers.backlog",
    "qrlora_deploy.runtime.blocks": "qrlora_deploy.runtime.table.blocks",
    "qrlora_deploy.runtime.bucket_runner": "qrlora_deploy.runtime.sessions.bucket_runner",
    "qrlora_deploy.runtime.buckets": "qrlora_deploy.runtime.sessions.buckets",
    "qrlora_deploy.runtime.cuda": "qrlora_deploy.runtime.table.cuda",
    "qrlora_deploy.runtime.customer_files": "qrlora_deploy.formats.customer_files",
    "qrlora_deploy.runtime.devices": "qrlora_deploy.runtime.host.devices",
    "qrlora_deploy.runtime.directory": "qrlora_deploy.runtime.table.directory",
    "qrlora_deploy.runtime.external_data": "qrlora_deploy.runtime.bundle.external_data",
    "qrlora_deploy.runtime.fitting": "qrlora_deploy.runtime.bundle.compatibility",
    "qrlora_deploy.runtime.forking": "qrlora_deploy.runtime.host.forking",
    "qrlora_deploy.runtime.free_rows": "qrlora_deploy.runtime.table.free_rows",
    "qrlora_deploy.runtime.id_index": "qrlora_deploy.runtime.table.id_index",
    "qrlora_deploy.runtime.layout": "qrlora_deploy.runtime.bundle.row_layout",
    "qrlora_deploy.runtime.manifest": "qrlora_deploy.runtime.bundle.manifest",
    "qrlora_deploy.runtime.manifest_checks": "qrlora_deploy.runtime.bundle.manifest_checks",
    "qrlora_deploy.runtime.memory": "qrlora_deploy.runtime.table.memory",
    "qrlora_deploy.runtime.packed": "qrlora_deploy.runtime.customers.packed",
    "qrlora_deploy.runtime.packed_check": "qrlora_deploy.runtime.customers.packed_check",
    "qrlora_deploy.runtime.packed_header": "qrlora_deploy.runtime.customers.packed_header",
    "qrlora_deploy.runtime.packed_writer": "qrlora_deploy.runtime.customers.packed_writer",
    "qrlora_deploy.runtime.parity": "qrlora_deploy.runtime.verification.parity",
    "qrlora_deploy.runtime.polling": "qrlora_deploy.runtime.customers.polling",
    "qrlora_deploy.runtime.predictor": "qrlora_deploy.runtime.prediction.predictor",
    "qrlora_deploy.runtime.bundle.records": "qrlora_deploy.runtime.bundle.manifest_parts",
    "qrlora_deploy.runtime.records": "qrlora_deploy.runtime.bundle.manifest_parts",
    "qrlora_deploy.runtime.requests": "qrlora_deploy.runtime.prediction.requests",
    "qrlora_deploy.runtime.running": "qrlora_deploy.runtime.sessions.running",
    "qrlora_deploy.runtime.sealed_facts": "qrlora_deploy.runtime.bundle.sealed_facts",
    "qrlora_deploy.runtime.session": "qrlora_deploy.runtime.sessions.session",
    "qrlora_deploy.runtime.store": "qrlora_deploy.runtime.customers.store",
    "qrlora_deploy.runtime.store_events": "qrlora_deploy.runtime.customers.events",
    "qrlora_deploy.runtime.switchable": "qrlora_deploy.runtime.sessions.switchable",
    "qrlora_deploy.runtime.token_index": "qrlora_deploy.runtime.sessions.token_index",
    "qrlora_deploy.runtime.tokenizing": "qrlora_deploy.runtime.prediction.tokenizing",
    "qrlora_deploy.runtime.watching": "qrlora_deploy.runtime.customers.watching",
    "qrlora_deploy.runtime.worker": "qrlora_deploy.runtime.sessions.worker",
    "qrlora_deploy.shards": "qrlora_deploy.models.shards",
    "qrlora_deploy.strict": "qrlora_deploy.io.strict",
    "qrlora_deploy.targets": "qrlora_deploy.models.targets",
    "qrlora_deploy.temporary": "qrlora_deploy.io.temporary",
    "qrlora_deploy.text": "qrlora_deploy.errors",
    "qrlora_deploy.tokens": "qrlora_deploy.tokenization",
    "qrlora_deploy.pivoted_qr": "qrlora_deploy.factorization.pivoted_qr",
    "exporters.onnx.biases": "exporters.onnx.bias_folding",
    "exporters.onnx.customers": "exporters.onnx.synthetic_customers",
    "exporters.onnx.joining": "qrlora_deploy.deprecated.onnx_joining",
    "exporters.onnx.packing": "exporters.onnx.padding_free",
    "exporters.onnx.saturation": "exporters.onnx.vnni_check",
    "exporters.onnx.sealing": "exporters.onnx.bundle_files",
    "exporters.onnx.showing": "exporters.onnx.ablation",
    "qrlora_deploy.tokenizer_files": "qrlora_deploy.models.tokenizer_files",
    "qrlora_deploy.tokens.long_runs": "qrlora_deploy.tokenization.long_runs",
    "qrlora_deploy.tokens.text_cut": "qrlora_deploy.tokenization.text_cut",
    "qrlora_deploy.tokens.tokenizer_facts": "qrlora_deploy.tokenization.tokenizer_facts",
    "qrlora_deploy.training.cached": "qrlora_deploy.training.cached_trainer",
    "qrlora_deploy.training.cutting": "qrlora_deploy.data.cutting",
    "qrlora_deploy.training.data": "qrlora_deploy.data.examples",
    "qrlora_deploy.training.fleet.plan": "qrlora_deploy.deprecated.fleet_plan",
    "qrlora_deploy.training.fleet.table": "qrlora_deploy.training.fleet.adam",
    "qrlora_deploy.training.graphed": "qrlora_deploy.training.trunk.cuda_graph",
    "qrlora_deploy.training.head": "qrlora_deploy.deprecated.training_head",
    "qrlora_deploy.training.json_lines": "qrlora_deploy.data.json_lines",
    "qrlora_deploy.training.labels": "qrlora_deploy.data.labels",
    "qrlora_deploy.training.layout": "qrlora_deploy.training.trunk.padding_free",
    "qrlora_deploy.training.reading": "qrlora_deploy.data.readers",
    "qrlora_deploy.training.row_scan": "qrlora_deploy.data.row_scan",
    "qrlora_deploy.training.tasks": "qrlora_deploy.deprecated.training_tasks",
    "qrlora_deploy.training.trunk_cache": "qrlora_deploy.training.trunk.cache",
    "qrlora_deploy.training.trunk_memory": "qrlora_deploy.training.trunk.memory",
    "qrlora_deploy.training.upper": "qrlora_deploy.training.trunk.upper",
    "qrlora_deploy.weight_files": "qrlora_deploy.models.weight_files",
}
"""Old dotted name of a module to its name now."""


class MovedModules:
    """A finder and loader (`importlib.abc`) of the modules of `MOVED` under their old names."""

    def find_spec(self, fullname: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        """The spec of a moved module, or None for every other name."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None  # type: ignore[arg-type]  # no import of the ABC

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module: the import system writes into what it gets, and today's module stays as it is."""
        _warn(spec.name, MOVED[spec.name])
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Put today's module in the place of the empty one."""
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def names_of(*modules: str, here: str | None = None) -> Callable[[str], Any]:
    """A `__getattr__` for what has the name of a former module: it offers what that module offered.

    Args:
        modules: dotted names of those that hold its parts now.
        here: dotted name of what asks; None: the package of the first one.
    """
    place = here or modules[0].rpartition(".")[0]

    def get(name: str) -> Any:
        for module in () if name.startswith("__") else modules:
            found = getattr(importlib.import_module(module), name, None)
            if found is not None:
                _warn(f"{place}.{name}", f"{module}.{name}")
                return found
        raise AttributeError(f"module {place!r} has no attribute {name!r}")

    return get


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes with release 0.3", DeprecationWarning, stacklevel=3)


def install() -> None:
    """Answer imports of old names from now on; first of all, for a moved package still finds its own files."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
