"""cluster-zoo train, validate and segment: the same parsers and the same code as the scripts."""

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster_zoo.cli import main
from cluster_zoo.cli.segment import predict_parser
from cluster_zoo.training import train_options as train
from cluster_zoo.training import validate
from cluster_zoo.training.parser import Parser
from segmentation.engine.train_options import train_parser
from segmentation.validate import validate_parser

ROOT = Path(__file__).parents[1]
SAMPLE = ['--dataset', 'cluster_zoo/cifar10_sample', '--device', 'cpu', '-j', '0']
TRAIN = [*SAMPLE, '--model', 'test_resnet', '--num-classes', '10', '--img-size', '32', '-b', '100', '--lr', '0.01']
TRAIN += ['--val-fraction', '0.1']


COMMANDS = ['train', 'validate', 'segment train', 'segment validate']


def _help(command, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), *flag.split()])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('command', COMMANDS)
def test_help_fits_a_screen(command, capsys, monkeypatch):
    """--help has the common options and names the groups, --help GROUP has one of them, --help-all everything."""
    monkeypatch.setenv('COLUMNS', '100')
    short, whole = _help(command, '--help', capsys), ' '.join(_help(command, '--help-all', capsys).split())
    assert len(short.splitlines()) <= 40 and '--help-all' in short
    titles = re.findall(r'([a-z][^,.]*?) \(\d+\)', ' '.join(short.partition('Groups of options: ')[2].split()))
    assert len(titles) >= 5
    for title in titles:
        group = _help(command, f'--help {title.split()[0]}', capsys)
        assert f'{title}:\n' in group and len(group.splitlines()) <= 60
        assert all(' '.join(line.split()) in whole for line in group.splitlines())


@pytest.mark.parametrize('command', COMMANDS)
def test_help_states_defaults(command, capsys, monkeypatch):
    scripts = (train.train_parser, validate.validate_parser, train_parser, validate_parser)
    parser = dict(zip(COMMANDS, scripts))[command]()
    monkeypatch.setenv('COLUMNS', '1000')
    shown = re.split(r'\n  (?=-)', _help(command, '--help-all', capsys))  # one text for each option
    for action in parser._actions:
        if action.default and action.default not in (argparse.SUPPRESS, 'None') and action.option_strings:
            [text] = [text for text in shown if text.split()[0] == action.option_strings[0]]
            assert 'default' in text and text.count('default:') <= 1, text


def test_help_of_a_parser_without_common_options(capsys):
    """As in benchmarks/throughput.py."""
    parser = Parser(prog='few.py', description='What it does.')
    parser.add_argument('--few', help='an option')
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(['--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and 'What it does.' in out and '--few' in out and 'Groups' not in out


def test_unknown_group_of_the_help(capsys):
    with pytest.raises(SystemExit):
        main(['train', '--help', 'optimiser'])
    assert re.search(r'no group .optimiser. \(did you mean optimizer', capsys.readouterr().err)


@pytest.mark.parametrize('command', ['validate', 'segment train'])
def test_help_is_that_of_the_script(command, capsys):
    script = {'segment train': 'segmentation/train.py', 'segment validate': 'segmentation/validate.py'}
    path = ROOT / script.get(command, f'{command}.py')
    run = subprocess.run([sys.executable, path, '--help-all'], capture_output=True, text=True, cwd=ROOT.parent)
    shown = _help(command, '--help-all', capsys)
    assert run.returncode == 0
    assert shown.startswith(f'usage: cluster-zoo {command} ')
    assert shown.partition('\n\n')[2] == run.stdout.partition('\n\n')[2]


def test_examples_of_the_help_are_valid(capsys):
    with pytest.raises(SystemExit):
        main(['segment', '--help'])
    examples = re.findall(r'^  cluster-zoo segment (.*)$', capsys.readouterr().out, re.MULTILINE)
    assert [example.split()[0] for example in examples] == ['train', 'validate', 'predict']
    for example, parser in zip(examples, (train_parser(), validate_parser())):
        assert parser.resolve(shlex.split(example)[1:]).data == 'DATA'
    assert predict_parser().resolve(shlex.split(examples[-1])[1:]).images == ['photos/']


def test_train_then_validate(tmp_path, capsys):
    line = ['train', *TRAIN, '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path), '--experiment', 'a']
    assert main(line) == 0
    capsys.readouterr()
    checkpoint = str(tmp_path / 'a' / 'last.pth.tar')
    line = ['validate', *SAMPLE, '--model', 'test_resnet', '--num-classes', '10', '--img-size', '32']
    assert main([*line, '--checkpoint', checkpoint, '-b', '100']) == 0
    result = json.loads(capsys.readouterr().out.partition('--result\n')[2])
    assert result['model'] == 'test_resnet' and 0 <= result['top1'] <= 100


def test_stopped_run_prints_the_command_of_the_package(tmp_path):
    line = [*TRAIN, '--epochs', '50', '--output', str(tmp_path), '--experiment', 'a', '--log-interval', '1']
    command = [sys.executable, '-m', 'cluster_zoo', 'train', *line]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for shown in process.stderr:
        if shown.startswith('Train:'):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGINT, rest
    words = shlex.split(next(line for line in rest.splitlines() if '--resume' in line))
    assert words[:4] == [sys.executable, '-m', 'cluster_zoo', 'train']
    done = subprocess.run([*words, '--epochs', '1'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'a' / 'last.pth.tar').is_file()


@pytest.mark.parametrize('command', ['train', 'validate'])
def test_model_of_the_hub_offline(command, monkeypatch, capsys, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError('the network was asked')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    options = ['--output', str(tmp_path), '--val-fraction', '0.1'] if command == 'train' else []
    assert main([command, *SAMPLE, '--model', 'hf-hub:my-lab/nothing', *options]) == 2
    err = capsys.readouterr().err
    assert re.search(r'^error: my-lab/nothing .*HF_HUB_OFFLINE', err, re.MULTILINE) and 'local_files_only' not in err


@pytest.mark.parametrize('command', ['train', 'validate', 'segment train', 'segment validate', 'info'])
def test_debug_shows_the_traceback(command, capsys, monkeypatch):
    wrong = dict(info=['coc_tny'], validate=['--model', 'coc_tny']).get(command, ['/no/such/folder', '--device', 'cpu'])
    monkeypatch.delenv('CLUSTER_ZOO_DEBUG', raising=False)
    assert main([*command.split(), *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and 'Traceback' not in error
    monkeypatch.setenv('CLUSTER_ZOO_DEBUG', '0')  # so that it is restored after the test
    assert main([*command.split(), *wrong, '--debug']) == 2
    assert os.environ['CLUSTER_ZOO_DEBUG'] == '1'
    detailed = capsys.readouterr().err
    assert 'Traceback' in detailed and detailed.endswith(error)


@pytest.mark.parametrize(('line', 'hint'), [('segment trian', 'train'), ('trian', 'train'), ('segment', 'COMMAND')])
def test_mistyped_command(line, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2 and hint in capsys.readouterr().err
