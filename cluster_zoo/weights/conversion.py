"""The authors' checkpoint names as ours.

Context Cluster and FEC have names of their own. The files of DNC have those of mmclassification 0.18
(``mmcls/models/backbones``, https://github.com/open-mmlab/mmpretrain), in which a model is ``backbone.*`` and
``head.*``; its Swin Transformer is named as that of mmsegmentation.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

Names = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

# Between stages the authors count on: network.0, 2, 4, 6 are stages, 1, 3, 5 what lies between them.
_CONTEXT_CLUSTER: Names = (
    (r'^network\.([0246])\.(\d+)\.', lambda m: f'stages.{int(m[1]) // 2}.blocks.{m[2]}.'),
    (r'^network\.([135])\.proj\.', lambda m: f'stages.{int(m[1]) // 2 + 1}.downsample.'),
    (r'^network\.([135])\.', lambda m: f'stages.{int(m[1]) // 2 + 1}.downsample.'),
    (r'\.layer_scale_([12])$', r'.ls\1.gamma'),
    (r'\.token_mixer\.fc1\.', '.token_mixer.f.'),  # the mixer's names before June 2023
    (r'\.token_mixer\.fc_v\.', '.token_mixer.v.'),
    (r'\.token_mixer\.fc2\.', '.token_mixer.proj.'),
    (r'\.downsample\.conv_(skip|f|v)\.', r'.downsample.\1.'),
    (r'\.downsample\.norm2\.', '.downsample.norm.'),
    (r'^patch_embed\.', 'stem.'),
    (r'^head\.', 'head.fc.'),
)
_MOBILENET_V2: Names = (
    (r'^conv1\.conv\.', 'conv_stem.'),
    (r'^conv1\.bn\.', 'bn1.'),
    (r'^conv2\.conv\.', 'conv_head.'),
    (r'^conv2\.bn\.', 'bn2.'),
    (r'^layer(\d)\.(\d+)\.conv\.', lambda m: f'blocks.{int(m[1]) - 1}.{m[2]}.'),
    (r'^blocks\.0\.0\.0\.conv\.', 'blocks.0.0.conv_dw.'),  # the one block without expansion
    (r'^blocks\.0\.0\.1\.conv\.', 'blocks.0.0.conv_pw.'),
    (r'^(blocks\.\d\.\d+)\.0\.conv\.', r'\1.conv_pw.'),
    (r'^(blocks\.\d\.\d+)\.1\.conv\.', r'\1.conv_dw.'),
    (r'^(blocks\.\d\.\d+)\.2\.conv\.', r'\1.conv_pwl.'),
    (r'^(blocks\.\d\.\d+)\.(\d)\.bn\.', lambda m: f'{m[1]}.bn{int(m[2]) + 1}.'),
)
_SWIN: Names = (
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'\.attn\.w_msa\.', '.attn.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
    # Theirs ends a stage with its reduction, timm's begins the next with it.
    (r'^stages\.(\d+)\.downsample\.', lambda m: f'layers.{int(m[1]) + 1}.downsample.'),
    (r'^stages\.', 'layers.'),
)
_SWIN_BUFFERS = ('.relative_position_index', '.attn_mask')  # timm's model computes them itself
# The head's names, which may stand behind the `head.` of the authors' framework.
_CENTROID_HEAD = re.compile(
    r'(?:head\.)?(?:(prototypes|(?:feat_norm|mask_norm)\.(?:weight|bias))|convs\.0\.conv\.(?:weight|bias))'
)


def renamed(state_dict: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """A state dict whose names went through regular expressions and their replacements, one after the other."""
    converted = {}
    for name, value in state_dict.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted


def context_cluster(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Context Cluster or FEC checkpoint of the authors, under this package's names.

    The stem's one convolution over C image and 2 coordinate channels is stored as two. The MLP, linear layers in
    checkpoints of the authors since June 2023 and 1x1 convolutions before, becomes 1x1 convolutions.
    """
    published = 'patch_embed.proj.weight' in state_dict
    converted = {}
    for name, value in (renamed(state_dict, _CONTEXT_CLUSTER) if published else state_dict).items():
        if re.search(r'\.mlp\.fc[12]\.weight$', name) and value.ndim == 2:
            value = value[:, :, None, None]
        if published and name == 'stem.proj.weight':
            converted['stem.coord.weight'] = value[:, -2:]
            value = value[:, :-2]
        converted[name] = value
    return converted


def context_cluster_args(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of the Context Cluster that a checkpoint of the authors belongs to, as far as its names tell.

    Until June 2023 they were others, of networks in which every member of a cluster counts one.
    """
    return dict(weighted_mean=False) if any('.token_mixer.fc_v.' in name for name in state_dict) else {}


def swin(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Swin Transformer of mmclassification or mmsegmentation under timm's names, norms of its outputs as they are.

    Patch merging joins four neighbours of C channels into 4 C. Theirs counts them by channel, row and column, as
    ``torch.nn.Unfold`` does, timm's by column, row and channel: its norm [4 C] and its reduction [2 C, 4 C] are
    reordered. Those of a last dimension that is not four times another stay as they are, and so fit no model.

    Args:
        state_dict: The backbone, without prefix. Buffers that follow from the size of images and windows are left out.
    """
    converted = {}
    for name, value in renamed(state_dict, _SWIN).items():
        if name.endswith(_SWIN_BUFFERS):
            continue
        if re.search(r'\.downsample\.(reduction|norm)\.', name) and value.ndim and value.shape[-1] % 4 == 0:
            *out, joined = value.shape
            value = value.reshape(*out, joined // 4, 2, 2).transpose(-1, -3).reshape(*out, joined)
        converted[name] = value
    return converted


def _swin_classifier(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(swin(state_dict), ((r'^norm3\.', 'norm.'),))  # that of the last stage, the only one


# Names that only one kind of backbone has, and its conversion; those of ResNets are torchvision's and timm's.
_BACKBONES: tuple[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]], ...] = (
    (r'layer\d\.\d+\.conv\.\d\.conv\.', lambda x: renamed(x, _MOBILENET_V2)),
    (r'stages\.\d\.blocks\.\d+\.attn\.w_msa\.', _swin_classifier),
)


def is_nearest_centroid_head(name: str) -> bool:
    """Whether an entry of the authors' DNC checkpoints belongs to the head."""
    return _CENTROID_HEAD.fullmatch(name) is not None


def nearest_centroid_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head of a DNC checkpoint of the authors, under the names of `NearestCentroidHead`.

    Their convolution ``convs.0``, which they never use, and the backbone are left out.
    """
    found = {name: _CENTROID_HEAD.fullmatch(name) for name in state_dict}
    return {match[1]: state_dict[name] for name, match in found.items() if match and match[1]}


def nearest_centroid(state_dict: dict[str, Tensor], classifier: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A DNC checkpoint of the authors, or one under this package's names, as backbone and head.

    Args:
        state_dict: The checkpoint. Which backbone it has, ResNet, MobileNetV2, Swin Transformer or another, is told by
            its names.
        classifier: Submodule of the model that is the head, such as ``'fc'`` or ``'head.fc'``.

    Returns:
        The backbone under timm's names, without prefix, or as it is if its names are none of those above; and the head
        as ``{classifier}.prototypes`` and so on. What the checkpoint has under ``{classifier}.`` already is part of it.
    """
    prefix = f'{classifier}.'
    head = {f'{prefix}{name}': value for name, value in nearest_centroid_head(state_dict).items()}
    backbone = {}
    for name, value in state_dict.items():
        if is_nearest_centroid_head(name):
            continue
        if name.startswith(prefix):
            head[name] = value
        else:
            backbone[name.removeprefix('backbone.')] = value
    for pattern, convert in _BACKBONES:
        if any(re.match(pattern, name) for name in backbone):
            return convert(backbone), head
    return backbone, head
