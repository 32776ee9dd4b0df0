"""The steps of benchmarks/gpu.py that train: CIFAR-10, and centroids compared with a linear head."""

import argparse
import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import centroids  # noqa: E402
from worker import Case  # noqa: E402

UPDATE = ['--rounds', '5']  # options of centroids.py
STOP_SECONDS = 30  # in which an interrupted training has to save its checkpoint, or a finished one is validated
LEAST_SECONDS = 90  # of a call, to start a training


def cifar10_cases(args: argparse.Namespace) -> list[Case]:
    settings = dict(model='coc_tiny_plain', epochs=args.epochs)
    return [Case(train_classifier, settings, LEAST_SECONDS)] if args.data else []


def train_classifier(args: argparse.Namespace, model: str, epochs: int) -> dict[str, Any]:
    """Trains the bundled model with the recipe of cifar10.sh, and validates it."""
    folder = args.out / 'runs' / f'{epochs}-epochs' / 'cifar10-gpu'
    result = train(args, ['cifar10.sh', 'gpu', str(args.data)], epochs, folder)
    if result.get('unfinished') or args.deadline - time.time() < STOP_SECONDS:
        return result | dict(unfinished=True)
    return result | validate(args, folder)


def validate(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Returns the accuracy of the weights after the last epoch, in a process of its own as `train`."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, 'results.json')
        command = [
            sys.executable,
            'validate.py',
            '--data-dir',
            str(args.data),
            '--split',
            'val',
            '--device',
            args.device,
        ]
        command += ['--checkpoint', str(folder / 'last.pth.tar'), '--results-file', str(path), '--amp']
        run = subprocess.run([*command, '--amp-dtype', 'bfloat16'], cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f'validate.py: {run.stderr[-2000:]}')
        results = json.loads(path.read_text())
    results = results[0] if isinstance(results, list) else results
    return dict(validated_top1=results['top1'], validated_top5=results['top5'])


def centroid_cases(args: argparse.Namespace) -> list[Case]:
    """The update of centroids, then, with data, nearest centroids against a linear head."""
    cases = [Case(update_centroids, dict(dtype=dtype)) for dtype in ('float32', 'bfloat16')]
    if args.data:
        for seed, backbone, head in itertools.product(
            args.seeds, ['resnet18_cifar', 'coc_tiny'], ['linear', 'default']
        ):
            settings = dict(backbone=backbone, head=head, seed=seed, epochs=args.epochs)
            cases.append(Case(train_head, settings, LEAST_SECONDS))
    return cases


def update_centroids(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Measures benchmarks/centroids.py."""
    options = centroids.parser().parse_args([*UPDATE, '--device', args.device, '--dtype', dtype])
    report = centroids.measure(options)
    return {key: report[key] for key in ('arguments', 'results', 'difference', 'step')}


def train_head(args: argparse.Namespace, backbone: str, head: str, seed: int, epochs: int) -> dict[str, Any]:
    """Trains one run of dnc.sh."""
    folder = args.out / 'runs' / f'{epochs}-epochs' / f'dnc-cifar10-{backbone}-{head}-{seed}'
    return train(args, ['dnc.sh', 'gpu', 'cifar10', str(args.data), backbone, head, str(seed)], epochs, folder)


def train(args: argparse.Namespace, command: list[str], epochs: int, folder: Path) -> dict[str, Any]:
    """Starts or resumes a training. Shortly before the deadline it is interrupted, so that it saves a checkpoint.

    Args:
        args: Options of gpu.py.
        command: A script of benchmarks/ and its arguments. The script is replaced by the process of train.py.
        epochs: Epochs of the run.
        folder: Folder of the run. The log is beside it.

    Returns:
        Epochs so far, top-1 after the last of them, and whether the run is ``unfinished``.

    Raises:
        RuntimeError: The training failed. The message is the end of its log.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f'{folder.name}.log'
    script, *rest = command
    options = ['--output', str(folder.parent), '--resume', 'auto', *shlex.split(args.train)]
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    stopped = False
    with log.open('a') as file:
        process = subprocess.Popen(
            ['bash', str(ROOT / 'benchmarks' / script), *rest, *options],
            env=os.environ | dict(PATH=path, EPOCHS=str(epochs)),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(max(args.deadline - time.time() - STOP_SECONDS, 0))
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGINT)
            process.wait()
    if process.returncode and not stopped:
        raise RuntimeError(f'{log}: exit status {process.returncode}\n{log.read_text()[-2000:].strip()}')
    summary = folder / 'summary.csv'
    rows = list(csv.DictReader(summary.open())) if summary.is_file() else []
    top1 = [float(row['eval_top1']) for row in rows if row.get('eval_top1')]
    result = dict(epochs_done=len(rows), top1=top1[-1] if top1 else None)
    return result | (dict(unfinished=True) if stopped and len(rows) < epochs else {})
