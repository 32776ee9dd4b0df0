"""The stem of Context Cluster: an image as points.

Paper: 'Image as Set of Points', ICLR 2023, https://arxiv.org/abs/2303.01494, section 3.1
"""

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from .grids import pad_to_multiple


@register_notrace_module  # pads by the size of its input, which a symbolic trace cannot follow
class PointStem(nn.Module):
    """Patches of an image and their coordinates, as points (section 3.1).

    The paper appends two coordinate channels to the image and applies one convolution. A convolution is a sum over its
    input channels, so here ``proj`` is applied to the image and ``coord`` to the coordinates, once for the whole batch.

    Args:
        in_chans: Image channels C.
        out_chans: Channels D of the points.
        patch_size: Kernel and stride of the convolution.
    """

    def __init__(self, in_chans: int, out_chans: int, patch_size: int = 4, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, out_chans, patch_size, patch_size, **dd)
        self.coord = nn.Conv2d(2, out_chans, patch_size, patch_size, bias=False, **dd)
        bound = ((in_chans + 2) * patch_size**2) ** -0.5  # as for one convolution over C + 2 channels
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, ceil(H / 4), ceil(W / 4)]; images of other sizes are padded with zeros."""
        H, W = x.shape[-2:]
        # In float32 for any dtype of the model, as in the authors' code
        rows = torch.arange(H, device=x.device, dtype=torch.float32) / max(H - 1, 1) - 0.5
        columns = torch.arange(W, device=x.device, dtype=torch.float32) / max(W - 1, 1) - 0.5
        position = torch.stack([rows.unsqueeze(1).expand(H, W), columns.expand(H, W)]).unsqueeze(0).to(x.dtype)
        x, position = pad_to_multiple(x, self.patch_size), pad_to_multiple(position, self.patch_size)
        return (self.proj(x) + self.coord(position)).contiguous(memory_format=torch.channels_last)
