"""cluster_zoo.cli: conventional options, exit codes and errors of the whole command, completion, and the demo."""

import io
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
from cluster_zoo.cli import demo, weights
from cluster_zoo.data import create_dataset
from cluster_zoo.errors import CheckpointError

ROOT = Path(__file__).parents[1]
COMMANDS = ['demo', 'list', 'info', 'fetch', 'import', 'push', 'predict', 'export']


def output_of(arguments, capsys):
    """Exit status, standard output and standard error of a command that ends while it parses its arguments."""
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    return status.value.code, *capsys.readouterr()


# --- the whole command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('arguments', [['--help'], *([name, '--help'] for name in COMMANDS), ['--version']])
def test_information_goes_to_standard_output(arguments, capsys):
    status, out, err = output_of(arguments, capsys)
    assert status == 0 and err == ''
    assert (__version__ if arguments == ['--version'] else 'usage: cluster-zoo') in out


@pytest.mark.parametrize('name', COMMANDS)
def test_the_examples_of_every_command_can_be_typed(name, capsys, tmp_path, monkeypatch):
    """Their arguments are understood; what they do is not done."""
    _, out, _ = output_of([name, '--help'], capsys)
    examples = re.findall(r'^  .*?(cluster-zoo .*)$', out.partition('examples:')[2], re.MULTILINE)
    assert examples and all(example.startswith(f'cluster-zoo {name}') for example in examples)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'birds.txt').write_text('robin\n')
    for example in examples:
        assert callable(cli._parser().parse_args(shlex.split(example)[1:]).run)


def test_the_exit_status_is_documented(capsys):
    _, out, _ = output_of(['--help'], capsys)
    assert re.findall(r'^  (\d+) ', out.partition('exit status:')[2], re.MULTILINE) == [
        '0',
        '1',
        '2',
        '130',
        '141',
        '143',
    ]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'COMMAND'),
        (['dmeo'], r"there is no command 'dmeo' \(did you mean demo\?\)"),
        (['list', '--jsn'], r'unknown argument --jsn \(did you mean --json\?\)'),
        (['predict', 'cat.jpg', '--modle=x'], r'unknown argument --modle=x \(did you mean --model\?\)'),
        (['info', 'coc_small', 'coc_tiny'], 'unknown argument coc_tiny'),
        (['fetch', 'coc_small', '--forc'], r'--forc \(did you mean --force'),  # there are no abbreviations
        (['demo', '--output', 'nowhere/at/all.png'], 'there is no folder'),
        (['demo', '--output', 'picture.txt'], r'picture\.txt names no picture format'),
        (['demo', '--output', '.png/'], 'names no picture format'),
        *((['demo', '--device', name], f'can not run on {name}, only on cpu') for name in ('abacus', 'meta', 'mps:7')),
    ],
)
def test_wrong_use(arguments, message, capsys):
    status, out, err = output_of(arguments, capsys)
    assert status == 2 and out == '' and re.search(f'^error: .*{message}', err)
    assert re.search(r'\(see cluster-zoo.* --help\)\n$', err)


def test_errors_are_one_message(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise CheckpointError('the weights are damaged')

    monkeypatch.setattr(timm, 'create_model', refuse)
    assert cli.main(['demo']) == 2
    assert capsys.readouterr() == ('', 'error: the weights are damaged\n')


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
    monkeypatch.setattr(weights, '_where', lambda name: exec('raise error', dict(error=error)))
    assert cli.main(['list', 'coc_tiny']) == 2
    assert capsys.readouterr() == ('', f'error: {message}\n')


def test_terminated(monkeypatch, tmp_path, capsys):
    """What is temporary goes, and the handler of whoever calls is put back."""

    def work(name):
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError('nothing has ended this')

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(weights, '_where', work)
    status, out, err = output_of(['list', 'coc_tiny'], capsys)
    assert (status, out, err) == (143, '', '') and list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(('arguments', 'status'), [(['list', 'coc_tiny'], 0), (['list', 'no such'], 2)])
def test_closed_streams(arguments, status, monkeypatch):
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(arguments) == status
    for name in ('stdout', 'stderr'):
        getattr(sys, name).close()


def test_a_stream_that_knows_few_letters(monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding='ascii', errors='strict')
    monkeypatch.setattr(sys, 'stdout', printed)
    monkeypatch.setattr(weights, '_where', lambda name: '\u00fc \udce9')
    assert cli.main(['list', 'coc_tiny.in1k']) == 0
    assert printed.buffer.getvalue().endswith(b'\\xfc \\udce9\n')


def test_interrupted(monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, '_where', interrupt)
    assert cli.main(['list', 'coc_tiny']) == 130
    assert capsys.readouterr().err == ''


def test_a_reader_that_goes_away_is_no_error():
    """As in `cluster-zoo list | head -1`: python -m cluster_zoo is the same command."""
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
    """Completes a command line as an interactive bash would."""
    if not shutil.which('bash'):
        pytest.skip('there is no bash')
    pytest.importorskip('shtab')
    status, out, err = output_of(['--print-completion', 'bash'], capsys)
    assert status == 0 and err == ''
    (tmp_path / 'completion').write_text(out)
    (tmp_path / 'weights.pth').touch()

    def complete(*words):
        ask = (
            'source completion; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; '
            'read -ra registered < <(complete -p cluster-zoo); '  # complete ... -F function cluster-zoo
            '"${registered[-2]}"; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        run = subprocess.run(['bash', '-c', ask, 'bash', *words], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.split()

    return complete


def test_completion(bash):
    assert bash('cluster-zoo', 'in') == ['info']
    assert bash('cluster-zoo', 'import', 'wei') == ['weights.pth']
    assert bash('cluster-zoo', 'import', 'weights.pth', '--use') == ['--use-ema']
    assert {'fec_small', 'fec_small.in1k'} == set(bash('cluster-zoo', 'info', 'fec_s'))
    assert 'coc_tiny_plain.cifar10' in bash('cluster-zoo', 'predict', '--model', 'coc_tiny_plain.')


def test_completion_of_an_unknown_shell(capsys):
    shtab = pytest.importorskip('shtab')
    _, out, _ = output_of(['--help'], capsys)
    assert f'({", ".join(shtab.SUPPORTED_SHELLS)})' in ' '.join(out.split())
    status, out, err = output_of(['--print-completion', 'abacus'], capsys)
    assert status == 2 and out == '' and 'not for abacus' in err


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'tcsh', 'fish'])
def test_completion_of_every_shell(shell, capsys):
    if shell not in pytest.importorskip('shtab').SUPPORTED_SHELLS:
        pytest.skip('this shtab does not know it')
    status, out, _ = output_of(['--print-completion', shell], capsys)
    assert status == 0 and 'cluster-zoo' in out and 'coc_tiny' in out


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'shtab', None)
    assert 'which is not installed' in ' '.join(output_of(['--help'], capsys)[1].split())
    status, out, err = output_of(['--print-completion', 'bash'], capsys)
    assert status == 2 and out == '' and "pip install 'cluster_zoo[completion]'" in err


# --- the demo ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_model(monkeypatch):
    """A small network with random weights in the place of the bundled one."""
    torch.manual_seed(0)
    model = timm.create_model(
        'coc_tiny', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), mlp_ratios=(2, 2, 2, 2), regions=1, num_classes=10,
        pretrained_cfg_overlay=dict(input_size=(3, 32, 32), crop_pct=1.0),
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: asked.append((name, pretrained)) or model)
    yield model
    assert asked == [('coc_tiny_plain.cifar10', True)]


def test_demo(small_model, tmp_path, capsys):
    picture = tmp_path / 'demo.png'
    assert cli.main(['demo', '--output', str(picture), '--device', 'cpu']) == 0
    out, err = capsys.readouterr()
    assert err == ''

    # The printed accuracy against one that is counted apart, image by image.
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(small_model))
    with torch.inference_mode():
        right = sum(
            int(small_model(transform(image).unsqueeze(0)).argmax()) == target
            for image, target in create_dataset(demo.DEMO_DATASET)
        )
    assert f'top-1 {right / 10:.1f} % of 1000' in out
    assert re.search(r'\d+ images/s', out)
    lines = re.findall(r'^(\w+)/\d{5}\.png +(\w+) +\w+ +\d+\.\d %$', out, re.MULTILINE)
    assert len(lines) == 10 and all(folder == is_name for folder, is_name in lines)
    assert str(picture) in out
    with Image.open(picture) as image:
        assert image.format == 'PNG' and image.width > 10 * 100 and image.height > 4 * 100


def test_a_picture_that_can_not_be_written_is_noticed_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    (tmp_path / 'folder.png').mkdir()
    status, out, err = output_of(['demo', '--output', str(tmp_path / 'folder.png')], capsys)
    assert (status, out) == (2, '') and 'folder.png can not be written to' in err

    def refuse(**kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)  # root may write into any folder
    status, out, err = output_of(['demo', '--output', str(tmp_path / 'demo.png')], capsys)
    assert (status, out) == (2, '') and f'nothing can be written into {tmp_path}: Permission denied' in err


def test_bundled_weights_are_as_good_as_the_readme_says(tmp_path, capsys):
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    stated = float(re.search(r'([\d.]+) % of the 1,000\s+bundled images', readme).group(1))
    assert cli.main(['demo', '--output', str(tmp_path / 'demo.png'), '--device', 'cpu']) == 0
    printed = float(re.search(r'top-1 ([\d.]+) % of 1000', capsys.readouterr().out).group(1))
    assert abs(printed - stated) <= 0.3  # another machine may round a few images to the other side
