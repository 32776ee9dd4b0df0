"""Faults against training runs, and how many runs end as if there had been none.

    python benchmarks/faults.py [--kills 60] [--tasks classification] [--kinds kill save] [--json FILE]

A trial is a tiny training run on the CPU that suffers up to three faults of one kind. After each of them the same
command with ``--resume auto`` continues the run. At the end its folder is compared with that of an uninterrupted run:
the last checkpoint to the bit, the rows of summary.csv, the best checkpoint, readable files, no temporary files.

kill    SIGKILL to one process, which may be a worker of the loader, or to all processes, at a random time
save    SIGKILL to the first process before or within a random operation on a file of the run folder: opening a file to
        write, renaming, linking, removing (the audit events of Python), torch.save. In every third trial the file
        system has no hard links. The trial is not about power failures: what was written stays written.
term    SIGTERM to one training process; also hup and usr1. The run has to stop within two updates with the status
        128 + signal, no traceback, a checkpoint that misses at most one update, and the command that resumes it
group   the same with SIGTERM to all processes including the workers, as Slurm, Docker and a terminal do

The random times are uniform between the first update and the end of the run. Two processes are started with the
environment of torchrun; if one is killed, the other gets a SIGTERM and after some seconds a SIGKILL, as from torchrun.

The packages are imported once, and each process of a run is a fork. Linux only.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ['OMP_NUM_THREADS'] = '1'  # before importing PyTorch, because a fork has none of the threads

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from fault_processes import SIGNALS, Processes  # noqa: E402
from measuring import machine, positive, print_table  # noqa: E402
from run_folders import checkpoint_files, damages, differences, load, read_summary  # noqa: E402

from cluster_zoo.training import train  # noqa: E402
from segmentation import train as segmentation_train  # noqa: E402

KINDS = ('kill', 'save', *SIGNALS)
ACCUM = 2  # batches per update in classification
SMALL = f'--img-size 32 --num-classes 3 --epochs 4 --grad-accum-steps {ACCUM} --warmup-epochs 0 --recovery-interval 1'
COMMON = (
    '-b 4 -j 1 --device cpu --model-ema --model-ema-decay 0.5 --no-model-ema-warmup --checkpoint-hist 2 '
    '--log-interval 1 --resume auto --experiment run'
)
TASKS = dict(  # with a best checkpoint that changes several times
    classification=f'--model test_resnet --mixup 0.2 --lr 0.05 --seed 2 {SMALL} {COMMON}',
    centroids='--model dnc_resnet18 --model-kwargs channels=(8,8,8,8) layers=(1,1,1,1) --recipe timm --lr 0.01 '
    f'--centroid-memory 40 --centroid-momentum 0.9 {SMALL} {COMMON}',
    segmentation='--dataset folder --head fcn --backbone test_resnet --channels 8 --classifier dnc --crop 32 '
    f'--scale 48 40 --lr 0.003 -vb 4 --iterations 14 --val-interval 3 --recovery-interval 2 --seed 2 {COMMON}',
)


@dataclass
class Trial:
    """A run that suffers faults of one kind."""

    task: str
    processes: int
    kind: str
    number: int
    faults: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # why the run has not survived
    seconds: float = 0.0

    def start(self, folder: Path, timeout: float, watch: dict[str, Any] | None = None) -> Processes:
        """Returns the processes that start or resume the run, see `Processes`."""
        is_segmentation = self.task == 'segmentation'
        main = segmentation_train.main if is_segmentation else train.main
        data = folder.parent / ('masks' if is_segmentation else 'images')
        argv = [str(data), *TASKS[self.task].split(), '--output', str(folder)]
        return Processes(main, argv, self.processes, folder, timeout, watch)


@dataclass
class Reference:
    """The uninterrupted run."""

    folder: Path
    seconds: float  # from the first update to the end
    updates: int
    operations: int  # on files

    def updates_of(self, checkpoint: dict[str, Any]) -> int:
        """Returns the number of updates before a checkpoint."""
        progress = checkpoint['progress']
        if 'iteration' in progress:
            return progress['iteration']
        per_epoch = self.updates // len(read_summary(self.folder))
        return progress['epoch'] * per_epoch + math.ceil(progress['batch'] / ACCUM)


# --- trials -----------------------------------------------------------------------------------------------------------


def run_reference(task: str, processes: int, root: Path, timeout: float) -> Reference:
    """Runs without faults.

    Raises:
        RuntimeError: The run fails.
    """
    folder = root / f'reference-{task}-{processes}'
    folder.mkdir()
    with Trial(task, processes, '', 0).start(folder, timeout, watch={}) as run:
        run.wait(lambda: run.updates() > 0)
        start = time.monotonic()
        run.wait()
        reference = Reference(folder / 'run', time.monotonic() - start, run.updates(), len(run.operations()))
        reasons = [] if set(run.statuses.values()) == {0} else [f'exit status {run.statuses}']
    if reasons := reasons or differences(folder / 'run', folder / 'run'):
        raise RuntimeError(f'{task} in {processes} processes fails without faults: {reasons}\n{run.log()}')
    return reference


def run_trial(trial: Trial, reference: Reference, root: Path, seed: int, timeout: float) -> Trial:
    """Runs a trial to its end and fills in its faults and the reasons why the run has not survived."""
    rng, start = random.Random(f'{seed}-{trial}'), time.monotonic()
    folder = root / f'{trial.number}-{trial.kind}-{trial.task}-{trial.processes}'
    planned, watch = rng.choice([1, 1, 1, 2, 3]), dict(links=rng.random() > 1 / 3)
    try:
        while not (trial.faults or trial.reasons):  # a run may end before the time of its fault
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            while not run_until_fault(trial, reference, folder, rng, timeout, watch, len(trial.faults) < planned):
                pass
    except TimeoutError as error:
        trial.reasons.append(str(error))
    else:
        trial.reasons += differences(folder / 'run', reference.folder)
    if not trial.reasons:
        shutil.rmtree(folder)
    trial.reasons, trial.seconds = list(dict.fromkeys(trial.reasons)), time.monotonic() - start
    return trial


def run_until_fault(
    trial: Trial,
    reference: Reference,
    folder: Path,
    rng: random.Random,
    timeout: float,
    watch: dict[str, Any],
    strikes: bool,
) -> bool:
    """Starts or resumes a run until its next fault, or to its end. Returns whether it has ended."""
    first, sent, fault = newest(folder / 'run', reference), 0, ''
    if trial.kind == 'save':
        operation = rng.randint(1, reference.operations) if strikes else None
        watch = dict(watch, fatal=operation, torn=rng.random() < 0.5)
    with trial.start(folder, timeout, watch if trial.kind == 'save' else None) as run:
        if trial.kind != 'save' and strikes and run.wait(lambda: run.updates() > 0):
            moment = time.monotonic() + rng.uniform(0, reference.seconds)
            if run.wait(lambda: time.monotonic() > moment):
                sent, fault = run.updates(), run.strike(trial.kind, rng)
        if trial.kind in SIGNALS and fault:
            run.wait()
        else:
            run.wait_as_launcher()
        if trial.kind == 'save' and run.statuses[0] == -signal.SIGKILL:
            fault = f'SIGKILL at {run.operations()[-1]}'
    if fault:
        trial.faults.append(fault)
        trial.reasons += damages(folder / 'run')
        if trial.kind in SIGNALS:
            trial.reasons += errors_of_stop(trial, reference, run, first, sent)
        return False
    if any(run.statuses.values()):
        last = run.log().strip().rpartition('\n')[2]
        trial.reasons.append(f'resumed, but exit status {run.statuses}: {last}')
    return True


def newest(folder: Path, reference: Reference) -> int | None:
    """Returns the number of updates before the newest checkpoint of a run; None without a checkpoint."""
    checkpoints = (load(path) for path in checkpoint_files(folder))
    return max((reference.updates_of(each) for each in checkpoints if isinstance(each, dict)), default=None)


def errors_of_stop(trial: Trial, reference: Reference, run: Processes, first: int | None, sent: int) -> Iterator[str]:
    """Yields what is wrong with a run that was asked to stop.

    Args:
        trial: The trial.
        reference: Its uninterrupted run.
        run: The ended processes.
        first: Number of updates at their start.
        sent: Number of updates since then, when the signal was sent.
    """
    number, log, late = SIGNALS[trial.kind], run.log(), run.updates() - sent
    if 'Traceback' in log:
        error = next((line for line in log.splitlines() if re.match(r'[\w.]*Error', line)), '')
        yield f'traceback: {re.sub(r"[[].*[]] ", "", error)[:60]}'
    statuses = set(run.statuses.values())
    if late <= 2 and statuses <= {0, -number, 128 + number} and not differences(run.folder / 'run', reference.folder):
        return  # the run was at its end
    if late > 2:
        yield f'{late} updates after the signal'
    if statuses != {128 + number}:
        yield f'exit status {sorted(statuses)}, expected {128 + number}'
    saved = newest(run.folder / 'run', reference)
    if saved is None:
        yield 'no checkpoint after the signal'
    elif saved < (first or 0) + sent - 1:
        yield f'the checkpoint is {(first or 0) + sent - saved} updates older than the signal'
    if not any('train.py' in line and '--resume' in line for line in log.splitlines()):
        yield 'the command that resumes is not printed'


# --- the campaign -----------------------------------------------------------------------------------------------------


def write_data(root: Path) -> None:
    """Writes 24 noisy images in three colors for training and 9 to validate, and as many with masks."""
    rng = np.random.default_rng(0)
    (root / 'masks').mkdir()
    (root / 'masks' / 'classes.txt').write_text('ground\nred\ngreen\n')
    for split, name, count in (('train', 'train', 24), ('validation', 'val', 9)):
        for index in range(count):
            color, mask = index % 3, np.zeros((40, 48), np.uint8)
            mask[8:32, 10:30] = color
            pixels = rng.integers(0, 150, (40, 48, 3))
            pixels[8:32, 10:30, color] += 100
            image = Image.fromarray(pixels.astype(np.uint8))
            pairs = {f'images/{split}/{color}': image, f'masks/{name}/images': image}
            for folder, content in (pairs | {f'masks/{name}/masks': Image.fromarray(mask)}).items():
                (root / folder).mkdir(parents=True, exist_ok=True)
                content.save(root / folder / f'{index}.png')


def plan(args: argparse.Namespace) -> list[Trial]:
    """Returns the trials in random order, evenly divided among tasks and numbers of processes."""
    runs = [(task, processes) for task in args.tasks for processes in args.processes]
    kinds = [kind for kind in args.kinds for _ in range(args.kills if kind in KINDS[:2] else -(-args.kills // 6))]
    trials = [Trial(*runs[number % len(runs)], kind, number) for number, kind in enumerate(kinds)]
    random.Random(args.seed).shuffle(trials)
    return trials


def run_campaign(args: argparse.Namespace, root: Path) -> Iterator[Trial]:
    """Yields the trials as they end. Prints those that have not survived."""
    write_data(root)
    trials = plan(args)
    runs = sorted({(trial.task, trial.processes) for trial in trials})
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context('fork')) as lanes:
        started = {run: lanes.submit(run_reference, *run, root, args.timeout) for run in runs}
        references = {run: future.result() for run, future in started.items()}
        for (task, processes), each in references.items():
            print(f'{task}, {processes} processes: {each.updates} updates in {each.seconds:.1f} s', file=sys.stderr)
        options = (root, args.seed, args.timeout)
        futures = [lanes.submit(run_trial, each, references[each.task, each.processes], *options) for each in trials]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            lanes.shutdown(cancel_futures=True)


def rows(trials: list[Trial]) -> Iterator[list[str]]:
    """Yields the table: a row per task, number of processes and kind, a sum per kind, and the sum of all."""
    yield ['task', 'processes', 'kind', 'tried', 'survived', 'faults']
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: (list(TASKS).index(trial.task), trial.processes, trial.kind)):
        groups.setdefault((trial.task, str(trial.processes), trial.kind), []).append(trial)
    for kind in KINDS:
        groups['all', '', kind] = [trial for trial in trials if trial.kind == kind]
    groups['all', '', ''] = trials
    for names, group in groups.items():
        numbers = (len(group), sum(not trial.reasons for trial in group), sum(len(trial.faults) for trial in group))
        if group:
            yield [*names, *map(str, numbers)]


def show(trials: list[Trial], seconds: float) -> None:
    print_table(list(rows(trials)), markdown=False)
    reasons = Counter(re.sub(r'\d+', 'N', reason) for trial in trials for reason in trial.reasons)
    print(f'\n{seconds:.0f} s, {sum(trial.seconds for trial in trials) / len(trials):.1f} s per trial')
    for reason, count in reasons.most_common():
        print(f'{count:>4} x {reason}')


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--kills', type=positive, default=60, metavar='N', help='trials of kill and of save; of the others N / 6 each')
    add('--seed', type=int, default=0, metavar='N', help='seed of the faults (default: %(default)s)')
    add('--tasks', nargs='+', choices=TASKS, default=list(TASKS), metavar='TASK', help=' '.join(TASKS))
    add('--processes', nargs='+', type=positive, default=[1, 2], metavar='N', help='training processes of a run')
    add('--kinds', nargs='+', choices=KINDS, default=list(KINDS), metavar='KIND', help=' '.join(KINDS))
    add('--jobs', type=positive, default=os.cpu_count(), metavar='N', help='trials at the same time')
    add('--timeout', type=float, default=60.0, metavar='S', help='time after which a run hangs (default: %(default)s)')
    add('--keep', type=Path, metavar='DIR', help='new folder for the runs that have not survived')
    add('--json', type=Path, metavar='FILE', help='write the trials')
    return parser


def main() -> int:
    args, start, trials = parser().parse_args(), time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or Path(temporary)
        if args.keep:
            root.mkdir(parents=True)
        for trial in run_campaign(args, root):
            trials.append(trial)
            if trial.reasons:
                name = f'{trial.task}, {trial.processes} processes, {trial.kind} {trial.number}'
                print(f'{name}: {"; ".join(trial.faults)}: {"; ".join(trial.reasons)}', flush=True)
    show(trials, time.monotonic() - start)
    if args.json:
        options = {name: value for name, value in vars(args).items() if name not in ('keep', 'json')}
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
        report = dict(arguments=options, machine=machine('cpu'), torch=torch.__version__, date=date)
        args.json.write_text(json.dumps(report | dict(trials=list(map(asdict, trials))), indent=1) + '\n')
    return int(any(trial.reasons for trial in trials))


if __name__ == '__main__':
    sys.exit(main())
