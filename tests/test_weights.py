"""Opening checkpoints: what is accepted, what is refused, and with which words."""

import argparse
import os

import forged
import pytest
import timm
import torch
from parity_cases import recipe, save_published
from safetensors.torch import save_file

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.weights import CheckpointError, load_checkpoint, load_state_dict

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, num_classes=5)


@pytest.fixture
def tiny():
    return timm.create_model('coc_tiny', **TINY)


@pytest.fixture
def weights(tiny):
    return {name: value.clone() for name, value in tiny.state_dict().items()}


def _message(error):
    text = str(error.value)
    assert '\n' not in text
    return text


# What is accepted


@pytest.mark.parametrize('case', ['coc_tiny', 'fec_small'])
def test_a_published_file_loads_through_create_model(case, tmp_path):
    path = save_published(case, tmp_path / 'model_best.pth.tar')
    model = timm.create_model(case, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    expected = recipe.state_dict(case)
    torch.testing.assert_close(model.head.fc.weight, expected['head.weight'].float(), rtol=0, atol=0)
    assert 'state_dict' not in model.pretrained_cfg  # a configuration is not the place for 5 million numbers
    again = timm.create_model(case)
    load_checkpoint(again, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_other_classes_and_channels_are_adapted(tmp_path):
    overlay = dict(file=str(save_published('coc_tiny', tmp_path / 'c.pth')))
    expected = recipe.state_dict('coc_tiny')
    model = timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay, num_classes=10, in_chans=1)
    assert model.head.fc.weight.shape == (10, 320)
    image = expected['patch_embed.proj.weight'][:, :3].sum(1, keepdim=True).float()
    torch.testing.assert_close(model.stem.proj.weight, image)
    torch.testing.assert_close(model.stem.coord.weight, expected['patch_embed.proj.weight'][:, 3:].float())
    features = timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay, features_only=True)
    assert len(features(torch.zeros(1, 3, 32, 32))) == 4


def test_a_head_that_fits_the_file_is_kept(tiny, weights, tmp_path):
    save_file(weights, tmp_path / 'own.safetensors')  # 5 classes, where the configuration says 1000
    overlay = dict(file=str(tmp_path / 'own.safetensors'))
    model = timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay, **TINY)
    assert torch.equal(model.head.fc.weight, weights['head.fc.weight'])
    model = timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay | dict(num_classes=-1), **TINY)
    assert not torch.equal(model.head.fc.weight, weights['head.fc.weight'])  # a head of its own was asked for
    assert torch.equal(model.norm.weight, weights['norm.weight'])


def test_averaged_weights_are_preferred_where_asked(weights, tmp_path):
    averaged = {f'module.{name}': value + 1 for name, value in weights.items()}
    torch.save(dict(state_dict=weights, state_dict_ema=averaged), tmp_path / 'c.pth')
    name = 'norm.bias'
    assert torch.equal(load_state_dict(tmp_path / 'c.pth')[name], weights[name] + 1)
    assert torch.equal(load_state_dict(tmp_path / 'c.pth', use_ema=False)[name], weights[name])


def test_a_bare_state_dict_and_half_precision(tiny, weights, tmp_path):
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / 'half.safetensors')
    load_checkpoint(tiny, tmp_path / 'half.safetensors')
    assert tiny.norm.weight.dtype == torch.float32
    torch.save(weights, tmp_path / 'bare.pth')
    load_checkpoint(tiny, tmp_path / 'bare.pth')
    assert torch.equal(tiny.head.fc.weight, weights['head.fc.weight'])


def test_a_timm_model_takes_its_own_checkpoint(tmp_path):
    model = timm.create_model('resnet10t', num_classes=3)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'r.pth')
    load_checkpoint(timm.create_model('resnet10t', num_classes=3), tmp_path / 'r.pth')


# What is refused


class _Runs:
    """Would create a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(weights, tmp_path, zipped):
    torch.save(
        dict(state_dict=weights, args=_Runs(tmp_path / 'pwned')),
        tmp_path / 'evil.pth',
        _use_new_zipfile_serialization=zipped,
    )
    for load in (load_state_dict, lambda path: load_checkpoint(timm.create_model('coc_tiny', **TINY), path)):
        with pytest.raises(CheckpointError, match='refused') as error:
            load(tmp_path / 'evil.pth')
        assert 'mkdir' in _message(error)
    with pytest.raises(CheckpointError, match='refused'):
        overlay = dict(file=str(tmp_path / 'evil.pth'))
        timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay, **TINY)
    assert not (tmp_path / 'pwned').exists()


def test_a_namespace_that_holds_code_is_refused(weights, tmp_path):
    args = argparse.Namespace(lr=_Runs(tmp_path / 'pwned'))
    torch.save(dict(state_dict=weights, args=args), tmp_path / 'evil.pth')
    with pytest.raises(CheckpointError, match='refused'):
        load_state_dict(tmp_path / 'evil.pth')
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('keep', [0, 10, 1000, -20])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_truncated_files_are_refused(weights, tmp_path, suffix, keep):
    path = tmp_path / f'cut{suffix}'
    save_file(weights, path) if suffix == '.safetensors' else torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match='damaged') as error:
        load_state_dict(path)
    assert str(path) in _message(error)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    torch.save(dict(epoch=3), tmp_path / 'epoch.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    for name, words in (
        ('text.pth', 'not a checkpoint'),
        ('epoch.pth', 'epoch are not tensors'),
        ('list.pth', 'a list'),
        ('missing.pth', 'No checkpoint at'),
        ('', 'a folder'),
    ):
        with pytest.raises(CheckpointError, match=words) as error:
            load_state_dict(tmp_path / name)
        _message(error)


@pytest.mark.parametrize('change, words', [
    (lambda w: w.pop('norm.bias'), ['1 missing', 'norm.bias']),
    (lambda w: w.update(surprise=torch.ones(1)), ['1 unknown', 'surprise']),
    (lambda w: w.update({'norm.bias': torch.ones(3)}), ['another shape', 'norm.bias: [3] in the file, [16] in the']),
    (lambda w: w['norm.bias'].fill_(float('nan')), ['NaN', 'norm.bias']),
    (lambda w: w['norm.bias'].fill_(float('inf')), ['infinity', 'norm.bias']),
])  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(tiny, weights, tmp_path, change, words):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    weights['head.fc.bias'] += 1
    change(weights)
    torch.save(weights, tmp_path / 'c.pth')
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tiny, tmp_path / 'c.pth')
    assert all(word in _message(error) for word in words)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    with pytest.raises(CheckpointError):
        overlay = dict(file=str(tmp_path / 'c.pth'))
        timm.create_model('coc_tiny', True, pretrained_cfg_overlay=overlay, **TINY)


def test_another_models_checkpoint_names_the_first_differences(tmp_path):
    path = save_published('coc_small', tmp_path / 'c.pth')
    with pytest.raises(CheckpointError, match=r'does not fit this ContextCluster.*stem\.proj\.weight') as error:
        load_checkpoint(timm.create_model('coc_tiny'), path)
    assert len(_message(error)) < 1000
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'r.pth')
    with pytest.raises(CheckpointError, match=r'unknown to the model \(conv1'):
        load_checkpoint(timm.create_model('coc_tiny'), tmp_path / 'r.pth')


# What is refused although it is a checkpoint


@pytest.mark.parametrize('entries, words', [
    ({1: torch.ones(1)}, 'the entries 1 are not tensors'),
    ({'a': torch.ones(1), ('b',): torch.ones(1)}, 'keys other than text'),
    ({'state_dict': {'state_dict': 3}}, 'the entries state_dict are not tensors'),
    ({'a\x1b[2J\n': 3}, 'the entries a?[2J? are not tensors'),
])  # fmt: skip
def test_names_that_are_none(entries, words, tmp_path):
    torch.save(entries, tmp_path / 'c.pth')
    with pytest.raises(CheckpointError) as error:
        load_state_dict(tmp_path / 'c.pth')
    assert words in _message(error)


@pytest.mark.parametrize('dtype', [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_numbers_of_another_kind_are_refused(tiny, weights, tmp_path, dtype):
    weights['norm.bias'] = weights['norm.bias'].to(dtype)
    save_file(weights, tmp_path / 'c.safetensors')
    with pytest.raises(CheckpointError, match='1 of another type') as error:
        load_checkpoint(tiny, tmp_path / 'c.safetensors')
    assert f'norm.bias: {dtype} in the file, torch.float32 in the model' in _message(error)


def test_numbers_that_are_too_large_for_the_model_are_refused(tiny, weights, tmp_path):
    weights['norm.bias'] = weights['norm.bias'].double().fill_(1e39)
    torch.save(weights, tmp_path / 'c.pth')
    with pytest.raises(CheckpointError, match=r'NaN or infinity \(norm.bias\)'):
        load_checkpoint(tiny, tmp_path / 'c.pth')


@pytest.mark.parametrize('name', ['coc_tiny', 'dnc_swin_tiny', 'vit_tiny_patch16_224'])
def test_known_names_with_shapes_that_nobody_has_are_refused(name, tmp_path):
    torch.save({'patch_embed.proj.weight': torch.tensor(1.0)}, tmp_path / 'c.pth')
    with pytest.raises(CheckpointError, match='cannot be converted') as error:
        load_checkpoint(timm.create_model(name), tmp_path / 'c.pth')
    _message(error)


def test_shapes_without_numbers_cost_nothing(tiny, weights, tmp_path):
    """A header may name any shape that has a zero in it; and a message should not repeat it all."""
    header = {'norm.bias': dict(dtype='F32', shape=[0, *[1 << 40] + [1] * 50_000], data_offsets=[0, 0])}
    path = forged.write_safetensors(tmp_path / 'c.safetensors', header)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tiny, path)
    assert len(_message(error)) < 1500
