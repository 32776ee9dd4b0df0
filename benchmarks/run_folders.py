"""The folder of a training run for `faults.py`: its files, and what differs from the folder of another run."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

STATE = ('state_dict', 'state_dict_ema', 'metric', 'epoch')


def read_summary(folder: Path) -> list[dict[str, str]]:
    path = folder / 'summary.csv'
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run folder without temporary files."""
    return sorted(path for path in folder.glob('*.pth.tar') if 'tmp' not in path.name)


def load(path: Path) -> Any:
    """Returns a checkpoint, or the first line of the error of an unreadable one."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        return str(error).partition('\n')[0] or type(error).__name__


def same(a: Any, b: Any) -> bool:
    """Returns whether two nested values are equal to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def damages(folder: Path) -> Iterator[str]:
    """Yields what must not be in a run folder at any time: unreadable checkpoints, no last one after an epoch."""
    for path in checkpoint_files(folder):
        if isinstance(load(path), str):
            yield f'{path.name} is unreadable after the fault'
    if any(folder.glob('checkpoint-*')) and not (folder / 'last.pth.tar').exists():
        yield 'no last.pth.tar after the fault'


def differences(folder: Path, reference: Path) -> list[str]:
    """Returns how the folder of a finished run differs from that of the uninterrupted run."""
    reasons = [f'{path.name} is left' for path in sorted((*folder.glob('*tmp*'), *folder.glob('.*.part')))]
    rows, expected = read_summary(folder), read_summary(reference)
    if rows != expected:
        numbers = ([next(iter(row.values())) for row in each] for each in (rows, expected))
        reasons.append('summary.csv has rows {}, expected {}'.format(*map(' '.join, numbers)))
    checkpoints = {path.name: load(path) for path in checkpoint_files(folder)}
    reasons += [f'{name} is unreadable: {each}' for name, each in checkpoints.items() if isinstance(each, str)]
    for name, keys in dict(last=(*STATE, 'optimizer', 'progress', 'learned'), model_best=STATE).items():
        found, wanted = checkpoints.get(f'{name}.pth.tar', 'missing'), load(reference / f'{name}.pth.tar')
        if found == 'missing':
            reasons.append(f'{name}.pth.tar is missing')
        elif isinstance(found, dict) and isinstance(wanted, dict):
            differ = [key for key in keys if not same(found.get(key), wanted.get(key))]
            reasons += [f'{name}.pth.tar has another {", ".join(differ)}'] if differ else []
    best = checkpoints.get('model_best.pth.tar')
    if rows and isinstance(best, dict):
        metric = next(name for name in ('eval_top1', 'mIoU') if name in rows[0])
        row = max(rows, key=lambda row: float(row[metric]))  # the first of equals
        if (best['epoch'], best['metric']) != (int(next(iter(row.values()))), float(row[metric])):
            reasons.append('model_best.pth.tar is not the best row of summary.csv')
    return reasons
