"""segmentation.detection.prediction and trained: objects in images, pictures of them, and checkpoints."""

import numpy as np
import pytest
import torch
from PIL import Image

from cluster_zoo.errors import CheckpointError, ImageError, OptionError
from segmentation.detection import create_detector, load_trained, predict
from segmentation.detection.prediction import Detected, draw_objects

ARGUMENTS = dict(backbone='test_resnet', num_classes=2, min_size=64, max_size=96)
ARGUMENTS |= dict(box_score_thresh=0.0, box_detections_per_img=8, rpn_post_nms_top_n_test=30)


@pytest.fixture(scope='module')
def model():
    """An untrained detector whose masks are neither full nor empty."""
    torch.manual_seed(0)
    model = create_detector('mask_rcnn', **ARGUMENTS)
    model.roi_heads.mask_predictor.mask_fcn_logits.weight.data *= 10
    return model


@pytest.fixture(scope='module')
def pixels():
    """A smooth image, uint8 [3, 90, 70]."""
    noise = torch.rand(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(noise, (90, 70), mode='bilinear')[0] * 255).byte()


def test_objects_are_those_of_the_model(model, pixels):
    with torch.no_grad():
        expected = model.eval()([pixels / 255])[0]
    model.train()
    array = pixels.permute(1, 2, 0).numpy()
    for image in (pixels, pixels / 255, array, Image.fromarray(array)):
        found = predict(model, image, threshold=0)
        assert len(found) == len(expected['boxes']) == 8 and model.training
        for one, box, label, score, mask in zip(found, *(expected[k] for k in ('boxes', 'labels', 'scores', 'masks'))):
            assert one.label == label and one.score == pytest.approx(score.item(), abs=1e-6)
            torch.testing.assert_close(torch.tensor(one.box), box)
            left, top, right, bottom = one.region
            assert left <= box[0] and top <= box[1] and right >= box[2] and bottom >= box[3]
            assert (one.full_mask((90, 70)) != (mask[0] >= 0.5)).float().mean() < 1e-3  # rounding at the threshold
    assert 0 < expected['masks'].ge(0.5).float().mean() < 1
    limit = expected['scores'][3:5].mean().item()
    assert len(predict(model, pixels, limit)) == 4
    with torch.no_grad():
        assert model.eval()([pixels / 255])[0]['masks'].shape == (8, 1, 90, 70)  # as before


def test_detector_of_boxes(pixels):
    sizes = {name: ARGUMENTS[name] for name in ('backbone', 'num_classes', 'min_size', 'max_size')}
    found = predict(create_detector('fcos', score_thresh=0, detections_per_img=3, **sizes), pixels, 0)
    assert len(found) == 3 and all(one.mask is None for one in found)


def test_bad_input(model, pixels):
    with pytest.raises(ImageError, match='divide by 255'):
        predict(model, pixels.float())
    broken = create_detector('mask_rcnn', **ARGUMENTS)
    broken.roi_heads.mask_predictor.mask_fcn_logits.bias.data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match='not finite'):
        predict(broken, pixels, 0)


def test_drawing():
    image = Image.new('RGB', (200, 100), (100, 100, 100))
    mask = torch.zeros(60, 120, dtype=torch.bool)
    mask[20:50, 70:110] = True
    small = Detected(1, 0.8, (170.0, 50.0, 175.0, 52.0), (170, 50, 175, 52))
    large = Detected(2, 0.9, (10.2, 20.0, 130.0, 80.0), (10, 20, 130, 80), mask)
    drawn = np.asarray(draw_objects(image, [large, small], ['a', 'b']))
    changed = (drawn != 100).any(-1)
    assert changed[40:70, 80:120].all() and drawn[50, 100].tolist() == [
        169,
        77,
        77,
    ]  # 0.55 * 100 + 0.45 * [255, 51, 51]
    assert changed[20, 10:130].all() and changed[79, 10:130].all() and changed[20:80, [10, 129]].all()
    assert changed[22:35, 14:60].any() and not changed[45:78, 15:75].any()  # class and score; the rest of the box
    assert changed[50:52, 170:175].all() and not changed[:, 135:165].any()
    assert np.asarray(image).max() == 100


def save(path, model, **args):
    args = dict(detector='mask_rcnn', backbone='test_resnet', num_classes=2, min_size=[48, 64], max_size=96) | args
    args['model_kwargs'] = dict(box_score_thresh=0.0, box_detections_per_img=8, rpn_post_nms_top_n_test=30)
    torch.save(dict(state_dict=model.state_dict(), args=args, label_names=['cat', 'bird']), path)
    return path


def test_trained_detectors(model, pixels, tmp_path):
    path = save(tmp_path / 'last.pth.tar', model)
    trained = load_trained(path)
    assert trained.classes == ('cat', 'bird') and trained.masks and not trained.model.training
    assert [one.score for one in trained.predict(pixels, 0)] == [one.score for one in predict(model, pixels, 0)]
    assert load_trained(path, min_size=[32]).model.transform.min_size == [32]
    named = load_trained(path, detector='mask_rcnn', backbone='test_resnet', num_classes=2)
    assert named.classes == ('0', '1') and named.model.roi_heads.score_thresh == 0.05
    with pytest.raises(CheckpointError, match='of another shape'):
        load_trained(path, num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    with pytest.raises(OptionError, match='does not name its model'):
        load_trained(tmp_path / 'x.pth')


def test_names_of_a_published_detector(tmp_path):
    model = create_detector('mask_rcnn_coc_small_4', backbone='coc_tiny')
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    classes = load_trained(tmp_path / 'x.pth', detector='mask_rcnn_coc_small_4', backbone='coc_tiny').classes
    assert len(classes) == 80 and classes[:2] == ('person', 'bicycle') and classes[-1] == 'toothbrush'
