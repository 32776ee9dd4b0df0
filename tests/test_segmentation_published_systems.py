"""segmentation.models.published_systems: the published systems are consistent and can be created."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from cluster_zoo.errors import OptionError
from segmentation import create_segmenter, list_segmenters, segmenter_config
from segmentation.__main__ import markdown_table
from segmentation.data import classes
from segmentation.data.datasets import DATASETS
from segmentation.engine.optim import create_schedule
from segmentation.models.published_systems import CONFIGS

# Published parameters in millions, except r50_l32_ade20k: 323 M, fewer than its backbone vit_large_r50_s32_384 has
PUBLISHED_PARAMETERS = {
    'region_proxy_vit_ti16_ade20k': '5.8',
    'region_proxy_vit_s16_ade20k': '22',
    'region_proxy_r26_s32_ade20k': '36',
    'region_proxy_vit_b16_ade20k': '87',
    'region_proxy_vit_l16_ade20k': '306',
    'region_proxy_vit_ti16_cityscapes': '6',
    'region_proxy_vit_s16_cityscapes': '23',
    'region_proxy_vit_b16_cityscapes': '88',
    'region_proxy_vit_l16_cityscapes': '307',
}


def build(name, **options):
    with torch.device('meta'):
        return create_segmenter(name, **options)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_config_is_consistent(config):
    assert CONFIGS[config.name] is config
    assert config.name.endswith(config.dataset) or (config.dataset == 'ade20k' and config.head == 'semantic_fpn')
    assert config.dataset in DATASETS
    assert config.num_classes == len(getattr(classes, config.dataset.upper()).names)
    # A tag names pretrained weights of timm.
    tag = config.backbone.partition('.')[2]
    assert timm.is_model(config.backbone) and (not tag or timm.is_model_pretrained(config.backbone))
    assert config.optimizer in ('sgd', 'adamw')
    assert (config.test_mode, config.test_stride > 0) in (('whole', False), ('slide', True))
    assert config.test_pad == (config.head == 'region_proxy')
    assert config.test_stride <= config.crop <= max(config.scale) and config.scale[0] >= config.scale[1]
    assert (config.guidance_weight > 0) == (config.options.get('classifier') == 'cond')
    assert (config.auxiliary_weight > 0) == config.options.get('auxiliary', False)
    assert config.options.get('img_size', config.crop) == config.crop
    assert config.source is None or config.source.startswith('https://drive.google.com/')
    assert json.loads(json.dumps(dataclasses.asdict(config)))['name'] == config.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_schedules_run(config):
    """Checks the learning rate after warm-up and at the end."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.lr)
    schedule = create_schedule(
        config.schedule,
        optimizer,
        config.iterations,
        power=config.power,
        min_lr=config.min_lr,
        warmup=config.warmup,
        periods=config.periods,
        restart_weights=config.restart_weights,
    )

    def rate(step):
        schedule.step_update(step)
        return optimizer.param_groups[0]['lr']

    end = config.iterations
    if config.schedule == 'poly':
        assert rate(end // 4) == pytest.approx(config.min_lr + (config.lr - config.min_lr) * 0.75**config.power)
        assert rate(end - 1) == pytest.approx(config.min_lr, abs=1e-4 * config.lr)
    else:  # periods of 1/8, 1/4 and 5/8; each starts at half the learning rate of the previous one
        starts = [rate(end // 8), rate(end // 8 + end // 4)]
        assert starts == pytest.approx([config.lr / 2, config.lr / 4])
        assert rate(end // 8 - 1) < 1e-6 * config.lr and rate(end - 1) < 1e-6 * config.lr
    assert rate(0) == pytest.approx(config.lr * (1e-6 if config.warmup else 1))


@pytest.mark.parametrize('name', CONFIGS)
def test_every_system_can_be_created(name):
    config = segmenter_config(name)
    model = build(name).eval()
    assert model.num_classes == config.num_classes
    outputs = model(torch.empty(1, 3, 72, 100, device='meta'), all_outputs=True)
    assert outputs['logits'].shape == (1, config.num_classes, 72, 100)
    assert ('guidance' in outputs) == (config.guidance_weight > 0)
    assert ('auxiliary' in outputs) == (config.auxiliary_weight > 0)
    if name in PUBLISHED_PARAMETERS:
        digits = 1 if '.' in PUBLISHED_PARAMETERS[name] else 0
        assert f'{count(model) / 1e6:.{digits}f}' == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize('name', list_segmenters('semantic_fpn_*'))
def test_size_of_semantic_fpn(name):
    """Counts the parameters of the backbone, its output norms and the convolutions of Semantic FPN."""
    model, config = build(name), segmenter_config(name)
    with torch.device('meta'):
        backbone = timm.create_model(config.backbone, num_classes=0)
    widths = [stage['num_chs'] for stage in backbone.feature_info]
    expected = count(backbone) - count(backbone.norm) + sum(2 * width for width in widths)
    expected += sum(width * 256 + 256 for width in widths) + 4 * (256 * 256 * 9 + 256)
    expected += 4 * 256 * 128 * 9 + 3 * 128 * 128 * 9 + 7 * 2 * 128  # 1 + 1 + 2 + 3 convolutions with batch norms
    expected += 128 * 150 + 150
    assert count(model) == expected


def test_centers_of_dense_backbones():
    """Checks the proposals per stage."""
    for name, expected in (
        ('coc_medium_25', [5, 5, 5, 5]),
        ('coc_small_49', [7, 7, 7, 7]),
        ('fec_base', [10, 10, 5, 5]),
    ):
        model = build(f'semantic_fpn_{name}')
        stages = model.backbone.model.stages
        assert [{block.token_mixer.proposals for block in stage.blocks} for stage in stages] == [{g} for g in expected]


@pytest.mark.parametrize('name', list_segmenters('condnet_*'))
def test_parameters_of_condnet(name):
    """The guidance convolution replaces the plain classifier; the filters are additional."""
    K, C = segmenter_config(name).num_classes, 512
    filters = K * (C * (C + 1)) + K * (C + 1)
    assert count(build(name)) - count(build(name, classifier='plain')) == filters


def test_published_tests():
    """RegionProxy slides by 512 on Cityscapes and by the window on ADE20K; CondNet on ADE20K tests whole images."""
    for name in list_segmenters('region_proxy_*'):
        config = segmenter_config(name)
        assert (config.crop, config.test_stride) in (
            [(768, 512)] if config.dataset == 'cityscapes' else [(512, 512), (640, 640)]
        )
    for name in ('condnet_r50_ade20k', 'condnet_r101_ade20k', 'condnet_swin_base_ade20k'):
        assert (segmenter_config(name).test_mode, segmenter_config(name).test_stride) == ('whole', 0)


def test_files_of_condnet():
    sources = {name: segmenter_config(name).source for name in list_segmenters('condnet_*')}
    assert sources == {
        'condnet_r50_ade20k': 'https://drive.google.com/file/d/1ngWFxzHgdKyHGKRzzHpM5qixb1nZQouI',
        'condnet_r101_ade20k': 'https://drive.google.com/file/d/1LbMbEBkVuHFkKj3o1HSeTbRO4GzlA_ym',
        'condnet_r101_pascal_context_59': 'https://drive.google.com/file/d/1LjtqG_dcwseCJDx17ENj4o4EUlovk8EX',
        'condnet_swin_base_ade20k': None,
    }


def test_resnets_of_condnet():
    """Checks output stride 8 and the deep stem."""
    for name in ('condnet_r50_ade20k', 'condnet_r101_pascal_context_59'):
        backbone = build(name).backbone
        assert backbone.strides == [4, 8, 8, 8]
        assert len([layer for layer in backbone.model.conv1 if isinstance(layer, torch.nn.Conv2d)]) == 3


def test_arguments_override_the_config():
    model = create_segmenter('region_proxy_vit_ti16_cityscapes', num_classes=7, early=0, img_size=64).eval()
    assert model.backbone.early == 0
    assert model(torch.randn(1, 3, 48, 80)).shape == (1, 7, 48, 80)
    assert segmenter_config('region_proxy_vit_ti16_cityscapes').options['early'] == 2


def test_names():
    assert set(list_segmenters()) == set(CONFIGS)
    assert list_segmenters('*coc_small*') == [f'semantic_fpn_coc_small_{centers}' for centers in (4, 25, 49)]
    assert list_segmenters('coc_small') == list_segmenters('*coc_small*')
    assert len(list_segmenters('coc')) == 6 and list_segmenters('coc*') == []
    assert list_segmenters('nothing') == []
    with pytest.raises(OptionError, match=r"'condnet_r50_ade' \(did you mean condnet_r50_ade20k"):
        segmenter_config('condnet_r50_ade')


def test_command_prints_table():
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, '-m', 'segmentation', 'condnet_r50*'], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stderr == '', run.stderr
    row = run.stdout.splitlines()[-1].split(' | ')
    assert row[:4] == ['| `condnet_r50_ade20k`', 'deeplabv3plus', '`resnet50c`', 'ade20k']
    # Without auxiliary head
    assert row[4] == f'{count(build("condnet_r50_ade20k", auxiliary=False)) / 1e6:.2f}'
    assert row[5] == '43.68'


def test_filter_without_match():
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, '-m', 'segmentation', 'cocs'], cwd=root, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ''
    assert "'cocs'" in run.stderr


def test_table_has_empty_cells_for_missing_results():
    head, rule, row = markdown_table('condnet_swin_base_ade20k').splitlines()
    assert head.count('|') == rule.count('|') == row.count('|')
    assert row.endswith(' |  |  |')
