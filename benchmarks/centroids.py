"""How long does an update of centroids take: all classes at once, beside a loop over classes?

    python benchmarks/centroids.py [--dtype bfloat16] [--threads 2] [--json centroids.json] [--markdown]

The update is that of `NearestCentroidHead.learn` with a full memory (DNC paper, section 3.2), by default for 1,000
classes of 4 sub-centroids and 100,000 remembered features. The loop does what the paper says, class by class: pick the
features, share them among the sub-centroids, keep those classified correctly, move each sub-centroid. Its scores of all
classes, which say what is classified correctly, are one matrix product in blocks, as they are here; a loop without that
is slower still. Both read the same memory, take turns within each round and must give the same centroids. The median
round counts; the processor's seconds, over all threads, are less disturbed by other work than those of the clock.
"""

import argparse
import copy
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout too

from throughput import machine, positive

from cluster_zoo.layers.nearest_centroid import CentroidLearning, NearestCentroidHead
from cluster_zoo.training.options import Parser

BLOCK = 4096  # features that are scored at a time


def sinkhorn(similarity: Tensor, temperature: float, iterations: int) -> Tensor:
    """Sub-centroid of each sample of one class, from similarities [n, k]."""
    share = (similarity / temperature).exp()
    for _ in range(iterations):
        share = share / share.sum(0, keepdim=True)
        share = share / share.sum(1, keepdim=True)
    return share.argmax(1)


@torch.no_grad()
def update_by_loop(head: NearestCentroidHead) -> Tensor:
    """The centroids [K, k, D] after an update, class by class."""
    features, labels, learning = head.memory.features, head.memory.labels, head.learning
    before = F.normalize(head.prototypes, dim=-1)
    centroids = before.to(features.dtype)
    correct = []
    for block, of in zip(features.split(BLOCK), labels.split(BLOCK)):
        cosines = F.linear(block, centroids.flatten(0, 1)).unflatten(-1, centroids.shape[:2])
        correct.append(head.mask_norm(cosines.amax(-1).float()).argmax(-1) == of)
    correct = torch.cat(correct)
    after = before.clone()
    for c in range(head.num_classes):
        of_class = labels == c
        own = features[of_class]
        if len(own) == 0:
            continue
        assigned = sinkhorn((own @ centroids[c].T).float(), learning.temperature, learning.iterations)
        for j in range(head.sub_centroids):
            members = own[correct[of_class] & (assigned == j)].float()
            if len(members) > 0:
                direction = F.normalize(members.sum(0), dim=0)
                after[c, j] = F.normalize(learning.momentum * before[c, j] + (1 - learning.momentum) * direction, dim=0)
    return after


@torch.no_grad()
def update_at_once(head: NearestCentroidHead) -> Tensor:
    """The same by `NearestCentroidHead.learn`, with a batch of one feature that the memory holds already."""
    head.forward(head.memory.features[:1].float())
    head.memory.count.zero_()
    head.learn(head.memory.labels[:1])
    return head.prototypes


def full_head(args: argparse.Namespace) -> NearestCentroidHead:
    """A head with a full memory: features around the centroids of their classes, most of them classified correctly."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    learning = CentroidLearning(memory=args.memory, dtype=getattr(torch, args.dtype))
    head = NearestCentroidHead(args.width, args.classes, args.sub_centroids, learning).to(args.device).train()
    labels = torch.randint(args.classes, (args.memory,), generator=generator)
    near = head.prototypes.cpu()[labels, torch.randint(args.sub_centroids, (args.memory,), generator=generator)]
    noise = torch.randn(near.shape, generator=generator) * args.noise / args.width**0.5
    head(F.normalize(near + noise, dim=-1).to(args.device))
    with torch.no_grad():
        head.learn(torch.full_like(labels, -1).to(args.device))  # allocates and fills, teaches nothing
    head.memory.labels.copy_(labels)
    return head


def seconds(update: Callable[[NearestCentroidHead], Tensor], head: NearestCentroidHead) -> tuple[float, float, Tensor]:
    """Seconds of the clock and of the processor, and the centroids; the head stays as it was."""
    head = copy.deepcopy(head)
    wait = torch.cuda.synchronize if head.prototypes.device.type == 'cuda' else lambda: None
    wait()
    start = time.perf_counter(), time.process_time()
    centroids = update(head)
    wait()
    return time.perf_counter() - start[0], time.process_time() - start[1], centroids


def measure(args: argparse.Namespace) -> dict[str, Any]:
    head = full_head(args)
    ways = {'all classes at once': update_at_once, 'loop over classes': update_by_loop}
    before = F.normalize(head.prototypes, dim=-1)
    times, found = {name: [] for name in ways}, {}
    for number in range(args.rounds + 1):
        for name, update in ways.items():
            *spent, found[name] = seconds(update, head)
            if number > 0:  # the first round warms up
                times[name].append(spent)
    at_once, loop = found.values()
    step, difference = (loop - before).norm(dim=-1).max().item(), (at_once - loop).abs().max().item()
    if step == 0 or difference > args.tolerance * step:
        raise ValueError(f'the two differ by {difference:.1e}, where the largest step is {step:.1e}')
    return dict(
        arguments={name: value for name, value in vars(args).items() if name not in ('json', 'markdown')},
        machine=machine(args.device),
        torch=torch.__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        difference=difference,
        step=step,
        results={
            name: dict(zip(('seconds', 'processor_seconds'), map(statistics.median, zip(*spent))))
            for name, spent in times.items()
        },
    )


def show(report: dict[str, Any], markdown: bool) -> None:
    used, host = report['arguments'], report['machine']
    where = host['gpu'] or f'{host["cpu"]}, {host["threads"]} threads'
    print(
        f'{where}, torch {report["torch"]}, {report["date"][:10]}; {used["classes"]:,} classes x '
        f'{used["sub_centroids"]} sub-centroids x {used["memory"]:,} features of width {used["width"]} in '
        f'{used["dtype"]}; median of {used["rounds"]} rounds; centroids differ by {report["difference"]:.0e}, the '
        f'largest step is {report["step"]:.0e}\n'
    )
    rows = [['update', 'seconds', "processor's seconds"]]
    rows += [
        [name, f'{result["seconds"]:.3f}', f'{result["processor_seconds"]:.3f}']
        for name, result in report['results'].items()
    ]
    if markdown:
        rows.insert(1, ['---', '---:', '---:'])
        print(*(f'| {" | ".join(row)} |' for row in rows), sep='\n')
    else:
        for first, *rest in rows:
            print(f'{first:20}', *(f'{cell:>20}' for cell in rest))


def parser() -> Parser:
    parser = Parser(prog='centroids.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--classes', type=positive, default=1000, metavar='K', help='classes (default: %(default)s)')
    add('--sub-centroids', type=positive, default=4, metavar='K', help='of each class (default: %(default)s)')
    add('--memory', type=positive, default=100_000, metavar='N', help='remembered features (default: %(default)s)')
    add('--width', type=positive, default=512, metavar='D', help='of a feature (default: %(default)s)')
    add('--dtype', default='float32', choices=['float32', 'bfloat16'], help='of the memory (default: %(default)s)')
    add('--noise', type=float, default=1.5, metavar='F', help='length of the noise on unit features (default: 1.5)')
    add('--tolerance', type=float, default=1e-3, metavar='F', help='difference allowed, in largest steps (0.001)')
    add('--device', default='cpu', choices=['cpu', 'cuda'], help='where to measure (default: %(default)s)')
    add('--threads', type=positive, metavar='N', help="threads on a CPU (default: torch's choice)")
    add('--rounds', type=positive, default=5, metavar='N', help='turns of each way (default: %(default)s)')
    add('--json', type=Path, metavar='FILE', help='write the results')
    add('--markdown', action='store_true', help='print the table as Markdown')
    return parser


def main() -> None:
    args = (options := parser()).parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        options.error('--device cuda: torch finds no CUDA device here')
    if args.json and not args.json.absolute().parent.is_dir():
        options.error(f'{args.json}: there is no such folder')
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
