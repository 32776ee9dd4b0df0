"""cluster-zoo fetch, import and push: ways into the store and out of it, with servers on this machine for a network."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from drive_server import DriveServer
from hub_server import GUEST, OWNER, HubServer
from parity_cases import recipe, save_published
from PIL import Image

from cluster_zoo import cli, importing, store

ROOT = Path(__file__).parents[1]
NAME, FOLDER = 'coc_tiny.in1k', '155Lfofxr7vpdcUxL8ZvzlrNX4cUlhn3J'  # as the authors' page has it
URL = f'https://drive.google.com/drive/folders/{FOLDER}'
SMALL = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4)
ARGUMENTS = ['--model-kwargs', *(f'{key}={value}' for key, value in SMALL.items())]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty store, and a user with nothing."""
    for name, folder in dict(CLUSTER_ZOO_HOME='store', HF_HOME='hf', TORCH_HOME='torch', HOME='').items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    for name in ('CLUSTER_ZOO_HUB', 'CLUSTER_ZOO_AUTHORS', 'HF_TOKEN'):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --- fetch: the authors' publication ----------------------------------------------------------------------------------


@pytest.fixture
def drive(home, monkeypatch):
    with DriveServer(home) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.add_folder(FOLDER, 'coc_tiny')
        yield server


@pytest.fixture
def content(drive, monkeypatch) -> bytes:
    """Stands for a checkpoint where only its way here is tested: importing puts it into the store as it is."""

    def put(path, name, replace, source, root):
        with store.new_folder(name, root, replace) as folder:
            (folder / store.WEIGHTS).write_bytes(path.read_bytes())
            cfg = dict(architecture='coc_tiny', pretrained_cfg={}, sha256=store.sha256(folder / store.WEIGHTS))
            (folder / store.CONFIG).write_text(json.dumps(cfg | dict(source=source)))

    monkeypatch.setattr(importing, 'import_checkpoint', put)
    drive.add_file('F' * 33, 'model_best.pth.tar', random.Random(0).randbytes(1 << 20), FOLDER)
    return drive.files['F' * 33][1]


@pytest.fixture
def terminal(monkeypatch):
    """A real terminal as standard input, and what is typed there."""
    if not hasattr(os, 'openpty'):
        pytest.skip('no terminals here')
    master, slave = os.openpty()
    with os.fdopen(slave) as stdin, os.fdopen(master, 'wb', buffering=0) as typed:
        monkeypatch.setattr(sys, 'stdin', stdin)
        yield typed


def test_fetch_a_published_checkpoint(drive, home, capsys):
    """With the real conversion; the second time the store has it, and nobody is asked."""
    path = save_published('coc_tiny', home / 'model_best.pth.tar')
    drive.add_file('F' * 33, 'model_best.pth.tar', path.read_bytes(), FOLDER)
    assert cli.main(['fetch', 'coc_tiny', '--yes', '--json']) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == '' and found['name'] == NAME and found['found'] == "from the authors' publication"
    assert found['sha256'] == sha256(found['weights']) and Path(found['weights']).parent == home / 'store' / NAME
    model = timm.create_model('coc_tiny', pretrained=True)
    assert torch.equal(model.head.fc.weight, recipe.state_dict('coc_tiny')['head.weight'].float())

    asked = len(drive.requests)
    assert cli.main(['fetch', 'coc_tiny']) == 0
    out, err = capsys.readouterr()
    assert 'in the store already' in out and found['sha256'] in out and len(drive.requests) == asked
    assert f"timm.create_model('{NAME}', pretrained=True)" in out


@pytest.mark.parametrize(('answer', 'agreed'), [('y', True), ('Yes', True), ('n', False), ('', False), ('x', False)])
def test_the_question(answer, agreed, content, terminal, drive, capsys):
    terminal.write(f'{answer}\n'.encode())
    assert cli.main(['fetch', NAME]) == (0 if agreed else 2)
    out, err = capsys.readouterr()
    question = f'Downloading the weights of {NAME} from {URL}? [y/N] '
    if agreed:
        assert err == question and (store.folder(NAME) / store.WEIGHTS).read_bytes() == content
    else:
        assert out == '' and err == question + 'error: Nothing was downloaded.\n' and drive.requests == []


def test_nobody_to_ask(content, drive, monkeypatch, capsys):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, 'stdin', nothing)
        assert cli.main(['fetch', NAME]) == 2
    out, err = capsys.readouterr()
    assert out == '' and URL in err and '--yes' in err and len(err.splitlines()) == 1 and drive.requests == []


def test_leave_that_was_given_before(content, monkeypatch, capsys):
    monkeypatch.setenv('CLUSTER_ZOO_AUTHORS', '1')
    assert cli.main(['fetch', NAME]) == 0
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
    ('watched', 'quiet', 'shown'), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_progress_where_somebody_watches(watched, quiet, shown, content, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: watched)
    assert cli.main(['fetch', NAME, '--yes', *['--quiet'] * quiet]) == 0
    out, err = capfd.readouterr()
    assert bool(re.search(r'100%\|', err)) == shown and '%|' not in out
    assert shown or err == ''


def test_a_damaged_entry_is_fetched_again(content, drive, capsys):
    assert cli.main(['fetch', NAME, '--yes']) == 0
    weights = store.folder(NAME) / store.WEIGHTS
    weights.write_bytes(content[:-1])
    capsys.readouterr()
    assert cli.main(['fetch', NAME, '--yes']) == 0
    err = capsys.readouterr().err
    assert err.startswith('note: ') and 'damaged' in err and weights.read_bytes() == content


def test_a_file_of_the_folder_by_its_name(content, drive, capsys):
    drive.add_file('L' * 33, 'last.pth.tar', content[::-1], FOLDER)
    assert cli.main(['fetch', NAME, '--yes', '--file', 'first.pth.tar']) == 2
    err = capsys.readouterr().err
    assert 'first.pth.tar' in err and 'last.pth.tar' in err and len(err.splitlines()) == 1
    assert cli.main(['fetch', NAME, '--yes', '--file', 'last.pth.tar']) == 0
    assert (store.folder(NAME) / store.WEIGHTS).read_bytes() == content[::-1]


def test_force_accepts_a_file_that_the_authors_have_changed(content, drive, capsys):
    assert cli.main(['fetch', NAME, '--yes']) == 0
    drive.add_file('F' * 33, 'model_best.pth.tar', content[::-1], FOLDER)
    assert cli.main(['fetch', NAME, '--yes']) == 0  # the store has it
    assert (store.folder(NAME) / store.WEIGHTS).read_bytes() == content
    assert cli.main(['fetch', NAME, '--yes', '--force']) == 0
    assert (store.folder(NAME) / store.WEIGHTS).read_bytes() == content[::-1]


def test_the_server_is_down(drive, monkeypatch, capsys):
    drive.fail(FOLDER, status=404, times=None)
    assert cli.main(['fetch', NAME, '--yes']) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('error: ') and 'drive.google.com' in err and 'Traceback' not in err


def test_nothing_to_fetch(capsys):
    assert cli.main(['fetch', 'coc_tiny_plain.cifar10', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['found'] == 'part of the package' and found['sha256'] == sha256(found['weights'])
    assert cli.main(['fetch', 'dnc_resnet50']) == 2
    out, err = capsys.readouterr()
    assert out == '' and 'no publication of dnc_resnet50.untrained' in err and 'cluster-zoo import FILE' in err


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """As timm's script saves it: two sets of weights, three classes."""
    torch.manual_seed(0)
    first, second = (timm.create_model('coc_tiny', num_classes=3, **SMALL).state_dict() for _ in range(2))
    path = tmp_path_factory.mktemp('checkpoint') / 'last.pth.tar'
    torch.save(dict(epoch=1, arch='coc_tiny', state_dict=first, state_dict_ema=second), path)
    return path


@pytest.mark.parametrize(('options', 'key'), [([], 'state_dict_ema'), (['--no-ema'], 'state_dict')])
def test_import(options, key, checkpoint, home, capsys):
    labels = home / 'labels.txt'
    labels.write_text('robin\nwren\ngreat tit\n', encoding='utf-8')
    options += ['--num-classes', '3', '--label-names', str(labels), '--img-size', '64', *ARGUMENTS]
    assert cli.main(['import', str(checkpoint), '--as', 'coc_tiny.birds', '--json', *options]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == '' and found['classes'] == 3 and found['input_size'] == [3, 64, 64]
    assert Path(found['folder']) == home / 'store' / 'coc_tiny.birds'
    assert found['sha256'] == sha256(Path(found['folder']) / 'model.safetensors')
    expected = torch.load(checkpoint, weights_only=True)[key]
    assert found['parameters'] == sum(value.numel() for value in expected.values())
    model = timm.create_model(f'local-dir:{found["folder"]}', pretrained=True)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_the_whole_way_of_an_own_model(checkpoint, home):
    """Import, and then in another process, which finds the tag by its name: list, info, predict, fetch."""
    archive = home / 'drive-download.zip'
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as packed:
        packed.write(checkpoint, 'birds/last.pth.tar')
        packed.writestr('birds/readme.txt', 'a model')
    arguments = ['--as', 'coc_tiny.birds', '--num-classes', '3', '--img-size', '64', *ARGUMENTS]
    assert cli.main(['import', str(archive), *arguments]) == 0
    picture = home / 'picture.png'
    Image.new('RGB', (90, 70), 'green').save(picture)
    listed, info, predicted, fetched = in_a_new_process(
        ['list', 'birds', '--json'],
        ['info', 'coc_tiny.birds', '--json'],
        ['predict', str(picture), '--model', 'coc_tiny.birds', '--json'],
        ['fetch', 'coc_tiny.birds', '--json'],
    )
    [row] = listed
    assert row['name'] == 'coc_tiny.birds' and row['weights'] == 'store' and row['published_top1'] is None
    assert row['parameters'] == info['parameters'] and info['num_classes'] == 3
    assert info['weights']['sha256'] == sha256(home / 'store/coc_tiny.birds/model.safetensors') == fetched['sha256']
    assert info['weights']['made_from']['file'] == 'drive-download.zip' and fetched['found'] == 'in the store already'
    model = timm.create_model(f'local-dir:{home}/store/coc_tiny.birds', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode(), Image.open(picture) as image:
        expected = model(transform(image).unsqueeze(0)).softmax(-1)[0]
    [classified] = predicted['images']
    for one in classified['classes']:
        assert one['label'] is None and one['probability'] == pytest.approx(float(expected[one['index']]), abs=1e-5)


def test_import_says_how_to_use_it(checkpoint, capsys):
    arguments = ['import', str(checkpoint), '--as', 'coc_tiny.birds', '--num-classes', '3', *ARGUMENTS]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    lines = dict(re.findall(r'^  (\S+(?: \S+)*) {2,}(.*)$', out, re.MULTILINE))
    assert lines['classes'] == '3, without names' and lines['image size'] == '3 x 224 x 224'
    assert re.fullmatch(r'\d\.\d\d M', lines['parameters']) and re.fullmatch('[0-9a-f]{64}', lines['SHA-256'])
    assert 'made with   head_dim=4\n' in out
    assert "timm.create_model('coc_tiny.birds', pretrained=True)" in out
    assert cli.main(arguments) == 2
    assert '--force' in capsys.readouterr().err
    assert cli.main([*arguments, '--force']) == 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--as', 'coc_tny.birds'], r"argument --as: .* 'coc_tny' \(did you mean coc_tiny"),
        (['--as', 'resnet18.birds'], "no model 'resnet18'"),
        ([], '--as'),
        (['--as', 'coc_tiny.birds', '--model-kwargs', 'depths'], "'depths' is not of the form name=value"),
        (['--as', 'coc_tiny.birds', '--label-names', 'nowhere.txt'], r'nowhere\.txt can not be read'),
        (['--as', 'coc_tiny.birds', '--num-classes', '-3'], 'not a whole number'),
        (['--as', 'coc_tiny.birds', '--label-names', 'gaps.txt'], r'gaps\.txt has no name on line 2'),
    ],
)
def test_wrong_use_of_import(options, message, checkpoint, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    (home / 'gaps.txt').write_text('robin\n \nwren\n')
    with pytest.raises(SystemExit) as status:
        cli.main(['import', str(checkpoint), *options])
    out, err = capsys.readouterr()
    assert status.value.code == 2 and out == '' and re.search(f'^error: .*{message}', err)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['coc_tiny'], "'coc_tiny' is no name for weights"),
        (['coc_tiny.../birds'], 'is no name for weights'),
        (['coc_tiny_plain.cifar10'], 'part of the package'),
        (['coc_tiny.birds'], 'does not fit'),
        (['coc_tiny.birds', '--num-classes', '5', *ARGUMENTS], 'does not fit'),
        (['coc_tiny.birds', '--model-kwargs', 'no_such_argument=1'], 'no_such_argument'),
    ],
)
def test_what_can_not_be_imported(options, message, checkpoint, home, capsys):
    assert cli.main(['import', str(checkpoint), '--as', *options]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('error: ') and message in err
    assert store.entries() == {}


def test_files_that_are_no_checkpoints(home, capsys):
    (home / 'notes.txt').write_text('hello')
    for file in ('notes.txt', 'missing.pth', '.'):
        assert cli.main(['import', str(home / file), '--as', 'coc_tiny.birds']) == 2
        out, err = capsys.readouterr()
        assert out == '' and re.fullmatch(r'error: .*\n', err)


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        for name, value in dict(HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET='1', NO_PROXY='*').items():
            monkeypatch.setenv(name, value)
        yield server


def in_a_new_process(*commands, status: int = 0):
    """Runs commands one after the other as a user would, and gives what they print, from JSON."""
    code = (
        'import json, sys\n'
        'from cluster_zoo.cli import main\n'
        'for arguments in json.loads(sys.argv[1]):\n'
        '    status = main(arguments)\n'
        '    print("\\0", status, flush=True)\n'
    )
    run = subprocess.run(
        [sys.executable, '-c', code, json.dumps(commands)],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    printed = run.stdout.split('\0')
    statuses = [part.splitlines()[0].strip() for part in printed[1:]]
    assert run.returncode == 0 and statuses == [str(status)] * len(commands), run.stderr
    if status:
        return run.stderr
    return [json.loads(part.partition('\n')[2] if index else part) for index, part in enumerate(printed[:-1])]


def test_push_and_load_back(hub, home, monkeypatch):
    """The package's own tag to the Hub, and from there by both of its names."""
    monkeypatch.setenv('HF_TOKEN', OWNER)
    monkeypatch.setenv('CLUSTER_ZOO_HUB', 'my-lab')
    name, picture = 'coc_tiny_plain.cifar10', home / 'picture.png'
    Image.new('RGB', (64, 64), 'green').save(picture)
    pushed, again, loaded, bundled, fetched = in_a_new_process(
        ['push', name, '--to', f'my-lab/{name}', '--private', '--message', 'A first model', '--json'],
        ['push', name, '--to', 'my-lab/coc_tiny_plain.in1k', '--json'],  # stands for another tag's weights
        ['predict', str(picture), '--model', f'hf-hub:my-lab/{name}', '--json'],
        ['predict', str(picture), '--json'],
        ['fetch', 'coc_tiny_plain.in1k', '--json'],
    )
    assert pushed['name'] == f'hf-hub:my-lab/{name}' and pushed['url'].startswith(hub.url)
    repository = hub.repositories[f'my-lab/{name}']
    files = repository.commits[repository.head]
    assert repository.private and {'model.safetensors', 'config.json', 'README.md'} <= set(files)
    assert hashlib.sha256(files['model.safetensors']).hexdigest() == pushed['sha256'] == again['sha256']
    assert json.loads(files['config.json'])['label_names'][0] == 'airplane'
    assert f'hf-hub:my-lab/{name}' in files['README.md'].decode()
    assert loaded['images'] == bundled['images']
    assert fetched['found'] == 'from my-lab on Hugging Face' and fetched['sha256'] == again['sha256']
    assert Path(fetched['weights']).is_relative_to(home / 'hf') and sha256(fetched['weights']) == again['sha256']


def test_what_the_hub_does_not_have_and_does_not_take(hub, monkeypatch):
    """A note, and then the next source; or one error."""
    monkeypatch.setenv('CLUSTER_ZOO_HUB', 'my-lab')
    monkeypatch.setenv('HF_TOKEN', GUEST)
    said = in_a_new_process(
        ['fetch', NAME],
        ['fetch', 'dnc_resnet50'],
        ['push', 'coc_tiny_plain.cifar10', '--to', 'my-lab/x'],
        ['push', NAME, '--to', 'my-lab/x'],
        status=2,
    )
    note, question, missing, refused, absent = said.strip().splitlines()
    assert note.startswith('note: ') and f'my-lab/{NAME}' in note
    assert question.startswith('error: ') and '--yes' in question
    assert missing.startswith('error: ') and 'my-lab/dnc_resnet50' in missing
    assert refused.startswith('error: ') and 'my-lab/x' in refused
    assert absent.startswith('error: ') and f'cluster-zoo fetch {NAME}' in absent


@pytest.mark.parametrize('repository', ['my-lab', 'a/b/c', '/x', 'https://huggingface.co/my-lab/x'])
def test_where_nothing_can_be_pushed(repository, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(['push', 'coc_tiny_plain.cifar10', '--to', repository])
    assert status.value.code == 2 and 'not of the form organisation/name' in capsys.readouterr().err


@pytest.mark.parametrize('repository', ['my-lab/x y', 'my-lab/x..y', '-lab/x', 'my-lab/' + 'x' * 100])
def test_names_that_the_hub_does_not_have(repository, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(['push', 'coc_tiny_plain.cifar10', f'--to={repository}'])
    assert status.value.code == 2 and re.match('error: argument --to: .*\n', capsys.readouterr().err)
