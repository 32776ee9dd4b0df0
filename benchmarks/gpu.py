"""Measures on a GPU: kernels, parity, throughput, profile, CIFAR-10 training, centroids.

    python benchmarks/gpu.py OUT [--steps kernels parity] [--minutes 8] [--data DATA]
    python benchmarks/gpu.py OUT --report

A call ends after --minutes. Repeat it until it prints that no cases are left: each case is written to OUT/STEP.jsonl
as soon as it is measured, and the next call goes on with the others. The steps are

- kernels: the tests of the kernels, one by one.
- parity: errors of logits and of a gradient, and assignments and predictions that differ, from float64 on the CPU; for
  IEEE float32, TF32 and bfloat16 autocast. Models without bundled weights have random weights and images.
- throughput: images/s and memory of inference (batch 256) and training (batch 128, without an optimizer), eager and
  compiled; for the models, their floor (the same network without clustering, see clustering.py), the papers' formulas
  and models of timm. All of them are in channels_last and bfloat16 autocast.
- profile: the kernels of a training step.
- cifar10: training of coc_tiny_plain on CIFAR-10 (cifar10.sh). It is interrupted before the end of a call and resumed.
- centroids: the update of centroids (centroids.py), and nearest centroids against a linear head on CIFAR-10 (dnc.sh).

The models run with the plain functions and with the Triton kernels (CLUSTER_ZOO_KERNELS). DATA has train.tar and
val.tar, or train/ and val/, with one folder of images per class. Without it nothing is trained.

A case that fails is written with its error and not repeated without --retry; the others go on. A case that has not
ended after --minutes is stopped and left for the next call; if it was the first of its call, this is its error. Results
of another GPU, driver, commit or version are kept, but do not count as measured. Each call writes OUT/report.md.
"""

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from gpu_report import read, write_report  # noqa: E402
from gpu_steps import STEPS  # noqa: E402
from measuring import device_name, machine, nvidia_smi, positive  # noqa: E402
from worker import Case, CaseError, Worker  # noqa: E402

import cluster_zoo  # noqa: E402
from cluster_zoo.errors import nearest  # noqa: E402
from cluster_zoo.training.parser import Parser  # noqa: E402

DATA_STEPS = ('cifar10',)  # that have no case without --data


def commit() -> str:
    """Returns the commit of the checkout, with ``+`` if files differ from it; '-' outside of git."""
    command = ['git', '-C', str(ROOT), 'describe', '--always', '--abbrev=12', '--exclude=*', '--dirty=+']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return '-'


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Returns what results depend on: the GPU, its driver, clocks and power limit, versions and the commit."""
    try:
        import triton
    except ImportError:
        triton = None
    host = machine(args.device)
    fields = {
        'driver': 'driver_version',
        'maximum SM clock, MHz': 'clocks.max.sm',
        'maximum memory clock, MHz': 'clocks.max.mem',
        'power limit, W': 'power.limit',
    }
    found = nvidia_smi(*fields.values()) if args.device != 'cpu' else dict.fromkeys(fields.values(), '-')
    return {
        'device': device_name(host),
        **{name: found[field] for name, field in fields.items()},
        'host': f'{host["cpu"]}, {host["cores"]} cores',
        'python': platform.python_version(),
        'torch': torch.__version__,
        'triton': getattr(triton, '__version__', '-'),
        'timm': timm.__version__,
        'cluster_zoo': cluster_zoo.__version__,
        'commit': args.commit or commit(),
    }


@dataclass
class Call:
    """One call of the script: its options, and the process that measures."""

    args: argparse.Namespace
    facts: dict[str, str]  # `environment`
    command: str
    worker: Worker
    started: int = 0  # cases

    def time_left(self) -> float:
        return self.args.deadline - time.time()

    def append(self, step: str, **record: Any) -> None:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
        with (self.args.out / f'{step}.jsonl').open('a') as file:
            file.write(json.dumps(dict(**record, date=date, command=self.command, environment=self.facts)) + '\n')

    def run(self, step: str) -> None:
        """Measures cases of a step until all are done or the time is used up."""
        known = [record for record in read(self.args.out, step) if record['environment'] == self.facts]
        done = {record['case'] for record in known if is_done(record, self.args.retry)}
        try:
            cases = STEPS[step](self.args)
        except RuntimeError as error:
            self.append(step, case='all', settings={}, seconds=0, error=str(error))
            return progress(f'{step}: {error}')
        open_cases = [case for case in cases if case.name not in done]
        left = 0
        for number, case in enumerate(open_cases, len(cases) - len(open_cases) + 1):
            if self.time_left() <= case.needs:
                left = len(cases) + 1 - number
                break
            left += not self.measure(step, case, f'{step} {number}/{len(cases)}: {case.name}')
        progress(f'{step}: {left} of {len(cases)} cases left')

    def measure(self, step: str, case: Case, title: str) -> bool:
        """Measures and records a case. Returns whether it is done."""
        first, begin, error = self.started == 0, time.time(), None
        self.started += 1
        try:
            result = self.worker.call(case.function, self.args, timeout=self.time_left(), **case.settings)
        except TimeoutError:
            if not first:
                progress(f'{title}: stopped at the end of the call')
                return False
            error = f'TimeoutError: not measured within {self.args.minutes:g} minutes'
        except CaseError as failure:
            error = str(failure).strip()
        seconds = round(time.time() - begin, 2)
        outcome = dict(result=result) if error is None else dict(error=error)
        self.append(step, case=case.name, settings=case.settings, seconds=seconds, **outcome)
        progress(f'{title}: {error.splitlines()[-1] if error else f"{seconds} s"}')
        return error is not None or not result.get('unfinished')


def is_done(record: dict[str, Any], retry: bool) -> bool:
    return not retry if 'error' in record else not record['result'].get('unfinished')


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> Parser:
    parser = Parser(prog='gpu.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('out', type=Path, metavar='OUT', help='folder of the results')
    add('--steps', nargs='+', choices=list(STEPS), default=list(STEPS), help='what to measure (default: all)')
    add('--minutes', type=float, default=8, metavar='N', help='time limit of the call (default: %(default)s)')
    add('--data', type=Path, help='CIFAR-10, for the steps that train')
    add('--report', action='store_true', help='only write OUT/report.md from the results')
    add('--retry', action='store_true', help='measure cases that failed again')
    add('--models', nargs='+', metavar='NAME', help='models (default: those of each step)')
    add('--kernels', nargs='+', choices=['plain', 'triton'], default=['triton', 'plain'], help='default: both')
    add('--executions', nargs='+', choices=['eager', 'compiled'], default=['eager', 'compiled'], help='default: both')
    add('--batch-size', type=positive, metavar='N', help='images per step (default: those of each step)')
    add('--img-size', type=positive, default=224, metavar='N', help='image side in pixels (default: %(default)s)')
    add('--timed-steps', type=positive, default=20, metavar='N', help='steps between two events (default: %(default)s)')
    add('--repeats', type=positive, default=5, metavar='N', help='times of which the median counts (default: 5)')
    add('--epochs', type=positive, default=100, metavar='N', help='epochs of the trainings (default: %(default)s)')
    add('--seeds', type=int, nargs='+', default=[42, 43, 44], metavar='N', help='of linear and nearest-centroid heads')
    add('--train', default='', metavar='OPTIONS', help="more options of train.py, such as --train='--workers 14'")
    add('--tests', nargs='+', metavar='TEST', help='tests of the step kernels (default: those of the kernels)')
    add('--device', default='cuda', choices=['cuda', 'cpu'], help='cpu is for trying the script (default: %(default)s)')
    add('--commit', default='', help='commit to record where there is no git')
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks the arguments.

    Raises:
        ValueError: An argument is invalid.
    """
    for name in args.models or ():
        if not timm.is_model(name):
            raise ValueError(f'--models: no model is named {name!r}{nearest(name, timm.list_models())}')
    if args.device == 'cuda' and not torch.cuda.is_available() and not args.report:
        raise ValueError('--device cuda: torch finds no CUDA device')
    if args.data:
        if not args.data.is_dir():
            raise ValueError(f'--data {args.data}: the folder does not exist')
        args.data = args.data.resolve()
    elif len(args.steps) < len(STEPS) and (named := [step for step in args.steps if step in DATA_STEPS]):
        raise ValueError(f'--steps {named[0]} needs --data')
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f'{args.out} is a file, expected a folder')
    args.out = args.out.resolve()


def main() -> None:
    args = (options := parser()).parse_args()
    args.deadline = time.time() + 60 * args.minutes
    try:
        check(args)
    except ValueError as e:
        options.error(str(e))
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        call = Call(args, environment(args), shlex.join(['python', 'benchmarks/gpu.py', *sys.argv[1:]]), Worker())
        try:
            for step in args.steps:
                call.run(step)
        finally:
            call.worker.close()
    progress(f'Report: {write_report(args.out)}')


if __name__ == '__main__':
    main()
