"""The models as encoders of segmentation_models_pytorch."""

import pytest
import timm
import torch

import cluster_zoo  # noqa: F401  registers the models

smp = pytest.importorskip('segmentation_models_pytorch')

ENCODERS = ['coc_small', 'fec_small']
DECODERS = [smp.Unet, smp.FPN, smp.UPerNet]


def build(decoder, encoder, **kwargs):
    torch.manual_seed(0)
    return decoder(f'tu-{encoder}', encoder_weights=None, classes=5, **kwargs)


@pytest.mark.parametrize('encoder', ENCODERS)
@pytest.mark.parametrize('decoder', DECODERS)
def test_output_shape(decoder, encoder):
    model = build(decoder, encoder).eval()
    with torch.inference_mode():
        for size in ((32, 32), (64, 96)):
            logits = model(torch.randn(2, 3, *size))
            assert logits.shape == (2, 5, *size)
            assert logits.isfinite().all()


@pytest.mark.parametrize('encoder', ENCODERS)
@pytest.mark.parametrize('decoder', DECODERS)
def test_gradients_of_the_encoder(decoder, encoder):
    model = build(decoder, encoder)
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(5, (2, 64, 96))
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    # FEC's pooling assigns points by argmax, so that its similarities have zero gradients.
    hard = {name for name, _ in model.encoder.named_parameters() if '.downsample.f.' in name}
    assert len(hard) == (6 if encoder.startswith('fec') else 0)
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() == (name not in hard), name


@pytest.mark.parametrize('encoder', ENCODERS)
def test_same_features_as_timm(encoder):
    """The first two features are the image and an empty map for stride 2."""
    ours = build(smp.Unet, encoder).encoder.eval()
    timms = timm.create_model(encoder, features_only=True).eval()
    timms.load_state_dict(ours.model.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        image, absent, *features = ours(images)
        expected = timms(images)
    assert torch.equal(image, images)
    assert absent.shape[1] == 0
    assert ours.out_channels == [3, 0, *timms.feature_info.channels()]
    assert [feature.shape[-2:] for feature in features] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert len(features) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(features, expected))


def test_pretrained_weights_by_tag():
    name = 'coc_tiny_plain.cifar10'
    encoder = smp.FPN(f'tu-{name}', encoder_weights=True).encoder.eval()
    pretrained = timm.create_model(name, pretrained=True, features_only=True).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(encoder(images)[2:], pretrained(images)))


def test_options_of_the_encoder():
    shallow = dict(encoder_depth=4, decoder_channels=(64, 32, 16, 8))
    model = build(smp.Unet, 'coc_small', in_channels=4, **shallow, proposals=5, drop_path_rate=0.1).eval()
    blocks = [block for stage in model.encoder.model.children() for block in getattr(stage, 'blocks', [])]
    assert len(blocks) == 2 + 2 + 6  # three stages
    assert {block.token_mixer.proposals for block in blocks} == {5}
    assert model(torch.randn(1, 4, 64, 64)).shape == (1, 5, 64, 64)


def test_save_and_load(tmp_path):
    model = build(smp.Unet, 'fec_small').eval()
    model.save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(model(images), loaded(images))


@pytest.mark.parametrize('stride', [8, 16])
def test_deeplab(stride):
    model = build(smp.DeepLabV3Plus, 'coc_small', encoder_output_stride=stride).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert model.encoder(images)[-1].shape[-2:] == (64 // stride, 96 // stride)
        assert model(images).shape == (1, 5, 64, 96)


def test_deeplab_does_not_support_fec():
    with pytest.raises(ValueError, match=r'output_stride of FEC is one of \[32\], got 16'):
        build(smp.DeepLabV3Plus, 'fec_small')
