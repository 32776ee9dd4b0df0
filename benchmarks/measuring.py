"""What the benchmarks share: time, memory, the description of the machine, and tables."""

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange


def seconds(step: Callable[[], object], device: torch.device | str, steps: int = 1) -> float:
    """Returns the time of one step, on a GPU until its kernels have finished."""
    on_gpu = torch.device(device).type == 'cuda'
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def interleaved_seconds(
    steps: dict[Hashable, Callable[[], object]],
    device: torch.device | str,
    rounds: int,
    repeats: dict[Hashable, int] | None = None,
) -> dict[Hashable, list[float]]:
    """Returns the times of steps that take turns in each round, so that other work on the machine affects all of them.

    Args:
        steps: Functions to time. Call each once before to warm up.
        device: Device that they run on.
        rounds: Number of rounds, and of times for each step.
        repeats: How often each step runs in a round, once by default. The time is the mean.
    """
    times = {name: [] for name in steps}
    for _ in trange(rounds, desc='rounds', leave=False, disable=None):
        for name, step in steps.items():
            times[name].append(seconds(step, device, repeats[name] if repeats else 1))
    return times


def event_seconds(step: Callable[[], object], device: str, steps: int = 20, repeats: int = 5) -> list[float]:
    """Returns the mean time of a step in each repeat: on a GPU, the time between two events around ``steps`` steps.

    Unlike `seconds`, this does not contain the start of the first kernel. Call the step before to warm up.
    """
    if device == 'cpu':
        return [seconds(step, device, steps) for _ in range(repeats)]
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / steps)
    return times


def used_bytes(device: str) -> int:
    """Returns the memory that torch has allocated on a GPU, or the memory of this process (Linux only)."""
    return torch.cuda.memory_allocated(device) if device != 'cpu' else _process_bytes('VmRSS')


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Returns the peak of `used_bytes` during a step."""
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM to the memory in use
    step()
    return _process_bytes('VmHWM')


def _process_bytes(field: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def peak_megabytes(create: Callable[[], Any], modes: Sequence[str], device: str) -> dict[str, float]:
    """Returns the peak memory of ``create().step(mode)`` in MB (10^6 bytes). Call it in a new process.

    On a CPU, memory that the process used before is not counted.
    """
    if device == 'cpu':  # load libraries and start threads first, so that they are not counted
        layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 8))
        layers(torch.randn(2, 3, 8, 8)).sum().backward()
    before = used_bytes(device)
    candidate = create()
    peaks = {}
    for mode in modes:
        if device != 'cpu':
            candidate.step(mode)  # memory of the compilation is not counted
        peaks[mode] = (peak_bytes(lambda mode=mode: candidate.step(mode), device) - before) / 1e6
    return peaks


class Classifier:
    """A model and a batch, to run steps of inference and training.

    Args:
        model: Image classifier.
        images: Inputs [B, C, H, W].
        labels: Labels, int64 [B].
        amp: Autocast to bfloat16.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, amp: bool):
        self.model, self.images, self.labels, self.amp = model, images, labels, amp

    def step(self, mode: str) -> None:
        """Runs a forward pass (``'inference'``), or a training step without optimizer (``'training'``)."""
        training = mode == 'training'
        if self.model.training != training:
            self.model.train(training)
        with torch.inference_mode(not training):
            with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.amp):
                logits = self.model(self.images)
                if training:
                    loss = F.cross_entropy(logits, self.labels)
            if training:
                loss.backward()
                self.model.zero_grad()


def in_new_process(function: Callable, *args: Any) -> Any:
    """Returns the result of a function that runs in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as executor:
        return executor.submit(function, *args).result()


def nvidia_smi(*fields: str) -> dict[str, str]:
    """Returns fields of ``nvidia-smi --query-gpu`` of the first visible GPU, without units; '-' for what is unknown."""
    unknown = dict.fromkeys(fields, '-')
    if not torch.cuda.is_available():
        return unknown
    command = ['nvidia-smi', '-i', f'GPU-{torch.cuda.get_device_properties(0).uuid}', '--format=csv,noheader,nounits']
    try:
        run = subprocess.run(
            [*command, f'--query-gpu={",".join(fields)}'], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    return unknown | {
        field: value.strip()
        for field, value in zip(fields, run.stdout.split(','))
        if value.strip() and '[' not in value  # [N/A]
    }


def machine(device: str) -> dict[str, Any]:
    """Returns the processor, its cores and threads, the GPU and the system."""
    cpu = platform.processor() or platform.machine()
    if sys.platform == 'linux':
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), cpu)
    gpu = torch.cuda.get_device_name(device) if device != 'cpu' else None
    return dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu, system=platform.system())


def device_name(host: dict[str, Any]) -> str:
    """Returns the GPU, or the CPU and its threads, of `machine`."""
    return host['gpu'] or f'{host["cpu"]}, {host["threads"]} threads'


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as a Markdown table. The first row is the heading."""
    ruler = ['---'] + ['---:'] * (len(rows[0]) - 1)
    return '\n'.join(f'| {" | ".join(row)} |' for row in (rows[0], ruler, *rows[1:]))


def print_table(rows: Sequence[Sequence[str]], markdown: bool = True) -> None:
    """Prints rows in aligned columns or as Markdown. The first row is the heading."""
    if markdown:
        print(markdown_table(rows))
        return
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep='  ')


def positive(text: str) -> int:
    """Type of an argument: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected at least 1, got {text}')
    return int(text)
