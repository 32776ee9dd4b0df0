"""cluster_zoo.training.streaming: train.py on real shards, with fewer of them than loader workers and processes."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import assert_same
from PIL import Image

from cluster_zoo.errors import DataError
from cluster_zoo.training.signals import StopRequest
from cluster_zoo.training.streaming import shard_workers

ROOT = Path(__file__).parents[1]
BASE = ['--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '--device', 'cpu', '-b', '8']
SPLITS = dict(train=48, validation=12)


def _images(count):
    """PNG files of noise, with their labels."""
    rng = np.random.default_rng(0)
    for index in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)).save(file, 'png')
        yield file.getvalue(), index % 3


@pytest.fixture
def data(tmp_path):
    """Writes the shards of both splits of a format, and returns the options of train.py."""

    def _wds(shards):
        splits = {}
        for split, count in SPLITS.items():
            names = [f'{split}-{shard:04d}.tar' for shard in range(shards)]
            for shard, name in enumerate(names):
                with tarfile.open(tmp_path / name, 'w') as archive:
                    for index, (image, label) in list(enumerate(_images(count)))[shard::shards]:
                        for suffix, content in (('png', image), ('cls', str(label).encode())):
                            info = tarfile.TarInfo(f'{index:04d}.{suffix}')
                            info.size = len(content)
                            archive.addfile(info, io.BytesIO(content))
            lengths = [len(range(shard, count, shards)) for shard in range(shards)]
            splits[split] = dict(name=split, num_samples=count, filenames=names, shard_lengths=lengths)
        (tmp_path / 'info.json').write_text(json.dumps(dict(splits=splits)))
        return ['--dataset', 'wds/x', '--data-dir', tmp_path]

    def _hfids(shards):
        datasets = pytest.importorskip('datasets')
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b', 'c']))
        for split, count in SPLITS.items():
            for shard in range(shards):
                rows = [dict(image=dict(bytes=image), label=label) for image, label in _images(count)][shard::shards]
                path = tmp_path / 'hub' / 'data' / f'{split}-{shard:05d}-of-{shards:05d}.parquet'
                datasets.Dataset.from_list(rows, features=features).to_parquet(path)
        counts = ['--train-num-samples', SPLITS['train'], '--val-num-samples', SPLITS['validation']]
        return ['--dataset', f'hfids/{tmp_path}/hub', '--data-dir', tmp_path / 'cache', *counts]

    pytest.importorskip('webdataset')
    return dict(wds=_wds, hfids=_hfids)


@pytest.fixture
def launch(tmp_path):
    """Trains one epoch in a subprocess that is killed if it hangs. Returns its exit status, output and summary."""

    def _launch(processes, *flags):
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
        command = (command if processes > 1 else [sys.executable]) + ['train.py', *BASE, '--epochs', 1]
        command += ['--output', tmp_path, '--experiment', 'a', *flags]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_OFFLINE': '1'}
        with subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as run:
            try:
                output, _ = run.communicate(timeout=180)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                pytest.fail(f'the run hangs: {run.communicate()[0][-2000:]}')
        return run.returncode, output

    return _launch


@pytest.mark.parametrize(
    ('kind', 'shards', 'processes', 'workers', 'expected'),
    [
        ('wds', 1, 1, 4, 'has 1 shard for 1 process, so a process has 1 of 4 loader workers'),
        ('wds', 3, 2, 2, 'has 3 shards for 2 processes, so a process has 1 of 2 loader workers'),
        ('hfids', 1, 1, 4, 'has 1 shard for 1 process, so a process has 1 of 4 loader workers'),
        ('hfids', 1, 2, 2, 'has 1 shard for 2 processes, so a process has 1 of 2 loader workers'),
    ],
)
def test_fewer_shards_than_workers(data, launch, tmp_path, kind, shards, processes, workers, expected):
    status, output = launch(processes, *data[kind](shards), '--workers', workers, '--log-interval', 1)
    assert status == 0, output[-3000:]
    assert f'the train split {expected}' in output and f'the validation split {expected}' in output
    batches = SPLITS['train'] // 8 // processes
    assert f'{batches}/{batches} 100%]' in output  # the epoch has all its batches
    with (tmp_path / 'a' / 'summary.csv').open() as file:
        assert len(list(csv.DictReader(file))) == 1


def test_fewer_shards_than_processes(data, launch):
    status, output = launch(2, *data['wds'](1), '--workers', 0)
    assert status != 0
    (error,) = (line for line in output.splitlines() if line.startswith('error:'))
    assert 'the train split has 1 shard for 2 processes: write it as at least 2 shards' in error
    assert 'ZeroDivisionError' not in output


def test_missing_shard(train, data, tmp_path, capsys):
    flags = data['wds'](1)
    (tmp_path / 'train-0000.tar').unlink()
    line = [*BASE, *flags, '--epochs', 1, '--workers', 1, '--output', tmp_path]
    assert train.main(list(map(str, line))) == 2
    assert 'error: wds/x: the train split ended after 0 of 6 batches' in capsys.readouterr().err


def test_the_limit_is_that_of_the_readers():
    """``datasets`` gives each worker a shard up to this number, and timm refuses more."""
    datasets = pytest.importorskip('datasets')
    from datasets.distributed import split_dataset_by_node

    for shards, processes, workers in np.ndindex(6, 3, 6):
        shards, processes, workers = shards + 1, processes + 1, workers + 1
        stream = datasets.IterableDataset.from_generator(iter, gen_kwargs=dict(rows=list(range(shards))))
        builder = SimpleNamespace(as_streaming_dataset=lambda split, stream=stream: stream)
        dataset = SimpleNamespace(reader=SimpleNamespace(builder=builder, download=False, split='train'))
        own = split_dataset_by_node(stream, rank=0, world_size=processes).num_shards
        assert shard_workers(dataset, 'hfids/x', 'train', workers, processes) == min(workers, own)


def test_datasets_without_a_limit():
    for reader in (None, SimpleNamespace(), SimpleNamespace(builder=None, download=True)):
        assert shard_workers(SimpleNamespace(reader=reader), 'x', 'train', 7, 3) == 7


def test_shards_of_each_process():
    dataset = SimpleNamespace(reader=SimpleNamespace(split_info=SimpleNamespace(filenames='abcdefg')))
    workers = [shard_workers(dataset, 'wds/x', 'train', 4, processes) for processes in (1, 2, 3, 7)]
    assert workers == [4, 3, 2, 1] and shard_workers(dataset, 'wds/x', 'train', 0, 7) == 0
    with pytest.raises(DataError, match='7 shards for 8 processes'):
        shard_workers(dataset, 'wds/x', 'train', 0, 8)


def test_resumed_stream_ends_in_the_same_bits(train, data, tmp_path, monkeypatch):
    line = [*BASE, *data['wds'](2), '--epochs', 2, '--workers', 2, '--output', tmp_path, '--val-split', '']
    original, asked = StopRequest.requested, []

    def requested(self):
        asked.append(self)
        if len(asked) == 10:  # within the second epoch: 6 batches, and once more at the end
            self._received = signal.SIGINT
        return original(self)

    def run(*flags):
        return train.main(list(map(str, [*line, *flags])))

    assert run('--experiment', 'whole') == 0
    monkeypatch.setattr(StopRequest, 'requested', requested)
    assert run('--experiment', 'stopped') == 128 + signal.SIGINT
    assert list((tmp_path / 'stopped').glob('recovery-1-3*'))
    assert run('--experiment', 'stopped', '--resume', 'auto') == 0
    whole, resumed = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=True) for name in ('whole', 'stopped'))
    assert_same(whole['state_dict'], resumed['state_dict'])
