#!/usr/bin/env python3
"""New classes from a few images: centroids found without training, a linear probe and the nearest class mean.

    python benchmarks/few_shot.py DATA --model dnc_resnet18 --epochs 3

DATA holds train and val, as folders or .tar files of class folders of images. A model is trained on the first 80 % of
the classes, unless OUTPUT holds its weights from before. For the others it only computes features: of some images a
class to learn from, drawn several times, and of the validation images to be right about. Every method gets the same.
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

from throughput import machine  # noqa: E402

from cluster_zoo.data import class_names, create_dataset  # noqa: E402
from cluster_zoo.layers.nearest_centroid import normalize  # noqa: E402
from cluster_zoo.transfer import class_centroids, embed_dataset  # noqa: E402
from cluster_zoo.weights import load_checkpoint  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('data', type=Path, help='folder with train and val')
    add('--model', default='dnc_resnet18', help='a dnc_* model (default: %(default)s)')
    add('--img-size', type=int, default=48)
    add('--epochs', type=int, default=3, help='of the training on the other classes')
    add('--shots', type=int, nargs='+', default=[5, 20, 100], help='images a class to learn from')
    add('--draws', type=int, default=10, help='times they are drawn')
    add('--output', type=Path, default=ROOT / 'output' / 'few-shot', help='where class lists and weights go')
    add('--device', default='cpu')
    add('--json', type=Path, help='write the figures there too')
    return parser.parse_args()


def split_classes(args: argparse.Namespace) -> tuple[Path, Path, int]:
    """Writes the names of the classes to train on and of the held-out ones; also gives the number of the former."""
    names = list(class_names(create_dataset('', args.data, 'train')).values())
    known = len(names) * 4 // 5
    args.output.mkdir(parents=True, exist_ok=True)
    files = args.output / 'trained.txt', args.output / 'held_out.txt'
    for file, some in zip(files, (names[:known], names[known:])):
        file.write_text('\n'.join(some) + '\n')
    return *files, known


def train(args: argparse.Namespace, class_map: Path, num_classes: int) -> Path:
    """Weights of a model of the other classes, trained like those of `benchmarks/dnc.sh`."""
    name = f'{args.model}-{num_classes}-classes-{args.img_size}px-{args.epochs}'
    weights = args.output / name / 'last.pth.tar'
    if weights.is_file():
        return weights
    command = f"""{sys.executable} {ROOT / 'train.py'} --recipe timm --model {args.model} --num-classes {num_classes}
        --img-size {args.img_size} --crop-pct 1 --scale 0.5 1 --ratio 0.9 1.11 --color-jitter 0 -b 64 --seed 42
        --opt adamw --lr 1e-3 --weight-decay 0.05 --clip-grad 1 --warmup-epochs 1 --warmup-lr 1e-6 --sched-on-updates
        --epochs {args.epochs} --amp --amp-dtype bfloat16 --device {args.device} --checkpoint-hist 1 --workers 1
        --experiment {name}""".split()
    places = ['--data-dir', str(args.data), '--class-map', str(class_map), '--output', str(args.output)]
    subprocess.run(command + places, check=True)
    return weights


def draw(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices of so many samples of each class, at random."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == c][:shots] for c in range(int(labels.max()) + 1)])


def linear_probe(features: Tensor, labels: Tensor, num_classes: int, weight_decay: float = 1e-3) -> nn.Linear:
    """Multinomial regression to its optimum, on features of zero mean and deviation one."""
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


def methods(features: Tensor, labels: Tensor, to_tell: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Scores of `to_tell` [N, D] for each class by each method, from few labelled features."""
    scores = {}
    for k in (1, 4):
        centroids = class_centroids(features, labels, num_classes, k)
        scores[f'fit_centroids, {k} a class'] = torch.einsum('nd,ckd->nck', to_tell, centroids).amax(-1)
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    with torch.enable_grad():
        probe = linear_probe((features - mean) / deviation, labels, num_classes)
    scores['linear probe'] = probe((to_tell - mean) / deviation)
    means = torch.stack([features[labels == c].mean(0) for c in range(num_classes)])
    scores['nearest class mean'] = -torch.cdist(to_tell, means)
    return scores


@torch.no_grad()
def main() -> None:
    args = parse()
    trained, held_out, known = split_classes(args)
    weights = train(args, trained, known)
    model = timm.create_model(args.model, num_classes=known)
    load_checkpoint(model, weights)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, args.img_size, args.img_size), crop_pct=1.0)
    model.to(args.device)
    splits = [create_dataset('', args.data, split, class_map=str(held_out)) for split in ('train', 'val')]
    (features, labels), (to_tell, right) = (embed_dataset(model, dataset) for dataset in splits)
    num_classes = int(labels.max()) + 1

    figures = {}
    for shots in args.shots:
        runs = []
        for seed in range(args.draws):
            chosen = draw(labels, shots, seed)
            scores = methods(normalize(features[chosen]), labels[chosen], to_tell, num_classes)
            runs.append({name: top1(score, right) for name, score in scores.items()})
        for name in runs[0]:
            values = torch.tensor([run[name] for run in runs])
            spread = values.std().item() if len(runs) > 1 else 0.0
            figures.setdefault(name, {})[shots] = dict(mean=values.mean().item(), std=spread)

    print(
        f'{args.model}, {args.epochs} epochs on {known} classes; top-1 of {len(right)} images of {num_classes} others, '
    )
    where = machine(args.device)
    print(f'mean and deviation of {args.draws} draws; {where["gpu"] or where["cpu"]}; {date.today()}\n')
    print('| | ' + ' | '.join(f'{shots} images a class' for shots in args.shots) + ' |')
    print('|---|' + '---|' * len(args.shots))
    for name, row in figures.items():
        print(f'| {name} | ' + ' | '.join(f'{v["mean"]:.1f} ± {v["std"]:.1f}' for v in row.values()) + ' |')
    if args.json:
        args.json.write_text(json.dumps(dict(machine=where, date=str(date.today()), figures=figures), indent=2) + '\n')


if __name__ == '__main__':
    main()
