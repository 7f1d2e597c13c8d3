"""From settings to what is opened: the subjects with their names and roles, and their shapes."""

from collections.abc import Sequence
from pathlib import Path

from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.settings import BenchSettings
from qrlora_deploy.bench.subjects import Spec, with_graphs
from qrlora_deploy.bench.workload import Workload, shaped_workloads, text_workloads
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.runtime.bundle.bundle import Bundle, check_no_decoder, open_bundle

DEFAULT_LENGTHS = (32, 128)


def open_bundles(settings: BenchSettings) -> dict[Path, Bundle]:
    """Check every bundle of the settings, the reference among them.

    Raises:
        InputError: one is no bundle, damaged, or a decoder's.
    """
    folders = list(settings.bundles)
    if settings.reference is not None and settings.earlier is None:
        folders.append(settings.reference)
    bundles = {folder: open_bundle(folder) for folder in dict.fromkeys(folders)}
    for bundle in bundles.values():
        check_no_decoder(bundle)
    return bundles


def make_specs(settings: BenchSettings, bundles: dict[Path, Bundle]) -> list[Spec]:
    """The reference first, then the bundles in order, then the peers; all names differ."""
    reference = settings.reference if settings.earlier is None else None
    folders: list[tuple[Path, bool]] = [] if reference is None else [(reference, True)]
    folders += [(folder, False) for folder in settings.bundles]
    specs: list[Spec] = []
    for folder, is_reference in folders:
        switchable = bundles[folder].manifest.kind == "switchable"
        spec = Spec(
            name=_free_name(folder.resolve().name, specs),
            role="reference" if is_reference else "candidate",
            kind="bundle",
            path=folder,
            provider=settings.provider,
            threads=settings.threads,
            cuda_graph=settings.cuda_graph == "on",
            folder=settings.customers if switchable else None,
            mix=settings.mix,
        )
        specs += [spec, with_graphs(spec)] if settings.cuda_graph == "both" else [spec]
    if settings.customers is not None and not any(spec.folder for spec in specs):
        raise InputError(f"{argument('customers')} is for switchable bundles, and none of these is one")
    first = bundles[settings.bundles[0]].manifest
    targets = tuple(target.name for target in first.targets)
    precision = first.precision if first.precision in ("fp16", "bf16") else "fp32"
    for peer in settings.peers:
        base = settings.base if settings.base is not None else Path()
        specs.append(
            Spec(peer, "peer", peer, base, settings.provider, settings.threads, targets=targets, precision=precision)
        )
    return specs


def _free_name(name: str, specs: Sequence[Spec]) -> str:
    taken = {spec.name for spec in specs}
    number = 2
    wanted = name
    while wanted in taken:
        wanted, number = f"{name} #{number}", number + 1
    return wanted


def make_workloads(settings: BenchSettings, bundles: dict[Path, Bundle]) -> list[Workload]:
    """The shapes of the settings, or batches of its texts.

    Raises:
        InputError: the texts cannot be read.
    """
    if settings.data is not None:
        # Imported here: it takes a quarter of a second; no PyTorch in it.
        from qrlora_deploy.data.examples import read_examples

        examples = read_examples(settings.data)
        return text_workloads(settings.batches, examples.texts, examples.pairs, settings.seed)
    most = min(bundle.manifest.max_length for bundle in bundles.values())
    lengths = settings.lengths or tuple(dict.fromkeys(min(length, most) for length in DEFAULT_LENGTHS))
    return shaped_workloads(settings.batches, lengths, settings.seed)


def baseline(specs: Sequence[Spec]) -> str:
    """The subject that ratios are to: the reference, or the first one."""
    references = [spec.name for spec in specs if spec.role == "reference"]
    return references[0] if references else specs[0].name


def earlier_names(specs: Sequence[Spec], earlier: Report) -> dict[str, str]:
    """The subject of the earlier report for each candidate: that of its name, or its first candidate."""
    names = [subject.name for subject in earlier.subjects if subject.role != "peer"]
    first = next((subject.name for subject in earlier.subjects if subject.role == "candidate"), names[0])
    return {spec.name: spec.name if spec.name in names else first for spec in specs if spec.role == "candidate"}
