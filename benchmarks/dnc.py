#!/usr/bin/env python3
"""Prints the results of `benchmarks/dnc.sh` as a table, and anchors the centroids of the default head.

    python benchmarks/dnc.py cifar10 DATA
    python benchmarks/dnc.py tiny_imagenet DATA --device cuda

DATA is the argument of `dnc.sh`. Accuracy is measured on the validation images after the last epoch. Each anchored
model is saved in the folder of its run as `anchored.safetensors`, with images of its centroids and of some
predictions.
"""

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from measuring import device_name, machine, print_table  # noqa: E402

import cluster_zoo  # noqa: E402, F401  registers the models
from cluster_zoo.datasets import class_names, create_dataset  # noqa: E402
from cluster_zoo.explain import anchor, draw_centroids, draw_explanation, explain  # noqa: E402
from cluster_zoo.weights import load_checkpoint  # noqa: E402

_RUN = r'dnc-{data}-(?P<backbone>\w+)-(?P<head>linear|published|queue|default)-(?P<seed>\d+)'
_HEADS = dict(
    linear='linear',
    published='DNC, published schedule and start',
    queue='DNC, queue, published start',
    default='DNC, queue, common start (default)',
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('name', choices=('cifar10', 'cifar10_small', 'tiny_imagenet'))
    add('data', type=Path, help='folder with train and val')
    add('--runs', type=Path, default=ROOT / 'output' / 'train', help='folder of the runs (default: %(default)s)')
    add('--device', default='cpu')
    add('--anchor', nargs='*', default=['default'], choices=list(_HEADS), help='heads to anchor (default: default)')
    add('--workers', type=int, default=1)
    add('--json', type=Path, help='also write the results to this file')
    return parser.parse_args()


def anchored(args: argparse.Namespace, folder: Path, options: dict[str, Any]) -> dict[str, float]:
    """Replaces the centroids of a run by training images. Returns top-1 in percent before and after."""
    model = timm.create_model(options['model'], num_classes=options['num_classes'], **options['model_kwargs'])
    load_checkpoint(model, folder / 'last.pth.tar')
    model.to(args.device)
    transform = create_transform(**resolve_data_config(options, model=model))  # the transform of the run
    train, val = (create_dataset('', args.data, split) for split in ('train', 'val'))
    result = anchor(model, train, val, num_workers=args.workers, transform=transform)
    print(f'{folder.name}: {result}', file=sys.stderr, flush=True)
    model.cpu()
    save_file(model.state_dict(), folder / 'anchored.safetensors')

    names = class_names(train)
    draw_centroids(model, names).save(folder / 'centroids.png')
    step = max(len(val) // 8, 1)
    for number in range(step // 2, len(val), step):
        image = val[number][0].convert('RGB')
        draw_explanation(explain(model, transform(image), names), image).save(folder / f'decision-{number}.png')
    return dict(before=100 * result.accuracy_before, after=100 * result.accuracy_after)


def main() -> None:
    args = parse()
    found = {path: re.fullmatch(_RUN.format(data=args.name), path.name) for path in sorted(args.runs.glob('*'))}
    rows: dict[tuple, dict[int, float]] = defaultdict(dict)
    for folder, match in found.items():
        if not match or not (folder / 'summary.csv').is_file():
            continue
        options = yaml.safe_load((folder / 'args.yaml').read_text())
        history = list(csv.DictReader((folder / 'summary.csv').open()))
        if len(history) < options['epochs']:
            print(f'Skipped {folder.name}: {len(history)} of {options["epochs"]} epochs', file=sys.stderr)
            continue
        key, seed, top1 = (match['backbone'], len(history)), int(match['seed']), float(history[-1]['eval_top1'])
        rows[(*key, match['head'])][seed] = top1
        if match['head'] in args.anchor:
            result = anchored(args, folder, options)
            if abs(result['before'] - top1) > 0.5:  # autocast makes a small difference
                sys.exit(
                    f'error: {folder.name} has top-1 {top1:.2f}, but {result["before"]:.2f} on {args.data}: use the '
                    'data of the run'
                )
            rows[(*key, f'{match["head"]}, anchored')][seed] = result['after']
    if not rows:
        sys.exit(f'error: no runs of {args.name} in {args.runs}: train them with benchmarks/dnc.sh')

    host = machine(args.device)
    print(f'{args.name}, validation images; anchored on {device_name(host)}; {date.today()}\n')
    names = {**_HEADS, **{f'{head}, anchored': f'{name}, anchored' for head, name in _HEADS.items()}}
    order = [name for head in _HEADS for name in (head, f'{head}, anchored')]
    table = [['backbone', 'epochs', 'head', 'top-1', 'seeds']]
    for backbone, epochs, head in sorted(rows, key=lambda key: (*key[:2], order.index(key[2]))):
        by_seed = rows[backbone, epochs, head]
        values = torch.tensor(list(by_seed.values()))
        spread = f' ± {values.std():.2f}' if len(values) > 1 else ''
        seeds = ', '.join(map(str, by_seed))
        table.append([f'`{backbone}`', str(epochs), names[head], f'{values.mean():.2f}{spread}', seeds])
    print_table(table)
    if args.json:
        records = [dict(zip(('backbone', 'epochs', 'head'), key), top1=by_seed) for key, by_seed in rows.items()]
        args.json.write_text(json.dumps(dict(machine=host, date=str(date.today()), rows=records), indent=2) + '\n')


if __name__ == '__main__':
    main()
