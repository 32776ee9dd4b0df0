"""Backbones of dense heads, compared with results of the authors' code and with other implementations."""

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from parity_cases import recipe, reference_results, relative_error
from timm.layers import LayerNorm2d

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.errors import CheckpointError, OptionError
from segmentation import create_segmenter
from segmentation.engine.build import build_model
from segmentation.engine.train_options import train_parser
from segmentation.models.backbones import Pyramid, create_backbone
from segmentation.models.conversion import convert_segmenter


def load_backbone(backbone, state_dict):
    """Loads the backbone of an authors' checkpoint, converted like a whole checkpoint."""
    names = {f'backbone.{name}': value for name, value in state_dict.items()}
    converted = convert_segmenter(names | {'decode_head.conv_seg.weight': torch.empty(0)}, nn.Module())
    assert all(name.startswith('backbone.') for name in converted)
    backbone.double().load_state_dict({name.removeprefix('backbone.'): value for name, value in converted.items()})
    return backbone.eval()


@pytest.mark.parametrize(
    'case, name, options',
    [('coc_small_dense', 'coc_small', {}), ('fec_small_dense', 'fec_small', {})],
)
@torch.no_grad()
def test_results_of_the_authors_code(case, name, options):
    backbone = load_backbone(create_backbone(name, **options), recipe.state_dict(case))
    (images,) = recipe.inputs(case)
    expected, levels = reference_results(case), backbone(images)
    assert len(expected) == 2 * len(levels)
    for i, level in enumerate(levels, start=1):
        assert relative_error(level[:, :, :2, :3], expected[f'level{i}_corner']) < 1e-9
        assert relative_error(level.mean((2, 3)), expected[f'level{i}_mean']) < 1e-9


class PlainVisionTransformer(nn.Module):
    """Reference vision transformer with PyTorch's attention and the names of mmsegmentation."""

    def __init__(self, dim, depth, heads, side, distilled):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + distilled + side * side, dim))
        self.patch_embed = nn.ModuleDict(dict(projection=nn.Conv2d(3, dim, 16, 16)))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    ln1=nn.LayerNorm(dim, eps=1e-6),
                    attn=nn.ModuleDict(dict(attn=nn.MultiheadAttention(dim, heads, batch_first=True))),
                    ln2=nn.LayerNorm(dim, eps=1e-6),
                    ffn=nn.ModuleDict(
                        dict(
                            layers=nn.Sequential(
                                nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU()), nn.Linear(4 * dim, dim)
                            )
                        )
                    ),
                )
            )
            for _ in range(depth)
        )
        self.ln1 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x, early):
        x = self.patch_embed['projection'](x)
        B, C, h, w = x.shape
        prefix = [self.cls_token, *([self.dist_token] if hasattr(self, 'dist_token') else [])]
        x = torch.cat([*(token.expand(B, -1, -1) for token in prefix), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.pos_embed
        kept = x
        for i, layer in enumerate(self.layers):
            y = layer['ln1'](x)
            x = x + layer['attn']['attn'](y, y, y)[0]
            x = x + layer['ffn']['layers'](layer['ln2'](x))
            if i == early:
                kept = x
        return [tokens[:, len(prefix) :].reshape(B, h, w, C).permute(0, 3, 1, 2) for tokens in (kept, self.ln1(x))]


@pytest.mark.parametrize(
    'name, early',
    [('vit_tiny_patch16_224', -1), ('vit_tiny_patch16_224', 4), ('deit_tiny_distilled_patch16_224', 1)],
)
@torch.no_grad()
def test_converted_vision_transformer(name, early):
    torch.manual_seed(0)
    plain = PlainVisionTransformer(192, 12, 3, side=4, distilled='distilled' in name).double().eval()
    backbone = create_backbone(name, tokens=True, early=early, img_size=64)
    load_backbone(backbone, plain.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for ours, theirs in zip(backbone(images), plain(images, early)):
        assert relative_error(ours, theirs) < 1e-12


@torch.no_grad()
def test_converted_resnet_with_deep_stem_and_stride_8():
    torch.manual_seed(0)
    plain = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).double().eval()
    layers = []
    for i, o, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
        layers += [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    stem = nn.Sequential(*layers).double().eval()
    for module in (*plain.modules(), *stem.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    state_dict = {f'stem.{name}': value for name, value in stem.state_dict().items()}
    state_dict |= {k: v for k, v in plain.state_dict().items() if k.startswith('layer')}
    backbone = load_backbone(create_backbone('resnet50c', output_stride=8), state_dict)
    images = torch.randn(1, 3, 97, 65, dtype=torch.float64)
    x = plain.maxpool(stem(images))
    for level, stage in zip(backbone(images), (plain.layer1, plain.layer2, plain.layer3, plain.layer4)):
        x = stage(x)
        assert relative_error(level, x) < 1e-12


def mmsegmentation_names(state_dict):
    """Renames torchvision's Swin to the names of mmsegmentation, which merges patches in another order."""
    named = {}
    for name, value in state_dict.items():
        _, index, *rest = name.split('.')
        rest = '.'.join(rest)
        if name.startswith(('norm.', 'head.')) or rest.endswith('relative_position_index'):
            continue
        if index == '0':
            named['patch_embed.' + rest.replace('0.', 'projection.', 1).replace('2.', 'norm.', 1)] = value
        elif int(index) % 2:
            rest = (
                rest.replace('attn.', 'attn.w_msa.').replace('mlp.0', 'ffn.layers.0.0').replace('mlp.3', 'ffn.layers.1')
            )
            named[f'stages.{int(index) // 2}.blocks.{rest}'] = value
        else:
            # mmsegmentation merges the four points by unfold: unfold the indices to find the permutation.
            channels = value.shape[-1] // 4
            numbers = torch.arange(4.0 * channels).reshape(1, channels, 2, 2)
            unfolded = torch.nn.functional.unfold(numbers, 2).flatten()
            joined = [numbers[0, :, i, j] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
            where = {int(number): i for i, number in enumerate(torch.cat(joined))}
            order = [where[int(number)] for number in unfolded]
            named[f'stages.{int(index) // 2 - 1}.downsample.{rest}'] = value[..., order]
    return named


@torch.no_grad()
def test_converted_swin_pads_windows():
    torch.manual_seed(0)
    plain = torchvision.models.swin_t().double().eval()
    backbone = create_backbone('swin_tiny_patch4_window7_224')
    norms = {f'norm{i}.{kind}': fill(c) for i, c in enumerate(backbone.channels) for kind, fill in KINDS.items()}
    load_backbone(backbone, mmsegmentation_names(plain.state_dict()) | norms)
    images = torch.randn(1, 3, 256, 264, dtype=torch.float64)  # not a multiple of the windows in any stage
    x, stages = images, list(plain.features)
    for level, i in zip(backbone(images), (1, 3, 5, 7)):
        x = nn.Sequential(*stages[i - 1 : i + 1])(x)
        expected = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        assert relative_error(level, expected.permute(0, 3, 1, 2)) < 1e-9


KINDS = dict(weight=torch.ones, bias=torch.zeros)


@pytest.mark.parametrize(
    'name, norm',
    [('resnet10t', nn.Identity), ('convnext_atto', LayerNorm2d), ('swin_tiny_patch4_window7_224', LayerNorm2d)],
)
def test_output_norms(name, norm):
    backbone = create_backbone(name)
    assert [type(module) for module in backbone.norms] == [norm] * 4
    assert backbone.strides == [4, 8, 16, 32]


@torch.no_grad()
def test_same_features_as_timm():
    torch.manual_seed(0)
    backbone = create_backbone('mobilenetv3_small_050').eval()
    reference = timm.create_model('mobilenetv3_small_050', features_only=True).eval()
    own = reference.state_dict()
    reference.load_state_dict({name: backbone.model.state_dict()[name] for name in own})
    images = torch.randn(1, 3, 64, 96)
    for level, expected in zip(backbone(images), reference(images)[-4:]):
        torch.testing.assert_close(level, expected)


def test_pretrained_classifier_with_other_classes(tmp_path):
    classifier = timm.create_model('coc_tiny', num_classes=7)
    torch.save(dict(state_dict=classifier.state_dict(), epoch=3), tmp_path / 'classifier.pth.tar')
    backbone = create_backbone('coc_tiny', pretrained=tmp_path / 'classifier.pth.tar')
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name]), name


def test_pretrained_classifier_of_another_model(tmp_path):
    torch.save(timm.create_model('coc_tiny', num_classes=7).state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(CheckpointError, match='does not fit this FEC'):
        create_backbone('fec_small', pretrained=tmp_path / 'weights.pth')


def test_segmenter_for_a_pretrained_classifier(tmp_path):
    segmenter = create_segmenter('fcn', 'resnet10t', 5)
    torch.save(segmenter.state_dict(), tmp_path / 'segmenter.pth')
    with pytest.raises(CheckpointError, match=r'segmenter\.pth.* segmenter.*--checkpoint'):
        create_backbone('resnet10t', pretrained=tmp_path / 'segmenter.pth')


@pytest.mark.parametrize('failure', [OSError('no route to host'), RuntimeError('No weights. Use `pretrained=False`.')])
def test_pretrained_weights_cannot_be_loaded(monkeypatch, failure):
    def load(*args, **kwargs):
        raise failure

    monkeypatch.setattr(timm.models._builder, 'load_pretrained', load)
    with pytest.raises(CheckpointError, match=r'resnet10t.*--pretrained-backbone') as error:
        create_backbone('resnet10t', pretrained=True)
    assert str(failure)[:10] in str(error.value) and 'pretrained=False' not in str(error.value)


@pytest.mark.parametrize(
    'head, name, message',
    [
        ('semantic_fpn', 'vit_tiny_patch16_224', 'four stages.* region_proxy'),
        ('region_proxy', 'resnet18', 'vision transformer, and resnet18'),
        ('region_proxy', 'coc_tiny', 'semantic_fpn'),
        ('fcn', 'mixer_s32_224', 'four stages, which mixer_s32_224'),
        ('fcn', 'coc_tinny', 'did you mean coc_tiny.*--backbone'),
        ('fcn', 'resnet18 ', 'There is no model'),
    ],
)
def test_backbone_does_not_fit_head(head, name, message):
    with pytest.raises(ValueError, match=message):
        create_segmenter(head, name, 5)


def test_invalid_options():
    with pytest.raises(ValueError, match=r'coc_tiny does not take these options \(--model-kwargs\), proposal=3: '):
        create_backbone('coc_tiny', proposal=3)
    with pytest.raises(ValueError, match=r'resnet18 does not take these options \(--model-kwargs\), output_stride=7$'):
        create_backbone('resnet18', output_stride=7)
    with pytest.raises(
        ValueError, match=r'vit_tiny_patch16_224 does not take these options \(--model-kwargs\), channels=8: '
    ):
        create_backbone('vit_tiny_patch16_224', tokens=True, channels=8)
    with pytest.raises(ValueError, match=r'--early.* 0 to 11.* got 12'):
        create_backbone('vit_tiny_patch16_224', tokens=True, early=12)
    with pytest.raises(ValueError, match=r'--early.* region_proxy'):
        create_backbone('coc_tiny', early=1)


def test_resnets_have_output_stride_8_by_default():
    for name in ('resnet18', 'seresnet50', 'wide_resnet50_2'):
        for head, stride in (('deeplabv3plus', 8), ('fcn', 8), ('upernet', 32)):
            assert create_segmenter(head, name, 5, device='meta').backbone.strides[-1] == stride
    assert create_segmenter('fcn', 'resnet18', 5, output_stride=16, device='meta').backbone.strides[-1] == 16


def test_default_early_layer():
    backbone = create_backbone('vit_small_r26_s32_384', tokens=True, device='meta')
    assert (backbone.early, backbone.divisor) == (-1, 32)
    assert create_backbone('vit_tiny_patch16_224', tokens=True, device='meta').early == 4


def test_every_pyramid_parameter_is_used():
    for name in ('coc_tiny', 'resnet10t', 'convnext_atto'):
        backbone: Pyramid = create_backbone(name)
        sum(level.square().sum() for level in backbone(torch.randn(2, 3, 32, 32))).backward()
        assert not [name for name, parameter in backbone.named_parameters() if parameter.grad is None]


# ---- Backbones whose attention depends on the size ----

WINDOWED = {
    'swinv2_tiny_window8_256': (dict(embed_dim=24, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8)), 32),
    'swinv2_cr_tiny_ns_224': (dict(embed_dim=24, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8)), 32),
    'maxvit_rmlp_pico_rw_256': ({}, 256),
    'hiera_tiny_224': (dict(stages=(1, 1, 1, 1)), 224),
}


@pytest.mark.parametrize('name', WINDOWED)
@torch.no_grad()
def test_images_are_padded_to_windows(name):
    """Images of any size, or up to that of the model, give the maps of timm's model on an image with a zero border."""
    options, divisor = WINDOWED[name]
    torch.manual_seed(0)
    model = create_segmenter('fcn', name, 3, channels=8, dropout=0.0, **options).eval()
    assert model.backbone.divisor == divisor
    for height, width in ((64, 64), (90, 130), (divisor, divisor)):
        images = torch.randn(1, 3, height, width)
        assert model(images).shape == (1, 3, height, width)
        padded = F.pad(images, (0, -width % divisor, 0, -height % divisor))
        last = model.backbone.model.forward_intermediates(padded, intermediates_only=True)[-1]
        logits = model.head([model.backbone.norms[-1](last)] * 4)['logits']
        expected = F.interpolate(logits, size=padded.shape[2:], mode='bilinear')[..., :height, :width]
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize('size', [(64, 64), (100, 132), (90, 120)])
@torch.no_grad()
def test_detection_backbone_of_fec(size):
    """The published detectors have 7 x 7 centers, regions in the first two stages and in the first pooling."""
    options = dict(proposals=7, regions=(2, 2, 1, 1), pool_regions=(2, 1, 1))
    backbone = create_backbone('fec_small', **options).eval()
    pools = [stage.downsample for stage in backbone.model.stages[1:]]
    assert [pool.regions for pool in pools] == [2, 1, 1]
    images = torch.randn(1, 3, *size)
    levels = backbone(images)
    assert [level.shape[1] for level in levels] == [32, 64, 196, 320]
    plain = create_backbone('fec_small', **options | dict(pool_regions=1)).eval()
    plain.load_state_dict(backbone.state_dict())
    for level, other, same in zip(levels, plain(images), (True, False, False, False)):
        assert level.shape == other.shape and torch.equal(level, other) == same


def test_backbone_of_a_fixed_size():
    options = dict(stages=(1, 1, 1, 1))
    backbone = create_backbone('hiera_tiny_224', **options)
    assert backbone.img_size == (224, 224)
    with pytest.raises(OptionError, match=r'224 x 224 pixels only.*--crop 224 --test-mode slide.*img_size=N') as error:
        backbone(torch.randn(1, 3, 256, 256))
    assert '\n' not in str(error.value)
    larger = create_backbone('hiera_tiny_224', img_size=256, **options)
    assert (larger.img_size, larger.divisor) == ((256, 256), 256)
    assert larger(torch.randn(1, 3, 256, 256))[0].shape[2:] == (64, 64)
    # A model that timm marks, too, but accepts any size
    assert create_backbone('twins_svt_small').img_size is None


@pytest.mark.parametrize(
    ('flags', 'valid'),
    [
        ([], False),
        (['--crop', 224], False),
        (['--crop', 224, '--test-mode', 'slide', '--test-crop', 256], False),
        (['--crop', 224, '--test-mode', 'slide', '--test-crop', 224], True),
        (['--crop', 96, 224, '--test-scale', 200, 100], True),
        (['--crop', 96, '--test-scale', 300, 100], False),
    ],
)
def test_training_with_a_fixed_size(flags, valid):
    line = ['data', '--head', 'fcn', '--backbone', 'hiera_tiny_224', '--num-classes', 3, '--channels', 8]
    args = train_parser().resolve(list(map(str, [*line, '--model-kwargs', 'stages=(1,1,1,1)', *flags])))
    args.device = 'cpu'
    args.distributed = False
    if valid:
        build_model(args)
    else:
        with pytest.raises(OptionError, match='--crop 224'):
            build_model(args)
