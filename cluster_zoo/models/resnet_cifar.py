"""ResNet for images of 32 pixels, with a 3x3 convolution of stride one instead of the 7x7 stem and its pooling.

'Visual Recognition with Deep Nearest Centroids' (section 4.1) and many other papers train it on CIFAR.
"""

from typing import Any

import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

from .builder import build_model

__all__ = ['CifarResNet']  # register_model adds the entry points


class CifarResNet(ResNet):
    """timm's `ResNet` with a first stage at the resolution of the image. It takes the same arguments."""

    def __init__(self, *args: Any, in_chans: int = 3, device=None, dtype=None, **kwargs: Any):
        super().__init__(*args, in_chans=in_chans, device=device, dtype=dtype, **kwargs)
        width = self.conv1.out_channels
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False, device=device, dtype=dtype)
        self.maxpool = nn.Identity()
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        # timm's stem and pooling reduce the resolution by 4.
        self.feature_info = [dict(info, reduction=max(info['reduction'] // 4, 1)) for info in self.feature_info]


def cfg(**kwargs: Any) -> dict[str, Any]:
    """A pretrained configuration for CIFAR-10, with its mean and standard deviation."""
    return {
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': (4, 4),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': (0.4914, 0.4822, 0.4465),
        'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({'resnet18_cifar.untrained': cfg()})


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for images of 32 pixels with a linear classifier, the baseline of `dnc_resnet18_cifar`."""
    args = dict(block=BasicBlock, layers=(2, 2, 2, 2)) | kwargs
    return build_model(CifarResNet, 'resnet18_cifar', pretrained, **args)
