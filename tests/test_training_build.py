"""The parts of a run as built from options (runtime, model, loaders, optim), and errors of wrong options."""

import warnings

import pytest
import torch
from PIL import Image
from timm.data import FastCollateMixup, Mixup, auto_augment
from timm.models import save_for_hf
from timm.task import ClassificationTask

from cluster_zoo.datasets import create_dataset
from cluster_zoo.errors import DataError, OptionError
from cluster_zoo.layers.centroid_learning import CentroidLearning
from cluster_zoo.training.loaders import build_datasets, build_loaders, build_mixup
from cluster_zoo.training.model import build_model
from cluster_zoo.training.optim import build_optimizer, build_scheduler, build_task
from cluster_zoo.training.posterize import allow_zero_bits
from cluster_zoo.training.runtime import build_precision, option_errors, set_up_runtime
from cluster_zoo.training.tasks import CentroidTaskMixin, centroid_heads
from cluster_zoo.training.train_options import check_train_options, train_parser
from cluster_zoo.training.validate import validate_parser

MODEL = ['--model', 'test_resnet', '--num-classes', '3', '--device', 'cpu']


def _args(*flags):
    args = train_parser().resolve([*MODEL, *map(str, flags)])
    args.distributed, args.world_size, args.rank = False, 1, 0
    return args


def test_option_errors_name_the_option_in_one_line():
    with pytest.raises(OptionError, match=r'^--aa: first line second line$'), option_errors('--aa'):
        raise AssertionError('first line\n  second line')
    with pytest.raises(OptionError, match=r'^--aa: AssertionError$'), option_errors('--aa'):
        raise AssertionError


@pytest.mark.parametrize('bug', [ZeroDivisionError, TypeError, KeyError, AttributeError, IndexError, NameError])
def test_bugs_are_not_errors_of_an_option(bug):
    with pytest.raises(bug), option_errors('--aa'):
        raise bug
    with pytest.raises(OptionError), option_errors('--opt-kwargs', bug):  # unless the value of the option can cause it
        raise bug


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--mixup', 1, '-b', 3], 'must be even'),
        (['--cutmix', 1, '--train-img-sizes', 32, '--train-batch-sizes', 5], 'must be even'),
        (['--aug-splits', 1], '--aug-splits'),
        (['--jsd-loss'], '--aug-splits'),
        (['--split-bn'], '--aug-splits'),
        (['--resume', 'auto'], '--experiment'),
        (['-b', 0], 'at least 1'),
        (['--grad-accum-steps', 0], 'at least 1'),
        (['--checkpoint-hist', 0], 'at least 1'),
        (['--train-crop-mode', 'pad', '--aug-splits', 2], '--train-crop-mode pad'),
        (['--train-batch-sizes', 5], '--train-img-sizes'),
    ],
)
def test_contradictions(flags, message):
    with pytest.raises(OptionError, match=message):
        check_train_options(_args(*flags))


def test_recipes_do_not_contradict_themselves():
    for model in ('coc_tiny', 'fec_small', 'dnc_resnet18', 'dnc_swin_tiny', 'resnet50'):
        check_train_options(train_parser().resolve(['--model', model]))


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--device', 'cdua'], '--device cdua'),
        (['--device-modules', 'no_such_module'], '--device-modules'),
        (['--fuser', 'none'], '--fuser'),
        (['--amp', '--model-dtype', 'bfloat16'], 'exclude'),
        (['--torchscript', '--torchcompile'], 'exclude'),
    ],
)
def test_runtime_that_is_not_there(flags, message):
    for args in (_args(*flags), validate_parser().resolve(flags)):
        with pytest.raises(OptionError, match=message):
            set_up_runtime(args)


def test_device_is_what_is_there():
    args = train_parser().resolve([])
    set_up_runtime(args)
    assert args.device == ('cuda' if torch.cuda.is_available() else 'cpu')


def test_precision():
    autocast, scaler = build_precision(_args())
    assert scaler is None
    with autocast():
        assert not torch.is_autocast_enabled('cpu')
    for flags, dtype, scaled in [
        (['--amp'], torch.bfloat16, False),
        (['--amp', '--amp-dtype', 'float16'], torch.float16, True),
    ]:
        autocast, scaler = build_precision(_args(*flags))
        with autocast():
            assert torch.get_autocast_dtype('cpu') == dtype and torch.is_autocast_enabled('cpu')
        assert (scaler is not None) == scaled


def test_model_options_reach_the_model():
    flags = ['--in-chans', 1, '--gp', 'max', '--bn-tf', '--bn-eps', 0.1, '--head-init-bias', 0.5, '--channels-last']
    model = build_model(_args(*flags))
    assert model.num_classes == 3 and model.conv1[0].in_channels == 1
    assert model.global_pool.pool_type == 'max'
    assert all((m.momentum, m.eps) == (0.01, 0.1) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert (model.fc.bias == 0.5).all()
    assert model.layer4[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_number_of_classes_is_the_models_unless_given():
    args = train_parser().resolve(['--model', 'test_resnet', '--device', 'cpu', '--model-dtype', 'bfloat16'])
    model = build_model(args)
    assert args.num_classes == model.num_classes == 1000
    assert model.fc.weight.dtype == torch.bfloat16


def test_image_size_reaches_models_of_a_fixed_size():
    args = train_parser().resolve(['--model', 'test_vit', '--img-size', '32', '--device', 'cpu'])
    assert build_model(args)(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--model', 'coc_tinny'], 'coc_tiny'),
        (['--model-kwargs', 'colour=3'], 'colour'),
        (['--initial-checkpoint', 'none.pth'], 'none.pth'),
        (['--gp', 'median'], 'median'),
    ],
)
def test_model_that_can_not_be_built(flags, message):
    with pytest.raises((OptionError, RuntimeError), match=message):
        build_model(_args(*flags))


def test_initial_checkpoint(tmp_path):
    source = build_model(_args())
    torch.save({'state_dict': {f'module.{k}': v for k, v in source.state_dict().items()}}, tmp_path / 'a.pth')
    model = build_model(_args('--initial-checkpoint', tmp_path / 'a.pth'))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize('flags', [['--opt', 'adamx'], ['--opt', 'adamw', '--opt-kwargs', 'speed=3']])
def test_optimizer_that_is_not_there(flags):
    args = _args('--lr', 1, *flags)
    with pytest.raises(OptionError, match='--opt'):
        build_optimizer(args, ClassificationTask(build_model(args), verbose=False))


@pytest.mark.parametrize(
    ('flags', 'lr'),
    [
        (['--lr', 0.5], 0.5),
        (['-b', 64, '--lr-base', 0.1], 0.1 * 64 / 256),
        (['-b', 64, '--grad-accum-steps', 2], 0.1 * 128 / 256),
        (['-b', 64, '--opt', 'adamw'], 0.1 * (64 / 256) ** 0.5),
        (['-b', 64, '--opt', 'adamw', '--lr-base-scale', 'linear'], 0.1 * 64 / 256),
        (['-b', 64, '--lr-base-scale', 'sqrt', '--lr-base-size', 16], 0.1 * 2),
    ],
)
def test_learning_rate(flags, lr):
    args = _args(*flags)
    optimizer = build_optimizer(args, ClassificationTask(build_model(args), verbose=False))
    assert args.lr == pytest.approx(lr) and optimizer.param_groups[0]['lr'] == pytest.approx(lr)


def test_weight_decay_leaves_norms_and_biases_alone():
    args = _args('--lr', 1, '--weight-decay', 0.3, '--opt', 'lookahead_adamw')
    task = ClassificationTask(build_model(args), verbose=False)
    groups = build_optimizer(args, task).param_groups
    assert sorted(group['weight_decay'] for group in groups) == [0, 0.3]
    assert all(p.ndim <= 1 for group in groups if not group['weight_decay'] for p in group['params'])


def test_schedule_with_cool_down_and_warm_up_prefix():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    flags = ['--epochs', 10, '--warmup-epochs', 3, '--cooldown-epochs', 2]
    assert build_scheduler(_args(*flags), optimizer, 5)[1] == 12
    assert build_scheduler(_args(*flags, '--warmup-prefix'), optimizer, 5)[1] == 15
    assert build_scheduler(_args('--sched', 'none', '--epochs', 4), optimizer, 5) == (None, 4)
    scheduler, epochs = build_scheduler(_args(*flags, '--sched-on-updates'), optimizer, 5)
    assert epochs == 12 and scheduler._get_lr(60) == [0]
    with pytest.raises(OptionError, match='--sched'):
        build_scheduler(_args('--sched', 'cosin'), optimizer, 5)


@pytest.mark.parametrize(
    ('flags', 'criterion'),
    [
        ([], 'LabelSmoothingCrossEntropy'),
        (['--smoothing', 0], 'CrossEntropyLoss'),
        (['--mixup', 0.2], 'SoftTargetCrossEntropy'),
        (['--bce-loss', '--bce-target-thresh', 0.2, '--bce-sum'], 'BinaryCrossEntropy'),
        (['--jsd-loss', '--aug-splits', 3], 'JsdCrossEntropy'),
    ],
)
def test_loss(flags, criterion):
    args = _args(*flags)
    task = build_task(args, build_model(args))
    assert type(task.criterion).__name__ == criterion


@pytest.mark.parametrize('flags', [[], ['--smoothing', 0], ['--mixup', 0.2], ['--bce-loss', '--smoothing', 0]])
def test_class_weights(flags, tmp_path):
    """The loss has the weights N / (K n), against a plain loop over the images."""
    counts = dict(a=6, b=2, c=1)
    for name, count in counts.items():
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new('RGB', (8, 8)).save(tmp_path / name / f'{index}.png')
    args = _args('--class-weights', 'balanced', *flags)
    dataset = create_dataset('', tmp_path, 'train')
    criterion = build_task(args, build_model(args), dataset).criterion
    weights = torch.tensor([9 / (3 * count) for count in counts.values()])
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    hot = torch.nn.functional.one_hot(target, 3) * 1.0
    if '--mixup' in flags:
        soft = torch.rand(5, 3).softmax(1)
        expected = -(weights * soft * logits.log_softmax(1)).sum(1).mean()
        assert torch.allclose(criterion(logits, soft), expected)
    elif '--bce-loss' in flags:
        losses = -(hot * logits.sigmoid().log() + (1 - hot) * (1 - logits.sigmoid()).log())
        assert torch.allclose(criterion(logits, target), (weights * losses).mean())
    else:
        smooth = hot * (1 - args.smoothing) + args.smoothing / 3
        expected = -(weights * smooth * logits.log_softmax(1)).sum() / weights[target].sum()
        assert torch.allclose(criterion(logits, target), expected)


def test_class_weights_of_several_labels(tmp_path):
    """The weight of a positive target is the number of negative ones for each positive one."""
    rows = ['file,labels', '0.png,a;b', '1.png,a', '2.png,a', '3.png,']
    for index in range(4):
        Image.new('RGB', (8, 8)).save(tmp_path / f'{index}.png')
    (tmp_path / 'labels.csv').write_text('\n'.join(rows))
    args = _args('--class-weights', 'balanced', '--multi-label', tmp_path / 'labels.csv', '--num-classes', 2)
    args.smoothing = 0.0
    dataset = create_dataset('', tmp_path, 'train', label_files=args.multi_label)
    criterion = build_task(args, build_model(args), dataset).criterion
    logits, target = torch.randn(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    p, weights = logits.sigmoid(), torch.tensor([1 / 3, 3.0])
    expected = -(weights * target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert torch.allclose(criterion(logits, target), expected)


def test_class_weights_need_labels():
    args = _args('--class-weights', 'balanced')
    with pytest.raises(DataError, match='not known without reading'):
        build_task(args, build_model(args), torch.utils.data.TensorDataset(torch.zeros(4)))


def test_pad_and_crop_moves_the_image(image_folder):
    """The crop of CIFAR moves an image by at most an eighth in each direction, with a black border."""
    args = _args('--recipe', 'dnc_cifar', '--data-dir', image_folder, '-j', 0, '-b', 4, '--hflip', 0)
    config = dict(input_size=(3, 32, 32), mean=(0, 0, 0), std=(1, 1, 1), interpolation='bicubic', crop_pct=1.0)
    datasets = build_datasets(args, config)
    loader, _ = build_loaders(args, datasets, config, None)
    image = Image.new('RGB', (32, 32), (255, 255, 255))
    moves = set()
    for _ in range(200):
        moved = loader.dataset.transform(image)
        assert moved.shape == (3, 32, 32) and set(moved.unique().tolist()) <= {0, 1}
        rows, columns = moved[0].amax(1), moved[0].amax(0)
        moves.add((int(rows.argmax() - rows.flip(0).argmax()), int(columns.argmax() - columns.flip(0).argmax())))
    assert {row for row, _ in moves} == {column for _, column in moves} == set(range(-4, 5))
    args.no_aug = True
    loader, _ = build_loaders(args, datasets, config, None)
    assert (loader.dataset.transform(image) == 1).all()


def test_mixup_is_the_collate_function_of_the_prefetcher(monkeypatch):
    args = _args('--mixup', 0.2, '--cutmix', 0.3, '--mixup-prob', 0.4, '--mixup-mode', 'pair')
    mixup = build_mixup(args)
    assert type(mixup) is Mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.mode) == (0.2, 0.3, 0.4, 'pair')
    args.device = 'cuda'
    assert type(build_mixup(args)) is FastCollateMixup
    args.no_prefetcher = True
    assert type(build_mixup(args)) is Mixup
    assert build_mixup(_args()) is None


def test_randaugment_reaches_magnitude_ten():
    """Magnitude 10 keeps 0 bits, which Pillow refuses since 13.0; the result is a black image."""
    image = Image.new('RGB', (4, 4), (250, 130, 7))
    for magnitude, expected in ((10, (0, 0, 0)), (5, (250 & 0b11000000, 130 & 0b11000000, 0))):
        operation = auto_augment.AugmentOp('PosterizeIncreasing', prob=1.0, magnitude=magnitude)
        allow_zero_bits(operation)
        assert operation(image).getpixel((0, 0)) == expected
    assert auto_augment.NAME_TO_OP['Posterize'] is auto_augment.posterize  # timm's table is unchanged


@pytest.mark.parametrize('flags', [['--aa', 'rand-m10-n8-mstd0.5-inc1'], ['--aa', 'augmix-m10', '--aug-splits', 2]])
def test_loaders_allow_magnitude_ten(image_folder, flags):
    args = _args('--data-dir', image_folder, '-j', 0, '-b', 4, *flags)
    config = dict(input_size=(3, 32, 32), mean=(0, 0, 0), std=(1, 1, 1), interpolation='bicubic', crop_pct=1.0)
    loader, _ = build_loaders(args, build_datasets(args, config), config, None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(30):
            loader.dataset[0]


def test_centroid_options_reach_the_head():
    flags = ['--sub-centroids', 2, '--centroid-momentum', 0.9, '--centroid-temperature', 0.1, '--centroid-memory', 50]
    flags += ['--centroid-every', 3, '--centroid-dtype', 'bfloat16', '--centroid-contrast', 0.005]
    head = build_model(_args('--model', 'dnc_resnet18', *flags)).get_classifier()
    assert head.prototypes.shape == (3, 2, 512)
    assert head.learning == CentroidLearning(
        momentum=0.9, temperature=0.1, memory=50, every=3, dtype=torch.bfloat16, contrast=0.005
    )
    published = build_model(_args('--model', 'dnc_resnet18', '--recipe', 'dnc_resnet')).get_classifier()
    assert (published.learning, published.common_start) == (CentroidLearning(every=1000), 0)
    ours = build_model(_args('--model', 'dnc_resnet18')).get_classifier()
    assert (ours.learning, ours.common_start) == (CentroidLearning(), 2)
    typed = build_model(_args('--model', 'dnc_resnet18', '--common-start', 1)).get_classifier()
    assert typed.common_start == 1


def test_recipe_of_centroids_for_a_linear_model():
    """A recipe may be shared with a linear model. Only an explicit option for centroids is an error."""
    assert isinstance(build_model(_args('--recipe', 'dnc_cifar')), torch.nn.Module)
    with pytest.raises(OptionError, match=r'^--centroid-every: test_resnet has no centroids'):
        build_model(_args('--recipe', 'dnc_cifar', '--centroid-every', 5))
    with pytest.raises(OptionError, match='common_start'):
        build_model(_args('--common-start', 1))


@pytest.mark.parametrize('kind', ['', 'Logit', 'Feature'])
def test_task_of_a_model_with_centroids(kind, tmp_path):
    args = _args('--model', 'dnc_resnet18')
    if kind:
        save_for_hf(build_model(_args()), tmp_path, model_config=dict(num_classes=3))
        args.kd_model_name, args.kd_distill_type = f'local-dir:{tmp_path}', kind.lower()
    task = build_task(args, build_model(args))
    name = f'NearestCentroid{kind}DistillationTask' if kind else 'NearestCentroidClassificationTask'
    assert isinstance(task, CentroidTaskMixin) and type(task).__name__ == name
    [head] = centroid_heads(task.get_trainable_module())
    groups = build_optimizer(args, task).param_groups
    assert all(p is not head.prototypes for group in groups for p in group['params'])


def test_task_of_a_linear_model_is_timms():
    assert type(build_task(_args(), build_model(_args()))) is ClassificationTask
