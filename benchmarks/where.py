"""Profile where one class's matching step spends its time: ``python -m benchmarks.where [--form "compiled fp32"]``."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import forms, problem, settings, timing
from hmn.objectives.gradient import matching_step


def main() -> None:
    parser = settings.parser(__doc__, rounds=3)
    parser.add_argument("--form", default="compiled fp32", help="a row of benchmarks.matching")
    options = parser.parse_args()
    device = settings.prepare(options)
    at = problem.make(options, device)
    known = [form for form in forms.matching(settings.kind_of(options), at.classes) if not form.stored]
    named = {form.name: form for form in known if form != forms.REFERENCE}
    if options.form not in named:
        parser.error(f"--form: must be one of {', '.join(named)}")
    form = named[options.form]
    network = at.network(channels_last=True)
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    real, synthetic = (
        at.batches(n, name)[:1] for n, name in ((options.real, "real"), (options.synthetic, "synthetic"))
    )
    step = matching_step(network, "mse", form.compute(device))
    arguments = parameters, real, synthetic, torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(2):
        step(*arguments)
    timing.wait(device)
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    ) as found:
        for _ in range(options.rounds):
            step(*arguments)
        timing.wait(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=50))


if __name__ == "__main__":
    main()
