"""Few-shot transfer of a trained nearest-centroid model to new classes."""

import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import Dataset

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.transfer import class_centroids, fit_centroids

TINY = dict(channels=(8, 16, 24, 32), num_classes=5)
COLORS = ('red', 'green', 'blue', 'white', 'yellow', 'magenta', 'cyan')


class ColorImages(Dataset):
    """Images of one color with a little noise; each color is a class."""

    def __init__(self, counts: list[int], seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.transform = None
        self.items = []
        for target, count in enumerate(counts):
            for _ in range(count):
                noise = Image.fromarray(torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8).numpy())
                self.items.append((Image.blend(Image.new('RGB', (40, 40), COLORS[target]), noise, 0.2), target))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        image, target = self.items[index]
        return image if self.transform is None else self.transform(image), target


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model('dnc_resnet18', **TINY)
    for _ in range(3):  # batch statistics of similar images
        for image, _ in ColorImages([2] * 5):
            model(torch.stack([timm.data.create_transform((3, 64, 64))(image)] * 2))
    return model


def normalize(x):
    return x / x.norm(dim=-1, keepdim=True)


def blobs(counts, width=6, seed=0):
    """Unit vectors around one direction per class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    directions = torch.randn(len(counts), width, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(labels), generator=generator)
    return normalize(directions[labels] + 0.3 * noise)[order], labels[order]


def test_one_centroid_is_the_mean_direction():
    features, labels = blobs([5, 1, 9])
    centroids = class_centroids(features, labels, 3, 1)
    expected = torch.stack([normalize(features[labels == c].mean(0)) for c in range(3)]).unsqueeze(1)
    torch.testing.assert_close(centroids, expected, rtol=1e-12, atol=1e-12)


def test_as_many_centroids_as_images():
    features, labels = blobs([3, 3])
    centroids = class_centroids(features, labels, 2, 3)
    for c in range(2):
        cosines = centroids[c] @ features[labels == c].T
        assert cosines.max(0).values.min() > 1 - 1e-9  # each image is a centroid


def test_fewer_images_than_centroids():
    features, labels = blobs([1, 2])
    centroids = class_centroids(features, labels, 2, 4)
    assert centroids.shape == (2, 4, 6) and centroids.isfinite().all()
    torch.testing.assert_close(centroids[0], features[labels == 0].expand(4, -1))
    assert (centroids[1] @ features[labels == 1].T).max(0).values.min() > 0.99


def test_two_groups_in_a_class_get_one_centroid_each():
    generator = torch.Generator().manual_seed(1)
    groups = torch.eye(6, dtype=torch.float64)[:2]
    features = normalize(groups.repeat(10, 1) + 0.05 * torch.randn(20, 6, generator=generator, dtype=torch.float64))
    centroids = class_centroids(features, torch.zeros(20, dtype=torch.int64), 1, 2)[0]
    means = normalize(torch.stack([features[g::2].mean(0) for g in range(2)]))
    torch.testing.assert_close(centroids, means, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('sub_centroids', [4, 1])
def test_new_classes(model, sub_centroids):
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith('fc.')}
    feat_norm = model.get_classifier().feat_norm.weight.clone()
    dataset = ColorImages([6] * 7)
    assert fit_centroids(model, dataset, sub_centroids) is None
    assert dataset.transform is None and model.training
    head = model.get_classifier()
    assert model.num_classes == 7 and head.prototypes.shape == (7, sub_centroids, 32)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(head.feat_norm.weight, feat_norm)

    other = ColorImages([4] * 7, seed=1)
    other.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images, targets = map(list, zip(*other))
    with torch.no_grad():
        logits = model.eval()(torch.stack(images))
    assert (logits.argmax(-1) == torch.tensor(targets)).float().mean() > 0.9  # images that the model was not fitted on


def test_errors_leave_the_model_unchanged(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'1 of 3 classes .* 1'):
        fit_centroids(model, ColorImages([2, 0, 2]))
    with pytest.raises(ValueError, match='no images'):
        fit_centroids(model, ColorImages([]))
    with pytest.raises(ValueError, match='sub_centroids'):
        fit_centroids(model, ColorImages([2, 2]), sub_centroids=0)
    with pytest.raises(ValueError, match='centroid'):
        fit_centroids(timm.create_model('resnet18', **TINY), ColorImages([2, 2]))
    assert model.training and model.num_classes == 5
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
