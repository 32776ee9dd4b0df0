"""Creation of segmenters: image sizes, options, checkpoints, and timm's conventions."""

import copy

import pytest
import timm
import torch
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2

from cluster_zoo.errors import CheckpointError
from cluster_zoo.layers.nearest_centroid import centroid_heads
from segmentation import create_segmenter

TINY = dict(channels=16)
PAIRINGS = [
    ('semantic_fpn', 'resnet10t', dict(TINY, pyramid_channels=16)),
    ('semantic_fpn', 'coc_tiny', dict(TINY, pyramid_channels=16, proposals=3, classifier='cond')),
    ('semantic_fpn', 'fec_small', dict(TINY, pyramid_channels=16, classifier='dnc', sub_centroids=2)),
    ('upernet', 'swin_tiny_patch4_window7_224', dict(TINY, classifier='cond', auxiliary=True)),
    ('upernet', 'convnext_atto', dict(TINY, classifier='dnc')),
    ('deeplabv3plus', 'resnet10t', dict(TINY, classifier='cond', auxiliary=True)),
    ('deeplabv3plus', 'coc_tiny', dict(TINY)),
    ('deeplabv3plus', 'resnet10t', dict(TINY, classifier='dnc', common_start=0.0)),
    ('fcn', 'resnet10t', dict(TINY, output_stride=16)),
    ('fcn', 'fec_small', dict(TINY, classifier='cond')),
    ('fcn', 'mobilenetv3_small_050', dict(TINY, classifier='dnc')),
    ('region_proxy', 'vit_tiny_patch16_224', {}),
    ('region_proxy', 'deit_tiny_distilled_patch16_224', dict(early=-1)),
]


@pytest.mark.parametrize('head, backbone, options', PAIRINGS)
def test_any_size_and_all_parameters_are_used(head, backbone, options):
    torch.manual_seed(0)
    model = create_segmenter(head, backbone, 5, **options)
    outputs = model(torch.randn(2, 3, 75, 50), all_outputs=True)
    expected = {'logits', *(['guidance'] * ('cond' in options.values())), *(['auxiliary'] * ('auxiliary' in options))}
    assert set(outputs) == expected
    assert outputs['logits'].shape == (2, 5, 75, 50)
    sum(value.square().sum() for value in outputs.values()).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []
    assert len(centroid_heads(model)) == ('dnc' in options.values())
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 33, 64)).shape == (1, 5, 33, 64)


@torch.no_grad()
def test_padding():
    torch.manual_seed(0)
    model = create_segmenter('region_proxy', 'vit_tiny_patch16_224', 5, img_size=64).eval()
    images = torch.randn(1, 3, 60, 41)
    padded = torch.nn.functional.pad(images, (0, 7, 0, 4))
    torch.testing.assert_close(model(images), model(padded)[..., :60, :41])


def test_labels_at():
    model = create_segmenter('region_proxy', 'vit_tiny_patch16_224', 5)
    labels = torch.randint(5, (2, 20, 33))
    resized = model.labels_at(labels, (8, 12))  # of the image padded to 32 x 48 pixels
    for i in range(8):
        for j in range(12):
            y, x = 4 * i, 4 * j
            expected = labels[:, y, x] if y < 20 and x < 33 else torch.tensor([255, 255])
            assert torch.equal(resized[:, i, j], expected)
    assert resized.dtype == labels.dtype


def test_layer_decay():
    model = create_segmenter('deeplabv3plus', 'coc_tiny', 5, auxiliary=True, **TINY)
    layers = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    assert layers['backbone.model.stem.proj.weight'] == 0
    assert layers['backbone.model.stages.0.blocks.0.mlp.fc1.weight'] == 1
    last = max(layers.values())
    for name, layer in layers.items():
        assert (layer == last) == name.startswith(('backbone.norms.', 'head.', 'auxiliary.')), name
    transformer = create_segmenter('region_proxy', 'vit_tiny_patch16_224', 5)
    layers = group_with_matcher(transformer.named_parameters(), transformer.group_matcher(), reverse=True)
    assert layers['backbone.model.pos_embed'] == layers['backbone.model.patch_embed.proj.weight'] == 0


def test_position_embeddings_do_not_decay():
    model = create_segmenter('region_proxy', 'vit_tiny_patch16_224', 5)
    assert model.no_weight_decay() >= {'backbone.model.pos_embed', 'backbone.model.cls_token'}
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.1)
    undecayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] == 0 for p in group['params']}
    assert id(model.backbone.model.pos_embed) in undecayed


@torch.no_grad()
def test_own_checkpoint(tmp_path):
    model = create_segmenter('fcn', 'resnet10t', 5, **TINY).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'own.pth.tar')
    again = create_segmenter('fcn', 'resnet10t', 5, checkpoint_path=tmp_path / 'own.pth.tar', **TINY).eval()
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(model(images), again(images))


@torch.no_grad()
def test_unused_auxiliary_head_is_dropped(tmp_path):
    options = dict(TINY, head='deeplabv3plus', backbone='coc_tiny', num_classes=5)
    model = create_segmenter(**options, auxiliary=True).eval()  # and the norm of its level
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    again = create_segmenter(**options, checkpoint_path=tmp_path / 'own.pth').eval()
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(model(images), again(images))


def mmsegmentation_names(model):
    """Renames the state dict of a Semantic FPN on Context Cluster to the names of mmsegmentation."""
    renamed = {}
    for name, value in model.state_dict().items():
        for ours, theirs in (
            ('backbone.model.stem.proj.', 'backbone.patch_embed.proj.'),
            ('backbone.model.stages.', 'backbone.network.'),
            ('backbone.norms.', 'backbone.norm'),
            ('head.decoder.lateral_convs.', 'neck.lateral_convs.'),
            ('head.decoder.fpn_convs.', 'neck.fpn_convs.'),
            ('head.decoder.', 'decode_head.'),
            ('head.classifier.conv.', 'decode_head.conv_seg.'),
        ):
            name = name.replace(ours, theirs)
        parts = name.split('.')
        if parts[1] == 'network' and parts[3] == 'blocks':
            parts[2:4] = [str(2 * int(parts[2]))]
        elif parts[1] == 'network':
            parts[2:4] = [str(2 * int(parts[2]) - 1), 'proj']
        elif parts[1].startswith('norm') and parts[0] == 'backbone':
            parts[1:] = [f'norm{2 * int(parts[1].removeprefix("norm"))}', *parts[2:]]
        elif parts[0] == 'neck':
            parts.insert(3, 'conv')
        elif parts[1] == 'scale_heads':
            parts[3] = str(2 * int(parts[3]))
        name = '.'.join(parts).replace('.ls1.gamma', '.layer_scale_1').replace('.ls2.gamma', '.layer_scale_2')
        renamed[name] = value[:, :, 0, 0] if '.mlp.fc' in name and value.ndim == 4 else value
    coordinates = renamed.pop('backbone.model.stem.coord.weight')
    stem = 'backbone.patch_embed.proj.weight'
    renamed[stem] = torch.cat([renamed[stem], coordinates], dim=1)
    return renamed


@torch.no_grad()
def test_authors_checkpoint(tmp_path):
    torch.manual_seed(0)
    options = dict(TINY, pyramid_channels=16, proposals=5)
    model = create_segmenter('semantic_fpn', 'coc_tiny', 5, **options).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    state_dict = mmsegmentation_names(model)
    assert 'backbone.network.6.1.token_mixer.sim_alpha' in state_dict and 'backbone.norm6.weight' in state_dict
    state_dict['auxiliary_head.conv_seg.weight'] = torch.zeros(5, 256, 1, 1)  # dropped
    torch.save(dict(state_dict=state_dict, meta=dict(CLASSES=['a'], iter=80000), optimizer={}), tmp_path / 'iter.pth')
    again = create_segmenter('semantic_fpn', 'coc_tiny', 5, checkpoint_path=tmp_path / 'iter.pth', **options).eval()
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(model(images), again(images))


def test_checkpoint_with_other_classes(tmp_path):
    torch.save(create_segmenter('fcn', 'resnet10t', 7, **TINY).state_dict(), tmp_path / 'seven.pth')
    with pytest.raises(CheckpointError, match=r'head\.classifier\.conv\.weight: \[7, 16, 1, 1\] in the file, \[5, 16'):
        create_segmenter('fcn', 'resnet10t', 5, checkpoint_path=tmp_path / 'seven.pth', **TINY)


@pytest.mark.parametrize(
    'arguments, options, message',
    [
        (('semantic_fnp', 'coc_tiny', 5), {}, r'no head .semantic_fnp. \(did you mean semantic_fpn'),
        (('fcn', 'coc_tiny'), {}, 'fcn needs .*--num-classes'),
        (('fcn', 'coc_tiny', 0), {}, 'num_classes .--num-classes. .* got 0'),
        (('fcn', 'coc_tiny', 5), dict(classifier='cnd'), 'no classifier .cnd. .did you mean cond.*--classifier'),
        (('fcn', 'coc_tiny', 5), dict(channels=0), '--channels.* got 0'),
        (('fcn', 'coc_tiny', 5), dict(dropout=2), '--dropout.* got 2'),
        (('fcn', 'coc_tiny', 5), dict(sub_centroids=2), '--sub-centroids.*--classifier dnc'),
        (('fcn', 'coc_tiny', 5), dict(classifier='dnc', sub_centroids=0), '--sub-centroids.* got 0'),
        (('fcn', 'coc_tiny', 5), dict(pyramid_channels=2), 'coc_tiny does not take these options.*, pyramid_channels'),
        (('region_proxy', 'vit_tiny_patch16_224', 5), dict(classifier='cond'), 'region_proxy .* --classifier'),
        (('region_proxy', 'vit_tiny_patch16_224', 5), dict(auxiliary=True), 'region_proxy .* --auxiliary'),
        (('region_proxy', 'vit_tiny_patch16_224', 5), dict(channels=8, dropout=0), '--channels, --dropout'),
        (('semantic_fnp',), dict(pretrained=True), 'no head .semantic_fnp. .did you mean semantic_fpn'),
        (('fcn', 'coc_tiny', 5), dict(pretrained=True), 'list_segmenters.*pretrained_backbone=True'),
    ],
)
def test_invalid_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        create_segmenter(*arguments, **options)


@pytest.mark.parametrize('wrapped', [False, True])
def test_checkpoint_of_a_classifier(tmp_path, wrapped):
    weights = timm.create_model('resnet10t', num_classes=7).state_dict()
    path = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=weights, arch='resnet10t') if wrapped else weights, path)
    with pytest.raises(CheckpointError, match=r'classifier\.pth.* classifier.*--pretrained-backbone'):
        create_segmenter('fcn', 'resnet10t', 5, checkpoint_path=path, **TINY)


def test_weights_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv('CLUSTER_ZOO_HOME', str(tmp_path))
    monkeypatch.setenv('CLUSTER_ZOO_AUTHORS', '0')
    with pytest.raises(CheckpointError, match=r'condnet_r50_ade20k.*drive\.google\.com.*import FILE --as'):
        create_segmenter('condnet_r50_ade20k', pretrained=True)
    with pytest.raises(CheckpointError, match=r'condnet_swin_base_ade20k.*authors have published none'):
        create_segmenter('condnet_swin_base_ade20k', pretrained=True)


def test_meta_device_and_copies():
    model = create_segmenter('upernet', 'swin_tiny_patch4_window7_224', 5, device='meta', **TINY)
    assert {parameter.device.type for parameter in model.parameters()} == {'meta'}
    model = create_segmenter('fcn', 'resnet10t', 5, classifier='dnc', **TINY)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model).eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    'head, name', [('fcn', 'coc_tiny'), ('fcn', 'resnet10t'), ('region_proxy', 'vit_tiny_patch16_224')]
)
def test_gradient_checkpointing(head, name):
    torch.manual_seed(0)
    model = create_segmenter(head, name, 5, **({} if head == 'region_proxy' else TINY)).eval()
    images = torch.randn(1, 3, 32, 32)
    gradients, sizes, kept = [], [], []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            loss = model(images).square().sum()
        sizes.append(len(kept))
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize(
    'head, backbone, options',
    [
        ('semantic_fpn', 'coc_tiny', dict(TINY, pyramid_channels=16, classifier='cond', depths=(1, 1, 1, 1))),
        ('fcn', 'resnet10t', dict(TINY, classifier='dnc')),
        ('region_proxy', 'vit_tiny_patch16_224', dict(img_size=64)),
    ],
)
@torch.no_grad()
def test_compile_and_export_with_dynamic_sizes(head, backbone, options):
    torch.manual_seed(0)
    model = create_segmenter(head, backbone, 5, **options).eval()
    images = torch.randn(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)
    height, width = (32 * torch.export.Dim(name, min=1, max=8) for name in ('height', 'width'))
    dynamic = {0: torch.export.Dim('batch', min=1, max=8), 2: height, 3: width}
    exported = torch.export.export(model, (images,), dynamic_shapes=(dynamic,)).module()
    images = torch.randn(1, 3, 128, 64)
    torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-4)
