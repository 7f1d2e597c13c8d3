"""From settings to what is opened: the subjects with their names and roles, and their shapes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qrlora_deploy.bench.generation.scenarios import check_budgets
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import DECODER_SCENARIOS, SCENARIOS, Scenario
from qrlora_deploy.bench.settings import BenchSettings
from qrlora_deploy.bench.subjects import Spec, with_graphs
from qrlora_deploy.bench.workload import Workload, shaped_workloads, text_workloads
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.runtime.bundle.bundle import Bundle, open_bundle

if TYPE_CHECKING:
    from qrlora_deploy.data.examples import Examples

PROMPT = "prompt"
"""The role of what a decoder reads of a plain row."""

DEFAULT_LENGTHS = (32, 128)
DEFAULT_NEW_TOKENS = 32

OF_DECODERS = ("new_tokens", "ttft_ms", "tpot_ms")
"""Settings that mean something for decoders alone."""


def settled(settings: BenchSettings) -> BenchSettings:
    """The settings with the scenarios that suit the bundles, where none were given.

    Raises:
        InputError: a folder is no bundle, decoders and others are measured together, or a setting is not for them.
    """
    folders = [*settings.bundles, *([settings.reference] if settings.reference and not settings.earlier else [])]
    kinds = {folder: writes_text(open_bundle(folder, graph=False)) for folder in folders}
    if len(set(kinds.values())) > 1:
        decoder = next(folder for folder, writes in kinds.items() if writes)
        raise InputError(f"{decoder} is a decoder, and others here are none: measure them apart")
    if not kinds[settings.bundles[0]]:
        wrong = next((name for name in OF_DECODERS if getattr(settings, name) is not None), None)
        if wrong is not None:
            raise InputError(f"{argument(wrong, getattr(settings, wrong))} is for decoders, and no bundle here is one")
        return _with_scenarios(settings, ("single-stream", "offline"), SCENARIOS)
    if settings.peers:
        raise InputError(f"{argument('peers', settings.peers)}: a decoder has no peers here; leave them out")
    if settings.cuda_graph == "both":
        raise InputError(f"{argument('cuda_graph', 'both')}: a decoder is measured with its graphs, or without")
    chosen = _with_scenarios(settings, ("generation",), DECODER_SCENARIOS)
    if "server" in chosen.scenarios:
        check_budgets(chosen)
    return replace(chosen, new_tokens=chosen.new_tokens or DEFAULT_NEW_TOKENS)


def writes_text(bundle: Bundle) -> bool:
    """Whether a bundle is a decoder's."""
    return bool(bundle.manifest.deciding_task.writes_text)


def _with_scenarios(settings: BenchSettings, usual: tuple[Scenario, ...], able: Sequence[Scenario]) -> BenchSettings:
    chosen = settings.scenarios or usual
    wrong = [name for name in chosen if name not in able]
    if wrong:
        raise InputError(
            f"{argument('scenarios', wrong)}: {settings.bundles[0]} is measured by {', '.join(able)}, as what it is"
        )
    return replace(settings, scenarios=chosen)


def open_bundles(settings: BenchSettings) -> dict[Path, Bundle]:
    """Check every bundle of the settings, the reference among them.

    Raises:
        InputError: one is no bundle, or damaged.
    """
    folders = list(settings.bundles)
    if settings.reference is not None and settings.earlier is None:
        folders.append(settings.reference)
    return {folder: open_bundle(folder) for folder in dict.fromkeys(folders)}


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
            new_tokens=settings.new_tokens or 1,
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
        if settings.new_tokens is not None:
            return text_workloads(settings.batches, prompts_of(examples), None, settings.seed)
        return text_workloads(settings.batches, examples.texts, examples.pairs, settings.seed)
    most = min(bundle.manifest.max_length for bundle in bundles.values()) - (settings.new_tokens or 0)
    lengths = settings.lengths or tuple(dict.fromkeys(min(length, most) for length in DEFAULT_LENGTHS))
    return shaped_workloads(settings.batches, lengths, settings.seed)


def prompts_of(examples: "Examples") -> list[str]:
    """What a decoder reads of rows: prompts without their completions.

    Raises:
        InputError: they are chats.
    """
    if examples.turns is None:
        return list(examples.texts)
    if any(turns[0].role != PROMPT for turns in examples.turns):
        raise InputError(f"{examples.name} holds chats; {argument('data')} of a decoder takes prompts")
    return [turns[0].content for turns in examples.turns]


def baseline(specs: Sequence[Spec]) -> str:
    """The subject that ratios are to: the reference, or the first one."""
    references = [spec.name for spec in specs if spec.role == "reference"]
    return references[0] if references else specs[0].name


def earlier_names(specs: Sequence[Spec], earlier: Report) -> dict[str, str]:
    """The subject of the earlier report for each candidate: that of its name, or its first candidate."""
    names = [subject.name for subject in earlier.subjects if subject.role != "peer"]
    first = next((subject.name for subject in earlier.subjects if subject.role == "candidate"), names[0])
    return {spec.name: spec.name if spec.name in names else first for spec in specs if spec.role == "candidate"}
