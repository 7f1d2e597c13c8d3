"""The tuner: which layers of a model get side branches, and which basis they share."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.formats.basis import Basis, BasisTarget, read_basis
from qrlora_deploy.integrations.peft.config import QRLoRAConfig
from qrlora_deploy.integrations.peft.layer import NOBODY, QRLoRALayer
from qrlora_deploy.integrations.pytorch import check_weights
from qrlora_deploy.models.adapter import resolve_layer

PREFIX = "qrlora_"


class QRLoRAModel(BaseTuner):
    """A model with customers of one basis as adapters of PEFT."""

    prefix = PREFIX
    tuner_layer_cls = QRLoRALayer
    target_module_mapping: dict[str, list[str]] = {}

    basis: Basis | None = None
    targets: dict[str, BasisTarget]

    def _check_new_adapter_config(self, config: Any) -> None:
        """Open the basis of the first adapter, and refuse others of another one: the factors are there once."""
        super()._check_new_adapter_config(config)
        if self.basis is None:
            self._open_basis(config)
        elif config.basis_digest not in ("", self.basis.digest):
            raise BasisMismatchError(
                f"the adapters that are there are of basis {self.basis.digest[:12]}, and this one is of "
                f"{config.basis_digest[:12]}; a model takes adapters of one basis"
            )
        config.basis_digest = self.basis.digest if self.basis else ""

    def _open_basis(self, config: QRLoRAConfig) -> None:
        if not config.basis_file:
            raise InputError("QRLoRAConfig: basis_file is empty; give the basis that the adapter is of")
        basis = read_basis(Path(config.basis_file))
        if config.basis_digest not in ("", basis.digest):
            raise BasisMismatchError(
                f"the adapter is of basis {config.basis_digest[:12]}, but {config.basis_file} is {basis.digest[:12]}"
            )
        check_weights(self.model, basis)
        self.targets = {resolve_layer(self.model, target.name)[0]: target for target in basis.targets}
        self.basis = basis

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        peft_config.target_modules = list(self.targets)
        return peft_config

    def _check_target_module_exists(self, peft_config: QRLoRAConfig, key: str) -> bool:  # type: ignore[override]
        # Exact paths: PEFT's own matching takes every layer whose path ends so.
        return key in self.targets

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, QRLoRALayer) else QRLoRALayer(target, self.targets[current_key])
        layer.add(adapter_name, peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a mixed batch to the layers, and to heads that adapters have of their own."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is for answering: call model.eval() first")
        unknown = sorted(set(names) - {NOBODY, *self.peft_config})
        if unknown:
            raise ValueError(f"adapter_names: there is no adapter {', '.join(unknown)}")
        hook = partial(_with_names, names=list(names))
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (QRLoRALayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _with_names(_module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}
