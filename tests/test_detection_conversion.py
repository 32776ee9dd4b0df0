"""Checkpoints of mmdetection: the detector computes what a plain transcription of mmdetection computes from them."""

import pytest
import torch
from parity_cases import recipe, reference_results, relative_error
from plain_detector import batch, detect, neck, prepare

from cluster_zoo.errors import CheckpointError
from cluster_zoo.weights import load_state_dict
from segmentation.detection import create_detector
from segmentation.detection.conversion import convert_detector
from segmentation.detection.detectors import load_detector_weights

K = 3
WIDTHS = (64, 128, 320, 512)
SIZE = dict(min_size=96, max_size=150)
LIMITS = dict(candidates=300, limit=150, detections=12)  # fewer than published, to be fast
SCALES = {'rpn_head.rpn_reg': 2.0, 'roi_head.bbox_head.fc_cls': 6.0, 'roi_head.bbox_head.fc_reg': 1.0}


def shapes():
    """Names and shapes of the weights beside the backbone."""
    layers = {}
    for i, width in enumerate(WIDTHS):
        layers[f'neck.lateral_convs.{i}.conv'] = (256, width, 1, 1)
        layers[f'neck.fpn_convs.{i}.conv'] = (256, 256, 3, 3)
    layers['rpn_head.rpn_conv'] = (256, 256, 3, 3)
    layers['rpn_head.rpn_cls'] = (3, 256, 1, 1)
    layers['rpn_head.rpn_reg'] = (12, 256, 1, 1)
    layers['roi_head.bbox_head.shared_fcs.0'] = (1024, 256 * 49)
    layers['roi_head.bbox_head.shared_fcs.1'] = (1024, 1024)
    layers['roi_head.bbox_head.fc_cls'] = (K + 1, 1024)
    layers['roi_head.bbox_head.fc_reg'] = (4 * K, 1024)
    for i in range(4):
        layers[f'roi_head.mask_head.convs.{i}.conv'] = (256, 256, 3, 3)
    layers['roi_head.mask_head.upsample'] = (256, 256, 2, 2)
    layers['roi_head.mask_head.conv_logits'] = (K, 256, 1, 1)
    return layers


@pytest.fixture(scope='module')
def weights():
    """Random weights with the names of mmdetection; the backbone is that of the authors' results."""
    found = {f'backbone.{name}': value for name, value in recipe.state_dict('coc_small_dense').items()}
    for name, shape in shapes().items():
        scale = next((value for prefix, value in SCALES.items() if name.startswith(prefix)), 1.5)
        found[f'{name}.weight'] = scale * recipe.parameter(f'{name}.weight', shape)
        found[f'{name}.bias'] = recipe.parameter(f'{name}.bias', (shape[0],))
    # Otherwise one class would win everywhere
    found['roi_head.bbox_head.fc_cls.bias'] += torch.tensor([-20.0, 22.0, 0.0, -29.0])
    return found


@pytest.fixture(scope='module')
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp('mmdetection') / 'epoch_12.pth'
    torch.save(dict(meta=dict(CLASSES=('a', 'b', 'c'), epoch=12), state_dict=weights, optimizer={}), path)
    return path


@pytest.fixture(scope='module')
def detector(file):
    limits = dict(zip(('rpn_pre_nms_top_n_test', 'rpn_post_nms_top_n_test', 'box_detections_per_img'), LIMITS.values()))
    model = create_detector('mask_rcnn', 'coc_small', K, **SIZE, **limits).double().eval()
    load_detector_weights(model, load_state_dict(file), file)
    return model


@torch.no_grad()
def test_backbone_has_the_results_of_the_authors_code(detector):
    (images,) = recipe.inputs('coc_small_dense')
    expected = reference_results('coc_small_dense')
    for i, level in enumerate(detector.backbone.body(images), start=1):
        assert relative_error(level[:, :, :2, :3], expected[f'level{i}_corner']) < 1e-9
        assert relative_error(level.mean((2, 3)), expected[f'level{i}_mean']) < 1e-9


@torch.no_grad()
def test_results_are_those_of_the_transcription(detector, weights):
    """Two images, one larger and one smaller than the network's input, with sides that must be rounded."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator, dtype=torch.float64) for size in ((83, 101), (130, 210))]
    prepared = [prepare(image, 96, 150) for image in images]
    assert [x.shape[1:] for x in prepared] == [(96, 117), (93, 150)]
    levels = neck(weights, detector.backbone.body(batch(prepared)))
    seen = set()
    for i, found in enumerate(detector(images)):
        sizes = (tuple(image.shape[1:]) for image in (prepared[i], images[i]))
        expected = detect(weights, levels, i, *sizes, **LIMITS)
        assert len(expected['scores']) > 10
        assert torch.equal(found['labels'], expected['labels'] + 1)
        for name in ('boxes', 'scores', 'masks'):
            assert relative_error(found[name], expected[name]) < 1e-9, name
        print(found['labels'], found['scores'])
        seen |= set(found['labels'].tolist())
    assert seen == {1, 2, 3}


def test_a_file_loads_by_its_path(file, detector):
    model = create_detector('mask_rcnn', 'coc_small', K, checkpoint_path=file)
    own = model.state_dict()
    assert all(torch.equal(own[name], value.float()) for name, value in detector.state_dict().items())
    assert convert_detector(own, model) == own  # the names of this package stay


def build(*args, **options):
    with torch.device('meta'):  # files are refused before their values are used
        return create_detector(*args, **options)


def test_detector_without_masks(weights):
    model = build('faster_rcnn', 'coc_small', K)
    assert set(convert_detector(weights, model)) == set(model.state_dict())


def test_wrong_files(file, weights, tmp_path):
    for model, message in (
        (('mask_rcnn', 'coc_small', 80), 'box_predictor'),
        (('mask_rcnn', 'coc_medium', K), 'backbone'),
        (('retinanet', 'coc_small', K), 'extra_blocks'),
    ):
        with pytest.raises(CheckpointError, match=message):
            build(*model, checkpoint_path=file)
    files = {
        r'layer_blocks\.2': {name: x for name, x in weights.items() if 'fpn_convs.2' not in name},
        'of a classifier, not of a detector': recipe.state_dict('coc_tiny'),
        'of a segmenter, not of a detector': {'backbone.norm0.weight': torch.ones(1), 'decode_head.x': torch.ones(1)},
        'a segmenter, not of a detector': {'backbone.norms.0.weight': torch.ones(1), 'head.x': torch.ones(1)},
    }
    for message, state_dict in files.items():
        torch.save(state_dict, tmp_path / 'wrong.pth')
        with pytest.raises(CheckpointError, match=message) as found:
            build('mask_rcnn', 'coc_small', K, checkpoint_path=tmp_path / 'wrong.pth')
        assert len(str(found.value).splitlines()) == 1
