"""ResNet-18 for CIFAR; the model with centroids differs from it only in the head."""

import pytest
import timm
import torch
from torch import nn

import cluster_zoo  # noqa: F401  registers the models

SMALL = dict(channels=(8, 16, 24, 32))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_number_of_parameters():
    """The usual ResNet-18 for CIFAR has 11,173,962 parameters."""
    with torch.device('meta'):
        model = timm.create_model('resnet18_cifar')
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert model.num_classes == 10 and model.pretrained_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('name', ['resnet18_cifar', 'dnc_resnet18_cifar'])
def test_resolutions(name):
    """The stem and the first stage keep the resolution of the image."""
    model = timm.create_model(name, **SMALL).eval()
    x = torch.randn(2, 3, 32, 48)
    levels = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(level.shape[-2:]) for level in levels] == [(32, 48), (32, 48), (16, 24), (8, 12), (4, 6)]
    assert [info['reduction'] for info in model.feature_info] == [1, 1, 2, 4, 8]
    backbone = timm.create_model(name, features_only=True, **SMALL).eval()
    assert backbone.feature_info.reduction() == [1, 1, 2, 4, 8]
    assert [level.shape for level in backbone(x)] == [level.shape for level in levels]
    assert model(x).shape == (2, 10)


def test_forward_by_hand():
    model = timm.create_model('resnet18_cifar', **SMALL).eval()
    x = torch.randn(1, 3, 32, 32)
    stem = torch.relu(model.bn1(nn.functional.conv2d(x, model.conv1.weight, padding=1)))
    expected = model.layer4(model.layer3(model.layer2(model.layer1(stem)))).mean((2, 3))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), expected)


def test_only_the_head_differs():
    linear, centroids = (timm.create_model(name, **SMALL).eval() for name in ('resnet18_cifar', 'dnc_resnet18_cifar'))
    backbone = {name: value for name, value in linear.state_dict().items() if not name.startswith('fc.')}
    assert centroids.load_state_dict(backbone, strict=False).unexpected_keys == []
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(centroids.forward_features(x), linear.forward_features(x))


@pytest.mark.parametrize('in_chans', [1, 4])
def test_in_chans(in_chans, tmp_path):
    model = timm.create_model('resnet18_cifar', in_chans=in_chans, **SMALL).eval()
    assert model(torch.randn(1, in_chans, 32, 32)).shape == (1, 10)
    pretrained = timm.create_model('resnet18_cifar', **SMALL)
    torch.save(pretrained.state_dict(), tmp_path / 'x.pth')
    overlay = dict(file=str(tmp_path / 'x.pth'))
    adapted = timm.create_model(
        'resnet18_cifar', pretrained=True, pretrained_cfg_overlay=overlay, in_chans=in_chans, num_classes=4, **SMALL
    )
    assert adapted.conv1.weight.shape == (64, in_chans, 3, 3) and adapted.num_classes == 4
    assert torch.equal(adapted.layer4[1].conv2.weight, pretrained.layer4[1].conv2.weight)


def test_on_the_meta_device():
    with torch.device('meta'):
        model = timm.create_model('dnc_resnet18_cifar')
    assert all(value.is_meta for value in model.state_dict().values())
