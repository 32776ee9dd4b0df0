"""Cost of clustering: registered models compared with their floor, the same network without clustering.

    python benchmarks/clustering.py [--models coc_tiny,fec_small] [--batch-size 8] [--compile] [--amp] [--device cuda]

The floor has the weights and inputs of the model, but each mixer returns ``proj(v(x) + f(x))``. In FEC's cluster
pooling, average pooling of v replaces the means of the groups, and f and the product of unit centers and points are
computed as in the paper and dropped. Model and floor take turns in one process, and the result is the median of the
ratios of all rounds. 1.00 means that clustering has no cost. The ratio may be lower, because the model does not need
all convolutions of the floor. With ``--formulas`` the transcription of the formulas (tests/transcription.py) is timed
too, and the last column is its time divided by that of the model.

Before the measurement, the logits and a gradient of each model are compared with the transcription in float64. Memory
is what a training step adds to the process, for model and floor in a new process each; on a GPU, to torch's allocator.
"""

import argparse
import copy
import json
import math
import os
import statistics
import sys
from datetime import date
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'benchmarks')]

from measuring import (  # noqa: E402
    Classifier,
    device_name,
    in_new_process,
    interleaved_seconds,
    machine,
    peak_bytes,
    used_bytes,
)
from transcription import Transcription  # noqa: E402

import cluster_zoo  # noqa: E402, F401  registers the models
from cluster_zoo.layers.cluster_mixer import ClusterMixer  # noqa: E402
from cluster_zoo.models.fec import ClusterPool  # noqa: E402

MODELS = 'coc_tiny,coc_tiny_plain,coc_small,coc_medium,fec_small,fec_base'


class FloorMixer(nn.Module):
    """The three convolutions of a mixer."""

    def __init__(self, mixer: ClusterMixer):
        super().__init__()
        self.f, self.v, self.proj = mixer.f, mixer.v, mixer.proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.v(x) + self.f(x))


class FloorPool(nn.Module):
    """Cluster pooling without assignment and sums: the convolutions, the norm, and the product of all pairs."""

    def __init__(self, pool: ClusterPool):
        super().__init__()
        self.f, self.v, self.skip, self.norm = pool.f, pool.v, pool.skip, pool.norm

    def forward(self, x: Tensor) -> Tensor:
        f = self.f(x)
        with torch.no_grad():
            centers = F.normalize(F.avg_pool2d(f, 2).flatten(2), dim=1).transpose(1, 2)
            points = F.normalize(f.flatten(2), dim=1)
            size = (1 << 18) // centers.shape[1]  # the block size of the model, for comparable memory
            products = [(centers @ block)[:, :1, :1] for block in points.split(size, dim=-1)]
        unused = 0 * (f[:1, :, :1, :1].sum() + sum(products).sum())  # keeps a compiler from removing them
        return self.skip(x) + self.norm(F.avg_pool2d(self.v(x), 2)) + unused


def floor(model: nn.Module) -> nn.Module:
    """Returns a copy of the model without clustering."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (ClusterMixer, ClusterPool)):
            model.set_submodule(name, (FloorMixer if isinstance(module, ClusterMixer) else FloorPool)(module))
    return model


def create(name: str) -> nn.Module:
    """Creates a model with layer scales of 0.3. At the initial 1e-5, errors in the branches would not show."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith('gamma'):
            nn.init.constant_(parameter, 0.3)
    return model


def disagreement(name: str, size: int) -> float:
    """Returns the relative error of logits and the first weight's gradient to the formulas, in float64."""
    model = create(name).double().eval()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    results = []
    for network in (model, Transcription(model)):
        logits = network(images)
        (gradient,) = torch.autograd.grad(logits.square().sum(), model.stem.proj.weight)
        results.append((logits.detach(), gradient))
    return max(((value - expected).norm() / expected.norm()).item() for value, expected in zip(*results))


def classifier(model: nn.Module, args: argparse.Namespace, batch_size: int) -> Classifier:
    images = torch.randn(batch_size, 3, args.img_size, args.img_size, device=args.device)
    return Classifier(model, images, torch.arange(batch_size, device=args.device) % 1000, args.amp)


def compare(candidates: dict[str, Classifier], mode: str, args: argparse.Namespace) -> dict[str, float]:
    """Returns the median milliseconds of each network, and the median ratio of the model to each other network."""
    steps = {name: partial(candidate.step, mode) for name, candidate in candidates.items()}
    interleaved_seconds(steps, args.device, rounds=2)  # warms up
    times = interleaved_seconds(steps, args.device, args.rounds)
    result = {f'{name} ms': 1e3 * statistics.median(values) for name, values in times.items()}
    for name in times:
        if name != 'model':
            result[f'model / {name}'] = statistics.median(a / b for a, b in zip(times['model'], times[name]))
    return result


def candidates(name: str, args: argparse.Namespace) -> dict[str, Classifier]:
    """Creates the model, its floor and, with ``--formulas`` and without ``--compile``, its transcription."""
    model = create(name).to(args.device)
    found = {'model': model, 'floor': floor(model)}
    for network in found.values():  # after a training step, the allocator keeps more memory
        classifier(network, args, args.batch_size).step('training')
    if args.compile:
        torch.compiler.reset()  # otherwise earlier models count as recompilations
        found = {key: torch.compile(network, fullgraph=True) for key, network in found.items()}
    elif args.formulas:
        found['formulas'] = Transcription(model)
    return {key: classifier(network, args, args.batch_size) for key, network in found.items()}


def megabytes(name: str, which: str, args: argparse.Namespace) -> float:
    """Returns the memory in MiB that a training step adds, after one with a smaller batch. Call it in a new process."""
    torch.set_num_threads(args.threads)
    network = create(name)
    network = (floor(network) if which == 'floor' else network).to(args.device)
    classifier(network, args, 1).step('training')
    candidate = classifier(network, args, args.batch_size)
    before = used_bytes(args.device)
    return (peak_bytes(partial(candidate.step, 'training'), args.device) - before) / 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', default=MODELS, help='comma-separated names')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help='CPU threads')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--compile', action='store_true', help='use torch.compile(fullgraph=True)')
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--formulas', action='store_true', help='also time the transcription of the formulas')
    parser.add_argument('--skip', nargs='*', default=[], choices=['forward', 'train', 'memory', 'check'])
    parser.add_argument('--json', type=Path, help='write the results to this file')
    args = parser.parse_args()
    names = args.models.split(',')
    for name in names:
        if not any(name.startswith(prefix) for prefix in ('coc_', 'fec_')) or not timm.is_model(name):
            parser.error(f"--models: '{name}' is not one of the registered models coc_* and fec_*")
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no CUDA device')
    args.models = names
    return args


def measure(name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns all results of one model."""
    result = {}
    if 'check' not in args.skip:
        result['check'] = {'relative error': disagreement(name, args.img_size)}
        if not result['check']['relative error'] < 1e-9:
            sys.exit(f'error: {name} differs from the formulas: {result["check"]["relative error"]:.1e}')
    networks = candidates(name, args)
    for kind, mode in (('forward', 'inference'), ('train', 'training')):
        if kind not in args.skip:
            result[kind] = compare(networks, mode, args)
    if 'memory' not in args.skip and not args.compile:
        memory = {f'{which} MB': in_new_process(megabytes, name, which, args) for which in ('model', 'floor')}
        result['memory'] = memory | {'model / floor': memory['model MB'] / memory['floor MB']}
    return result


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    host = machine(args.device)
    where = dict(device=device_name(host), torch=torch.__version__, date=date.today().isoformat())
    mode = f'{"compiled" if args.compile else "eager"}, {"autocast bfloat16" if args.amp else "float32"}'
    print(', '.join(where.values()) + f'; {mode}, batch {args.batch_size}, {args.img_size} px')
    print('| model | pass | model | floor | model / floor | formulas / model |\n|---|---|---:|---:|---:|---:|')
    results = {}
    for name in args.models:
        results[name] = measure(name, args)
        for kind in ('forward', 'train', 'memory'):
            if kind in results[name]:
                row, unit = results[name][kind], 'MB' if kind == 'memory' else 'ms'
                gain = 1 / row.get('model / formulas', math.nan)
                model, floor = (f'{row[f"{which} {unit}"]:.0f} {unit}' for which in ('model', 'floor'))
                cells = f'{model} | {floor} | {row["model / floor"]:.2f} | {"" if math.isnan(gain) else f"{gain:.2f}"}'
                print(f'| `{name}` | {kind} | {cells} |', flush=True)
    if args.json:
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.json.write_text(json.dumps(dict(machine=where, arguments=arguments, figures=results), indent=1))


if __name__ == '__main__':
    main()
