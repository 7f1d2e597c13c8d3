"""Where a token's time goes on a GPU: the kernels of one replay, in their order."""

from typing import Any

from benchmarks.decoding.bench import Bench

REPLAYS = 3
"""The one in the middle counts."""

ATTENTION = ("flash_fwd_splitkv_kernel", "kernel_mha", "fmha", "flash_fwd_kernel", "native_sdpa")
"""In the names of the kernels that attend, one or more a layer."""


def measure_kernels(bench: Bench) -> dict[str, Any]:
    """Of every graph at batch 1: kernels a token, how long they are busy, and those of one layer."""
    found = {}
    for name in bench.graphs:
        writer = bench.writer(name, 1)
        writer.timed(bench.ids(1))
        events = _replayed(writer)
        found[name] = _described(events, bench.layers)
        one = found[name]
        print(
            f"{bench.name} {name}: {one['kernels']} kernels a token, busy {one['busy_us']:.0f} of {one['us']:.0f} us, "
            f"a layer {len(one['layer'])}",
            flush=True,
        )
        for kernel in one["layer"]:
            print(f"    {kernel['us']:7.2f} us, then {kernel['gap_us']:5.2f}  {kernel['name'][:90]}", flush=True)
    return found


def _replayed(writer: Any) -> list[Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(REPLAYS):
            writer.write()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    events = sorted(
        (one for one in profiled.events() if one.device_type == device), key=lambda one: one.time_range.start
    )
    each = len(events) // REPLAYS
    return events[each : 2 * each]


def _described(events: list[Any], layers: int) -> dict[str, Any]:
    if not events:
        return {"kernels": 0, "busy_us": 0.0, "us": 0.0, "layer": [], "first": [], "last": []}
    kernels = [
        {
            "name": one.name,
            "us": one.time_range.elapsed_us(),
            "gap_us": after.time_range.start - one.time_range.end if after is not one else 0.0,
        }
        for one, after in zip(events, [*events[1:], events[-1]], strict=True)
    ]
    attending = [at for at, kernel in enumerate(kernels) if any(part in kernel["name"] for part in ATTENTION)]
    each = max(1, len(attending) // layers)
    # From one layer's attention to the next one's, in the middle of the decoder.
    middle = attending[each * (layers // 2) : each * (layers // 2 + 1) + 1]
    return {
        "kernels": len(kernels),
        "busy_us": sum(kernel["us"] for kernel in kernels),
        "us": events[-1].time_range.end - events[0].time_range.start,
        "layer": kernels[middle[0] : middle[-1]] if middle else [],
        "first": kernels[:12],
        "last": kernels[-6:],
    }
