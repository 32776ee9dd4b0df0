"""Code that depends on private methods of timm. Written for timm 1.0.31, which has no public equivalent."""

import torch.nn as nn
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

__all__ = ['PaddedSwinBlock', 'embed_tokens']


class PaddedSwinBlock(SwinTransformerBlock):
    """A Swin block that pads a map to whole windows before the cyclic shift, as the published systems do.

    timm shifts first. The results differ where a side is not a multiple of the window.

    Args:
        block: The block to replace. Its submodules and settings are reused.
    """

    def __init__(self, block: SwinTransformerBlock):
        nn.Module.__init__(self)
        vars(self).update(vars(block))

    def _attn(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        H, W = x.shape[1:3]
        h, w = self.window_size
        return super()._attn(F.pad(x, (0, 0, 0, -W % w, 0, -H % h)))[:, :H, :W]


def embed_tokens(model: VisionTransformer, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Computes the input of the first block: images [B, C, H, W] -> tokens [B, N, D] and the size of their grid."""
    x = model.patch_embed(x)
    return model.norm_pre(model._pos_embed(x)), x.shape[1:3]
