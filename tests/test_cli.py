"""cluster_zoo.cli: options, exit status and errors of the whole command, completion, and the demo."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from cluster_zoo import __version__, cli
from cluster_zoo.cli import demo
from cluster_zoo.datasets import create_dataset
from cluster_zoo.errors import CheckpointError

ROOT = Path(__file__).parents[1]
COMMANDS = ['demo', 'list', 'info', 'fetch', 'import', 'push', 'predict', 'explain', 'app', 'export']


def output_of(arguments, capsys):
    """Exit status, standard output and standard error of a command that exits while it parses its arguments."""
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    return status.value.code, *capsys.readouterr()


# --- the whole command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('arguments', [['--help'], *([name, '--help'] for name in COMMANDS), ['--version']])
def test_help_and_version(arguments, capsys):
    status, out, err = output_of(arguments, capsys)
    assert status == 0 and err == ''
    assert (__version__ if arguments == ['--version'] else 'usage: cluster-zoo') in out


@pytest.mark.parametrize('name', COMMANDS)
def test_examples_of_the_help_are_valid(name, capsys, tmp_path, monkeypatch):
    """The examples are parsed, not run."""
    _, out, _ = output_of([name, '--help'], capsys)
    examples = re.findall(r'^  .*?(cluster-zoo .*)$', out.partition('examples:')[2], re.MULTILINE)
    assert examples and all(example.startswith(f'cluster-zoo {name}') for example in examples)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'birds.txt').write_text('robin\n')
    for example in examples:
        assert callable(cli._parser().parse_args(shlex.split(example)[1:]).run)


def console_script(argv, setup=''):
    """Code of the installed command, which ends by printing whether PyTorch was imported."""
    return (
        f'import sys; sys.argv = ["/usr/bin/cluster-zoo", *{argv!r}]\n{setup}\ntry:\n'
        '    from cluster_zoo.cli import main\n    status = main()\n'
        'except SystemExit as error:\n    status = error.code\n'
        'print("torch" in sys.modules, status)'
    )


@pytest.mark.parametrize(
    ('argv', 'expected'),
    [
        (['--help'], 'False 0'),
        (['--version'], 'False 0'),
        ([], 'False 0'),
        (['help'], 'False 0'),
        (['trian'], 'False 2'),
        (['segment', 'trian'], 'False 2'),
        (['segment', '--help'], 'False 0'),
        (['list', 'coc_tiny.in1k'], 'True 0'),
    ],
)
def test_help_and_typos_do_not_import_pytorch(argv, expected):
    run = subprocess.run([sys.executable, '-c', console_script(argv)], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.splitlines()[-1] == expected, run.stderr


def test_package_under_the_command():
    """The package has its function and its models there too."""
    code = (
        'import sys; sys.argv = ["cluster-zoo"]\nimport cluster_zoo\nassert "torch" not in sys.modules\nimport timm\n'
    )
    code += 'assert cluster_zoo.nearest_centroid("resnet18", num_classes=2) and timm.is_model("coc_tiny")\n'
    code += 'try:\n    cluster_zoo.nonsense\nexcept AttributeError as error:\n    print(error)'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert "'cluster_zoo' has no attribute 'nonsense'" in run.stdout, run.stderr


@pytest.mark.parametrize(
    'program',
    [
        ['-c', console_script(['list'])],
        ['-c', console_script(['train', 'data'])],
        *(['segmentation/train.py'], ['segmentation/validate.py'], ['train.py'], ['validate.py']),
    ],
    ids=lambda program: program[-1][:25],
)
def test_interrupted_import(program, tmp_path):
    """Ctrl-C while PyTorch is imported ends the command without a traceback."""
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' / '__init__.py').write_text('import time; print("importing", flush=True); time.sleep(60)')
    environment = dict(os.environ, PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}')
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    process = subprocess.Popen([sys.executable, *program], **options)
    assert process.stdout.readline() == 'importing\n'
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert err == '' and (process.returncode in (130, -signal.SIGINT) or out.endswith(' 130\n')), (out, err)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['info', 'coc_smal'], 'did you mean coc_small'),
        (['train', '--data-dir', 'missing'], 'missing does not exist'),
        (['segment', 'validate', 'missing'], 'missing|--checkpoint'),
    ],
)
def test_debug_before_the_command(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv('CLUSTER_ZOO_DEBUG', '0')  # so that it is restored after the test
    assert cli.main(['--debug', *arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(f'^error: .*({message})', err, re.MULTILINE) and err.startswith('Traceback')


@pytest.mark.parametrize('line', ['', 'help', 'help demo'])
def test_help_without_a_flag(line, capsys):
    assert output_of(line.split(), capsys) == output_of([*line.split()[1:], '--help'], capsys)


def test_exit_status_is_documented(capsys):
    _, out, _ = output_of(['--help'], capsys)
    documented = re.findall(r'^  (\d+) ', out.partition('exit status:')[2], re.MULTILINE)
    assert documented == ['0', '1', '2', '130', '141', '143']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--'], 'COMMAND'),
        (['dmeo'], r'dmeo.* \(did you mean demo\?\)'),
        (['list', '--jsn'], r'--jsn \(did you mean --json\?\)'),
        (['predict', 'cat.jpg', '--modle=x'], r'--modle=x \(did you mean --model\?\)'),
        (['info', 'coc_small', 'coc_tiny'], 'coc_tiny'),
        (['fetch', 'coc_small', '--forc'], r'--forc \(did you mean --force'),  # abbreviations are not allowed
        (['demo', '--output', 'missing/folder/demo.png'], 'missing/folder'),
        (['demo', '--output', 'image.txt'], r'image\.txt'),
        (['demo', '--output', '.png/'], 'image format'),
        *((['demo', '--device', name], f'{name}.* cpu') for name in ('abacus', 'meta', 'mps:7')),
    ],
)
def test_invalid_arguments(arguments, message, capsys):
    status, out, err = output_of(arguments, capsys)
    assert status == 2 and out == '' and re.search(f'^error: .*{message}', err)
    assert re.search(r'\(see cluster-zoo.* --help\)\n$', err)


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (CheckpointError('several lines\n  of our own'), 'several lines\n  of our own'),
        (CheckpointError('a name \x1b[31m of a file'), 'a name \\x1b[31m of a file'),
        (OSError('Client error\n\n  of another\tlibrary '), 'Client error of another library'),
        (PermissionError(), 'PermissionError'),
    ],
)
def test_messages(error, message, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(demo, 'load_classifier', fail)
    assert cli.main(['demo']) == 2
    assert capsys.readouterr() == ('', f'error: {message}\n')


def test_terminated(monkeypatch, tmp_path, capsys):
    """SIGTERM removes temporary files, and the caller's signal handler is restored."""

    def work(*args):
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError('SIGTERM had no effect')

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(demo, 'load_classifier', work)
    status, out, err = output_of(['demo'], capsys)
    assert (status, out, err) == (143, '', '') and list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(('arguments', 'status'), [(['list', 'coc_tiny'], 0), (['list', 'no such'], 2)])
def test_closed_streams(arguments, status, monkeypatch):
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(arguments) == status
    for name in ('stdout', 'stderr'):
        getattr(sys, name).close()


def test_interrupted(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, 'load_classifier', interrupt)
    assert cli.main(['demo']) == 130
    assert capsys.readouterr().err == ''


def test_broken_pipe():
    """As in `cluster-zoo list | head -1`, here with `python -m cluster_zoo`."""
    read, write = os.pipe()
    os.close(read)
    try:
        run = subprocess.run(
            [sys.executable, '-m', 'cluster_zoo', 'list'], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write)
    assert (run.returncode, run.stderr) == (141, '')


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bash(tmp_path, capsys):
    """Completes a command line as in an interactive bash."""
    if not shutil.which('bash'):
        pytest.skip('there is no bash')
    pytest.importorskip('shtab')
    status, out, err = output_of(['--print-completion', 'bash'], capsys)
    assert status == 0 and err == ''
    (tmp_path / 'completion').write_text(out)
    (tmp_path / 'weights.pth').touch()

    def complete(*words):
        script = (
            'source completion; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; '
            'read -ra registered < <(complete -p cluster-zoo); '  # complete ... -F function cluster-zoo
            '"${registered[-2]}"; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        run = subprocess.run(['bash', '-c', script, 'bash', *words], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.split()

    return complete


def test_completion(bash):
    assert bash('cluster-zoo', 'in') == ['info']
    assert bash('cluster-zoo', 'import', 'wei') == ['weights.pth']
    assert bash('cluster-zoo', 'import', 'weights.pth', '--use') == ['--use-ema']
    assert {'fec_small', 'fec_small.cifar10', 'fec_small.in1k'} == set(bash('cluster-zoo', 'info', 'fec_s'))
    assert 'coc_tiny_plain.cifar10' in bash('cluster-zoo', 'predict', '--model', 'coc_tiny_plain.')


def test_completion_of_an_unknown_shell(capsys):
    shtab = pytest.importorskip('shtab')
    _, out, _ = output_of(['--help'], capsys)
    assert f'({", ".join(shtab.SUPPORTED_SHELLS)})' in ' '.join(out.split())
    status, out, err = output_of(['--print-completion', 'abacus'], capsys)
    assert status == 2 and out == '' and 'abacus' in err


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'tcsh', 'fish'])
def test_completion_of_every_shell(shell, capsys):
    if shell not in pytest.importorskip('shtab').SUPPORTED_SHELLS:
        pytest.skip('this version of shtab does not support the shell')
    status, out, _ = output_of(['--print-completion', shell], capsys)
    assert status == 0 and 'cluster-zoo' in out and 'coc_tiny' in out


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'shtab', None)
    assert 'not installed' in ' '.join(output_of(['--help'], capsys)[1].split())
    status, out, err = output_of(['--print-completion', 'bash'], capsys)
    assert status == 2 and out == '' and "pip install 'cluster_zoo[completion]'" in err


# --- the demo ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_model(monkeypatch):
    """Replaces the bundled model by a small one with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(
        'coc_tiny', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), mlp_ratios=(2, 2, 2, 2), regions=1, num_classes=10,
        pretrained_cfg_overlay=dict(input_size=(3, 32, 32), crop_pct=1.0),
    )  # fmt: skip
    created = []
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: created.append((name, pretrained)) or model)
    yield model
    assert created == [('coc_tiny_plain.cifar10', True)]


def test_demo(small_model, tmp_path, capsys):
    path = tmp_path / 'demo.png'
    assert cli.main(['demo', '--output', str(path), '--device', 'cpu']) == 0
    out, err = capsys.readouterr()
    assert err == ''

    # Compare the printed accuracy with one computed image by image.
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(small_model))
    with torch.inference_mode():
        right = sum(
            int(small_model(transform(image).unsqueeze(0)).argmax()) == target
            for image, target in create_dataset(demo.DEMO_DATASET)
        )
    assert f'top-1 {right / 10:.1f} % of 1000' in out
    assert re.search(r'\d+ images/s', out)
    lines = re.findall(r'^(\w+)/\d{5}\.png +(\w+) +\w+ +\d+\.\d %$', out, re.MULTILINE)
    assert len(lines) == 10 and all(folder == label for folder, label in lines)
    assert str(path) in out
    with Image.open(path) as image:
        assert image.format == 'PNG' and image.width > 10 * 100 and image.height > 4 * 100


def test_output_is_checked_before_the_demo_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / 'folder.png').mkdir()
    status, out, err = output_of(['demo', '--output', str(tmp_path / 'folder.png')], capsys)
    assert (status, out) == (2, '') and 'folder.png' in err

    monkeypatch.setattr(os, 'access', lambda path, mode: False)  # root may write to any folder
    status, out, err = output_of(['demo', '--output', str(tmp_path / 'demo.png')], capsys)
    assert (status, out) == (2, '') and str(tmp_path / 'demo.png') in err


def test_accuracy_of_the_bundled_weights_matches_the_readme(tmp_path, capsys):
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    stated = float(re.search(r'([\d.]+) % of the 1,000\s+bundled images', readme).group(1))
    assert cli.main(['demo', '--output', str(tmp_path / 'demo.png'), '--device', 'cpu']) == 0
    printed = float(re.search(r'top-1 ([\d.]+) % of 1000', capsys.readouterr().out).group(1))
    assert abs(printed - stated) <= 0.3  # rounding differs slightly between machines
