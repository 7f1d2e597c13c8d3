"""From a spec to an open subject."""

from collections.abc import Sequence

from qrlora_deploy.bench.subjects import BundleSubject, Spec, Subject
from qrlora_deploy.bench.workload import Workload


def open_subject(spec: Spec, workloads: Sequence[Workload]) -> Subject:
    """Open what `spec` says, ready for `workloads`.

    Raises:
        InputError: it cannot be opened that way, or a workload does not fit it.
    """
    if spec.kind == "bundle":
        return BundleSubject(spec, workloads)
    # Imported here: a serving host has no PyTorch.
    from qrlora_deploy.bench.peers import TorchSubject

    return TorchSubject(spec)
