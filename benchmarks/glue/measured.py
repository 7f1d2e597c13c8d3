"""The rate that `train` measures, for the benchmark's own loop."""

from dataclasses import replace

import torch

from benchmarks.glue.loop import Schedule
from benchmarks.glue.methods import Prepared
from benchmarks.glue.tasks import Rows, Task
from qrlora_deploy.tasks.registry import task_named
from qrlora_deploy.training.step_size import Start, measure_rate, start_rows


def with_own_rate(prepared: Prepared, task: Task, rows: Rows, schedule: Schedule) -> Prepared:
    """The same with the measured rate; as it is where nothing can be measured."""
    device = rows.targets.device
    kind = task_named(task.kind)
    prepared.model.eval()

    def graded(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=schedule.bf16):
            logits: torch.Tensor = prepared.model(**rows.batch(index.cpu().numpy(), index)).logits
        return kind.loss(logits.float(), rows.targets[index]), logits.float()

    numbers = start_rows(len(rows), schedule.batch_size, schedule.seed)
    coefficients = prepared.groups[0]["params"]
    start = Start(
        batches=[torch.from_numpy(chosen).to(device) for chosen in numbers],
        targets=[rows.targets[torch.from_numpy(chosen).to(device)] for chosen in numbers],
        graded=graded,
        parameters=coefficients,
        task=kind,
        steps=schedule.epochs * -(-len(rows) // schedule.batch_size),
    )
    found = measure_rate(start)
    if found is None:
        return prepared
    groups = [prepared.groups[0] | {"lr": found.rate}, *prepared.groups[1:]]
    return replace(prepared, rate=found.rate, groups=groups)
