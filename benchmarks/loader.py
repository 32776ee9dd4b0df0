"""Images per second that the training loader gives, by number of workers.

    python benchmarks/loader.py DATA [--model coc_tiny] [--img-size 224] [--workers 0 1 2] [--json loader.json]

DATA is a folder or a .tar of images in one folder per class. The loader is that of train.py for a GPU, with the
augmentation of the model's recipe: the workers read, decode, crop, augment and mix images and stack them to batches of
uint8. There is no model. The prefetcher, which normalizes images and erases parts of them on the GPU, is not measured,
nor is the disk: after a first pass the files are in memory.

In each round every number of workers gets new processes, a warm-up and then the time that is measured, which begins and
ends with a batch. They take turns, so that other work on the machine affects all of them. The table has the fastest
round, the range over the rounds, and the images per processor second of all processes (Linux only, also of the fastest
round), which varies less with other work.
"""

import argparse
import datetime
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from measuring import machine, positive, print_table  # noqa: E402

from cluster_zoo.datasets import class_names, create_dataset  # noqa: E402
from cluster_zoo.errors import UserError  # noqa: E402
from cluster_zoo.training.loaders import build_loaders, build_mixup, dataset_options  # noqa: E402
from cluster_zoo.training.model import check_model_name  # noqa: E402
from cluster_zoo.training.parser import Parser  # noqa: E402
from cluster_zoo.training.train_options import train_parser  # noqa: E402

PASS = 10_000  # batches in a pass over the data, so that the measured time has no end of an epoch in it
SAMPLE = 100  # images of which the mean size is computed


def training_options(args: argparse.Namespace, workers: int) -> argparse.Namespace:
    """Returns the options of train.py. On the device 'meta' the loader is that for a GPU, without its prefetcher."""
    flags = ['--model', args.model, '--img-size', args.img_size, '-b', args.batch_size, '-j', workers]
    options = train_parser().resolve([str(args.data), '--val-split', '', '--device', 'meta', *map(str, flags)])
    options.distributed, options.world_size = False, 1
    return options


def build(args: argparse.Namespace, workers: int) -> tuple[DataLoader, Any]:
    """Builds the training loader, without the prefetcher, and its dataset, which repeats the images."""
    options = training_options(args, workers)
    check_model_name(args.model)
    data_config = resolve_data_config(vars(options), pretrained_cfg=timm.get_pretrained_cfg(args.model).to_dict())
    images = create_dataset(split=options.train_split, is_training=True, **dataset_options(options, 3))
    options.num_classes = len(class_names(images))
    repeated = list(itertools.islice(itertools.cycle(range(len(images))), PASS * args.batch_size))
    dataset = images.subset(repeated)
    loader, _ = build_loaders(options, (dataset, None), data_config, build_mixup(options))
    return loader.loader, images


def processor_seconds(workers: list[Any]) -> float | None:
    """Returns the processor time of this process and of workers; None where the system does not tell."""
    if workers and sys.platform != 'linux':
        return None
    ticks = 0
    for worker in workers:
        fields = Path(f'/proc/{worker.pid}/stat').read_text().rpartition(')')[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return time.process_time() + ticks / os.sysconf('SC_CLK_TCK')


def measure_once(args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Returns images per second, and per processor second, of a new loader."""
    batches = iter(build(args, workers)[0])
    processes = getattr(batches, '_workers', [])
    turn = max(1, workers)  # each worker makes every n-th batch

    def take(seconds: float, start: float) -> int:
        count = 0
        while count == 0 or count % turn or time.perf_counter() - start < seconds:
            next(batches)
            count += 1
        return count

    for _ in range(2 * turn):
        next(batches)  # starts the workers
    take(args.warm_up, time.perf_counter())
    start, used = time.perf_counter(), processor_seconds(processes)
    images = args.batch_size * take(args.seconds, start)
    seconds, after = time.perf_counter() - start, processor_seconds(processes)
    return dict(per_second=images / seconds, per_processor_second=None if used is None else images / (after - used))


def image_size(images: Any) -> dict[str, float]:
    """Returns the mean megapixels and kilobytes of images spread over a dataset."""
    pixels, size, indices = 0, 0, range(0, len(images), -(-len(images) // SAMPLE))
    for index in indices:
        with images.reader[index][0] as file, Image.open(file) as image:
            pixels += image.width * image.height
            size += file.seek(0, os.SEEK_END)
    return dict(megapixels=pixels / len(indices) / 1e6, kilobytes=size / len(indices) / 1e3)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all numbers of workers in turns. Returns the rounds with the machine and arguments."""
    _, images = build(args, 0)
    rounds: dict[int, list[dict[str, Any]]] = {workers: [] for workers in args.workers}
    for _ in range(args.rounds):
        for workers in args.workers:
            rounds[workers].append(measure_once(args, workers))
    return dict(
        arguments={name: value for name, value in vars(args).items() if name not in ('data', 'json')},
        machine=machine('cpu'),
        torch=torch.__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        images=dict(number=len(images), **image_size(images)),
        results=[dict(workers=workers, rounds=of_workers) for workers, of_workers in rounds.items()],
    )


def rows(results: list[dict[str, Any]]) -> Iterator[list[str]]:
    yield ['workers', 'images/s', 'range', 'images per processor second']
    for result in results:
        rates = [each['per_second'] for each in result['rounds']]
        best = max(result['rounds'], key=lambda each: each['per_second'])
        efficiency = best['per_processor_second']
        row = [f'{result["workers"]}', f'{max(rates):.0f}', f'{min(rates):.0f} to {max(rates):.0f}']
        yield [*row, '' if efficiency is None else f'{efficiency:.0f}']


def show(report: dict[str, Any]) -> None:
    used, host, images = report['arguments'], report['machine'], report['images']
    print(
        f'{host["cpu"]}, {host["cores"]} processors, torch {report["torch"]}, {report["date"][:10]}; '
        f'{images["number"]:,} images of {images["megapixels"]:.3f} megapixels and {images["kilobytes"]:.1f} kB on '
        f'average, to {used["img_size"]} px with the recipe of {used["model"]}, batch {used["batch_size"]}; '
        f'{used["rounds"]} rounds of {used["seconds"]:g} s\n'
    )
    print_table(list(rows(report['results'])))


def parser() -> Parser:
    parser = Parser(prog='loader.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cores = parser.add_argument, os.cpu_count() or 1
    add('data', type=Path, metavar='DATA', help='folder or .tar of images')
    add('--model', default='coc_tiny', metavar='NAME', help='its recipe is used (default: %(default)s)')
    add('--img-size', type=positive, default=224, metavar='N', help='image side in pixels (default: %(default)s)')
    add('--batch-size', type=positive, default=64, metavar='N', help='images per batch (default: %(default)s)')
    add('--workers', type=int, nargs='+', default=sorted({0, 1, 2, cores}), metavar='N', help='numbers of workers')
    add('--seconds', type=float, default=10.0, metavar='S', help='time to measure (default: %(default)s)')
    add('--warm-up', type=float, default=3.0, metavar='S', help='time before it (default: %(default)s)')
    add('--rounds', type=positive, default=2, metavar='N', help='measurements per number (default: %(default)s)')
    add('--json', type=Path, metavar='FILE', help='write the results')
    return parser


def main() -> None:
    args = (options := parser()).parse_args()
    torch.set_num_threads(1)  # as in the workers
    if args.json and not args.json.absolute().parent.is_dir():
        options.error(f'--json: the folder of {args.json} does not exist')
    if min(args.workers) < 0:
        options.error('--workers must be at least 0')
    try:
        report = measure(args)
    except UserError as e:
        options.error(str(e))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + '\n')
    show(report)


if __name__ == '__main__':
    main()
