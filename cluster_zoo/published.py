"""The authors' checkpoint names as ours."""

import re

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

    The stem's one convolution over C image and 2 coordinate channels is stored as two, and the MLP of checkpoints from
    before June 2023, 1x1 convolutions, as the linear layers that they are. Other state dicts are returned as they are.
    """
    if 'patch_embed.proj.weight' not in state_dict:
        return state_dict
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if re.search(r'\.mlp\.fc[12]\.weight$', name) and value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        if name == 'stem.proj.weight':
            renamed['stem.coord.weight'] = value[:, -2:]
            value = value[:, :-2]
        renamed[name] = value
    return renamed
