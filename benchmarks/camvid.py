#!/usr/bin/env python3
"""What `benchmarks/camvid.sh` has trained, on CamVid's test images, as a table.

    python benchmarks/camvid.py cpu DATA [--overlays 8]
    python benchmarks/camvid.py gpu DATA --device cuda

For each run, by the weights after its last iteration: mIoU and pixel accuracy, and IoU of each class, in percent. Then,
for each model, side by side and with the precision of its run (the models take turns; the median of the rounds counts):

- images/s of the forward pass, 8 images of 480 x 384, and of training steps without optimizer, 8 crops of 256;
- MB (10^6 bytes) at the peak of such a training step, in a process of its own, as `benchmarks/throughput.py` has it.

Predictions are drawn into the folder of each run, and the figures written there as `test.json`.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from throughput import first_use, machine, process_bytes  # noqa: E402

from cluster_zoo.training import build  # noqa: E402
from segmentation import create_segmenter, validate  # noqa: E402
from segmentation.engine.options import model_options  # noqa: E402
from segmentation.engine.tasks import SegmentationTask  # noqa: E402

_RUN = r'camvid-{kind}-(?P<row>[\w-]+)-(?P<seed>\d+)'
_IMAGES, _CROPS = (8, 3, 384, 480), (8, 3, 256, 256)
MODES = ('inference', 'training')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('kind', choices=('cpu', 'gpu'), help='as camvid.sh was called')
    add('data', help='folder or tar of CamVid')
    add('--runs', type=Path, default=ROOT / 'output' / 'segmentation', help='where the runs are (default: %(default)s)')
    add('--device', default='cpu')
    add('--overlays', type=int, default=4, metavar='N', help='predictions to draw, a run (default: 4)')
    add('--rounds', type=int, default=5, help='of the measurement of speed; 0: leave speed and memory out')
    add('--json', type=Path, help='write the figures there too')
    return parser.parse_args()


class Candidate:
    """A model as a run has it, without the run's weights, with what it computes on."""

    def __init__(self, options: dict[str, Any], device: str):
        torch.manual_seed(0)
        self.device = torch.device(device)
        args = argparse.Namespace(**options | dict(device=device))
        self.autocast, _ = build.build_precision(args)
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

    def seconds(self, mode: str) -> float:
        """Of one step; on a GPU until its kernels have run."""
        wait = torch.cuda.synchronize if self.device.type == 'cuda' else lambda: None
        wait()
        start = time.perf_counter()
        self.step(mode)
        wait()
        return time.perf_counter() - start


def training_memory(options: dict[str, Any], device: str) -> float:
    """MB at the peak of a training step; to be called in a fresh process."""
    if device == 'cpu':
        first_use()
        before = process_bytes('VmRSS')
        candidate = Candidate(options, device)
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from what is in use
        candidate.step('training')
        return (process_bytes('VmHWM') - before) / 1e6
    candidate = Candidate(options, device)
    candidate.step('training')
    torch.cuda.reset_peak_memory_stats(device)
    candidate.step('training')
    return torch.cuda.max_memory_allocated(device) / 1e6


def speeds(models: dict[str, dict[str, Any]], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Images/s in each mode, parameters and memory of each model."""
    candidates = {row: Candidate(options, device) for row, options in models.items()}
    times = {(row, mode): [] for row in models for mode in MODES}
    for number in range(rounds + 1):
        for row, mode in times:
            seconds = candidates[row].seconds(mode)
            if number:  # the first is to warm up
                times[row, mode].append(seconds)
    found = {}
    for row, candidate in candidates.items():
        found[row] = {mode: len(candidate.images) / statistics.median(times[row, mode]) for mode in MODES}
        found[row]['parameters'] = candidate.parameters / 1e6
    candidates.clear()
    for row, options in models.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as fresh:
            found[row]['memory'] = fresh.submit(training_memory, options, device).result()
    return found


def test(folder: Path, options: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Figures of a run's last weights on the test images, with its precision; they are kept beside the weights."""
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
    figures: dict[str, dict[str, Any]] = defaultdict(dict)
    models = {}
    for folder in sorted(args.runs.glob('*')):
        match = re.fullmatch(_RUN.format(kind=args.kind), folder.name)
        if not match:
            continue
        if not (folder / 'done').is_file():
            print(f'{folder.name} is left out: it has not ended', file=sys.stderr)
            continue
        models[match['row']] = options = yaml.safe_load((folder / 'args.yaml').read_text())
        figures[match['row']][match['seed']] = test(folder, options, args)
    if not figures:
        sys.exit(f'error: no {args.kind} runs in {args.runs}: train them with benchmarks/camvid.sh')
    costs = speeds(models, args.device, args.rounds) if args.rounds else {}

    where = machine(args.device)
    processor = where['gpu'] or f'{where["threads"]} threads of {where["cpu"]}'
    print(f'\nCamVid, test images; {processor}, torch {torch.__version__}, {date.today()}\n')
    columns = ('model', 'parameters, M', 'mIoU', 'accuracy', 'inference, images/s', 'training, images/s')
    print('| ' + ' | '.join((*columns, 'training, MB')) + ' |\n|---' + '|---:' * len(columns) + '|')
    for row, of_seeds in figures.items():
        cells = [f'`{row}`', _cell(costs.get(row, {}).get('parameters'), 2)]
        cells += [_spread([result[name] for result in of_seeds.values()]) for name in ('mIoU', 'aAcc')]
        cost = costs.get(row, {})
        cells += [_cell(cost.get(name), digits) for name, digits in (('inference', 1), ('training', 1), ('memory', 0))]
        print('| ' + ' | '.join(cells) + ' |')
    classes = list(next(iter(next(iter(figures.values())).values()))['IoU'])
    print('\n| IoU | ' + ' | '.join(classes) + ' |\n|---' + '|---:' * len(classes) + '|')
    for row, of_seeds in figures.items():
        means = [statistics.mean(result['IoU'][name] for result in of_seeds.values()) for name in classes]
        print(f'| `{row}` | ' + ' | '.join(f'{mean:.1f}' for mean in means) + ' |')
    if args.json:
        report = dict(machine=where, date=str(date.today()), figures=figures, costs=costs)
        args.json.write_text(json.dumps(report, indent=2) + '\n')


def _cell(value: float | None, digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def _spread(values: list[float]) -> str:
    deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{deviation}'


if __name__ == '__main__':
    main()
