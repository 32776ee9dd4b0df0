"""benchmarks/gpu.py on the CPU with tiny settings: its steps, resuming, errors, time limits and the report."""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ['--device', 'cpu', '--batch-size', '2', '--img-size', '32', '--timed-steps', '1', '--repeats', '2']
TINY += ['--kernels', 'plain', '--executions', 'eager', '--models', 'coc_tiny']


@pytest.fixture(scope='module')
def gpu():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, 'path', [str(ROOT / 'benchmarks'), *sys.path])
        spec = importlib.util.spec_from_file_location('gpu', ROOT / 'benchmarks' / 'gpu.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope='module')
def steps(gpu):
    return sys.modules['gpu_steps']


@pytest.fixture(scope='module')
def training(gpu):
    return sys.modules['gpu_training']


class SameProcess:
    """A worker that starts no process."""

    def __init__(self, gpu):
        self.error = gpu.CaseError

    def call(self, function, *args, timeout, **kwargs):
        try:
            return function(*args, **kwargs)
        except RuntimeError as e:
            raise self.error(f'Traceback:\n{e}') from None

    def close(self):
        pass


@pytest.fixture
def main(gpu, monkeypatch):
    """The script's main function, called with a command line; cases run in this process."""

    def main(*argv, worker=None):
        monkeypatch.setattr(sys, 'argv', ['gpu.py', *map(str, argv)])
        monkeypatch.setattr(gpu, 'Worker', worker or (lambda: SameProcess(gpu)))
        gpu.main()

    return main


def _records(out, step):
    return [json.loads(line) for line in (out / f'{step}.jsonl').read_text().splitlines()]


def _options(gpu, out, *argv):
    args = gpu.parser().parse_args([str(out), *map(str, argv)])
    args.deadline = time.time() + 600
    return args


def test_throughput_is_resumed(main, tmp_path, capsys):
    options = [tmp_path, '--steps', 'throughput', *TINY, 'resnet18']
    main(*options, '--minutes', 0)
    assert 'throughput: 8 of 8 cases left' in capsys.readouterr().err
    main(*options)
    first = _records(tmp_path, 'throughput')
    assert [(r['settings']['model'], r['settings']['network'], r['settings']['mode']) for r in first] == [
        *(
            ('coc_tiny', network, mode)
            for mode in ('inference', 'training')
            for network in ('model', 'floor', 'formulas')
        ),
        *(('resnet18', 'model', mode) for mode in ('inference', 'training')),
    ]
    assert all(0 < record['result']['seconds'] < 60 for record in first)
    main(*options)
    assert _records(tmp_path, 'throughput') == first
    with (tmp_path / 'throughput.jsonl').open('a') as file:
        file.write('{"case": "cut o')
    main(tmp_path, '--report')
    report = (tmp_path / 'report.md').read_text()
    for mode, start in (('inference', 0), ('training', 3)):
        seconds = [record['result']['seconds'] for record in first[start : start + 3]]
        ratios = f'{seconds[0] / seconds[1]:.2f} | {seconds[2] / seconds[0]:.2f}'
        table = report.split(f'**{mode.capitalize()}**')[1].split('**')[0]
        assert f'| `coc_tiny` | plain | eager | {ratios} |' in table
        assert f'| `coc_tiny` | model | plain | {1e3 * seconds[0]:.2f} | {2 / seconds[0]:.0f} |' in table
    assert f'| torch | {torch.__version__} |' in report and '| driver | - |' in report
    assert report.count('| commit |') == 1 and '### errors' not in report


def test_a_result_of_another_commit_does_not_count(main, tmp_path):
    options = [tmp_path, '--steps', 'profile', *TINY]
    for commit in ('aaaa', 'bbbb', 'aaaa'):
        main(*options, '--commit', commit)
    (first, second) = _records(tmp_path, 'profile')
    assert (first['environment']['commit'], second['environment']['commit']) == ('aaaa', 'bbbb')
    report = (tmp_path / 'report.md').read_text()
    assert report.count('### profile') == 2 and report.count('| kernel | calls | ms |') == 2
    result = first['result']
    assert result['launches'] >= sum(kernel['calls'] for kernel in result['kernels_top']) > 100
    assert len(result['kernels_top']) == 25 and result['kernel_ms'] > 0 and result['step_ms'] > 0


def test_a_failed_case_is_kept_and_the_others_go_on(main, steps, monkeypatch, tmp_path):
    def speed(args, network, **settings):
        if network == 'floor':
            raise RuntimeError('no floor | here')
        return dict(seconds=1, memory_mb=None, sm_mhz='-')

    monkeypatch.setattr(steps, 'speed', speed)
    options = [tmp_path, '--steps', 'throughput', *TINY]
    main(*options)
    records = _records(tmp_path, 'throughput')
    assert ['error' in record for record in records] == [False, True, False] * 2
    assert (tmp_path / 'report.md').read_text().split('### errors')[1].count('no floor / here') == 2
    main(*options)
    assert len(_records(tmp_path, 'throughput')) == 6
    monkeypatch.setattr(steps, 'speed', lambda args, **settings: dict(seconds=1, memory_mb=None, sm_mhz='-'))
    main(*options, '--retry')
    assert len(_records(tmp_path, 'throughput')) == 8
    assert '### errors' not in (tmp_path / 'report.md').read_text()


@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small'])
def test_parity(main, name, tmp_path):
    main(tmp_path, '--steps', 'parity', *TINY, '--models', name)
    exact, _, half = (record['result'] for record in _records(tmp_path, 'parity'))
    assert exact['flips'] == exact['changed_top1'] == 0
    assert 0 < exact['logits'] < 1e-5 < half['logits'] < 0.1
    assert 0 < exact['gradient'] < 1e-4 < half['gradient'] < 1
    assert f'| `{name}` | bfloat16 | plain | 2 x 32 px |' in (tmp_path / 'report.md').read_text()


@pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') != '1', reason='the kernels need the interpreter on a CPU')
def test_parity_of_the_triton_kernels(gpu, steps, tmp_path):
    pytest.importorskip('triton')
    args = _options(gpu, tmp_path, '--device', 'cpu')
    result = steps.parity(args, 'fec_small', 'float32', 'triton', images=1, size=32)
    assert result['flips'] == 0 and 0 < result['logits'] < 1e-5 and 0 < result['gradient'] < 1e-4


def test_parity_counts_flips(steps, gpu, monkeypatch, tmp_path):
    """The other network assigns each point of the first layer to center 0."""
    example, outputs = steps.example, steps.outputs

    def changed(model, images, amp):
        logits, gradient, found = outputs(model, images, amp)
        if images.dtype != torch.float64:
            changed.expected = (found[0] != 0).sum().item()
            found[0] = torch.zeros_like(found[0])
            logits = -logits
        return logits, gradient, found

    monkeypatch.setattr(steps, 'outputs', changed)
    args = _options(gpu, tmp_path, '--device', 'cpu')
    result = steps.parity(args, 'coc_tiny', 'float32', 'plain', images=2, size=64)
    points = example('coc_tiny', 2, 64)[0].stages[0].blocks[0].token_mixer.num_heads * 2 * 16 * 16
    assert result['flips'] == changed.expected > 0 and result['changed_top1'] == 2
    assert result['worst_layer'] == pytest.approx(changed.expected / points) and result['points'] > points
    assert result['logits'] == pytest.approx(2)


def test_bundled_weights_are_compared_on_the_sample(steps):
    model, images = steps.example('coc_tiny_plain.cifar10', 20, 64)
    assert images.shape == (20, 3, 64, 64)
    assert len(model(images).argmax(1).unique()) > 5


def test_all_cases(gpu, steps, tmp_path):
    args = _options(gpu, tmp_path, '--data', tmp_path)
    cases = {step: found(args) for step, found in steps.STEPS.items() if step != 'kernels'}
    assert all((ROOT / path).is_file() for path in steps.TESTS)
    assert len(cases['parity']) == 5 * 3 * 2 and len(cases['profile']) == 4
    ours, peers = 3 * 2 * (2 + 1) * 2 + 3 * 2, 4 * 2 * 2  # models, modes, networks, executions; formulas are eager only
    assert len(cases['throughput']) == ours + peers
    assert {(c.settings['mode'], c.settings['batch']) for c in cases['throughput']} == {
        ('inference', 256),
        ('training', 128),
    }
    assert len(cases['cifar10']) == 1 and len(cases['centroids']) == 2 + 3 * 2 * 2
    for found in cases.values():
        assert len({case.name for case in found}) == len(found)
    args.data = None
    assert not steps.STEPS['cifar10'](args) and len(steps.STEPS['centroids'](args)) == 2


def test_kernel_tests_run_one_by_one(main, steps, monkeypatch, tmp_path):
    monkeypatch.setattr(steps, 'ROOT', tmp_path)
    (tmp_path / 'test_example.py').write_text(
        'import pytest\n\ndef test_good():\n    pass\n\ndef test_bad():\n    assert 1 + 1 == 3\n\n'
        'def test_skipped():\n    pytest.skip("no GPU")\n\n@pytest.mark.parametrize("x", [1, 2])\n'
        'def test_last(x):\n    assert x == 2\n'
    )
    out = tmp_path / 'out'
    main(out, '--steps', 'kernels', '--tests', 'test_example.py', '--device', 'cpu')
    records = {record['case'].rpartition('::')[2]: record for record in _records(out, 'kernels')}
    outcomes = {name: record.get('result', {}).get('outcome') for name, record in records.items()}
    assert outcomes == {
        'test_good': 'passed',
        'test_bad': None,
        'test_skipped': 'skipped',
        'test_last[1]': None,
        'test_last[2]': 'passed',
    }
    assert '1 + 1' in records['test_bad']['error']
    report = (out / 'report.md').read_text()
    assert (
        '| `test_example.py` | 2 | 2 | 1 |' in report and 'test_example.py::test_bad' in report.split('### errors')[1]
    )


def test_tests_that_cannot_be_collected(main, tmp_path):
    path = tmp_path / 'test_example.py'
    path.write_text('import no_such_module\n')
    main(tmp_path, '--steps', 'kernels', '--tests', path, '--device', 'cpu')
    (record,) = _records(tmp_path, 'kernels')
    assert 'no_such_module' in record['error']


def test_a_process_that_crashes_or_exceeds_its_time(gpu):
    worker = gpu.Worker()
    try:
        assert worker.call(math.sqrt, 4, timeout=100) == 2
        process = worker.process
        with pytest.raises(gpu.CaseError, match='ValueError'):
            worker.call(int, 'x', timeout=100)
        assert worker.call(os.getpid, timeout=100) == process.pid
        with pytest.raises(gpu.CaseError, match='exit code 7'):
            worker.call(os._exit, 7, timeout=100)
        assert worker.call(math.sqrt, 9, timeout=100) == 3
        process = worker.process
        with pytest.raises(TimeoutError):
            worker.call(time.sleep, 100, timeout=0.1)
        assert not process.is_alive()
    finally:
        worker.close()


def test_a_case_that_exceeds_the_call(main, gpu, tmp_path, capsys):
    """It is left for the next call, unless it had all the time."""
    calls = []

    class Slow(SameProcess):
        def call(self, function, *args, timeout, **kwargs):
            calls.append(timeout)
            if len(calls) in (2, 7):  # the second of a call, and the first of the next one
                raise TimeoutError
            return dict(seconds=1, memory_mb=None, sm_mhz='-')

    options = [tmp_path, '--steps', 'throughput', *TINY]
    main(*options, worker=lambda: Slow(gpu))
    assert 'throughput: 1 of 6 cases left' in capsys.readouterr().err
    assert all(0 < timeout <= 480 for timeout in calls)
    main(*options, worker=lambda: Slow(gpu))
    (failed,) = [record for record in _records(tmp_path, 'throughput') if 'error' in record]
    assert 'not measured within 8 minutes' in failed['error'] and 'network=floor' in failed['case']


FAKE = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
folder = Path(sys.argv[sys.argv.index('--output') + 1], 'cifar10-gpu')
folder.mkdir(exist_ok=True)
summary = folder / 'summary.csv'
rows = summary.read_text().splitlines() if summary.exists() else ['epoch,eval_top1']
summary.write_text('\\n'.join([*rows, f'{len(rows) - 1},{10 * len(rows)}']) + '\\n')
print('started', flush=True)
time.sleep(0 if len(rows) == 2 else 100)
"""


def test_training_is_interrupted_and_resumed(gpu, main, training, monkeypatch, tmp_path):
    scripts = tmp_path / 'benchmarks'
    scripts.mkdir()
    (scripts / 'train.py').write_text(FAKE)
    (scripts / 'cifar10.sh').write_text(f'exec {sys.executable} {scripts / "train.py"} "$@"')
    monkeypatch.setattr(training, 'ROOT', tmp_path)
    monkeypatch.setattr(training, 'LEAST_SECONDS', 0)
    monkeypatch.setattr(training, 'STOP_SECONDS', 0)
    monkeypatch.setattr(training, 'validate', lambda args, folder: dict(validated_top1=21.0, validated_top5=99.0))
    options = [tmp_path / 'out', '--steps', 'cifar10', '--data', tmp_path, '--epochs', 2, '--device', 'cpu']
    for _ in range(3):
        main(*options, '--minutes', 0.05)
    stopped, finished = _records(tmp_path / 'out', 'cifar10')
    assert stopped['result'] == dict(epochs_done=1, top1=10, unfinished=True)
    assert finished['result'] == dict(epochs_done=2, top1=20, validated_top1=21, validated_top5=99)
    minutes = (stopped['seconds'] + finished['seconds']) / 60
    row = f'| coc_tiny_plain | 2 of 2 | {minutes:.1f} | 20.00 | 21.00 |'
    assert row in (tmp_path / 'out' / 'report.md').read_text()
    assert (tmp_path / 'out/runs/2-epochs/cifar10-gpu.log').read_text().count('started') == 2


def test_cifar10_with_the_recipe(main, image_folder, tmp_path):
    """One epoch of a few images, then validation."""
    options = '--device cpu --workers 0 -b 8 --num-classes 3'
    main(tmp_path, '--steps', 'cifar10', '--data', image_folder, '--epochs', 1, f'--train={options}', '--device', 'cpu')
    (record,) = _records(tmp_path, 'cifar10')
    assert 'error' not in record, record
    result = record['result']
    assert result['epochs_done'] == 1 and result['validated_top1'] == pytest.approx(result['top1'], abs=0.01)


def test_centroids(main, training, monkeypatch, tmp_path):
    update = '--rounds 1 --classes 10 --memory 400 --width 16 --tolerance 0.1'
    monkeypatch.setattr(training, 'UPDATE', update.split())
    main(tmp_path, '--steps', 'centroids', '--device', 'cpu')
    assert [record['settings'] for record in _records(tmp_path, 'centroids')] == [
        dict(dtype='float32'),
        dict(dtype='bfloat16'),
    ]
    report = (tmp_path / 'report.md').read_text()
    assert '| loop over classes | bfloat16 | 10 | 400 |' in report and '| all classes at once | float32 |' in report


@pytest.mark.parametrize('head', ['linear', 'default'])
def test_a_run_of_the_comparison_of_heads(gpu, training, head, image_folder, tmp_path):
    options = '--device cpu --workers 0 -b 8 --num-classes 3 --dry-run'
    args = _options(gpu, tmp_path, '--data', image_folder, f'--train={options}')
    assert training.train_head(args, 'resnet18_cifar', head, 43, 7) == dict(epochs_done=0, top1=None)
    log = (tmp_path / f'runs/7-epochs/dnc-cifar10-resnet18_cifar-{head}-43.log').read_text()
    model = 'resnet18_cifar' if head == 'linear' else 'dnc_resnet18_cifar'
    assert f'{model}: ' in log and '7 epochs of' in log
    args.train = '--device cpu --no-such-option'
    with pytest.raises(RuntimeError, match='no-such-option'):
        training.train_head(args, 'resnet18_cifar', head, 43, 7)


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--models', 'coc_smal'], "'coc_smal' (did you mean coc_small"),
        ([], '--device cuda'),
        (['--steps', 'cifar10', '--device', 'cpu'], '--steps cifar10 needs --data'),
        (['--device', 'cpu', '--data', 'missing'], 'missing'),
        (['--steps', 'speed'], "'speed'"),
    ],
)
def test_invalid_arguments(argv, message, main, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(tmp_path / 'out', *argv)
    assert stopped.value.code == 2 and not (tmp_path / 'out').exists()
    assert message in capsys.readouterr().err.splitlines()[0]


def test_nvidia_smi(gpu, monkeypatch):
    """Unknown values, and a missing program, are a dash."""
    measuring = sys.modules['measuring']
    answers = ['570.1, 1980, [N/A]\n']

    def run(command, **kwargs):
        if not answers:
            raise FileNotFoundError
        assert command[2] == 'GPU-123' and command[-1] == '--query-gpu=driver_version,clocks.sm,power.limit'
        return argparse.Namespace(stdout=answers.pop())

    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda index: argparse.Namespace(uuid='123'))
    fields = ['driver_version', 'clocks.sm', 'power.limit']
    assert list(measuring.nvidia_smi(*fields).values()) == ['570.1', '1980', '-']
    assert list(measuring.nvidia_smi(*fields).values()) == ['-'] * 3
