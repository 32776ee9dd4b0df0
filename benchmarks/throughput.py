"""How fast, large and accurate are this package's models beside what one would take from timm instead?

    python benchmarks/throughput.py [--device cuda] [--batch-size 8] [--json cpu.json] [--markdown]
    python benchmarks/throughput.py --growth --batch-size 1 [--json growth.json]
    python benchmarks/throughput.py --read cpu.json gpu.json --markdown --figure throughput.png

Printed for each model, with 1,000 classes, random weights and random images:

- images/s: inference is the forward pass; training is forward pass, cross-entropy and backward pass, no optimizer. The
  models take turns within each round, so that other work on the machine hits all alike. The median round counts.
- GFLOPs of one image's forward pass as `torch.utils.flop_counter` counts them: convolutions and matrix products only, a
  multiplication and an addition are two operations (the GMACs of many papers are half as many). This package's models
  are counted with ``CLUSTER_ZOO_KERNELS=plain``, and the averages of their grids as matrix
  products.
- MB (10^6 bytes) at the peak of one step, measured in a process of its own: parameters, activations and, for training,
  gradients. On a GPU what torch has allocated. On a CPU what the process has grown by, which only Linux tells: some MB
  of code that is loaded at the first step, and what the allocator keeps for later, count too.
- top-1 on ImageNet-1k at 224 px as published; it is not measured here. `PUBLISHED` says by whom.

With --growth: milliseconds an image at several image sizes. Each FILE of --json can be shown again with --read, and
--figure draws top-1 against images/s (needs matplotlib), one panel a file.
"""

import argparse
import datetime
import fnmatch
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout too

import cluster_zoo
from cluster_zoo.errors import nearest
from cluster_zoo.training.options import Parser

OURS = ('coc_', 'fec_', 'dnc_')
TIMM = ['resnet18', 'resnet50', 'poolformer_s12', 'convnext_tiny']
TIMM += ['vit_small_patch16_224', 'swin_tiny_patch4_window7_224']
GROWTH = ['coc_small', 'fec_small', 'swin_tiny_patch4_window7_224']
MODES = ['inference', 'training']
NUM_CLASSES = 1000
TURN = 0.2  # seconds that a model's turn takes at least, so that a GPU's steps queue up as they do in use

# Top-1 in % on ImageNet-1k at 224 px after training on nothing else, and whose figure it is. Other models are left out
# of the picture.
PUBLISHED = {
    'coc_tiny': (73.2, 'https://github.com/ma-xu/Context-Cluster, weights of June 2023'),
    'coc_tiny_plain': (73.8, 'https://github.com/ma-xu/Context-Cluster, weights of June 2023'),
    'coc_small': (78.1, 'https://github.com/ma-xu/Context-Cluster, weights of June 2023'),
    'coc_medium': (81.2, 'https://github.com/ma-xu/Context-Cluster, weights of June 2023'),
    'fec_small': (72.7, 'as a later paper of the group of FEC quotes it'),
    'fec_base': (78.1, 'as a later paper of the group of FEC quotes it'),
    'fec_large': (81.2, 'as a later paper of the group of FEC quotes it'),
    'resnet18': (71.5, 'resnet18.a1_in1k, https://huggingface.co/timm/resnet18.a1_in1k'),
    'resnet50': (80.4, 'resnet50.a1_in1k, https://arxiv.org/abs/2110.00476'),
    'poolformer_s12': (77.2, 'poolformer_s12.sail_in1k, https://github.com/sail-sg/poolformer'),
    'convnext_tiny': (82.1, 'convnext_tiny.fb_in1k, https://github.com/facebookresearch/ConvNeXt'),
    'vit_small_patch16_224': (79.9, 'as deit_small_patch16_224.fb_in1k, https://github.com/facebookresearch/deit'),
    'swin_tiny_patch4_window7_224': (81.2, 'of .ms_in1k, https://github.com/microsoft/Swin-Transformer'),
}


def build(name: str, size: int) -> nn.Module:
    """A model for square images of ``size`` pixels; some, such as Swin, must be told."""
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    return timm.create_model(name, num_classes=NUM_CLASSES, **({'img_size': size} if fixed else {}))


class Candidate:
    """A model with a batch, ready to take steps."""

    def __init__(self, name: str, size: int, args: argparse.Namespace):
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        self.amp = args.amp
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = build(name, size).to(self.device, memory_format=layout)
        images = torch.randn(args.batch_size, 3, size, size, device=self.device)
        self.images = images.contiguous(memory_format=layout)
        self.labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=self.device)
        if args.compile:
            self.model.compile()

    def step(self, mode: str) -> None:
        with torch.inference_mode(mode == 'inference'):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                logits = self.model(self.images)
                if mode == 'training':
                    loss = F.cross_entropy(logits, self.labels)
            if mode == 'training':
                loss.backward()
                self.model.zero_grad()

    def seconds(self, mode: str, steps: int) -> float:
        """Time of one of several steps; on a GPU until its kernels have run."""
        wait = torch.cuda.synchronize if self.device.type == 'cuda' else lambda: None
        self.model.train(mode == 'training')
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(mode)
        wait()
        return (time.perf_counter() - start) / steps


def median_seconds(cases: list[tuple[str, int]], args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of a step of each case in each mode."""
    candidates = [Candidate(name, size, args) for name, size in cases]
    turns = list(itertools.product(range(len(cases)), args.modes))
    steps = {}
    for i, mode in turns:
        progress(f'warming up: {cases[i][0]}, {mode}')
        candidates[i].seconds(mode, steps=1)
        steps[i, mode] = math.ceil(TURN / candidates[i].seconds(mode, steps=1))
    times = {turn: [] for turn in turns}
    for number in range(args.rounds):
        progress(f'round {number + 1} of {args.rounds}')
        for i, mode in turns:
            times[i, mode].append(candidates[i].seconds(mode, steps[i, mode]))
    return [{mode: statistics.median(times[i, mode]) for mode in args.modes} for i in range(len(cases))]


def gflops(name: str, size: int) -> float:
    """Billions of operations of one image's forward pass."""
    # Attention must be taken apart into its products: not every fused kernel has a formula.
    plain = patch.dict(os.environ, CLUSTER_ZOO_KERNELS='plain')
    with torch.device('meta'), torch.no_grad(), plain, sdpa_kernel(SDPBackend.MATH):
        model = build(name, size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 1e9


def memory_is_known(args: argparse.Namespace) -> bool:
    # A compiler's own memory cannot be told from the model's in one process.
    return args.device != 'cpu' or (sys.platform == 'linux' and not args.compile)


def peak_memory(name: str, size: int, args: argparse.Namespace) -> dict[str, float]:
    """MB at the peak of a step in each mode; to be called in a fresh process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == 'cpu':
        first_use()
        before = process_bytes('VmRSS')
    candidate = Candidate(name, size, args)
    peaks = {}
    for mode in args.modes:
        if args.device == 'cpu':
            Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from what is in use
            candidate.seconds(mode, steps=1)
            peaks[mode] = (process_bytes('VmHWM') - before) / 1e6
        else:
            candidate.seconds(mode, steps=1)  # what compiling takes does not count
            torch.cuda.reset_peak_memory_stats(args.device)
            candidate.seconds(mode, steps=1)
            peaks[mode] = torch.cuda.max_memory_allocated(args.device) / 1e6
    return peaks


def first_use() -> None:
    """Libraries load and start their threads now, so that the model is not charged for it."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 8))
    layers(torch.randn(2, 3, 8, 8)).sum().backward()


def process_bytes(field: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that is known about the models, the machine and the run."""
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
        memory = {}
        if memory_is_known(args):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as fresh:
                memory = fresh.submit(peak_memory, name, size, args).result()
        results.append(result | {mode: dict(memory_mb=memory.get(mode)) for mode in args.modes})
    for result, seconds in zip(results, median_seconds(cases, args)):
        for mode, value in seconds.items():
            result[mode] |= dict(seconds=value, images_per_second=args.batch_size / value)
    versions = dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__)
    return dict(
        machine=machine(args.device),
        versions=versions | dict(cluster_zoo=cluster_zoo.__version__),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        arguments={name: value for name, value in vars(args).items() if name not in ('json', 'read', 'figure')},
        results=results,
    )


def machine(device: str) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if sys.platform == 'linux':
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), cpu)
    gpu = torch.cuda.get_device_name(device) if device != 'cpu' else None
    return dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu, system=platform.system())


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def heading(report: dict[str, Any]) -> str:
    """Where and how the figures of a report were measured."""
    host, used, versions = report['machine'], report['arguments'], report['versions']
    parts = [host['gpu'] or f'{host["cpu"]}, {host["threads"]} threads', f'batch {used["batch_size"]}']
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
    rows = [['ms an image', *(f'{size} px' for size in used['sizes'])]]
    for name, mode in itertools.product(used['models'], used['modes']):
        rows.append([f'`{name}`, {mode}', *(times[name, mode, size] for size in used['sizes'])])
    return rows


def show(report: dict[str, Any], markdown: bool) -> None:
    rows = growth_rows(report) if report['arguments']['growth'] else model_rows(report)
    print(f'{heading(report)}\n')
    if markdown:
        rows.insert(1, ['---'] + ['---:'] * (len(rows[0]) - 1))
        print(*(f'| {" | ".join(row)} |' for row in rows), sep='\n')
    else:
        widths = [max(map(len, column)) for column in zip(*rows)]
        for first, *rest in rows:
            cells = [first.replace('`', '').ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
            print(*cells, sep='  ')
    if any(result[mode]['memory_mb'] is None for result in report['results'] for mode in report['arguments']['modes']):
        print('\nMemory on a CPU is measured on Linux and without --compile only.')
    print()


def draw(reports: list[dict[str, Any]], path: Path) -> None:
    """Published top-1 against measured speed, one panel a report."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    if any(report['arguments']['growth'] or 'inference' not in report['arguments']['modes'] for report in reports):
        raise ValueError('--figure draws the inference speed of models: not --growth, and not training alone')
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
            ours = name.startswith(OURS)  # this package's names to the right of their points, timm's to the left
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


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected at least 1, got {text}')
    return int(text)


def parser() -> Parser:
    parser = Parser(prog='throughput.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--models', nargs='+', metavar='NAME', help="names or patterns (default: this package's, and six of timm's)")
    add('--device', default='cpu', choices=['cpu', 'cuda'], help='where to measure (default: %(default)s)')
    add('--batch-size', type=positive, default=8, metavar='N', help='images in a step (default: %(default)s)')
    add('--img-size', type=positive, default=224, metavar='N', help='image side in pixels (default: %(default)s)')
    add('--amp', action='store_true', help='autocast to bfloat16')
    add('--channels-last', action='store_true', help='channels-last memory layout')
    add('--compile', action='store_true', help='torch.compile the models')
    add('--threads', type=positive, metavar='N', help="threads on a CPU (default: torch's choice)")
    add('--rounds', type=positive, default=5, metavar='N', help='turns of each model (default: %(default)s)')
    add('--modes', nargs='+', choices=MODES, default=MODES, help='what to measure (default: both)')
    add('--growth', action='store_true', help=f'how time grows with image size (default models: {", ".join(GROWTH)})')
    add('--sizes', type=positive, nargs='+', default=[128, 256, 512, 1024], metavar='N', help='sizes of --growth')
    add('--json', type=Path, metavar='FILE', help='write the results')
    add('--read', type=Path, nargs='+', metavar='FILE', help='show results that --json wrote instead of measuring')
    add('--markdown', action='store_true', help='print the table as Markdown')
    add('--figure', type=Path, metavar='FILE', help='draw published top-1 against inference images/s')
    return parser


def check(args: argparse.Namespace) -> None:
    """Fills in the names of the models; what is wrong is said before anything is measured.

    Raises:
        ValueError: Something is wrong.
    """
    known = timm.list_models()
    patterns = args.models or (GROWTH if args.growth else [f'{prefix}*' for prefix in OURS] + TIMM)
    args.models = []
    for pattern in patterns:
        found = fnmatch.filter(known, pattern)
        if not found:
            raise ValueError(f'no model is called {pattern!r}{nearest(pattern, known)}')
        # Models for images of 32 pixels only if they are asked for by name
        args.models += [n for n in found if n not in args.models and (n == pattern or not n.endswith('_cifar'))]
    args.modes = [mode for mode in MODES if mode in args.modes]
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('--device cuda: torch finds no CUDA device here')
    if args.json and args.read:
        raise ValueError('--json writes what was measured, and with --read nothing is')
    for path in (args.json, args.figure):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f'{path}: there is no such folder')
    if args.figure and importlib.util.find_spec('matplotlib') is None:
        raise ValueError('--figure needs matplotlib: pip install matplotlib')


def read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        heading(report), report['results']
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise ValueError(f'{path} is not a file that --json wrote ({type(e).__name__}: {e})') from None
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
        options.error('out of memory; try a smaller --batch-size or --img-size')


if __name__ == '__main__':
    main()
