"""What does clustering cost? Registered models beside their floor: the same network with its clustering removed.

    python benchmarks/clustering.py [--models coc_tiny,fec_small] [--batch-size 8] [--compile] [--amp] [--device cuda]

The floor has the model's weights and input, but each mixer returns ``proj(v(x) + f(x))``; in FEC's cluster pooling the
mean grid of v stands for the groups' means, and f and the product of unit centers and points are computed as the paper
writes them and dropped. Model and floor take turns in one process, and printed is the median of the ratios of a round:
1.00 would be clustering at no cost, and it can be less, because the model does not need all of the floor's
convolutions. With ``--formulas`` the network as its formulas read (tests/transcription.py) takes part too, and the last
column says how many times as fast the model is.

Before anything is timed the model's logits and its gradient are compared in float64 with that transcription. Memory is
what one training step adds to the process, for model and floor in a process of their own each; on a GPU, what its
allocator reports.
"""

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'benchmarks')]

from throughput import machine, process_bytes  # noqa: E402
from transcription import Transcription  # noqa: E402

import cluster_zoo  # noqa: E402, F401  registers the models
from cluster_zoo.layers.cluster_mixer import ClusterMixer  # noqa: E402
from cluster_zoo.models.fec import ClusterPool  # noqa: E402

MODELS = 'coc_tiny,coc_tiny_plain,coc_small,coc_medium,fec_small,fec_base'


class FloorMixer(nn.Module):
    """A mixer's three convolutions."""

    def __init__(self, mixer: ClusterMixer):
        super().__init__()
        self.f, self.v, self.proj = mixer.f, mixer.v, mixer.proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.v(x) + self.f(x))


class FloorPool(nn.Module):
    """Cluster pooling without assignment and sums: its convolutions, its norm, and the product of all pairs."""

    def __init__(self, pool: ClusterPool):
        super().__init__()
        self.f, self.v, self.skip, self.norm = pool.f, pool.v, pool.skip, pool.norm

    def forward(self, x: Tensor) -> Tensor:
        f = self.f(x)
        with torch.no_grad():
            centers = F.normalize(F.avg_pool2d(f, 2).flatten(2), dim=1).transpose(1, 2)
            points = F.normalize(f.flatten(2), dim=1)
            size = (1 << 18) // centers.shape[1]  # blocks as the model's, so that memory can be compared too
            products = [(centers @ block)[:, :1, :1] for block in points.split(size, dim=-1)]
        unused = 0 * (f[:1, :, :1, :1].sum() + sum(products).sum())  # a compiler must not leave them out
        return self.skip(x) + self.norm(F.avg_pool2d(self.v(x), 2)) + unused


def floor(model: nn.Module) -> nn.Module:
    """A copy of the model without its clustering."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (ClusterMixer, ClusterPool)):
            model.set_submodule(name, (FloorMixer if isinstance(module, ClusterMixer) else FloorPool)(module))
    return model


def create(name: str) -> nn.Module:
    """The model, with residual branches that count: at their initial 1e-5 an error in them would go unseen."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith('gamma'):
            nn.init.constant_(parameter, 0.3)
    return model


def disagreement(name: str, size: int) -> float:
    """Relative error of logits and the first weight's gradient, model against formulas, float64, two images."""
    model = create(name).double().eval()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    results = []
    for network in (model, Transcription(model)):
        logits = network(images)
        (gradient,) = torch.autograd.grad(logits.square().sum(), model.stem.proj.weight)
        results.append((logits.detach(), gradient))
    return max(((value - expected).norm() / expected.norm()).item() for value, expected in zip(*results))


class Step:
    """A forward pass without gradients, or a training step without its optimizer."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, train: bool):
        self.model, self.args, self.train = model.train(train), args, train
        self.images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
        self.labels = torch.arange(args.batch_size, device=args.device) % 1000

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.train):
            with torch.autocast(self.args.device, dtype=torch.bfloat16, enabled=self.args.amp):
                logits = self.model(self.images)
            if self.train:
                F.cross_entropy(logits.float(), self.labels).backward()
                self.model.zero_grad()

    def seconds(self) -> float:
        synchronize = torch.cuda.synchronize if self.args.device == 'cuda' else lambda: None
        synchronize()
        start = time.perf_counter()
        self()
        synchronize()
        return time.perf_counter() - start


def compare(steps: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns, and the median ratio of the model to each of the others."""
    for step in steps.values():
        for _ in range(2):
            step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(1e3 * step.seconds())
    result = {f'{name} ms': statistics.median(values) for name, values in times.items()}
    for name in times:
        if name != 'model':
            result[f'model / {name}'] = statistics.median(a / b for a, b in zip(times['model'], times[name]))
    return result


def networks(name: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The model, its floor and, if asked for and eager, its transcription."""
    model = create(name).to(args.device)
    found = {'model': model, 'floor': floor(model)}
    for network in found.values():  # the allocator of a process that has trained holds on to more memory
        Step(network, args, train=True)()
    if args.compile:
        torch.compiler.reset()  # or the models before would count as recompilations of this one
        return {key: torch.compile(network, fullgraph=True) for key, network in found.items()}
    return found | ({'formulas': Transcription(model)} if args.formulas else {})


def megabytes(name: str, which: str, args: argparse.Namespace) -> float:
    """What a training step of a network adds to this process, once it has run at a smaller batch size."""
    network = create(name)
    network = (floor(network) if which == 'floor' else network).to(args.device)
    small = copy.copy(args)
    small.batch_size = 1
    Step(network, small, train=True)()
    step = Step(network, args, train=True)
    if args.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = process_bytes('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak so far is forgotten
    step()
    return (process_bytes('VmHWM') - before) / 2**20


def memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    """`megabytes` of model and floor, each in a new process."""
    result = {}
    for which in ('model', 'floor'):
        command = [sys.executable, __file__, *sys.argv[1:], '--models', name, '--megabytes-of', which]
        result[f'{which} MB'] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return result | {'model / floor': result['model MB'] / result['floor MB']}


def where(args: argparse.Namespace) -> dict[str, str]:
    """Where and when the figures were measured."""
    host = machine(args.device)
    device = host['gpu'] or f'{host["cpu"]}, {host["threads"]} threads'
    return dict(device=device, torch=torch.__version__, date=date.today().isoformat())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', default=MODELS, help='names, separated by commas')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='CPU threads')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16 instead of float32')
    parser.add_argument('--compile', action='store_true', help='torch.compile(fullgraph=True) instead of eager')
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--formulas', action='store_true', help='time the transcription of the formulas too')
    parser.add_argument('--skip', nargs='*', default=[], choices=['forward', 'train', 'memory', 'check'])
    parser.add_argument('--json', type=Path, help='write all figures to this file')
    parser.add_argument('--megabytes-of', choices=['model', 'floor'], help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.models.split(',')
    for name in names:
        if not any(name.startswith(prefix) for prefix in ('coc_', 'fec_')) or not timm.is_model(name):
            parser.error(f"--models: '{name}' is none of the registered models coc_* and fec_*")
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: there is no GPU that torch can use')
    args.models = names
    return args


def measure(name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All figures of one model."""
    result = {}
    if 'check' not in args.skip:
        result['check'] = {'relative error': disagreement(name, args.img_size)}
        if not result['check']['relative error'] < 1e-9:
            sys.exit(f'error: {name} differs from the formulas: {result["check"]["relative error"]:.1e}')
    found = networks(name, args)
    if 'forward' not in args.skip:
        result['forward'] = compare({key: Step(value, args, False) for key, value in found.items()}, args.rounds)
    if 'train' not in args.skip:
        result['train'] = compare({key: Step(value, args, True) for key, value in found.items()}, args.rounds)
    if 'memory' not in args.skip and not args.compile:
        result['memory'] = memory(name, args)
    return result


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.megabytes_of:
        print(megabytes(args.models[0], args.megabytes_of, args))
        return
    mode = f'{"compiled" if args.compile else "eager"}, {"autocast bfloat16" if args.amp else "float32"}'
    print(', '.join(map(str, where(args).values())) + f'; {mode}, batch {args.batch_size}, {args.img_size} px')
    print('| model | pass | model | floor | model / floor | formulas / model |\n|---|---|---:|---:|---:|---:|')
    figures = {}
    for name in args.models:
        figures[name] = measure(name, args)
        for kind in ('forward', 'train', 'memory'):
            if kind in figures[name]:
                row, unit = figures[name][kind], 'MB' if kind == 'memory' else 'ms'
                gain = 1 / row.get('model / formulas', math.nan)
                model, floor = (f'{row[f"{which} {unit}"]:.0f} {unit}' for which in ('model', 'floor'))
                cells = f'{model} | {floor} | {row["model / floor"]:.2f} | {"" if math.isnan(gain) else f"{gain:.2f}"}'
                print(f'| `{name}` | {kind} | {cells} |', flush=True)
    if args.json:
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.json.write_text(json.dumps(dict(machine=where(args), arguments=arguments, figures=figures), indent=1))


if __name__ == '__main__':
    main()
