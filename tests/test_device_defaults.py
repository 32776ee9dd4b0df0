"""Options that the device decides: defaults on CUDA, none of them over a flag or a config file. Without a GPU."""

import pytest
import torch
from timm.task import ClassificationTask

from cluster_zoo.errors import OptionError
from cluster_zoo.training import engine, runtime
from cluster_zoo.training.optim import build_optimizer
from cluster_zoo.training.runtime import build_precision, set_device_defaults, set_up_device
from cluster_zoo.training.train_options import check_train_options, train_parser
from cluster_zoo.training.validate import validate_parser
from segmentation.engine.train_options import train_parser as segmentation_parser
from segmentation.validate import validate_parser as segmentation_validate_parser

PARSERS = {
    'train': train_parser,
    'validate': validate_parser,
    'segmentation train': segmentation_parser,
    'segmentation validate': segmentation_validate_parser,
}
CORES = 12


@pytest.fixture
def resolve(monkeypatch):
    """Resolves a command line on a machine with 12 processors and a GPU that computes in bfloat16, or emulates it."""

    def _resolve(*flags, parser=train_parser, device='cuda', bfloat16=True, processes=None):
        monkeypatch.setattr(runtime, 'available_workers', lambda workers: min(workers, CORES))
        monkeypatch.setattr(
            torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bfloat16 or including_emulation
        )
        monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
        if processes:
            monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
        args = parser().resolve(list(map(str, (*flags, '--device', device))))
        set_device_defaults(args)
        return args

    return _resolve


@pytest.mark.parametrize('name', PARSERS)
def test_defaults_on_cuda(resolve, name):
    flags = ['data'] if 'segmentation' in name else []
    args = resolve(*flags, '--amp', parser=PARSERS[name], device='cuda:1')
    found = {option: getattr(args, option, None) for option in ('pin_mem', 'persistent_workers')}
    assert found == dict(
        pin_mem=True if name in ('train', 'validate') else None,  # segmentation has no option for it
        persistent_workers=True if name == 'train' else None,
    )
    assert (args.channels_last, args.workers, args.amp_dtype) == (True, CORES, 'bfloat16')


def test_recipe_is_weaker_than_the_device(resolve):
    assert train_parser().resolve(['--model', 'coc_tiny']).workers == 8
    assert resolve('--model', 'coc_tiny').workers == CORES


@pytest.mark.parametrize(
    ('flag', 'option', 'value'),
    [
        ('--no-pin-mem', 'pin_mem', False),
        ('--no-channels-last', 'channels_last', False),
        ('--no-persistent-workers', 'persistent_workers', False),
        ('--workers=3', 'workers', 3),
        ('--workers=99', 'workers', 99),
        ('--amp-dtype=float16', 'amp_dtype', 'float16'),
    ],
)
def test_flag_and_config_file_are_stronger(resolve, tmp_path, flag, option, value):
    assert getattr(resolve('--amp', flag), option) == value
    config = tmp_path / 'config.yaml'
    config.write_text(f'{option}: {str(value).lower()}\n')
    others = vars(resolve('--amp', '-c', config))
    assert others[option] == value
    expected = dict(pin_mem=True, channels_last=True, persistent_workers=True, workers=CORES, amp_dtype='bfloat16')
    assert {name: others[name] for name in expected} == expected | {option: value}


def test_option_that_a_saved_run_has_left_open_is_not_given(resolve, tmp_path):
    config = tmp_path / 'args.yaml'
    config.write_text('channels_last:\npin_mem:\namp_dtype:\n')
    args = resolve('--amp', '-c', config)
    assert (args.channels_last, args.pin_mem, args.amp_dtype) == (True, True, 'bfloat16')


def test_processes_of_a_machine_share_its_processors(resolve):
    assert [resolve(processes=n).workers for n in (1, 4, 5, 100)] == [12, 3, 2, 1]
    assert resolve('-j', 7, processes=4).workers == 7


def test_workers_have_an_upper_bound(resolve, monkeypatch):
    monkeypatch.setattr(f'{__name__}.CORES', 192)
    assert resolve().workers == 32
    assert resolve(processes=8).workers == 24


def test_gpu_that_only_emulates_bfloat16(resolve):
    args = resolve('--amp', bfloat16=False)
    assert args.amp_dtype is None
    args.device = 'cuda'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.utils, 'NativeScaler', lambda device: f'scaler on {device}')
        autocast, scaler = build_precision(args)
    assert (autocast.keywords['dtype'], scaler) == (torch.float16, 'scaler on cuda')


def test_no_loss_scaler_with_bfloat16(resolve):
    autocast, scaler = build_precision(resolve('--amp'))
    assert (autocast.keywords, scaler) == (dict(device_type='cuda', dtype=torch.bfloat16), None)


@pytest.mark.parametrize('device', ['cpu', 'mps'])
def test_other_devices_keep_their_defaults(resolve, device):
    for parser in (train_parser, validate_parser):
        args, before = resolve('--amp', parser=parser, device=device), parser().resolve(['--amp', '--device', device])
        assert vars(args) == vars(before) | dict(workers=min(before.workers, CORES))
        assert not args.channels_last and not args.pin_mem


def test_persistent_workers_cannot_turn_mixing_off(resolve):
    args = resolve('--mixup', 0.8, '--mixup-off-epoch', 3)
    assert args.persistent_workers is False
    check_train_options(args)
    with pytest.raises(OptionError, match='--mixup-off-epoch'):
        check_train_options(resolve('--persistent-workers', '--mixup-off-epoch', 3))


@pytest.mark.parametrize(
    ('flags', 'fused'),
    [
        (['--opt', 'sgd'], True),
        (['--opt', 'momentum'], True),
        (['--opt', 'adam'], True),
        (['--opt', 'adamw', '--opt-eps', 1e-6], True),
        (['--opt', 'lookahead_adamw'], True),
        (['--opt', 'adamw', '--opt-kwargs', 'fused=False'], False),
        (['--opt', 'adamw', '--opt-kwargs', 'foreach=True'], None),
        (['--opt', 'rmsprop'], None),  # PyTorch has no fused version of it
        (['--opt', 'lamb'], None),
    ],
)
def test_fused_optimizers(resolve, flags, fused):
    task = ClassificationTask(torch.nn.Linear(2, 2), device=torch.device('cpu'))
    for device, expected in (('cuda', fused), ('cpu', fused and None)):
        args = resolve('--model', 'test_resnet', '--lr', 0.1, *flags, device=device)
        optimizer = build_optimizer(args, task)
        assert [group.get('fused') for group in optimizer.param_groups] == [expected] * len(optimizer.param_groups)
        task(torch.ones(2, 2), torch.tensor([0, 1]))['loss'].backward()
        optimizer.step()


@pytest.mark.parametrize(('saved', 'own'), [('True', 'None'), ('None', 'True')])
def test_resumed_run_keeps_its_own_implementation(train, image_folder, tmp_path, saved, own):
    line = [image_folder, '--model', 'test_resnet', '--num-classes', 3, '--img-size', 32, '--device', 'cpu', '-j', 0]
    line += ['-b', 8, '--opt', 'adamw', '--epochs', 2, '--output', tmp_path, '--experiment', 'a', '--val-split', '']
    line = list(map(str, line))
    assert train.main([*line, '--opt-kwargs', f'fused={saved}', '--sched', 'none']) == 0
    path = tmp_path / 'a' / 'checkpoint-0.pth.tar'
    state = torch.load(path, weights_only=True)['optimizer']
    assert state['param_groups'][0]['fused'] is (True if saved == 'True' else None)
    args = train_parser().resolve([*line, '--opt-kwargs', f'fused={own}', '--resume', str(path), '--dry-run'])
    optimizer = train.start(args).optimizer
    assert {group['fused'] for group in optimizer.param_groups} == {True if own == 'True' else None}
    assert all(float(state['step']) == 5 for state in optimizer.state.values())
    for group in optimizer.param_groups:
        for parameter in group['params']:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize('device', ['cpu', 'cuda:0'])
def test_gradients_are_views_of_buckets(resolve, device):
    args = resolve(device=device)
    args.distributed, calls = True, []

    class Task:
        def prepare_distributed(self, **options):
            calls.append(options)

    run = engine.TrainingRun(
        args=args,
        model_name='',
        task=Task(),
        optimizer=None,
        scheduler=None,
        autocast=None,
        scaler=None,
        output_dir=None,
    )
    engine.launch(run, broadcast_buffers=False)
    if device == 'cpu':
        assert calls == [dict(device_ids=None, broadcast_buffers=False)]
    else:
        devices = [torch.device('cuda:0')]
        assert calls == [dict(device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)]


@pytest.fixture
def _switches():
    """Restores the switches of the device."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@pytest.mark.usefixtures('_switches')
@pytest.mark.parametrize('tf32', [False, True])
def test_tf32_is_for_training_only(monkeypatch, tf32):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not tf32
    monkeypatch.setattr(torch, 'zeros', lambda *args, **kwargs: None)  # there may be no GPU
    set_up_device(train_parser().resolve(['--device', 'cuda']), tf32)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


class _SetUp(Exception):
    """Stops a script where it sets up the device."""


@pytest.mark.parametrize('name', PARSERS)
def test_scripts_choose_tf32(monkeypatch, train, validate, image_folder, tmp_path, name):
    import segmentation.train
    import segmentation.validate

    scripts = dict(zip(PARSERS, (train, validate, segmentation.train, segmentation.validate)))
    chosen = []

    def record(args, tf32=False):
        chosen.append(tf32)
        raise _SetUp

    for module in (runtime, segmentation.train, segmentation.validate):
        monkeypatch.setattr(module, 'set_up_device', record)
    data = 'data' if 'segmentation' in name else str(image_folder)
    with pytest.raises(_SetUp):
        scripts[name].main([data, *(['--model', 'test_resnet'] if 'segmentation' not in name else [])])
    assert chosen == [name.endswith('train')]


@pytest.mark.parametrize('persistent', [False, True])
def test_persistent_workers_are_off_on_a_cpu(train, image_folder, persistent):
    line = [str(image_folder), '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32', '--device', 'cpu']
    line += ['-j', '1', '-b', '8', '--dry-run', *(['--persistent-workers'] if persistent else [])]
    run = train.start(train_parser().resolve(line))
    assert run.train_loader.persistent_workers is run.val_loader.persistent_workers is persistent
    for _ in range(2):  # epochs
        assert sum(len(images) for _, (images, _) in train.epoch_batches(run)) == 40
