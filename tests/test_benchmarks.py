"""benchmarks/throughput.py on two models and small images: its file, tables and figure. camvid.py and loader.py."""

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import cluster_zoo

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'benchmarks' / 'throughput.py'
BATCH, SIZE = 2, 32


@pytest.fixture(scope='module')
def throughput():
    spec = importlib.util.spec_from_file_location('throughput', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """The JSON file and the standard output of a run."""
    path = tmp_path_factory.mktemp('throughput') / 'result.json'
    command = [sys.executable, SCRIPT, '--models', 'coc_tiny', 'resnet18', '--img-size', SIZE, '--batch-size', BATCH]
    command += ['--rounds', 1, '--threads', 1, '--json', path, '--markdown']
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    run = subprocess.run(
        [str(word) for word in command], env=dict(os.environ, PYTHONPATH=paths), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return path, run.stdout


@pytest.fixture
def main(throughput, monkeypatch):
    """The script's main function, called with a command line."""

    def main(*argv):
        monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *map(str, argv)])
        throughput.main()

    return main


def test_results(measured):
    report = json.loads(measured[0].read_text())
    assert [result['model'] for result in report['results']] == ['coc_tiny', 'resnet18']
    for result in report['results']:
        parameters = sum(p.numel() for p in timm.create_model(result['model'], num_classes=1000).parameters())
        assert result['parameters_m'] == pytest.approx(parameters / 1e6)
        assert result['img_size'] == SIZE
        assert 0 < result['gflops'] < 1
        for mode in ('inference', 'training'):
            seconds, images_per_second = result[mode]['seconds'], result[mode]['images_per_second']
            assert 0 < seconds < 60 and math.isfinite(images_per_second)
            assert images_per_second == pytest.approx(BATCH / seconds)


@pytest.mark.skipif(sys.platform != 'linux', reason='the memory of a process is only available on Linux')
def test_memory_holds_at_least_parameters_and_gradients(measured):
    for result in json.loads(measured[0].read_text())['results']:
        parameters = 4 * result['parameters_m']
        assert parameters < result['inference']['memory_mb'] < parameters + 100
        assert 2 * parameters < result['training']['memory_mb'] < 2 * parameters + 200


def test_machine_and_versions(measured):
    report = json.loads(measured[0].read_text())
    assert report['machine']['threads'] == 1 and report['machine']['cpu'] and report['machine']['gpu'] is None
    assert report['versions']['torch'] == torch.__version__ and report['versions']['timm'] == timm.__version__
    assert report['versions']['cluster_zoo'] == cluster_zoo.__version__
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT[\d:]+\+00:00', report['date'])
    assert report['arguments']['batch_size'] == BATCH and report['arguments']['amp'] is False


def test_table_is_printed_again_with_read(measured, main, capsys):
    path, printed = measured
    rows = [line for line in printed.splitlines() if line.startswith('|')]
    assert [row.split('|')[1].strip() for row in rows] == ['model', '---', '`coc_tiny`', '`resnet18`']
    assert len({row.count('|') for row in rows}) == 1
    main('--read', path, '--markdown')
    assert capsys.readouterr().out == printed


def test_growth(throughput, main, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(throughput, 'memory_is_known', lambda args: False)
    path = tmp_path / 'growth.json'
    main('--growth', '--models', 'swin_tiny_patch4_window7_224', '--sizes', 32, 64, '--batch-size', 1, '--rounds', 1,
         '--modes', 'inference', '--json', path)  # fmt: skip
    small, large = json.loads(path.read_text())['results']
    assert (small['img_size'], large['img_size']) == (32, 64)
    assert 1.5 < large['gflops'] / small['gflops'] < 4.5
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('swin'))
    assert row.split()[-2:] == [f'{1e3 * result["inference"]["seconds"]:.1f}' for result in (small, large)]
    with pytest.raises(SystemExit):
        main('--read', path, '--figure', tmp_path / 'growth.png')


def test_flops_of_a_vision_transformer(throughput):
    tokens, width = 14 * 14 + 1, 384
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    expected = 14 * 14 * (3 * 16**2) * width + 12 * block + 1000 * width
    assert throughput.gflops('vit_small_patch16_224', 224) == pytest.approx(2 * expected / 1e9, rel=1e-12)


@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small', 'dnc_coc_tiny'])
def test_flops_match_those_counted_on_real_tensors(throughput, name, monkeypatch):
    monkeypatch.setenv('CLUSTER_ZOO_KERNELS', 'plain')
    model = timm.create_model(name, num_classes=1000).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    monkeypatch.delenv('CLUSTER_ZOO_KERNELS')
    expected = counter.get_total_flops() / 1e9
    assert expected <= throughput.gflops(name, 64) < 1.01 * expected  # on a CPU, averages are not matrix products
    assert 'CLUSTER_ZOO_KERNELS' not in os.environ


def test_default_models(throughput):
    args = throughput.parser().parse_args([])
    throughput.check(args)
    ours = [
        name
        for name in timm.list_models()
        if timm.models.model_entrypoint(name).__module__.startswith('cluster_zoo.') and not name.endswith('_cifar')
    ]
    assert sorted(ours + throughput.TIMM) == sorted(args.models)
    assert set(throughput.PUBLISHED) <= set(args.models)


def test_published_accuracy_matches_the_readme(throughput):
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    table = readme.split('\n## Models\n')[1].split('\n## ')[0]
    stated = {name: float(top1) for name, top1 in re.findall(r'^\| `(\w+)` \| [\d.]+ \| (\d[\d.]*) \|', table, re.M)}
    ours = {name: top1 for name, (top1, _) in throughput.PUBLISHED.items() if name not in throughput.TIMM}
    assert ours == stated


def test_figure(measured, main, tmp_path):
    pytest.importorskip('matplotlib')
    path = tmp_path / 'figure.png'
    main('--read', measured[0], measured[0], '--figure', path)
    assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--models', 'coc_smal'], "'coc_smal' (did you mean coc_small"),
        (['--models', 'nothing_*'], "'nothing_*'"),
        (['--device', 'cuda'], '--device cuda'),
        (['--device', 'gpu'], "'gpu'"),
        (['--batch-size', '0'], 'at least 1'),
        (['--json', 'missing/folder.json'], 'missing/folder.json'),
        (['--read', 'missing.json'], 'missing.json'),
    ],
)
def test_invalid_arguments(argv, message, main, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(*argv)
    assert stopped.value.code == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith('error: ') and message in first


def test_camvid_evaluates_again_after_more_training(monkeypatch, tmp_path):
    """With the precision and memory format of the run."""
    monkeypatch.setattr(sys, 'path', sys.path[:])  # restored after the test: the script inserts its folder
    spec = importlib.util.spec_from_file_location('camvid', SCRIPT.with_name('camvid.py'))
    camvid = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(camvid)
    commands = []

    def validate(argv):
        commands.append(argv)
        Path(argv[argv.index('--results-file') + 1]).write_text(json.dumps(len(commands)))

    monkeypatch.setattr(camvid.validate, 'main', validate)
    checkpoint, results = tmp_path / 'last.pth.tar', tmp_path / 'test.json'
    checkpoint.touch()
    args = argparse.Namespace(data='camvid.tar', device='cpu', overlays=0)
    plain = dict(amp=False, amp_dtype=None, channels_last=False)
    assert camvid.test(tmp_path, plain, args) == 1
    assert not {'--amp', '--amp-dtype', '--channels-last'} & set(commands[0])
    os.utime(checkpoint, (100, 100))
    os.utime(results, (200, 200))
    assert camvid.test(tmp_path, plain, args) == 1
    os.utime(checkpoint, (300, 300))
    assert camvid.test(tmp_path, dict(amp=True, amp_dtype='float16', channels_last=True), args) == 2
    second = commands[1]
    assert {'--amp', '--channels-last'} < set(second) and second[second.index('--amp-dtype') + 1] == 'float16'
    assert len(commands) == 2


@pytest.fixture
def loader(monkeypatch):
    """The module of benchmarks/loader.py, which runs in this process."""
    monkeypatch.setattr(sys, 'path', sys.path[:])
    spec = importlib.util.spec_from_file_location('loader', SCRIPT.with_name('loader.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loader(image_folder, tmp_path):
    """In its own process: workers that are forked from a process with threads of PyTorch can wait forever."""
    path = tmp_path / 'loader.json'
    line = [image_folder, '--img-size', 32, '--batch-size', 4, '--workers', 0, 2, '--rounds', 2, '--json', path]
    command = [sys.executable, SCRIPT.with_name('loader.py'), *line, '--seconds', 0.2, '--warm-up', 0]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads(path.read_text())
    assert report['images']['number'] == 42 and report['images']['megapixels'] == pytest.approx(40 * 36 / 1e6)
    assert [(result['workers'], len(result['rounds'])) for result in report['results']] == [(0, 2), (2, 2)]
    heading, _, *rows = run.stdout.splitlines()
    assert torch.__version__ in heading and report['date'][:10] in heading
    for result, row in zip(report['results'], rows[2:]):
        rates = [each['per_second'] for each in result['rounds']]
        assert min(rates) > 0 and math.isfinite(max(rates))
        assert [cell.strip() for cell in row.split('|')[1:3]] == [str(result['workers']), f'{max(rates):.0f}']


def test_loader_gives_what_a_gpu_gets(loader, image_folder):
    args = argparse.Namespace(data=image_folder, model='coc_tiny', img_size=32, batch_size=6)
    batches, dataset = loader.build(args, 0)
    images, target = next(iter(batches))
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 32, 32)
    assert target.shape == (6, 3)  # mixed
    assert len(dataset) == 42 and len(batches) == loader.PASS


def test_loader_without_images(loader, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, 'argv', ['loader.py', str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        loader.main()
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith('error: ')
