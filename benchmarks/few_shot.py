#!/usr/bin/env python3
"""Few-shot transfer to new classes: `fit_centroids` compared with a linear probe and the nearest class mean.

    python benchmarks/few_shot.py DATA --model dnc_resnet18 --epochs 3

DATA has train and val, folders or .tar files of images with one folder per class. A model is trained on the first 80 %
of the classes, unless OUTPUT has its weights from an earlier run. For the other classes it only computes features: of a
few training images per class, drawn several times, and of all validation images. All methods use the same features.
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from measuring import device_name, machine, print_table  # noqa: E402

from cluster_zoo.datasets import class_names, create_dataset  # noqa: E402
from cluster_zoo.layers.centroid_learning import normalize  # noqa: E402
from cluster_zoo.transfer import class_centroids, embed_dataset  # noqa: E402
from cluster_zoo.weights import load_checkpoint  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('data', type=Path, help='folder with train and val')
    add('--model', default='dnc_resnet18', help='a dnc_* model (default: %(default)s)')
    add('--img-size', type=int, default=48)
    add('--epochs', type=int, default=3, help='epochs of the training on the first classes')
    add('--shots', type=int, nargs='+', default=[5, 20, 100], help='training images per class')
    add('--draws', type=int, default=10, help='number of random draws of the training images')
    add('--output', type=Path, default=ROOT / 'output' / 'few-shot', help='folder for class lists and weights')
    add('--device', default='cpu')
    add('--json', type=Path, help='also write the results to this file')
    return parser.parse_args()


def split_classes(args: argparse.Namespace) -> tuple[Path, Path, int]:
    """Writes the names of the training and the held-out classes. Returns both files and the number of the former."""
    names = list(class_names(create_dataset('', args.data, 'train')).values())
    num_trained = len(names) * 4 // 5
    args.output.mkdir(parents=True, exist_ok=True)
    files = args.output / 'trained.txt', args.output / 'held_out.txt'
    for file, part in zip(files, (names[:num_trained], names[num_trained:])):
        file.write_text('\n'.join(part) + '\n')
    return *files, num_trained


def train(args: argparse.Namespace, class_map: Path, num_classes: int) -> Path:
    """Trains a model as in `benchmarks/dnc.sh`, unless its weights exist. Returns the checkpoint."""
    name = f'{args.model}-{num_classes}-classes-{args.img_size}px-{args.epochs}'
    weights = args.output / name / 'last.pth.tar'
    if weights.is_file():
        return weights
    command = f"""{sys.executable} {ROOT / 'train.py'} --recipe timm --model {args.model} --num-classes {num_classes}
        --img-size {args.img_size} --crop-pct 1 --scale 0.5 1 --ratio 0.9 1.11 --color-jitter 0 -b 64 --seed 42
        --opt adamw --lr 1e-3 --weight-decay 0.05 --clip-grad 1 --warmup-epochs 1 --warmup-lr 1e-6 --sched-on-updates
        --epochs {args.epochs} --amp --amp-dtype bfloat16 --device {args.device} --checkpoint-hist 1 --workers 1
        --experiment {name}""".split()
    paths = ['--data-dir', str(args.data), '--class-map', str(class_map), '--output', str(args.output)]
    subprocess.run(command + paths, check=True)
    return weights


def draw(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Returns the indices of random samples, `shots` per class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == c][:shots] for c in range(int(labels.max()) + 1)])


def linear_probe(features: Tensor, labels: Tensor, num_classes: int, weight_decay: float = 1e-3) -> nn.Linear:
    """Fits a logistic regression to standardized features."""
    probe = nn.Linear(features.shape[1], num_classes)
    nn.init.zeros_(probe.weight)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(features), labels) + weight_decay * probe.weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe


def top1(scores: Tensor, labels: Tensor) -> float:
    return 100 * (scores.argmax(-1) == labels).float().mean().item()


def methods(features: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Returns the scores [N, K] of each method for `queries` [N, D], from a few labeled features."""
    scores = {}
    for k in (1, 4):
        centroids = class_centroids(features, labels, num_classes, k)
        scores[f'fit_centroids, {k} per class'] = torch.einsum('nd,ckd->nck', queries, centroids).amax(-1)
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    with torch.enable_grad():
        probe = linear_probe((features - mean) / deviation, labels, num_classes)
    scores['linear probe'] = probe((queries - mean) / deviation)
    means = torch.stack([features[labels == c].mean(0) for c in range(num_classes)])
    scores['nearest class mean'] = -torch.cdist(queries, means)
    return scores


@torch.no_grad()
def main() -> None:
    args = parse()
    trained, held_out, num_trained = split_classes(args)
    weights = train(args, trained, num_trained)
    model = timm.create_model(args.model, num_classes=num_trained)
    load_checkpoint(model, weights)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, args.img_size, args.img_size), crop_pct=1.0)
    model.to(args.device)
    splits = [create_dataset('', args.data, split, class_map=str(held_out)) for split in ('train', 'val')]
    (features, labels), (queries, query_labels) = (embed_dataset(model, dataset) for dataset in splits)
    num_classes = int(labels.max()) + 1

    results = {}
    for shots in args.shots:
        runs = []
        for seed in range(args.draws):
            chosen = draw(labels, shots, seed)
            scores = methods(normalize(features[chosen]), labels[chosen], queries, num_classes)
            runs.append({name: top1(score, query_labels) for name, score in scores.items()})
        for name in runs[0]:
            values = torch.tensor([run[name] for run in runs])
            spread = values.std().item() if len(runs) > 1 else 0.0
            results.setdefault(name, {})[shots] = dict(mean=values.mean().item(), std=spread)

    host = machine(args.device)
    print(
        f'{args.model}, {args.epochs} epochs on {num_trained} classes; top-1 of {len(query_labels)} images of '
        f'{num_classes} others, mean and deviation of {args.draws} draws; {device_name(host)}; {date.today()}\n'
    )
    rows = [['', *(f'{shots} images per class' for shots in args.shots)]]
    for name, row in results.items():
        rows.append([name, *(f'{v["mean"]:.1f} ± {v["std"]:.1f}' for v in row.values())])
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(dict(machine=host, date=str(date.today()), figures=results), indent=2) + '\n')


if __name__ == '__main__':
    main()
