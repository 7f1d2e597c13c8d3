"""From a spec to an open subject."""

from collections.abc import Sequence

from qrlora_deploy.bench.subjects import BundleSubject, Spec, Subject
from qrlora_deploy.bench.workload import Workload
from qrlora_deploy.runtime.bundle.bundle import Bundle, open_bundle


def open_subject(spec: Spec, workloads: Sequence[Workload], bundle: Bundle | None = None) -> Subject:
    """Open what `spec` says, ready for `workloads`.

    Args:
        bundle: that of the spec, where it has been checked before.

    Raises:
        InputError: it cannot be opened that way, or a workload does not fit it.
    """
    if spec.kind == "bundle":
        bundle = bundle or open_bundle(spec.path)
        if bundle.manifest.deciding_task.writes_text:
            # Imported here: encoders need nothing of it.
            from qrlora_deploy.bench.generation.subject import DecoderSubject

            return DecoderSubject(spec, workloads, bundle)
        return BundleSubject(spec, workloads, bundle)
    # Imported here: a serving host has no PyTorch.
    from qrlora_deploy.bench.peers import TorchSubject

    return TorchSubject(spec)
