"""Time of a centroid update: all classes at once, compared with a loop over the classes.

    python benchmarks/centroids.py [--dtype bfloat16] [--threads 2] [--json centroids.json] [--markdown]

The update is `NearestCentroidHead.learn` with a full memory (DNC paper, section 3.2), by default for 1,000 classes of 4
sub-centroids and 100,000 features in memory. The loop follows the paper class by class: select the features, assign
them to the sub-centroids, keep the correctly classified ones, move each sub-centroid. It computes the scores of all
classes, which decide what is classified correctly, in blocks with one matrix product each, as the head does; otherwise
it would be even slower. Both updates read the same memory, take turns in each round and must give the same centroids.
The result is the median round. Processor seconds, summed over threads, vary less with other work on the machine.
"""

import argparse
import copy
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from measuring import device_name, machine, positive, print_table, seconds  # noqa: E402

from cluster_zoo.layers.centroid_learning import CentroidLearning  # noqa: E402
from cluster_zoo.layers.nearest_centroid import NearestCentroidHead  # noqa: E402
from cluster_zoo.training.parser import Parser  # noqa: E402

BLOCK = 4096  # features that are scored at once


def sinkhorn(similarity: Tensor, temperature: float, iterations: int) -> Tensor:
    """Returns the sub-centroid of each sample of one class, from similarities [n, k]."""
    share = (similarity / temperature).exp()
    for _ in range(iterations):
        share = share / share.sum(0, keepdim=True)
        share = share / share.sum(1, keepdim=True)
    return share.argmax(1)


@torch.no_grad()
def update_by_loop(head: NearestCentroidHead) -> Tensor:
    """Returns the centroids [K, k, D] after an update in a loop over the classes."""
    features, labels, learning = head.memory.features, head.memory.labels, head.learning
    before = F.normalize(head.prototypes, dim=-1)
    centroids = before.to(features.dtype)
    correct = []
    for block, target in zip(features.split(BLOCK), labels.split(BLOCK)):
        cosines = F.linear(block, centroids.flatten(0, 1)).unflatten(-1, centroids.shape[:2])
        correct.append(head.mask_norm(cosines.amax(-1).float()).argmax(-1) == target)
    correct = torch.cat(correct)
    after = before.clone()
    for c in range(head.num_classes):
        members = labels == c
        own = features[members]
        if len(own) == 0:
            continue
        assigned = sinkhorn((own @ centroids[c].T).float(), learning.temperature, learning.iterations)
        for j in range(head.sub_centroids):
            selected = own[correct[members] & (assigned == j)].float()
            if len(selected) > 0:
                direction = F.normalize(selected.sum(0), dim=0)
                after[c, j] = F.normalize(learning.momentum * before[c, j] + (1 - learning.momentum) * direction, dim=0)
    return after


@torch.no_grad()
def update_at_once(head: NearestCentroidHead) -> Tensor:
    """Returns the centroids after `NearestCentroidHead.learn` with one feature that is already in the memory."""
    head.forward(head.memory.features[:1].float())
    head.memory.count.zero_()
    head.learn(head.memory.labels[:1])
    return head.prototypes


def full_head(args: argparse.Namespace) -> NearestCentroidHead:
    """Creates a head with a full memory of features near the centroids of their classes, most classified correctly."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    learning = CentroidLearning(memory=args.memory, dtype=getattr(torch, args.dtype))
    head = NearestCentroidHead(args.width, args.classes, args.sub_centroids, learning).to(args.device).train()
    labels = torch.randint(args.classes, (args.memory,), generator=generator)
    near = head.prototypes.cpu()[labels, torch.randint(args.sub_centroids, (args.memory,), generator=generator)]
    noise = torch.randn(near.shape, generator=generator) * args.noise / args.width**0.5
    head(F.normalize(near + noise, dim=-1).to(args.device))
    with torch.no_grad():
        head.learn(torch.full_like(labels, -1).to(args.device))  # fills the memory without moving centroids
    head.memory.labels.copy_(labels)
    return head


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures both updates. Returns the results with the machine and arguments."""
    head = full_head(args)
    updates = {'all classes at once': update_at_once, 'loop over classes': update_by_loop}
    before = F.normalize(head.prototypes, dim=-1)
    times, centroids = {name: [] for name in updates}, {}
    for number in range(args.rounds + 1):
        for name, update in updates.items():
            used = copy.deepcopy(head)
            start, results = time.process_time(), []
            elapsed = seconds(lambda: results.append(update(used)), args.device)  # noqa: B023  called at once
            centroids[name] = results[0]
            if number > 0:  # the first round warms up
                times[name].append((elapsed, time.process_time() - start))
    at_once, loop = centroids.values()
    step, difference = (loop - before).norm(dim=-1).max().item(), (at_once - loop).abs().max().item()
    if step == 0 or difference > args.tolerance * step:
        raise ValueError(f'The updates differ by {difference:.1e}, where the largest step is {step:.1e}')
    return dict(
        arguments={name: value for name, value in vars(args).items() if name not in ('json', 'markdown')},
        machine=machine(args.device),
        torch=torch.__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        difference=difference,
        step=step,
        results={
            name: dict(zip(('seconds', 'processor_seconds'), map(statistics.median, zip(*values))))
            for name, values in times.items()
        },
    )


def show(report: dict[str, Any], markdown: bool) -> None:
    used = report['arguments']
    print(
        f'{device_name(report["machine"])}, torch {report["torch"]}, {report["date"][:10]}; {used["classes"]:,} '
        f'classes x {used["sub_centroids"]} sub-centroids x {used["memory"]:,} features of width {used["width"]} in '
        f'{used["dtype"]}; median of {used["rounds"]} rounds; centroids differ by {report["difference"]:.0e}, the '
        f'largest step is {report["step"]:.0e}\n'
    )
    rows = [['update', 'seconds', 'processor seconds']]
    for name, result in report['results'].items():
        rows.append([name, f'{result["seconds"]:.3f}', f'{result["processor_seconds"]:.3f}'])
    print_table(rows, markdown)


def parser() -> Parser:
    parser = Parser(prog='centroids.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--classes', type=positive, default=1000, metavar='K', help='classes (default: %(default)s)')
    add('--sub-centroids', type=positive, default=4, metavar='K', help='sub-centroids per class (default: %(default)s)')
    add('--memory', type=positive, default=100_000, metavar='N', help='features in memory (default: %(default)s)')
    add('--width', type=positive, default=512, metavar='D', help='feature width (default: %(default)s)')
    add(
        '--dtype', default='float32', choices=['float32', 'bfloat16'], help='dtype of the memory (default: %(default)s)'
    )
    add('--noise', type=float, default=1.5, metavar='F', help='norm of the noise on unit features (default: 1.5)')
    add('--tolerance', type=float, default=1e-3, metavar='F', help='allowed difference over the largest step (0.001)')
    add('--device', default='cpu', choices=['cpu', 'cuda'], help='where to measure (default: %(default)s)')
    add('--threads', type=positive, metavar='N', help='CPU threads (default: that of torch)')
    add('--rounds', type=positive, default=5, metavar='N', help='measurements per update (default: %(default)s)')
    add('--json', type=Path, metavar='FILE', help='write the results')
    add('--markdown', action='store_true', help='print the table as Markdown')
    return parser


def main() -> None:
    args = (options := parser()).parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        options.error('--device cuda: torch finds no CUDA device')
    if args.json and not args.json.absolute().parent.is_dir():
        options.error(f'--json: the folder of {args.json} does not exist')
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        report = measure(args)
    except ValueError as e:
        options.error(str(e))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + '\n')
    show(report, args.markdown)


if __name__ == '__main__':
    main()
