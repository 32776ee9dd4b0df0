#!/usr/bin/env python3
"""Evaluates the runs of `benchmarks/camvid.sh` on the test images of CamVid and prints tables.

    python benchmarks/camvid.py cpu DATA [--overlays 8]
    python benchmarks/camvid.py gpu DATA --device cuda

The first table has, for the weights after the last iteration, mIoU and pixel accuracy in percent, and the cost of each
model with the precision of its run (models take turns, median of the rounds):

- images/s of the forward pass, 8 images of 480 x 384, and of training steps without optimizer, 8 crops of 256;
- MB (10^6 bytes) at the peak of such a training step, measured in a new process as in `benchmarks/throughput.py`.

The second table has the IoU of each class. Each run's folder gets the metrics as `test.json`, and overlays of
predictions.
"""

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from measuring import device_name, in_new_process, interleaved_seconds, machine, peak_megabytes, print_table  # noqa: E402

from cluster_zoo.training.runtime import build_precision  # noqa: E402
from segmentation import create_segmenter, validate  # noqa: E402
from segmentation.engine.shared_options import model_options  # noqa: E402
from segmentation.engine.tasks import SegmentationTask  # noqa: E402

_RUN = r'camvid-{kind}-(?P<row>[\w-]+)-(?P<seed>\d+)'
_IMAGES, _CROPS = (8, 3, 384, 480), (8, 3, 256, 256)
MODES = ('inference', 'training')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('kind', choices=('cpu', 'gpu'), help='argument of camvid.sh')
    add('data', help='folder or tar of CamVid')
    add('--runs', type=Path, default=ROOT / 'output' / 'segmentation', help='folder of the runs (default: %(default)s)')
    add('--device', default='cpu')
    add('--overlays', type=int, default=4, metavar='N', help='predictions to draw per run (default: 4)')
    add('--rounds', type=int, default=5, help='rounds of the speed measurement; 0 skips speed and memory')
    add('--json', type=Path, help='also write the results to this file')
    return parser.parse_args()


class Candidate:
    """The model of a run with random weights, and random inputs."""

    def __init__(self, options: dict[str, Any], device: str):
        torch.manual_seed(0)
        args = argparse.Namespace(**options | dict(device=device))
        self.autocast, _ = build_precision(args)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        model = create_segmenter(**model_options(args)).to(device, memory_format=layout)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.task = SegmentationTask(model, args.guidance_weight, args.auxiliary_weight)
        self.images, self.crops = (
            torch.randn(size, device=device).contiguous(memory_format=layout) for size in (_IMAGES, _CROPS)
        )
        self.labels = torch.randint(args.num_classes, (_CROPS[0], *_CROPS[2:]), device=device)

    def step(self, mode: str) -> None:
        self.task.train(mode == 'training')
        if mode == 'inference':
            with torch.inference_mode(), self.autocast():
                self.task.trainable_module(self.images)
            return
        with self.autocast():
            loss = self.task(self.crops, self.labels)['loss']
        loss.backward()
        self.task.update_ema()  # centroids learn
        self.task.zero_grad()


def training_memory(options: dict[str, Any], device: str) -> float:
    """Returns the MB at the peak of a training step. Call it in a new process."""
    return peak_megabytes(lambda: Candidate(options, device), ['training'], device)['training']


def speeds(models: dict[str, dict[str, Any]], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Returns images/s in each mode, parameters in millions and memory in MB of each model."""
    found = {row: dict(memory=in_new_process(training_memory, options, device)) for row, options in models.items()}
    candidates = {row: Candidate(options, device) for row, options in models.items()}
    steps = {(row, mode): partial(candidates[row].step, mode) for row in models for mode in MODES}
    interleaved_seconds(steps, device, rounds=1)  # warms up
    times = interleaved_seconds(steps, device, rounds)
    for row, candidate in candidates.items():
        found[row] |= {mode: len(candidate.images) / statistics.median(times[row, mode]) for mode in MODES}
        found[row]['parameters'] = candidate.parameters / 1e6
    return found


def test(folder: Path, options: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Returns the test metrics of a run's last weights, with its precision. They are cached in the run's folder."""
    results, checkpoint = folder / 'test.json', folder / 'last.pth.tar'
    if not results.is_file() or results.stat().st_mtime < checkpoint.stat().st_mtime:
        command = [args.data, '--checkpoint', checkpoint, '--split', 'test', '--device', args.device, '--workers', 0]
        command += ['--results-file', results, '--overlays', folder / 'overlays-test', '--num-overlays', args.overlays]
        command += [f'--{name.replace("_", "-")}' for name in ('amp', 'channels_last') if options[name]]
        command += ['--amp-dtype', options['amp_dtype']] if options['amp_dtype'] else []
        if validate.main(list(map(str, command))):
            sys.exit(2)
    return json.loads(results.read_text())


def main() -> None:
    args = parse()
    results: dict[str, dict[str, Any]] = defaultdict(dict)
    models = {}
    for folder in sorted(args.runs.glob('*')):
        match = re.fullmatch(_RUN.format(kind=args.kind), folder.name)
        if not match:
            continue
        if not (folder / 'done').is_file():
            print(f'Skipped {folder.name}: the run is not finished', file=sys.stderr)
            continue
        models[match['row']] = options = yaml.safe_load((folder / 'args.yaml').read_text())
        results[match['row']][match['seed']] = test(folder, options, args)
    if not results:
        sys.exit(f'error: no {args.kind} runs in {args.runs}: train them with benchmarks/camvid.sh')
    costs = speeds(models, args.device, args.rounds) if args.rounds else {}

    host = machine(args.device)
    print(f'\nCamVid, test images; {device_name(host)}, torch {torch.__version__}, {date.today()}\n')
    columns = ('model', 'parameters, M', 'mIoU', 'accuracy', 'inference, images/s', 'training, images/s')
    rows = [[*columns, 'training, MB']]
    for row, by_seed in results.items():
        cost = costs.get(row, {})
        cells = [f'`{row}`', _cell(cost.get('parameters'), 2)]
        cells += [_spread([metrics[name] for metrics in by_seed.values()]) for name in ('mIoU', 'aAcc')]
        cells += [_cell(cost.get(name), digits) for name, digits in (('inference', 1), ('training', 1), ('memory', 0))]
        rows.append(cells)
    print_table(rows)
    classes = list(next(iter(next(iter(results.values())).values()))['IoU'])
    rows = [['IoU', *classes]]
    for row, by_seed in results.items():
        means = [statistics.mean(metrics['IoU'][name] for metrics in by_seed.values()) for name in classes]
        rows.append([f'`{row}`', *(f'{mean:.1f}' for mean in means)])
    print()
    print_table(rows)
    if args.json:
        report = dict(machine=host, date=str(date.today()), figures=results, costs=costs)
        args.json.write_text(json.dumps(report, indent=2) + '\n')


def _cell(value: float | None, digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def _spread(values: list[float]) -> str:
    deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{deviation}'


if __name__ == '__main__':
    main()
