"""The authors' checkpoint names as ours."""

import re
from typing import Any

from torch import Tensor

# Between stages the authors count on: network.0, 2, 4, 6 are stages, 1, 3, 5 what lies between them.
_RENAMED = (
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


def context_cluster(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Context Cluster or FEC checkpoint of the authors, under this package's names.

    The stem's one convolution over C image and 2 coordinate channels is stored as two. The MLP, linear layers in
    checkpoints of the authors since June 2023 and 1x1 convolutions before, becomes 1x1 convolutions.
    """
    published = 'patch_embed.proj.weight' in state_dict
    renamed = {}
    for name, value in state_dict.items():
        if published:
            for pattern, replacement in _RENAMED:
                name = re.sub(pattern, replacement, name)
        if re.search(r'\.mlp\.fc[12]\.weight$', name) and value.ndim == 2:
            value = value[:, :, None, None]
        if published and name == 'stem.proj.weight':
            renamed['stem.coord.weight'] = value[:, -2:]
            value = value[:, :-2]
        renamed[name] = value
    return renamed


def context_cluster_args(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of the Context Cluster that a checkpoint of the authors belongs to, as far as its names tell.

    Until June 2023 they were others, of networks in which every member of a cluster counts one.
    """
    return dict(weighted_mean=False) if any('.token_mixer.fc_v.' in name for name in state_dict) else {}


# The head's names, which may stand behind the `head.` of the authors' framework.
_CENTROID_HEAD = re.compile(
    r'(?:head\.)?(?:(prototypes|(?:feat_norm|mask_norm)\.(?:weight|bias))|convs\.0\.conv\.(?:weight|bias))'
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
