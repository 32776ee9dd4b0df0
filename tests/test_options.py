"""cluster_zoo.training.shared_options and train_options: flags, defaults, recipes, config files, errors."""

import ast
import csv
from pathlib import Path

import pytest
import yaml

from cluster_zoo.errors import OptionError, nearest
from cluster_zoo.training.engine import run_options
from cluster_zoo.training.runtime import available_workers
from cluster_zoo.training.train_options import train_parser
from cluster_zoo.training.validate import validate_parser

with (Path(__file__).parent / 'script_flags.tsv').open() as table:
    FLAGS = [
        {column: value.strip("'") for column, value in row.items()} for row in csv.DictReader(table, delimiter='\t')
    ]
# Defaults that differ on purpose: the available device and what is best for it, the format of the file's name, the
# model of the checkpoint (in validate.py), warm-up of the average in short runs
DEVICE_DEFAULTS = {'--device', '--amp-dtype', '--channels-last', '--pin-mem'}
OTHER_DEFAULTS = {*DEVICE_DEFAULTS, '--results-format', '-m', '--model-ema-warmup'}


def _default(row):
    """Value of the table's default column: a literal, a string without quotes, or None."""
    if row['action'] == 'store_true':
        return False
    try:
        return eval(row['default'] or 'None', {'__builtins__': {}})
    except (NameError, SyntaxError):
        return row['default']


@pytest.mark.parametrize('row', FLAGS, ids=lambda row: f'{row["script"]} {row["flag"]}')
def test_every_flag_of_timm_and_the_papers(row):
    parser = train_parser() if 'train.py' in row['script'] else validate_parser()
    known = {option: action for action in parser._actions for option in action.option_strings or [action.dest]}
    for option in row['flag'].split():
        action = known[option]
        if row['action'] == 'store_true':
            assert action.nargs == 0
        else:
            assert str(action.nargs or '') == row['nargs']
        if row['script'].startswith('timm') and not OTHER_DEFAULTS & {*row['flag'].split()}:
            assert (None if action.default == '' else action.default) == _default(row)
        if row['choices']:
            assert set(action.choices) >= set(ast.literal_eval(row['choices']))


def test_recipe_coc_has_the_defaults_of_the_papers_script():
    args = train_parser().resolve(['--model', 'coc_tiny'])
    rows = [row for row in FLAGS if row['script'].startswith('papers train.py') and row['type'] not in ('', 'None')]
    assert len(rows) == 15
    for row in rows:
        dest = row['flag'].split()[-1].lstrip('-').replace('-', '_')
        expected = row['default'] if dest == 'git_id' else _default(row)
        assert getattr(args, dest) == expected, dest


def test_published_command_line():
    line = '--data_dir /dev/shm/imagenet --model coc_small -b 128 --lr 1e-3 --drop-path 0.1 --amp --local-rank=3'
    args = train_parser().resolve(line.split())
    assert (args.data_dir, args.recipe, args.batch_size, args.lr) == ('/dev/shm/imagenet', 'coc', 128, 1e-3)
    assert (args.drop_path, args.amp, args.local_rank) == (0.1, True, 3)
    args = validate_parser().resolve(
        ['/path/to/imagenet', '--model', 'coc_small', '-b', '128', '--checkpoint', 'x.pth']
    )
    assert (args.data, args.batch_size, args.checkpoint) == ('/path/to/imagenet', 128, 'x.pth')


@pytest.mark.parametrize('flag', ['--amp', '--native-amp', '--apex-amp'])
def test_spellings_of_amp(flag):
    assert train_parser().resolve([flag]).amp
    assert validate_parser().resolve([flag]).amp


def test_recipe_is_weaker_than_config_is_weaker_than_flags(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('model: coc_tiny\nepochs: 10\nmixup: 0.5\nwarmup-epochs: 2\n')
    args = train_parser().resolve(['-c', str(config), '--epochs', '20'])
    assert (args.recipe, args.opt, args.mixup, args.epochs, args.warmup_epochs) == ('coc', 'adamw', 0.5, 20, 2)
    assert args.given == ['config', 'epochs']


def test_explicit_flag_equal_to_timms_default_wins_over_the_recipe():
    args = train_parser().resolve(['--model', 'coc_tiny', '--opt', 'sgd', '--epochs', '300', '--mixup', '0'])
    assert (args.opt, args.epochs, args.mixup, args.cutmix) == ('sgd', 300, 0.0, 1.0)


def test_named_recipe_wins_over_the_models():
    assert train_parser().resolve(['--model', 'coc_tiny', '--recipe', 'timm']).opt == 'sgd'
    assert train_parser().resolve(['--model', 'resnet18', '--recipe', 'fec']).opt == 'adamw'


def test_scaled_learning_rate_replaces_the_recipes_fixed_one():
    assert train_parser().resolve(['--model', 'coc_tiny', '--lr-base', '0.01']).lr is None
    assert train_parser().resolve(['--model', 'coc_tiny', '--lr-base', '0.01', '--lr', '0.5']).lr == 0.5


def test_saved_options_are_a_config(tmp_path):
    first = train_parser().resolve(['--model', 'fec_small', '--scale', '0.5', '1', '--opt-kwargs', 'a=1', '--amp'])
    saved = {k: v for k, v in vars(first).items() if k not in ('given', 'sources', 'resolved')}
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(saved))
    second = train_parser().resolve(['-c', str(tmp_path / 'args.yaml')])
    assert run_options(second) | {'config': ''} == run_options(first)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('modle: coc_tiny', '(did you mean model'),
        ('epochs: many', "'many'"),
        ('epochs: true', 'True'),
        ('amp: 1', "'amp'"),
        ('scale: 0.5', "'scale'"),
        ('input_size: [3, 32]', "'input_size'"),
        ('remode: stripes', "'stripes'"),
        ('model_kwargs: 3', "'model_kwargs'"),
        ('- a\n- b', 'expected a mapping'),
        ('a: [', 'config.yaml'),
        ('a: !!python/object/apply:os.getcwd []', 'config.yaml'),
    ],
)
def test_bad_config(tmp_path, text, message):
    path = tmp_path / 'config.yaml'
    path.write_text(text)
    with pytest.raises(OptionError) as error:
        train_parser().resolve(['--config', str(path)])
    assert message in str(error.value)


def test_config_values_take_the_options_types(tmp_path):
    # YAML 1.1 reads 1e-3 as a string, and users write integers for floats.
    (tmp_path / 'c.yaml').write_text('lr: 1e-3\nmixup: 1\nscale: [1, 1]\nmodel_kwargs: {proposals: 4}\nresume:\n')
    args = train_parser().resolve(['-c', str(tmp_path / 'c.yaml')])
    assert (args.lr, args.mixup, args.scale, args.model_kwargs) == (1e-3, 1.0, [1.0, 1.0], {'proposals': 4})
    assert isinstance(args.mixup, float)


def test_missing_config():
    with pytest.raises(OptionError, match=r'none\.yaml'):
        train_parser().resolve(['--config', 'none.yaml'])


@pytest.mark.parametrize('parser', [train_parser, validate_parser])
def test_mistyped_option(parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().resolve(['--bach-size', '3', '--log-wandb'])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith('error: ') and 'did you mean --batch-size' in message


@pytest.mark.parametrize('parser', [train_parser, validate_parser])
def test_help_names_what_is_left_out(parser):
    assert '--naflex' in parser().format_help()


def test_workers_are_bounded_by_the_machine():
    assert available_workers(0) == 0
    assert available_workers(1) == 1
    assert 1 <= available_workers(10**6) < 10**6


def test_nearest():
    assert nearest('epoch', ['epochs', 'lr']) == ' (did you mean epochs?)'
    assert nearest('zzz', ['epochs', 'lr']) == ''


def test_centroid_options_are_left_to_the_model_unless_given():
    args = train_parser().resolve(['--model', 'dnc_coc_tiny'])
    names = [name for name in vars(args) if name.startswith('centroid_')]
    assert len(names) == 6 and all(getattr(args, name) is None for name in [*names, 'sub_centroids'])
    args = train_parser().resolve(['--model', 'dnc_resnet50', '--centroid-every', '7'])
    assert (args.centroid_every, args.centroid_memory, args.common_start) == (7, None, None)
    assert args.given == ['centroid_every', 'model']


def test_centroid_dtype_is_one_of_three(capsys):
    with pytest.raises(SystemExit):
        train_parser().resolve(['--centroid-dtype', 'int8'])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


@pytest.mark.parametrize('word', ['a', '=3', ''])
def test_keyword_options_are_names_with_values(word, capsys):
    assert validate_parser().resolve(['--model-kwargs', 'proposals=3', 'global_pool=max']).model_kwargs == dict(
        proposals=3, global_pool='max'
    )
    with pytest.raises(SystemExit):
        validate_parser().resolve(['--model-kwargs', word])
    assert f"--model-kwargs: '{word}'" in capsys.readouterr().err
