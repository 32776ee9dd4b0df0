"""segmentation.detection.evaluation: average precision of detections whose value is known."""

import math

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from torch.utils.data import Dataset

from segmentation.detection.evaluation import evaluate, table

pytest.importorskip('faster_coco_eval')

BOXES = torch.tensor([[2.0, 3, 22, 23], [40, 10, 90, 60], [5, 40, 15, 50]])  # areas 400 (small), 2500 (medium), 100
CONTENT = {0: [(0, 1), (1, 2)], 1: [(1, 1)], 2: [(2, 2)], 3: []}  # (box, label) of each image


class Objects(Dataset):
    """Four images whose first pixel is their number; the last one has no objects."""

    def __init__(self, masks=True, crowd=False):
        self.classes, self.masks, self.crowd = ['cat', 'bird', 'fish'], masks, crowd

    def __len__(self):
        return len(CONTENT)

    def __getitem__(self, index):
        image = torch.full((3, 64, 96), index / 10)
        boxes = torch.stack([BOXES[i] for i, _ in CONTENT[index]]) if CONTENT[index] else torch.zeros(0, 4)
        target = dict(boxes=boxes, labels=torch.tensor([label for _, label in CONTENT[index]], dtype=torch.long))
        target['iscrowd'] = torch.full((len(boxes),), int(self.crowd))
        target['area'] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if self.masks:
            target['masks'] = rectangles(boxes).byte()
        return image, target


def rectangles(boxes):
    masks = torch.zeros(len(boxes), 64, 96)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    return masks


class Oracle(nn.Module):
    """Finds the objects, shifted to the right, without those of the images ``missed``."""

    def __init__(self, shift=0.0, missed=(), masks=True):
        super().__init__()
        self.shift, self.missed, self.masks = torch.tensor([shift, 0, shift, 0]), missed, masks

    def forward(self, images):
        assert not self.training
        found = []
        for image in images:
            index = round(image[0, 0, 0].item() * 10)
            objects = [] if index in self.missed else CONTENT[index]
            boxes = torch.stack([BOXES[i] for i, _ in objects]) if objects else torch.zeros(0, 4)
            labels = torch.tensor([label for _, label in objects], dtype=torch.long)
            one = dict(boxes=boxes + self.shift, labels=labels, scores=boxes[:, 2:3].flatten() / 100)
            found.append(one | (dict(masks=0.5 * rectangles(boxes)[:, None]) if self.masks else {}))
        return found


def test_perfect_detections():
    model = Oracle().train()
    found = evaluate(model, Objects(), 'cpu', batch_size=3)
    assert model.training
    assert all(found[f'{kind}_{name}'] == pytest.approx(100) for kind in ('box', 'mask') for name in ('AP', 'AP75'))
    assert found['box_AP_small'] == found['box_AP_medium'] == pytest.approx(100) and math.isnan(found['box_AP_large'])
    assert found['box_AP_by_class'] == {
        'cat': pytest.approx(100),
        'bird': pytest.approx(100),
        'fish': pytest.approx(math.nan, nan_ok=True),
    }
    assert found['images'] == 4 and found['images_per_second'] > 0
    lines = table(found).splitlines()
    assert lines[0].split() == ['class', 'box', 'AP', 'mask', 'AP'] and lines[3].split() == ['fish', '-', '-']
    assert lines[-1].startswith('mask_AP 100.00  mask_AP50 100.00')


def test_boxes_and_masks_are_measured_apart():
    """Squares of 50, 20 and 10 that are shifted by 4 have the IoU 46 / 54, 16 / 24 and 6 / 14; masks are perfect."""
    found = evaluate(Oracle(shift=4.0), Objects(), 'cpu')
    assert found['mask_AP'] == pytest.approx(100)
    # One of two objects found, the one with the higher score, is a precision of 1 at 51 of the 101 recalls of COCO
    half = 100 * 51 / 101
    cat = [100] * 4 + [half] * 4 + [0] * 2  # squares of 20 and 50: both at an IoU of 0.5 to 0.65, one up to 0.85
    bird = [half] * 8 + [0] * 2  # squares of 50 and 10
    assert found['box_AP_by_class']['cat'] == pytest.approx(sum(cat) / 10)
    assert found['box_AP_by_class']['bird'] == pytest.approx(sum(bird) / 10)
    assert found['box_AP'] == pytest.approx((sum(cat) + sum(bird)) / 20)
    assert found['box_AP50'] == pytest.approx((100 + half) / 2) and found['box_AP75'] == pytest.approx(half)


def test_missed_objects():
    found = evaluate(Oracle(missed=(1, 2)), Objects(masks=False), 'cpu')
    assert not any(name.startswith('mask') for name in found)
    assert found['box_AP'] == found['box_AP50'] == pytest.approx(100 * 51 / 101)
    assert evaluate(Oracle(missed=range(4), masks=False), Objects(masks=False), 'cpu')['box_AP'] == 0


def test_detections_in_crowds_do_not_count():
    assert math.isnan(evaluate(Oracle(), Objects(crowd=True), 'cpu')['box_AP'])


def _in_a_process(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world)
    found = evaluate(Oracle(missed=(1, 2)), Objects(), 'cpu', rank=rank, world_size=world)
    assert found['box_AP'] == pytest.approx(100 * 51 / 101) and found['mask_AP'] == pytest.approx(100 * 51 / 101)
    dist.destroy_process_group()


def test_several_processes_measure_all_images(tmp_path):
    run_processes(_in_a_process, 2, str(tmp_path / 'store'))
