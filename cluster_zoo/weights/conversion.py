"""Checkpoint conversion: from the names in the authors' checkpoints to the names of this package.

Context Cluster and FEC use their own names. DNC uses those of mmclassification 0.18 (``mmcls/models/backbones``,
https://github.com/open-mmlab/mmpretrain), where a model consists of ``backbone.*`` and ``head.*``.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

Names = tuple[tuple[str, str | Callable[[re.Match], str]], ...]
"""Regular expressions and their replacements, applied in this order."""

# Even indices of `network` are stages, odd ones the downsampling between them.
_CONTEXT_CLUSTER: Names = (
    (r'^network\.([0246])\.(\d+)\.', lambda m: f'stages.{int(m[1]) // 2}.blocks.{m[2]}.'),
    (r'^network\.([135])\.(?:proj\.)?', lambda m: f'stages.{int(m[1]) // 2 + 1}.downsample.'),
    (r'\.layer_scale_([12])$', r'.ls\1.gamma'),
    (r'\.token_mixer\.fc1\.', '.token_mixer.f.'),  # names before June 2023
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
    (r'^blocks\.0\.0\.0\.conv\.', 'blocks.0.0.conv_dw.'),  # the only block without expansion
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
    # mmclassification downsamples at the end of a stage, timm at the start of the next one
    (r'^stages\.(\d+)\.downsample\.', lambda m: f'layers.{int(m[1]) + 1}.downsample.'),
    (r'^stages\.', 'layers.'),
)
_SWIN_BUFFERS = ('.relative_position_index', '.attn_mask')  # which timm's model computes
# The prefix `head.` is optional. Only the names in the first group exist in `NearestCentroidHead`.
_CENTROID_HEAD = re.compile(
    r'(?:head\.)?(?:(prototypes|(?:feat_norm|mask_norm)\.(?:weight|bias))|convs\.0\.conv\.(?:weight|bias))'
)


def renamed(state_dict: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Returns a state dict with converted names."""
    converted = {}
    for name, value in state_dict.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted


def context_cluster(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts an authors' checkpoint of Context Cluster or FEC; this package's names stay unchanged.

    The stem's convolution over C image and 2 coordinate channels is split in two. Linear layers of the MLPs, which the
    authors' checkpoints have since June 2023, become 1x1 convolutions.
    """
    original = 'patch_embed.proj.weight' in state_dict
    converted = {}
    for name, value in (renamed(state_dict, _CONTEXT_CLUSTER) if original else state_dict).items():
        if re.search(r'\.mlp\.fc[12]\.weight$', name) and value.ndim == 2:
            value = value[:, :, None, None]
        if original and name == 'stem.proj.weight':
            converted['stem.coord.weight'] = value[:, -2:]
            value = value[:, :-2]
        converted[name] = value
    return converted


def context_cluster_args(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the model arguments that the names of a Context Cluster checkpoint imply.

    Checkpoints from before June 2023 have other names, and belong to models that average clusters without weights.
    """
    return dict(weighted_mean=False) if any('.token_mixer.fc_v.' in name for name in state_dict) else {}


def swin(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts a Swin Transformer of mmclassification or mmsegmentation to timm's names, except the output norms.

    Patch merging concatenates four neighbors of C channels. mmclassification orders them by channel, row and column, as
    ``torch.nn.Unfold`` does, and timm by column, row and channel. The norm [4 C] and the reduction [2 C, 4 C] are
    reordered.

    Args:
        state_dict: The backbone, without prefix. Buffers that depend on image and window size are dropped.
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


# Patterns of the names that identify a backbone, and its conversion. ResNets have torchvision's names, as in timm.
_BACKBONES: tuple[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]], ...] = (
    (r'layer\d\.\d+\.conv\.\d\.conv\.', lambda state_dict: renamed(state_dict, _MOBILENET_V2)),
    (
        r'stages\.\d\.blocks\.\d+\.attn\.w_msa\.',
        lambda state_dict: renamed(swin(state_dict), ((r'^norm3\.', 'norm.'),)),
    ),
)


def is_nearest_centroid_head(name: str) -> bool:
    """Whether a name in an authors' DNC checkpoint belongs to the head."""
    return _CENTROID_HEAD.fullmatch(name) is not None


def nearest_centroid_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Extracts the head of an authors' DNC checkpoint, with the names of `NearestCentroidHead`.

    The convolution ``convs.0``, which the authors' code never uses, is dropped.
    """
    found = {name: _CENTROID_HEAD.fullmatch(name) for name in state_dict}
    return {match[1]: state_dict[name] for name, match in found.items() if match and match[1]}


def nearest_centroid(state_dict: dict[str, Tensor], classifier: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a DNC checkpoint, with the authors' names or this package's, into backbone and head.

    Args:
        state_dict: The checkpoint. Its names determine the conversion of the backbone.
        classifier: Name of the head in the model, such as ``'fc'`` or ``'head.fc'``.

    Returns:
        The backbone with timm's names, without prefix; and the head as ``{classifier}.prototypes`` and so on.
    """
    prefix = f'{classifier}.'
    head = {f'{prefix}{name}': value for name, value in nearest_centroid_head(state_dict).items()}
    backbone = {}
    for name, value in state_dict.items():
        if name.startswith(prefix) and not is_nearest_centroid_head(name):
            head[name] = value
        elif not is_nearest_centroid_head(name):
            backbone[name.removeprefix('backbone.')] = value
    for pattern, convert in _BACKBONES:
        if any(re.match(pattern, name) for name in backbone):
            return convert(backbone), head
    return backbone, head
