"""cluster_zoo.pretrained: weights into models, and what a configuration from elsewhere may describe."""

import json
import logging

import pytest
import timm
import torch
from parity_cases import recipe
from safetensors.torch import load_file, save_file

from cluster_zoo.weights import CheckpointError

pytestmark = pytest.mark.usefixtures('home')


def test_weights_of_the_first_publication_are_run_by_their_formula(tmp_path, caplog):
    old = {
        name.replace('.token_mixer.v.', '.token_mixer.fc_v.'): x for name, x in recipe.state_dict('coc_tiny').items()
    }
    torch.save(old, tmp_path / 'old.pth')
    overlay = dict(file=str(tmp_path / 'old.pth'))
    mixers = [
        timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay, **kwargs).stages[0].blocks[0].token_mixer
        for kwargs in ({}, dict(weighted_mean=True))
    ]
    assert [mixer.weighted_mean for mixer in mixers] == [False, True]
    caplog.clear()
    timm.create_model('coc_tiny', weighted_mean=False, checkpoint_path=tmp_path / 'old.pth')
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    timm.create_model('coc_tiny', checkpoint_path=tmp_path / 'old.pth')  # too late to choose
    assert 'weighted_mean=False' in caplog.text


@pytest.mark.parametrize('how', ['file', 'state_dict', 'other classes', 'no classes'])
def test_centroids_come_with_the_weights(how, tmp_path):
    kwargs = dict(num_classes=10, sub_centroids=2)
    weights = timm.create_model('dnc_resnet18_cifar', **kwargs).state_dict()
    torch.save(weights, tmp_path / 'c.pth')
    source = dict(state_dict=dict(weights)) if how == 'state_dict' else dict(file=str(tmp_path / 'c.pth'))
    overlay = dict(source, num_classes=1000)  # as the configurations of ImageNet's models say
    if how in ('other classes', 'no classes'):
        kwargs['num_classes'] = 7 if how == 'other classes' else 0
        overlay['num_classes'] = 10
    model = timm.create_model('dnc_resnet18_cifar', True, pretrained_cfg_overlay=overlay, **kwargs)
    assert torch.equal(model.conv1.weight, weights['conv1.weight'])
    if how in ('file', 'state_dict'):
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_loading_tensors_by_hand_is_as_in_any_module():
    class Extra(torch.nn.Linear):
        def get_extra_state(self):
            return dict(note='text')

        def set_extra_state(self, state):
            self.note = state['note']

    for name in ('coc_tiny', 'dnc_resnet18_cifar'):
        model = timm.create_model(name, num_classes=3)
        model.extra = Extra(2, 2)
        state_dict = model.state_dict()
        model.load_state_dict(state_dict)
        assert model.extra.note == 'text'


def test_weights_are_kept_once(published_file):
    overlay = dict(file=str(published_file))
    model = timm.create_model(
        'coc_tiny', True, pretrained_cfg_overlay=overlay, features_only=True, feature_cls='getter'
    )
    assert 'state_dict' not in model.model.pretrained_cfg and 'state_dict' not in model.pretrained_cfg


# Configurations from elsewhere


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (dict(model_args=dict(act_layer='os.system')), 'act_layer'),
        (dict(model_args=dict(checkpoint_path='evil.pth')), 'checkpoint_path'),
        (dict(auto_map=dict(AutoModel='evil.Model')), 'auto_map'),
        (dict(pretrained_cfg=dict(custom_load=True)), 'custom_load'),
        (dict(pretrained_cfg=dict(url='https://example.org/other.pth')), 'url'),
    ],
)
def test_a_folder_whose_configuration_names_code_or_other_files_is_refused(imported, tmp_path, change, named):
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'model.safetensors').symlink_to(imported / 'coc_tiny.in1k' / 'model.safetensors')
    config = json.loads((imported / 'coc_tiny.in1k' / 'config.json').read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=named):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


@pytest.fixture
def foreign(imported, tmp_path):
    """A function that writes the imported folder with another configuration, and that loads it."""

    def load(pretrained=True, weights=None, model_args=(), **changes):
        folder = tmp_path / 'foreign'
        folder.mkdir(exist_ok=True)
        config = json.loads((imported / 'coc_tiny.in1k' / 'config.json').read_text())
        del config['sha256']
        config['pretrained_cfg'] |= changes
        config['model_args'] |= dict(model_args)
        (folder / 'config.json').write_text(json.dumps(config))
        tensors = load_file(imported / 'coc_tiny.in1k' / 'model.safetensors')
        save_file(weights(tensors) if weights else tensors, folder / 'model.safetensors')
        return lambda **kwargs: timm.create_model(f'local-dir:{folder}', pretrained=pretrained, **kwargs)

    return load


def test_which_layers_are_adapted_is_not_for_a_folder_to_say(foreign):
    def stages_left_out(weights):
        return {name: value for name, value in weights.items() if not name.startswith('stages.')}

    for layers in (['head.fc', 'stages'], ['head.fc', 'norm'], 'norm'):
        with pytest.raises(CheckpointError, match='missing'):
            foreign(weights=stages_left_out, classifier=layers)(num_classes=7)
        model = foreign(classifier=layers, first_conv='stages.1.downsample')(num_classes=7, in_chans=1)
        assert torch.equal(model.norm.weight, recipe.state_dict('coc_tiny')['norm.weight'].float())


@pytest.mark.parametrize('pretrained', [False, True])
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(dims=[2000, 2000, 2000, 30000]), 'describes a model of'),
        (dict(dims=[32, 64]), 'no model that can be built'),
        (dict(colour=3), 'no model that can be built'),
        (dict(checkpoint_path='evil'), 'checkpoint_path'),
    ],
)
def test_what_a_folder_describes_is_looked_at_before_it_is_built(foreign, pretrained, arguments, message):
    with pytest.raises(CheckpointError, match=message) as error:
        foreign(pretrained, model_args=arguments)()
    assert 'foreign' in str(error.value)
