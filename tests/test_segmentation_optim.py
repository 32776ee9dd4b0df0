"""Learning rates per iteration, compared with formulas, and parameter groups."""

import math
import re

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from segmentation import create_segmenter, segmenter_config
from segmentation.engine.optim import SCHEDULES, create_schedule, parameter_groups

LR = 0.02


def rates(name: str, iterations: int, scale: float = 1.0, **options) -> list[float]:
    """Returns the learning rate of each iteration of a training loop."""
    group = dict(params=[torch.nn.Parameter(torch.zeros(1))], lr_scale=scale)
    optimizer = create_optimizer_v2([group], 'adamw', lr=LR)
    schedule = create_schedule(name, optimizer, iterations, **options)
    found = []
    for iteration in range(iterations):
        found.append(optimizer.param_groups[0]['lr'])
        schedule.step_update(iteration + 1)
    return found


# ---- Schedules ----


@pytest.mark.parametrize('power', [0.9, 1.0, 2.0])
@pytest.mark.parametrize('min_lr', [0.0, 1e-4])
def test_poly(power, min_lr):
    expected = [(LR - min_lr) * (1 - n / 50) ** power + min_lr for n in range(50)]
    assert rates('poly', 50, power=power, min_lr=min_lr) == pytest.approx(expected, rel=1e-12)


def test_poly_equals_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=0.9)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    assert rates('poly', 50, power=0.9) == pytest.approx(expected, rel=1e-9)


def test_cosine():
    expected = [1e-4 + (LR - 1e-4) * (1 + math.cos(math.pi * n / 40)) / 2 for n in range(40)]
    assert rates('cosine', 40, min_lr=1e-4) == pytest.approx(expected, rel=1e-12)


def test_cosine_restarts():
    """The periods of RegionProxy, divided by 1000."""
    periods, weights = (20, 40, 100), (1, 0.5, 0.25)
    expected = []
    for period, weight in zip(periods, weights):
        expected += [1e-4 + weight * (LR - 1e-4) * (1 + math.cos(math.pi * n / period)) / 2 for n in range(period)]
    found = rates('cosine_restarts', 160, min_lr=1e-4, periods=periods, restart_weights=weights)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[20] == pytest.approx(1e-4 + 0.5 * (LR - 1e-4))
    assert rates('cosine_restarts', 30) == pytest.approx(rates('cosine', 30), rel=1e-12)


@pytest.mark.parametrize('name', SCHEDULES)
def test_warmup(name):
    found, plain = rates(name, 50, warmup=10, warmup_ratio=1e-6), rates(name, 50)
    assert found[:10] == pytest.approx([plain[n] * (1e-6 + (1 - 1e-6) * n / 10) for n in range(10)], rel=1e-9)
    assert found[10:] == plain[10:]


@pytest.mark.parametrize('name', SCHEDULES)
def test_scaled_groups(name):
    options = dict(min_lr=1e-3, warmup=5)
    # The group's own rate falls to the same floor
    expected = [10 * lr for lr in rates(name, 20, min_lr=1e-4, warmup=5)]
    assert rates(name, 20, scale=10.0, **options) == pytest.approx(expected)


def test_floor_is_absolute():
    """The last iterations of CondNet's head on Pascal Context: a rate of 1e-2 that falls to 1e-4, not to 1e-3."""
    group = dict(params=[torch.nn.Parameter(torch.zeros(1))], lr_scale=10.0)
    schedule = create_schedule('poly', create_optimizer_v2([group], 'sgd', lr=1e-3), 80_000, power=0.9, min_lr=1e-4)
    for step, expected in ((0, 1e-2), (40_000, 9.9e-3 * 0.5**0.9 + 1e-4), (80_000, 1e-4)):
        schedule.step_update(step)
        assert schedule.optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-12)
    assert schedule.rate(80_000, 1e-3) == 1e-4


@pytest.mark.parametrize('name', SCHEDULES)
def test_resumed_schedule(name):
    optimizer = create_optimizer_v2([torch.nn.Parameter(torch.zeros(1))], 'sgd', lr=LR)
    create_schedule(name, optimizer, 30, warmup=4).step_update(17)
    assert optimizer.param_groups[0]['lr'] == rates(name, 30, warmup=4)[17]


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('poli', {}, 'poli'),
        ('poly', dict(warmup=20), 'Warm-up of 20'),
        ('cosine_restarts', dict(periods=[5, 10]), '5, 10.*--periods.*--iterations 20'),
        ('cosine_restarts', dict(periods=[5, 15], restart_weights=[1]), 'one weight'),
        ('cosine_restarts', dict(periods=[0, 20]), '0, 20'),
    ],
)
def test_invalid_schedules(name, options, message):
    with pytest.raises(ValueError, match=message):
        rates(name, 20, **options)


# ---- Parameter groups ----


@pytest.fixture(scope='module')
def model():
    return create_segmenter('region_proxy', 'vit_tiny_patch16_224', 3, early=0, depth=3, img_size=32)


def settings(model, groups) -> dict[str, tuple[float, float]]:
    """Returns learning-rate scale and weight decay of each parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], (group['lr_scale'], group['weight_decay'])) for group in groups for p in group['params']]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


def test_one_group_by_default(model):
    [group] = parameter_groups(model, 0.01)
    assert (group['lr_scale'], group['weight_decay']) == (1.0, 0.01)
    assert len(group['params']) == len(list(model.parameters()))


def test_head_scale_and_no_decay_of_norms(model):
    found = settings(model, parameter_groups(model, 0.01, norm_decay='none', head_lr_scale=10.0))
    for name, (scale, decay) in found.items():
        assert scale == (1.0 if name.startswith('backbone.') else 10.0), name
        kept = name.endswith('.bias') or any(part in name for part in ('norm', 'pos_embed', 'cls_token', '.bn'))
        assert decay == (0.0 if kept else 0.01), name
    assert {decay for _, decay in found.values()} == {0.0, 0.01}


# Kinds of parameters that do not decay in the authors' training; mmcv's key 'norm' does not match the 'bn' of a decoder
UNDECAYED = {
    'region_proxy_vit_ti16_ade20k': r'backbone\..*(norm\d?\.(weight|bias)|pos_embed|cls_token)',
    'region_proxy_vit_b16_ade20k': r'backbone\..*(norm\d?\.(weight|bias)|pos_embed|cls_token|dist_token)',
    'region_proxy_r26_s32_ade20k': r'backbone\..*(norm\d?\.(weight|bias)|pos_embed|cls_token)',
    'condnet_swin_base_ade20k': r'backbone\..*(norm(s\.)?\d?\.(weight|bias)|relative_position_bias_table)',
    'condnet_r50_ade20k': 'nothing',
    'semantic_fpn_coc_small_4': 'nothing',
}


@pytest.mark.parametrize('name', UNDECAYED)
def test_published_weight_decay(name):
    config = segmenter_config(name)
    with torch.device('meta'):
        model = create_segmenter(name)
    found = settings(model, parameter_groups(model, config.weight_decay, config.norm_decay))
    expected = {parameter for parameter in found if re.fullmatch(UNDECAYED[name], parameter)}
    assert {parameter for parameter, (_, decay) in found.items() if decay == 0} == expected
    if config.norm_decay == 'heads':
        assert len(expected) > 20 and any('.bn.' in parameter for parameter in found.keys() - expected)


def test_layer_decay_equals_timm(model):
    expected = param_groups_layer_decay(model, 0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    found = settings(model, parameter_groups(model, 0.05, norm_decay='none', layer_decay=0.5))
    assert found == settings(model, expected)
    assert len({scale for scale, _ in found.values()}) == 5  # stem, three blocks, and the rest
    head = {scale for name, (scale, _) in found.items() if not name.startswith('backbone.')}
    assert head == {1.0}


def test_layer_decay_and_head_scale():
    model = create_segmenter('fcn', 'resnet10t', 3, channels=16, auxiliary=True)
    found = settings(model, parameter_groups(model, 0.05, layer_decay=0.5, head_lr_scale=10.0))
    assert {scale for name, (scale, _) in found.items() if name.startswith(('head.', 'auxiliary.'))} == {10.0}
    assert found['backbone.model.conv1.0.weight'][0] < found['backbone.model.layer4.0.conv1.weight'][0] < 1


def test_frozen_parameters_are_excluded():
    model = create_segmenter('fcn', 'resnet10t', 3, channels=16)
    model.backbone.requires_grad_(False)
    [group] = parameter_groups(model, 0.05)
    assert len(group['params']) == len(list(model.head.parameters()))
