"""Speed, memory and published accuracy of this package's models and of comparable models of timm.

    python benchmarks/throughput.py [--device cuda] [--batch-size 8] [--json cpu.json] [--markdown]
    python benchmarks/throughput.py --growth --batch-size 1 [--json growth.json]
    python benchmarks/throughput.py --read cpu.json gpu.json --markdown --figure throughput.png

All models have 1,000 classes and random weights and get random images. The table has

- images/s: inference is the forward pass; training is the forward pass, cross-entropy and the backward pass, without an
  optimizer. The models take turns in each round, so that other work on the machine affects all of them. The result is
  the median of the rounds.
- GFLOPs of the forward pass of one image, from `torch.utils.flop_counter`: convolutions and matrix products only. A
  multiplication and an addition are two operations, so the values are twice the GMACs of many papers. This package's
  models are counted with ``CLUSTER_ZOO_KERNELS=plain``, and the averages of their grids as matrix products.
- MB (10^6 bytes) at the peak of one step, measured in a new process: parameters, activations and, in training,
  gradients. On a GPU this is the memory that torch has allocated. On a CPU it is the growth of the process, on Linux
  only, which includes some MB of code that the first step loads, and memory that the allocator keeps.
- top-1 on ImageNet-1k at 224 px as published, not measured here. `PUBLISHED` has the sources.

--growth prints milliseconds per image at several image sizes. --read prints files of --json again, and --figure draws
top-1 over images/s (needs matplotlib), one panel per file.
"""

import argparse
import datetime
import fnmatch
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from measuring import (  # noqa: E402
    Classifier,
    device_name,
    in_new_process,
    interleaved_seconds,
    machine,
    peak_megabytes,
    positive,
    print_table,
    seconds,
)

import cluster_zoo  # noqa: E402
from cluster_zoo.errors import nearest  # noqa: E402
from cluster_zoo.training.parser import Parser  # noqa: E402

OURS = ('coc_', 'fec_', 'dnc_')
TIMM = ['resnet18', 'resnet50', 'poolformer_s12', 'convnext_tiny']
TIMM += ['vit_small_patch16_224', 'swin_tiny_patch4_window7_224']
GROWTH = ['coc_small', 'fec_small', 'swin_tiny_patch4_window7_224']
MODES = ['inference', 'training']
NUM_CLASSES = 1000
MIN_SECONDS = 0.2  # of a model's turn, so that a GPU's steps are queued as in training

# Top-1 in % on ImageNet-1k at 224 px, trained on ImageNet-1k only, and the source. Other models are not in the figure.
PUBLISHED = {
    'coc_tiny': (73.2, 'https://github.com/ma-xu/Context-Cluster, weights of June 2023'),
    'coc_tiny_plain': (73.8, 'https://github.com/ma-xu/Context-Cluster, weights of June 2023'),
    'coc_small': (78.1, 'https://github.com/ma-xu/Context-Cluster, weights of June 2023'),
    'coc_medium': (81.2, 'https://github.com/ma-xu/Context-Cluster, weights of June 2023'),
    'fec_small': (72.7, 'as cited in a later paper of the authors of FEC'),
    'fec_base': (78.1, 'as cited in a later paper of the authors of FEC'),
    'fec_large': (81.2, 'as cited in a later paper of the authors of FEC'),
    'resnet18': (71.5, 'resnet18.a1_in1k, https://huggingface.co/timm/resnet18.a1_in1k'),
    'resnet50': (80.4, 'resnet50.a1_in1k, https://arxiv.org/abs/2110.00476'),
    'poolformer_s12': (77.2, 'poolformer_s12.sail_in1k, https://github.com/sail-sg/poolformer'),
    'convnext_tiny': (82.1, 'convnext_tiny.fb_in1k, https://github.com/facebookresearch/ConvNeXt'),
    'vit_small_patch16_224': (79.9, 'as deit_small_patch16_224.fb_in1k, https://github.com/facebookresearch/deit'),
    'swin_tiny_patch4_window7_224': (81.2, 'of .ms_in1k, https://github.com/microsoft/Swin-Transformer'),
}


def build(name: str, size: int) -> nn.Module:
    """Creates a model for square images of ``size`` pixels."""
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    return timm.create_model(name, num_classes=NUM_CLASSES, **({'img_size': size} if fixed else {}))


def candidate(
    name: str,
    size: int,
    args: argparse.Namespace,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Classifier:
    """Creates a model, which ``change`` may replace, and a batch for it."""
    torch.manual_seed(0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = change(build(name, size)).to(args.device, memory_format=layout)
    images = torch.randn(args.batch_size, 3, size, size, device=args.device).contiguous(memory_format=layout)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=args.device)
    if args.compile:
        model.compile()
    return Classifier(model, images, labels, args.amp)


def median_seconds(cases: list[tuple[str, int]], args: argparse.Namespace) -> list[dict[str, float]]:
    """Returns the seconds of a step of each case (name and size) in each mode."""
    candidates = [candidate(name, size, args) for name, size in cases]
    steps = {(i, mode): partial(candidates[i].step, mode) for i in range(len(cases)) for mode in args.modes}
    repeats = {}
    for (i, mode), step in steps.items():
        progress(f'warming up: {cases[i][0]}, {mode}')
        step()
        repeats[i, mode] = math.ceil(MIN_SECONDS / seconds(step, args.device))
    times = interleaved_seconds(steps, args.device, args.rounds, repeats)
    return [{mode: statistics.median(times[i, mode]) for mode in args.modes} for i in range(len(cases))]


def gflops(name: str, size: int) -> float:
    """Returns the operations of the forward pass of one image, in billions."""
    # Math attention, because the flop counter does not support all fused kernels
    plain = patch.dict(os.environ, CLUSTER_ZOO_KERNELS='plain')
    with torch.device('meta'), torch.no_grad(), plain, sdpa_kernel(SDPBackend.MATH):
        model = build(name, size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 1e9


def memory_is_known(args: argparse.Namespace) -> bool:
    # On a CPU, the memory of the compiler cannot be separated from that of the model.
    return args.device != 'cpu' or (sys.platform == 'linux' and not args.compile)


def peak_memory(name: str, size: int, args: argparse.Namespace) -> dict[str, float]:
    """Returns the MB at the peak of a step in each mode. Call it in a new process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return peak_megabytes(lambda: candidate(name, size, args), args.modes, args.device)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all models. Returns the results with the machine, versions and arguments."""
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = list(itertools.product(args.models, args.sizes if args.growth else [args.img_size]))
    results = []
    for name, size in cases:
        progress(f'memory and FLOPs: {name}, {size} px')
        with torch.device('meta'):
            parameters = sum(parameter.numel() for parameter in build(name, size).parameters())
        result = dict(model=name, img_size=size, parameters_m=parameters / 1e6, gflops=gflops(name, size))
        result['published_top1'] = PUBLISHED.get(name, (None,))[0]
        memory = in_new_process(peak_memory, name, size, args) if memory_is_known(args) else {}
        results.append(result | {mode: dict(memory_mb=memory.get(mode)) for mode in args.modes})
    for result, times in zip(results, median_seconds(cases, args)):
        for mode, value in times.items():
            result[mode] |= dict(seconds=value, images_per_second=args.batch_size / value)
    versions = dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__)
    return dict(
        machine=machine(args.device),
        versions=versions | dict(cluster_zoo=cluster_zoo.__version__),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        arguments={name: value for name, value in vars(args).items() if name not in ('json', 'read', 'figure')},
        results=results,
    )


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def heading(report: dict[str, Any]) -> str:
    """Returns the machine and the settings of a report."""
    used, versions = report['arguments'], report['versions']
    parts = [device_name(report['machine']), f'batch {used["batch_size"]}']
    parts += [] if used['growth'] else [f'{used["img_size"]} px']
    parts += ['bfloat16 autocast' if used['amp'] else 'float32']
    parts += ['channels-last'] * used['channels_last'] + ['compiled'] * used['compile']
    parts += [f'torch {versions["torch"]}', f'timm {versions["timm"]}', report['date'][:10]]
    return ', '.join(parts) + f'; median of {used["rounds"]} rounds'


def model_rows(report: dict[str, Any]) -> list[list[str]]:
    modes = report['arguments']['modes']
    rows = [['model', 'parameters, M', 'GFLOPs']]
    rows[0] += [f'{mode}, images/s' for mode in modes] + [f'{mode}, MB' for mode in modes] + ['published top-1, %']
    for result in report['results']:
        row = [f'`{result["model"]}`', f'{result["parameters_m"]:.2f}', f'{result["gflops"]:.2f}']
        row += [f'{result[mode]["images_per_second"]:.1f}' for mode in modes]
        row += ['' if result[mode]['memory_mb'] is None else f'{result[mode]["memory_mb"]:.0f}' for mode in modes]
        rows.append([*row, str(result['published_top1'] or '')])
    return rows


def growth_rows(report: dict[str, Any]) -> list[list[str]]:
    used = report['arguments']
    times = {
        (result['model'], mode, result['img_size']): f'{1e3 / result[mode]["images_per_second"]:.1f}'
        for result in report['results']
        for mode in used['modes']
    }
    rows = [['ms per image', *(f'{size} px' for size in used['sizes'])]]
    for name, mode in itertools.product(used['models'], used['modes']):
        rows.append([f'`{name}`, {mode}', *(times[name, mode, size] for size in used['sizes'])])
    return rows


def show(report: dict[str, Any], markdown: bool) -> None:
    rows = growth_rows(report) if report['arguments']['growth'] else model_rows(report)
    print(f'{heading(report)}\n')
    print_table(rows if markdown else [[cell.replace('`', '') for cell in row] for row in rows], markdown)
    if any(result[mode]['memory_mb'] is None for result in report['results'] for mode in report['arguments']['modes']):
        print('\nMemory on a CPU is measured only on Linux and without --compile.')
    print()


def draw(reports: list[dict[str, Any]], path: Path) -> None:
    """Draws published top-1 over measured speed, one panel per report."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    if any(report['arguments']['growth'] or 'inference' not in report['arguments']['modes'] for report in reports):
        raise ValueError('--figure needs results with inference and without --growth: measure them first')
    figure = Figure(figsize=(7.5 * len(reports), 5), layout='constrained')
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)
    for axes, report in zip(panels[0], reports):
        points = [
            (result['inference']['images_per_second'], result['published_top1'], result['model'])
            for result in report['results']
            if result['published_top1']
        ]
        for ours, label, marker in ((True, 'cluster_zoo', 'o'), (False, 'timm', 's')):
            chosen = [point for point in points if point[2].startswith(OURS) == ours]
            axes.scatter([x for x, _, _ in chosen], [y for _, y, _ in chosen], marker=marker, label=label, zorder=2)
        for x, y, name in points:
            ours = name.startswith(OURS)  # labels of this package to the right of their points, of timm to the left
            close = [other for other in points if abs(math.log(other[0] / x)) < 0.7 and 0 < abs(other[1] - y) < 1.5]
            offset = (5 if ours else -5, -9 if any(other[1] > y for other in close) else 5)
            side = 'left' if ours else 'right'
            axes.annotate(name, (x, y), offset, textcoords='offset points', fontsize=8, horizontalalignment=side)
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter('{x:g}')
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.6)
        axes.set(xlabel='inference, images/s (measured)', ylabel='ImageNet-1k top-1 at 224 px, % (published)')
        axes.set_title(heading(report).replace(', torch', ',\ntorch'), fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(loc='lower left')
    figure.savefig(path, dpi=150)


def parser() -> Parser:
    parser = Parser(prog='throughput.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--models', nargs='+', metavar='NAME', help='names or patterns (default: this package and six of timm)')
    add('--device', default='cpu', choices=['cpu', 'cuda'], help='where to measure (default: %(default)s)')
    add('--batch-size', type=positive, default=8, metavar='N', help='images per step (default: %(default)s)')
    add('--img-size', type=positive, default=224, metavar='N', help='image side in pixels (default: %(default)s)')
    add('--amp', action='store_true', help='autocast to bfloat16')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--compile', action='store_true', help='compile the models with torch.compile')
    add('--threads', type=positive, metavar='N', help='CPU threads (default: that of torch)')
    add('--rounds', type=positive, default=5, metavar='N', help='measurements per model (default: %(default)s)')
    add('--modes', nargs='+', choices=MODES, default=MODES, help='what to measure (default: both)')
    add('--growth', action='store_true', help=f'measure time over image size (default models: {", ".join(GROWTH)})')
    add('--sizes', type=positive, nargs='+', default=[128, 256, 512, 1024], metavar='N', help='image sizes of --growth')
    add('--json', type=Path, metavar='FILE', help='write the results')
    add('--read', type=Path, nargs='+', metavar='FILE', help='print results of --json instead of measuring')
    add('--markdown', action='store_true', help='print the table as Markdown')
    add('--figure', type=Path, metavar='FILE', help='draw published top-1 over inference images/s')
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks the arguments and replaces the patterns of ``--models`` by names.

    Raises:
        ValueError: An argument is invalid.
    """
    known = timm.list_models()
    patterns = args.models or (GROWTH if args.growth else [f'{prefix}*' for prefix in OURS] + TIMM)
    args.models = []
    for pattern in patterns:
        found = fnmatch.filter(known, pattern)
        if not found:
            raise ValueError(f'--models: no model matches {pattern!r}{nearest(pattern, known)}')
        # Patterns leave out the models for images of 32 pixels.
        args.models += [n for n in found if n not in args.models and (n == pattern or not n.endswith('_cifar'))]
    args.modes = [mode for mode in MODES if mode in args.modes]
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('--device cuda: torch finds no CUDA device')
    if args.json and args.read:
        raise ValueError('--json cannot be used with --read, which measures nothing')
    for path in (args.json, args.figure):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f'{path}: the folder does not exist')
    if args.figure and importlib.util.find_spec('matplotlib') is None:
        raise ValueError('--figure needs matplotlib: pip install matplotlib')


def read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        heading(report), report['results']
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise ValueError(f'--read: {path} is not a file of --json ({type(e).__name__}: {e})') from None
    return report


def main() -> None:
    args = (options := parser()).parse_args()
    try:
        check(args)
        reports = [read(path) for path in args.read] if args.read else [measure(args)]
        if args.json:
            args.json.write_text(json.dumps(reports[0], indent=1) + '\n')
        for report in reports:
            show(report, args.markdown)
        if args.figure:
            draw(reports, args.figure)
    except ValueError as e:
        options.error(str(e))
    except (BrokenProcessPool, torch.OutOfMemoryError):
        options.error('Out of memory: use a smaller --batch-size or --img-size')


if __name__ == '__main__':
    main()
