"""segmentation.detection: detectors are built by name, train, and return what they should."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from torchvision.models import detection as torchvision_detection

from cluster_zoo.errors import OptionError
from segmentation.detection import create_detector, detector_config, list_detectors
from segmentation.detection.detectors import DETECTORS
from segmentation.detection.published_systems import CONFIGS

SMALL = dict(min_size=64, max_size=96)
FEW = dict(
    rpn_post_nms_top_n_train=30, rpn_post_nms_top_n_test=30, box_batch_size_per_image=8, box_detections_per_img=5
)


def small(detector, backbone='coc_tiny', **options):
    """A detector of three classes that is fast."""
    torch.manual_seed(0)
    return create_detector(detector, backbone, 3, **SMALL, **(FEW if 'rcnn' in detector else {}), **options)


def build(*args, **options):
    with torch.device('meta'):
        return create_detector(*args, **options)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def images_and_targets():
    """Two images of different sizes: two objects of the classes 1 and 3, and none."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in ((50, 70), (64, 40))]
    masks = torch.zeros(2, 50, 70, dtype=torch.uint8)
    masks[0, 5:30, 4:40], masks[1, 20:45, 30:60] = 1, 1
    boxes = torch.tensor([[4.0, 5, 40, 30], [30, 20, 60, 45]])
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, 64, 40).byte())
    return images, [dict(boxes=boxes, labels=torch.tensor([1, 3]), masks=masks), empty]


@pytest.mark.parametrize(
    'detector, backbone',
    [*((name, 'coc_tiny') for name in DETECTORS), ('mask_rcnn', 'fec_small'), ('fcos', 'resnet18')],
)
def test_every_weight_is_trained(detector, backbone):
    model = small(detector, backbone)
    images, targets = images_and_targets()
    losses = model(images, targets)
    assert len(losses) == dict(mask_rcnn=5, faster_rcnn=4, retinanet=2, fcos=3)[detector]
    sum(losses.values()).backward()
    assert not [name for name, x in model.named_parameters() if x.grad is None]  # would stop distributed training


@pytest.mark.parametrize('detector', DETECTORS)
@torch.no_grad()
def test_results(detector):
    threshold = 'box_score_thresh' if 'rcnn' in detector else 'score_thresh'
    model = small(detector, **{threshold: 0.0}).eval()
    images, _ = images_and_targets()
    for image, found in zip(images, model(images)):
        H, W = image.shape[1:]
        n = len(found['scores'])
        assert n > 0 and set(found) == {'boxes', 'labels', 'scores'} | ({'masks'} if detector == 'mask_rcnn' else set())
        assert found['boxes'].shape == (n, 4) and (found['boxes'] >= 0).all()
        assert (found['boxes'] <= torch.tensor([W, H, W, H]) * (1 + 1e-5)).all()
        assert found['labels'].max() <= 3 and (found['labels'].min() >= 1 or 'rcnn' not in detector)
        if detector == 'mask_rcnn':
            assert found['masks'].shape == (n, 1, H, W) and 0 <= found['masks'].min() <= found['masks'].max() <= 1


@pytest.mark.parametrize('detector', DETECTORS)
@torch.no_grad()
def test_autocast_keeps_the_precision_of_boxes(detector):
    threshold = 'box_score_thresh' if 'rcnn' in detector else 'score_thresh'
    model = small(detector, **{threshold: 0.0}).eval()
    images, _ = images_and_targets()
    with torch.autocast('cpu', torch.bfloat16):
        found = model(images)[0]
    assert found['boxes'].dtype == torch.float32
    assert (found['boxes'].bfloat16().float() != found['boxes']).any()


@torch.no_grad()
def test_levels():
    x = torch.rand(1, 3, 64, 96)
    for name, strides in (('mask_rcnn', [4, 8, 16, 32, 64]), ('retinanet', [8, 16, 32, 64, 128])):
        pyramid = create_detector(name, 'coc_tiny', 3).backbone
        assert pyramid.strides == strides
        expected = [(1, 256, -(-64 // stride), -(-96 // stride)) for stride in strides]
        assert [tuple(level.shape) for level in pyramid(x).values()] == expected


def test_options_go_to_the_detector_or_the_backbone():
    model = build(
        'mask_rcnn',
        'fec_small',
        3,
        proposals=7,
        regions=(2, 2, 1, 1),
        pool_regions=(2, 1, 1),
        min_size=320,
        box_score_thresh=0.3,
        image_mean=(0.5, 0.5, 0.5),
    )
    stages = model.backbone.body.model.stages
    assert [stage.downsample.regions for stage in list(stages)[1:]] == [2, 1, 1]
    assert [stage.blocks[0].token_mixer.regions for stage in stages] == [2, 2, 1, 1]
    assert [stage.blocks[0].token_mixer.proposals for stage in stages] == [7, 7, 7, 7]
    assert model.transform.min_size == (320,) and model.transform.max_size == 1333
    assert model.transform.image_mean == [0.5, 0.5, 0.5] and model.transform.image_std == [0.229, 0.224, 0.225]
    assert model.roi_heads.score_thresh == 0.3
    four = build('fcos', 'coc_tiny', 1, in_chans=4, image_mean=[0.5] * 4, image_std=[0.2] * 4)
    assert four.backbone.body.model.stem.proj.weight.shape[1] == 4


@pytest.mark.parametrize('num_classes', [1, 80])
def test_initial_masks_of_few_classes(num_classes):
    weight = create_detector('mask_rcnn', 'test_resnet', num_classes).roi_heads.mask_predictor.mask_fcn_logits.weight
    assert weight.std().item() == pytest.approx(80**-0.5 * 2**0.5, rel=0.2)  # mmdetection's for COCO


def test_settings_are_those_of_mmdetection():
    model = build('mask_rcnn', 'coc_tiny', 80)
    assert model.rpn._pre_nms_top_n == dict(training=2000, testing=1000)
    assert model.rpn._post_nms_top_n == dict(training=1000, testing=1000)
    assert (model.rpn.nms_thresh, model.rpn.score_thresh) == (0.7, 0.0) and 0 < model.rpn.min_size < 1e-30
    heads = model.roi_heads
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert (model.rpn.box_coder.weights, heads.box_coder.weights) == ((1.0,) * 4, (10.0, 10.0, 5.0, 5.0))
    assert (heads.box_roi_pool.output_size, heads.mask_roi_pool.output_size) == ((7, 7), (14, 14))
    assert (model.transform.min_size, model.transform.max_size, model.transform.size_divisible) == ((800,), 1333, 32)
    assert heads.box_predictor.cls_score.out_features == 81


@pytest.mark.parametrize(
    'args, options, message',
    [
        (('mask_rcn', 'coc_tiny', 3), {}, 'did you mean mask_rcnn'),
        (('mask_rcnn', 'coc_tyni', 3), {}, 'did you mean .*coc_tiny'),
        (('mask_rcnn', 'coc_tiny'), {}, 'needs a backbone and num_classes'),
        (('mask_rcnn', None, 3), {}, 'needs a backbone and num_classes'),
        (('mask_rcnn', 'coc_tiny', 0), {}, 'at least 1, without the background'),
        (('mask_rcnn', 'vit_tiny_patch16_224', 3), {}, 'four stages'),
        (('mask_rcnn', 'coc_tiny', 3), dict(pool_region=2), 'pool_region=2'),
        (('mask_rcnn', 'coc_tiny', 3), dict(in_chans=4), '4 channels need image_mean'),
        (('fcos', 'coc_tiny', 3), dict(image_mean=[0.5]), '3 channels need image_mean'),
        (('fcos', 'coc_tiny', 3), dict(pretrained=True), 'by name. Download a file'),
        (('mask_rcnn_coc_small_25',), dict(pretrained=True), 'drive.google.com/drive/folders/1Y-A'),
    ],
)
def test_wrong_arguments(args, options, message):
    with pytest.raises(ValueError, match=message) as found:
        build(*args, **options)
    assert len(str(found.value).splitlines()) == 1


# --- Published detectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_published_detectors(config):
    model = build(config.name)
    assert isinstance(model, torchvision_detection.MaskRCNN) and config.num_classes == 80
    assert timm.is_model(config.backbone) and config.source.startswith('https://drive.google.com/drive/folders/')
    assert json.loads(json.dumps(dataclasses.asdict(config)))['name'] == config.name
    with torch.device('meta'):
        backbone = timm.create_model(config.backbone, num_classes=0)
    widths = [stage['num_chs'] for stage in backbone.feature_info]
    expected = count(backbone) - count(backbone.norm) + sum(2 * width for width in widths)  # output norms
    expected += sum(width * 256 + 256 for width in widths) + 4 * (256 * 256 * 9 + 256)  # feature pyramid
    expected += 256 * 256 * 9 + 256 + 15 * 256 + 15  # proposals
    expected += 256 * 49 * 1024 + 1024 + 1024 * 1024 + 1024 + 81 * 5 * 1024 + 81 * 5  # boxes
    expected += 4 * (256 * 256 * 9 + 256) + 256 * 256 * 4 + 256 + 81 * 256 + 81  # masks
    assert count(model) == expected


def test_names_of_published_detectors():
    names = [f'mask_rcnn_coc_{size}_{centers}' for size in ('medium', 'small') for centers in (4, 25, 49)]
    assert list_detectors('coc') == list_detectors('*coc*') == names and len(list_detectors('*_25')) == 2
    assert list_detectors() == [*names, *(f'mask_rcnn_fec_{size}' for size in ('base', 'large', 'small'))]
    config = detector_config('mask_rcnn_coc_medium_49')
    assert (config.box_ap, config.mask_ap, config.options) == (40.6, 37.6, dict(proposals=7))
    assert (config.lr, config.weight_decay, config.epochs, config.steps, config.warmup) == (
        2e-4,
        1e-4,
        12,
        (8, 11),
        500,
    )
    with pytest.raises(OptionError, match=r'did you mean .*mask_rcnn_coc_small_4 '):
        detector_config('mask_rcnn_coc_small_5')
    assert build('mask_rcnn_coc_small_4', num_classes=7).roi_heads.box_predictor.cls_score.out_features == 8


def test_table_of_the_docs():
    page = (Path(__file__).parents[1] / 'docs' / 'detection.md').read_text(encoding='utf-8')
    for config in CONFIGS.values():
        parameters, mask_ap = f'{count(build(config.name)) / 1e6:.2f}', config.mask_ap or ''
        assert f'| `{config.name}` | `{config.backbone}` | {parameters} | {config.box_ap} | {mask_ap} |' in page
