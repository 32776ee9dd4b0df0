"""Anchored centroids compared with plain loops over the images, their record in checkpoints, and explanations."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Subset

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.datasets import class_names, create_dataset
from cluster_zoo.errors import CheckpointError
from cluster_zoo.explain import anchor, draw_centroids, draw_explanation, explain
from cluster_zoo.models.dnc import NearestCentroidHead, nearest_centroid
from cluster_zoo.training.tasks import NearestCentroidTask
from cluster_zoo.weights import load_checkpoint

TINY = dict(channels=(8, 16, 24, 32), layers=(1, 1, 1, 1), num_classes=5)
SMALL = dict(pretrained_cfg_overlay=dict(input_size=(3, 32, 32)))
# Class 2 has fewer images than sub-centroids, class 3 has none.
CLASSES = [0, 0, 1, 4, 0, 1, 2, 0, 4, 1, 1, 4, 0, 2, 4, 0, 1, 0, 4, 4]


class ColorImages(Dataset):
    """Images of several sizes, each with four colors in its quarters."""

    transform = None

    def __init__(self, classes: list[int] = CLASSES, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.images = []
        for index in range(len(classes)):
            colors = torch.randint(0, 256, (2, 2, 3), generator=generator, dtype=torch.uint8)
            size = (32 + 4 * (index % 3), 32 + 8 * (index % 2))
            self.images.append(Image.fromarray(colors.numpy()).resize(size, Image.Resampling.NEAREST))
        self.classes_of = classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.classes_of[index]


def tiny(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('dnc_resnet18', **{**TINY, **SMALL, **kwargs})
    nn.init.normal_(model.get_classifier().mask_norm.bias, std=0.3)
    return model


@pytest.fixture(scope='module')
def anchored() -> nn.Module:
    model = tiny()
    anchor(model, ColorImages(), thumbnail=16)
    return model.eval()


@torch.no_grad()
def plain_feature(model: nn.Module, image: Image.Image) -> torch.Tensor:
    """Normalized feature of one image, computed by the model's public methods."""
    transform = create_transform(**resolve_model_data_config(model))
    model = copy.deepcopy(model).eval()
    image = transform(image).unsqueeze(0).to(next(model.parameters()))
    feature = model.get_classifier().feat_norm(model.forward_head(model.forward_features(image), pre_logits=True))[0]
    return feature / feature.norm()


def plain_anchors(model: nn.Module, dataset: ColorImages) -> dict[tuple[int, int], int]:
    """Pairs of sub-centroid and image of each class, most similar first; remaining sub-centroids get their nearest."""
    prototypes, found = model.get_classifier().prototypes, {}
    features = [plain_feature(model, image) for image in dataset.images]
    for c in range(len(prototypes)):
        own = [i for i, label in enumerate(dataset.classes_of) if label == c]
        pairs = [(float(features[i] @ p / p.norm()), -i, s) for s, p in enumerate(prototypes[c]) for i in own]
        taken = set()
        for _, i, s in sorted(pairs, reverse=True):
            if (c, s) not in found and -i not in taken:
                found[c, s] = -i
                taken.add(-i)
        for _, i, s in sorted(pairs, reverse=True):
            found.setdefault((c, s), -i)
    return found


def as_index(found: dict[tuple[int, int], int]) -> list[list[int]]:
    return [[found.get((c, s), -1) for s in range(4)] for c in range(5)]


# ---- Anchoring ----


@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_anchors_match_plain_loops(batch_size):
    model, dataset = tiny().double(), ColorImages()
    before, expected = model.get_classifier().prototypes.clone(), as_index(plain_anchors(model, dataset))
    result = anchor(model, dataset, batch_size=batch_size)
    assert result.index.tolist() == expected
    assert model.get_classifier().anchor_index.tolist() == expected
    for c in range(5):
        assert expected[c] == [-1] * 4 if c == 3 else len(set(expected[c])) == (2 if c == 2 else 4)
        for s, i in enumerate(expected[c]):
            centroid = model.get_classifier().prototypes[c, s]
            if i < 0:
                assert torch.equal(centroid, before[c, s]) and result.similarity[c, s].isnan()
                continue
            feature = plain_feature(model, dataset.images[i])
            torch.testing.assert_close(centroid, feature, rtol=0, atol=1e-12)
            assert result.similarity[c, s].item() == pytest.approx(float(feature @ before[c, s]), abs=1e-6)
    model.get_classifier().forget_anchors()
    assert result.index.tolist() == expected


@pytest.mark.parametrize('batch_size', [2, 64])
def test_first_of_equal_images(batch_size):
    model, dataset = tiny(num_classes=1, sub_centroids=1).double(), ColorImages([0] * 64)
    cosines = [float(plain_feature(model, image) @ model.fc.prototypes[0, 0]) for image in dataset.images[:4]]
    worst, best = (dataset.images[cosines.index(pick(cosines))] for pick in (min, max))
    dataset.images = [worst] * 7 + [best, worst] * 28 + [best]
    assert anchor(model, dataset, batch_size=batch_size).index.tolist() == [[7]]


@pytest.mark.parametrize('validation', [False, True])
def test_accuracy_before_and_after(validation):
    model, dataset, other = tiny(), ColorImages(), ColorImages([1, 3, 0, 4, 4, 0, 1] * 3, seed=1)
    measured = other if validation else dataset

    @torch.no_grad()
    def accuracy():
        transform, network = create_transform(**resolve_model_data_config(model)), copy.deepcopy(model).eval()
        guessed = [network(transform(image).unsqueeze(0)).argmax().item() for image in measured.images]
        return sum(g == c for g, c in zip(guessed, measured.classes_of)) / len(measured)

    before = accuracy()
    result = anchor(model, dataset, other if validation else None)
    assert result.accuracy_before == pytest.approx(before) and result.accuracy_after == pytest.approx(accuracy())
    assert before != accuracy()
    assert result.measured_on == ('validation' if validation else 'training') and result.measured_on in str(result)


def test_names_and_thumbnails(anchored):
    dataset = ColorImages()
    for c in range(5):
        for s in range(4):
            image = anchored.get_classifier().anchored_image(c, s)
            if c == 3:
                assert image is None
                continue
            assert image.name == str(image.index) and dataset.classes_of[image.index] == c
            assert image.thumbnail.size == (16, 16)
            for corner in ((1, 1), (14, 1), (1, 14), (14, 14)):
                x, y = ((side - 1) * (at > 8) for side, at in zip(dataset.images[image.index].size, corner))
                found, expected = image.thumbnail.getpixel(corner), dataset.images[image.index].getpixel((x, y))
                assert max(abs(a - b) for a, b in zip(found, expected)) <= 4


def test_file_names(tmp_path):
    for index, (image, c) in enumerate(zip(ColorImages().images, CLASSES)):
        (tmp_path / f'class {c}').mkdir(exist_ok=True)
        image.save(tmp_path / f'class {c}' / f'Bär {index} {"x" * index}.png')
    (tmp_path / 'class 2' / 'a damaged one.png').write_bytes(b'not an image')
    dataset = create_dataset('', tmp_path)
    kept = dataset.transform = object()
    model = tiny(num_classes=4)
    index = anchor(model, dataset, batch_size=2).index
    assert dataset.transform is kept and not dataset.strict
    head = model.get_classifier()
    names = [[head.anchored_image(c, s).name for s in range(4)] for c in range(4)]
    assert names == [[dataset.filename(i) for i in of_class] for of_class in index.tolist()]
    assert not any('damaged' in name for of_class in names for name in of_class)


def test_no_readable_image(tmp_path):
    (tmp_path / 'class 0').mkdir()
    for index in range(3):
        (tmp_path / 'class 0' / f'{index}.png').write_bytes(b'not an image')
    with pytest.raises(ValueError, match='no readable images'):
        anchor(tiny(), create_dataset('', tmp_path), batch_size=2)


def test_long_name_keeps_its_end():
    dataset = ColorImages([0] * 4)
    dataset.filename = lambda index: 'ü' * 2000 + f'/{index}.png'
    model = tiny(num_classes=1)
    index = anchor(model, dataset).index
    assert model.fc.anchor_name.shape == (1, 4, 1024)
    assert model.fc.anchored_image(0, 2).name.endswith(f'üüü/{index[0, 2]}.png')


def test_workers_subset_and_custom_transform():
    dataset, seen = Subset(ColorImages(), range(2, 20)), []
    transform = create_transform(input_size=(3, 48, 48))

    def counted(image):
        seen.append(image.size)
        return transform(image)

    reference, model = tiny(), tiny()
    expected = anchor(reference, dataset, transform=counted, batch_size=18)
    assert len(seen) >= 2 * 18
    result = anchor(model, dataset, transform=transform, num_workers=2, batch_size=5)
    assert torch.equal(result.index, expected.index)
    torch.testing.assert_close(model.fc.prototypes, reference.fc.prototypes, rtol=0, atol=1e-5)
    assert not torch.equal(result.index, anchor(tiny(), dataset).index)


def test_training_mode_is_restored_and_compiled_models_work():
    model = tiny().train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    compiled = torch.compile(model, backend='eager')
    other = copy.deepcopy(model)
    with torch.no_grad():
        compiled.eval()(torch.zeros(len(CLASSES), 3, 32, 32))  # compiles the graph for the batch size of the images
    for module, training in zip(model.modules(), modes):
        module.training = training
    result = anchor(compiled, ColorImages())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(result.index, anchor(other, ColorImages()).index)
    assert not any(module._forward_pre_hooks for module in model.modules())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled.eval()(images), other.eval()(images))


class Streamed(IterableDataset):
    def __iter__(self):
        yield from ColorImages()


class Tensors(ColorImages):
    def __getitem__(self, index):
        return torch.zeros(3, 32, 32), 0


@pytest.mark.parametrize(
    ('dataset', 'options', 'message'),
    [
        (ColorImages([0, 1, 5]), {}, 'class 5, .* 0 to 4'),
        (ColorImages([0, -1]), {}, 'class -1'),
        (ColorImages([]), {}, 'no images'),
        (Streamed(), {}, 'streamed'),
        (Tensors(), {}, 'Item 0 .* Tensor, expected a PIL image'),
        (ColorImages(), dict(thumbnail=0), 'thumbnail .* 256'),
        (ColorImages(), dict(thumbnail=257), 'thumbnail .* 256'),
        (ColorImages(), dict(val_dataset=ColorImages([7])), 'class 7'),
        (ColorImages(), dict(val_dataset=ColorImages([])), 'no images'),
    ],
)
def test_errors_leave_the_model_unchanged(anchored, dataset, options, message):
    model = copy.deepcopy(anchored).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        anchor(model, dataset, **options)
    assert model.training
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_non_finite_features():
    model = tiny()
    model.conv1.weight.data[0, 0, 0, 0] = torch.nan
    before = model.fc.prototypes.clone()
    with pytest.raises(ValueError, match=r'NaN or infinite .* 0 to 3'):
        anchor(model, ColorImages(), batch_size=4)
    assert torch.equal(model.fc.prototypes, before)


@pytest.mark.parametrize('use', [lambda m: anchor(m, ColorImages()), lambda m: explain(m, torch.zeros(3, 32, 32))])
def test_model_without_centroids(use):
    with pytest.raises(ValueError, match='ResNet has no centroid head'):
        use(timm.create_model('resnet18', **TINY))
    with pytest.raises(ValueError, match='NearestCentroidResNet has no centroid head'):
        use(timm.create_model('dnc_resnet18', **{**TINY, 'num_classes': 0}))


# ---- The record in checkpoints ----


def same_record(a: NearestCentroidHead, b: NearestCentroidHead) -> bool:
    names = ('prototypes', *NearestCentroidHead.optional_entries)
    return all(torch.equal(a.get_buffer(name), b.get_buffer(name)) for name in names)


def via_state_dict(model, path):
    torch.save(model.state_dict(), path / 'a.pth')
    new = tiny()
    new.load_state_dict(torch.load(path / 'a.pth'))
    return new


def via_safetensors(model, path):
    save_file(model.state_dict(), path / 'a.safetensors')
    new = tiny()
    load_checkpoint(new, path / 'a.safetensors')
    return new


def via_timm(model, path):
    torch.save({'state_dict': model.state_dict()}, path / 'a.pth')
    return tiny(checkpoint_path=str(path / 'a.pth'))


def via_pretrained_file(model, path):
    save_file(model.state_dict(), path / 'a.safetensors')
    overlay = SMALL['pretrained_cfg_overlay'] | dict(file=str(path / 'a.safetensors'), num_classes=5)
    return timm.create_model('dnc_resnet18', pretrained=True, **TINY, pretrained_cfg_overlay=overlay)


def via_nearest_centroid(model, path):
    torch.save(model.state_dict(), path / 'a.pth')
    return nearest_centroid('resnet18', checkpoint_path=path / 'a.pth', **TINY, **SMALL)


def via_assign(model, path):
    with torch.device('meta'):
        new = timm.create_model('dnc_resnet18', **TINY, **SMALL)
    new.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return new


def via_pickle(model, path):
    return pickle.loads(pickle.dumps(model))


TRANSFERS = [
    via_state_dict,
    via_safetensors,
    via_timm,
    via_pretrained_file,
    via_nearest_centroid,
    via_assign,
    via_pickle,
]


@pytest.mark.parametrize('transfer', [*TRANSFERS, lambda model, path: copy.deepcopy(model)])
def test_record_is_saved_and_copied_with_the_model(anchored, tmp_path, transfer):
    model = transfer(anchored, tmp_path).eval()
    assert same_record(model.get_classifier(), anchored.get_classifier())
    image, names = ColorImages(seed=2).images[0], list('abcde')
    expected, found = explain(anchored, image, names), explain(model, image, names)
    assert found.neighbours[0].image.name == expected.neighbours[0].image.name
    assert found.probability == pytest.approx(expected.probability)


def test_scripted_and_compiled(anchored):
    images = torch.randn(2, 3, 32, 32)
    expected = anchored(images)
    torch.testing.assert_close(torch.jit.script(anchored)(images), expected)
    torch.testing.assert_close(torch.compile(anchored, backend='eager', fullgraph=True)(images), expected)
    assert copy.deepcopy(anchored).half().fc.anchor_thumbnail.dtype == torch.uint8


@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_checkpoint])
def test_checkpoint_without_record_clears_it(anchored, tmp_path, load):
    model, state = copy.deepcopy(anchored), tiny().state_dict()
    assert not any('anchor' in name for name in state)
    torch.save(state, tmp_path / 'a.pth')
    load(model, tmp_path / 'a.pth' if load is load_checkpoint else state)
    assert model.fc.anchor_index is None and model.fc.anchored_image(0, 0) is None
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        (
            'anchor_index',
            torch.zeros(4, 4, dtype=torch.int64),
            r'anchor_index of torch.int64 \[4, 4\], expected .*5, 4',
        ),
        ('anchor_index', torch.zeros(5, 4), r'anchor_index of torch.float32 \[5, 4\], expected torch.int64'),
        ('anchor_name', torch.tensor(1, dtype=torch.uint8), r'anchor_name of torch.uint8 \[\], expected'),
        ('anchor_name', torch.zeros(1, dtype=torch.uint8).expand(5, 4, 9999), r'9999\], expected .*5, 4, 1024\]'),
        ('anchor_thumbnail', torch.zeros(5, 4, 3, 8, 9, dtype=torch.uint8), r'\[5, 4, 3, 8, 9\], expected .*9, 9\]'),
        ('anchor_thumbnail', torch.zeros(1, dtype=torch.uint8).expand(5, 4, 3, 999, 999), 'expected .*256, 256'),
        ('anchor_thumbnail', torch.zeros(5, 4, 3, 0, 0, dtype=torch.uint8), r'0, 0\], expected .*1, 1\]'),
        ('anchor_thumbnail', None, 'anchor_index, anchor_name without anchor_thumbnail'),
    ],
)
def test_malformed_record(anchored, tmp_path, name, value, message):
    state = copy.deepcopy(anchored.state_dict())
    state.pop(f'fc.{name}')
    if value is not None:
        state[f'fc.{name}'] = value
    torch.save(state, tmp_path / 'a.pth')
    for model in (tiny(), copy.deepcopy(anchored)):
        nn.init.zeros_(model.conv1.weight)
        before = copy.deepcopy(model.state_dict())
        # An expanded tensor, whose elements are not all in the file, is refused before the shapes are checked.
        refusal = f'NearestCentroidHead can ?not .*{message}|a tensor '
        with pytest.raises(CheckpointError, match=refusal):
            load_checkpoint(model, tmp_path / 'a.pth')
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        with pytest.raises(RuntimeError, match=f'NearestCentroidHead can ?not .*{message}'):
            model.load_state_dict(state)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[key], model.state_dict()[key]) for key in before if key.startswith('fc.anchor'))


def test_other_unknown_entries_are_refused(anchored, tmp_path):
    torch.save({**anchored.state_dict(), 'fc.anchor_date': torch.zeros(1)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'fc\.anchor_date'):
        load_checkpoint(tiny(), tmp_path / 'a.pth')


def test_learning_clears_the_index_and_keeps_the_entries(anchored):
    model = copy.deepcopy(anchored).train()
    averaged = ModelEmaV3(model, decay=0.5)
    keys = list(model.state_dict())
    model(torch.randn(4, 3, 32, 32))
    model.learn(torch.tensor([0, 1, 2, 4]))
    assert list(model.state_dict()) == keys
    averaged.update(model)  # pairs the entries of both state dicts by position
    for network in (model, averaged.module):
        assert (network.fc.anchor_index == -1).all()
        assert all(n.image is None for n in explain(network, torch.zeros(3, 32, 32)).neighbours)
    again = copy.deepcopy(anchored)
    again.fc.reset_parameters()
    assert again.fc.anchored_image(0, 0) is None


# ---- Explanations ----


def test_explanation_matches_plain_loops(anchored):
    dataset, names = ColorImages(), ['ant', 'bee', 'cat', 'dog', 'eel']
    for image in ColorImages(seed=3).images[:6]:
        feature = plain_feature(anchored, image)
        cosines = [[float(feature @ p / p.norm()) for p in of_class] for of_class in anchored.fc.prototypes]
        logits = anchored.fc.mask_norm(torch.tensor([max(of_class) for of_class in cosines]))
        exponents = (logits - logits.max()).exp().tolist()
        ranking = sorted(range(5), key=lambda c: -exponents[c])
        e = explain(anchored, image, names)
        assert (e.class_index, e.class_name) == (ranking[0], names[ranking[0]])
        assert e.probability == pytest.approx(exponents[ranking[0]] / sum(exponents), rel=1e-4)
        assert e.competitor_probability == pytest.approx(exponents[ranking[1]] / sum(exponents), rel=1e-4)
        found = [n.similarity for n in e.neighbours]
        assert found == pytest.approx(sorted(cosines[ranking[0]], reverse=True), abs=1e-5)
        for n in (*e.neighbours, e.competitor):
            assert n.similarity == pytest.approx(cosines[n.class_index][n.sub_centroid], abs=1e-5)
            assert n.class_name == names[n.class_index]
            assert n.class_index == 3 or dataset.classes_of[n.image.index] == n.class_index
        assert e.competitor.class_index == ranking[1]
        assert e.competitor.similarity == pytest.approx(max(cosines[ranking[1]]), abs=1e-5)


def test_anchored_image_is_most_similar_to_itself(anchored):
    dataset = ColorImages()
    image = anchored.fc.anchored_image(0, 1)
    e = explain(anchored, dataset.images[image.index])
    same = [n for n in (*e.neighbours, e.competitor) if n.image and n.image.index == image.index]
    assert same and same[0].similarity == pytest.approx(1, abs=1e-5)


def test_ranking_when_probabilities_round_to_zero(anchored):
    model = copy.deepcopy(anchored)
    model.fc.mask_norm.weight.data.zero_()
    model.fc.mask_norm.bias.data.copy_(torch.tensor([-800.0, -700.0, -600.0, -900.0, 0.0]))
    e = explain(model, torch.zeros(3, 32, 32))
    assert (e.class_index, e.competitor.class_index, e.competitor_probability) == (4, 2, 0)


def test_tensor_inputs_class_names_and_training_mode(anchored):
    model = copy.deepcopy(anchored).train()
    image, names = ColorImages().images[0], class_names(create_dataset('cluster_zoo/cifar10_sample'))
    tensor = create_transform(**resolve_model_data_config(model))(image)
    a, b = explain(model, image.convert('RGBA')), explain(model, tensor, {})
    assert model.training and model.fc._seen is None
    assert a.probability == b.probability and a.class_name == f'class {a.class_index}'
    assert explain(model, tensor, {i: names[i] for i in range(5)}).class_name == names[a.class_index]
    for wrong in (['a'], names, {i + 1: 'a' for i in range(5)}):
        with pytest.raises(ValueError, match=r'class names .* 0 to 4'):
            explain(model, tensor, wrong)
    for wrong, what in ((tensor.unsqueeze(0), r'a tensor \[1, 3, 32, 32\]'), ('a.png', 'a str')):
        with pytest.raises(ValueError, match=f'Expected a PIL image .* got {what}'):
            explain(model, wrong)


# ---- Figures ----


def shows(figure: Image.Image, image: Image.Image, side: int) -> bool:
    """Whether a figure contains an image resized to `side` x `side`."""
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    whole, part = np.asarray(figure).astype(int), np.asarray(image).astype(int)
    corner = (whole[: 1 - side, : 1 - side] == part[0, 0]).all(-1).nonzero()
    return any(np.array_equal(whole[y : y + side, x : x + side], part) for y, x in zip(*corner))


def test_figure_of_an_explanation(anchored):
    image = ColorImages().images[0]
    e = explain(anchored, image, ['a class name that is wider than the heading'] * 5)
    figure = draw_explanation(e, image)
    assert figure.mode == 'RGB' and figure.width < 1100 and shows(figure, image, 228)
    assert all(shows(figure, n.image.thumbnail, 104) for n in (*e.neighbours, e.competitor) if n.image)
    empty = draw_explanation(explain(tiny(), image), image.convert('L'))
    assert empty.height == figure.height
    assert not any(shows(empty, n.image.thumbnail, 104) for n in e.neighbours if n.image)


def test_figures_of_one_class_with_one_centroid():
    model = tiny(num_classes=1, sub_centroids=1)
    anchor(model, ColorImages([0, 0]))
    e = explain(model, ColorImages().images[0])
    assert e.competitor is None and e.competitor_probability == 0 and e.probability == 1
    figures = draw_explanation(e, ColorImages().images[0]), draw_explanation(e, Image.new('L', (9, 30)))
    assert figures[0].height == figures[1].height
    assert draw_centroids(model).height < 200


def test_figure_of_all_centroids(anchored):
    sheets = [draw_centroids(anchored, list('abcde'), columns) for columns in (None, 1, 5)]
    assert sheets[1].width < sheets[0].width < sheets[2].width
    assert sheets[1].height > sheets[0].height > sheets[2].height
    for sheet in sheets:
        images = [anchored.fc.anchored_image(c, s) for c in range(5) for s in range(4)]
        assert all(shows(sheet, image.thumbnail, 72) for image in images if image)
    with pytest.raises(ValueError, match='call anchor'):
        draw_centroids(tiny())
    with pytest.raises(ValueError, match='class names'):
        draw_centroids(anchored, ['a'])


def test_model_without_pooling():
    model = timm.create_model('dnc_swin_tiny', img_size=32, num_classes=5, depths=(1, 1, 1, 1), global_pool='', **SMALL)
    with pytest.raises(ValueError, match='keep the pooling'):
        anchor(model, ColorImages())
    with pytest.raises(ValueError, match='keep the pooling'):
        explain(model, ColorImages().images[0])


@pytest.mark.parametrize('ema_setup', ['before', 'after'])
def test_training_with_ema_continues_after_anchoring(ema_setup):
    model = tiny()
    task = NearestCentroidTask(model, verbose=False)
    if ema_setup == 'before':
        task.setup_ema(decay=0.5)
    anchor(model, ColorImages(), thumbnail=16)
    if ema_setup == 'after':
        task.setup_ema(decay=0.5)
    task.train()
    for step in range(2):
        task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 4]))['loss'].backward()
        task.update_ema(step=step + 1)
    for ema in (False, True):
        assert not any('anchor' in name for name in task.get_checkpoint_state(ema=ema).popitem()[1])
