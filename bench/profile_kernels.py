"""Where a step's time goes, kernel by kernel: ``python bench/profile_kernels.py [--device cuda] [--op NAME …]``.

For each problem of bench/kernels.py and each impl of ours: the slowest kernels, and the bandwidth that the whole step
reaches on its bytes (problem.py). On the CPU, operators take the place of kernels.
"""

from __future__ import annotations

import torch
from kernels import OPS, parser
from problem import OURS, make_labels
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bcmf_ext.engine import choose_device
from bcmf_ext.errors import run_command

STEPS = 5
SHOWN = 8


def main() -> None:
    arguments = parser(__doc__).parse_args()
    cuda = arguments.device == "cuda"
    n, c, height, width = arguments.size
    labels = make_labels(arguments.labels, n, height, width).to(choose_device(arguments.device))
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    for op in arguments.op:
        for problem in OPS[op](labels, c):
            for impl in set(problem.contenders) & set(OURS):
                loss = problem.contenders[impl]
                problem.backward(loss(problem.input))
                problem.input.grad = None
                with profile(activities=activities) as recorded:
                    for _ in range(STEPS):
                        problem.backward(loss(problem.input))
                        problem.input.grad = None
                    if cuda:
                        torch.cuda.synchronize()
                wanted = DeviceType.CUDA if cuda else DeviceType.CPU
                events = [e for e in recorded.key_averages() if e.device_type == wanted]
                time = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / STEPS for e in events}
                total = sum(time.values())
                bandwidth = problem.work["both"][0] / (1e3 * total)
                print(f"{problem.title}, {impl}: {total:.0f} µs a step, {bandwidth:.0f} GB/s on its bytes")
                for name in sorted(time, key=time.__getitem__, reverse=True)[:SHOWN]:
                    print(f"  {time[name]:8.1f} µs  {time[name] / total:4.0%}  {name[:90]}")


if __name__ == "__main__":
    run_command(main)
