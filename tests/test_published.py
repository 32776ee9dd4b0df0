"""The authors' checkpoint names."""

import pytest
import timm
import torch
from parity_cases import recipe

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo import published
from cluster_zoo.dnc import NearestCentroidHead


def _before_june_2023(state_dict):
    """The same weights under the names and shapes of the authors' first checkpoints."""
    names = {'token_mixer.f.': 'token_mixer.fc1.', 'token_mixer.v.': 'token_mixer.fc_v.'}
    names |= {'token_mixer.proj.': 'token_mixer.fc2.'}
    old = {}
    for name, value in state_dict.items():
        for new_part, old_part in names.items():
            name = name.replace(new_part, old_part)
        old[name] = value[:, :, None, None] if '.mlp.fc' in name and value.ndim == 2 else value
    return old


def test_names_and_shapes_are_those_of_the_models():
    for case in ('coc_tiny', 'coc_small', 'fec_small', 'fec_base'):
        with torch.device('meta'):
            expected = {name: value.shape for name, value in timm.create_model(case).state_dict().items()}
        renamed = published.context_cluster(recipe.state_dict(case))
        assert {name: value.shape for name, value in renamed.items()} == expected


def test_old_checkpoints_are_the_new_ones_under_other_names():
    state_dict = recipe.state_dict('coc_tiny')
    old = _before_june_2023(state_dict)
    assert set(old) != set(state_dict)
    expected, renamed = published.context_cluster(state_dict), published.context_cluster(old)
    assert set(renamed) == set(expected)
    assert all(torch.equal(renamed[name], expected[name]) for name in expected)


def test_own_names_are_left_alone():
    state_dict = timm.create_model('fec_small').state_dict()
    renamed = published.context_cluster(state_dict)
    assert list(renamed) == list(state_dict) and all(renamed[name] is state_dict[name] for name in renamed)


def test_own_linear_layers_become_convolutions():
    state_dict = timm.create_model('coc_tiny').state_dict()
    linear = {
        name: value.flatten(1) if '.mlp.fc' in name and value.ndim == 4 else value for name, value in state_dict.items()
    }
    renamed = published.context_cluster(linear)
    assert all(torch.equal(renamed[name], state_dict[name]) for name in state_dict)


@pytest.mark.parametrize('prefix', ['', 'head.'])
def test_nearest_centroid_head(prefix):
    state_dict = recipe.state_dict('dnc_head')
    named = {prefix + name: value for name, value in state_dict.items()}
    others = {'backbone.conv1.weight': torch.zeros(1), 'mask_norm.running_mean': torch.zeros(1), 'fc.weight': None}
    head = published.nearest_centroid_head({**named, **others})
    expected = {name: value for name, value in state_dict.items() if not name.startswith('convs.')}
    assert head.keys() == expected.keys() and all(head[name] is expected[name] for name in head)
    NearestCentroidHead(32, 5).load_state_dict(head)
    assert all(published.is_nearest_centroid_head(name) for name in named)
    assert not any(published.is_nearest_centroid_head(name) for name in others)
    assert not published.is_nearest_centroid_head('backbone.head.prototypes')
