"""Decoders, classifiers and RegionProxy compared with results of the authors' code and with loops."""

import pytest
import torch
import torch.nn as nn
from parity_cases import recipe, reference_results, relative_error

from cluster_zoo.weights import check_fit
from segmentation.models.classifiers import CentroidClassifier, ConditionalClassifier, PlainClassifier
from segmentation.models.conversion import convert_segmenter
from segmentation.models.decoders import FCN, DeepLabV3Plus, SemanticFPN, UPerNet
from segmentation.models.region_proxy import RegionProxy
from segmentation.models.segmenter import DenseHead

F64 = dict(dtype=torch.float64)
LEVELS = (16, 32, 48, 64)
CASES = {
    'semantic_fpn': lambda: DenseHead(SemanticFPN((32, 64, 196, 320), **F64), PlainClassifier(128, 7, **F64)),
    'condnet_sep_aspp': lambda: DenseHead(
        DeepLabV3Plus(LEVELS, 32, low_level_channels=8, **F64), ConditionalClassifier(32, 7, **F64)
    ),
    'condnet_uper': lambda: DenseHead(UPerNet(LEVELS, 32, **F64), ConditionalClassifier(32, 7, **F64)),
    'region_proxy': lambda: RegionProxy((48, 48), 7, **F64),
}


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_results_of_the_authors_code(case):
    model = Model(CASES[case]())
    prefix = '' if case == 'semantic_fpn' else 'decode_head.'  # the other cases are heads without prefix
    state_dict = convert_segmenter({prefix + name: value for name, value in recipe.state_dict(case).items()}, model)
    check_fit(state_dict, model)
    model.load_state_dict(state_dict)
    outputs, expected = model.eval().head(recipe.inputs(case)), reference_results(case)
    assert set(outputs) == set(expected)
    for name, value in expected.items():
        assert relative_error(outputs[name], value) < 1e-9


def levels(channels=LEVELS, size=(13, 10), batch=2):
    h, w = size
    return [torch.randn(batch, c, -(-h // 2**i), -(-w // 2**i), **F64) for i, c in enumerate(channels)]


@pytest.mark.parametrize(
    'decoder, size',
    [
        (SemanticFPN(LEVELS, 24, pyramid_channels=20, **F64), (13, 10)),
        (UPerNet(LEVELS, 24, **F64), (13, 10)),
        (DeepLabV3Plus(LEVELS, 24, **F64), (13, 10)),
        (FCN(LEVELS, 24, **F64), (2, 2)),
        (FCN(LEVELS, 24, num_convs=1, concat_input=False, level=2, **F64), (4, 3)),
    ],
)
def test_odd_sizes(decoder, size):
    torch.manual_seed(0)
    out = decoder(levels())
    assert out.shape == (2, decoder.channels, *size)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_levels_attribute_lists_the_levels_read():
    for decoder in (
        SemanticFPN(LEVELS, **F64),
        UPerNet(LEVELS, **F64),
        DeepLabV3Plus(LEVELS, **F64),
        FCN(LEVELS, **F64),
    ):
        inputs = [level.requires_grad_() for level in levels()]
        decoder(inputs).sum().backward()
        assert list(decoder.levels) == [i for i, level in enumerate(inputs) if level.grad is not None]


@torch.no_grad()
def test_conditional_classifier_equals_loop():
    torch.manual_seed(0)
    B, C, K, h, w = 2, 6, 4, 5, 3
    classifier = ConditionalClassifier(C, K, **F64)
    nn.init.normal_(classifier.guidance.weight)
    x = torch.randn(B, C, h, w, **F64)
    outputs = classifier(x)
    for b in range(B):
        guidance = torch.zeros(K, h, w, **F64)
        for i in range(h):
            for j in range(w):
                guidance[:, i, j] = classifier.guidance.weight[:, :, 0, 0] @ x[b, :, i, j] + classifier.guidance.bias
        share = guidance.exp() / guidance.exp().sum(0)
        flat = []
        for k in range(K):
            embedding = sum(share[k, i, j] * x[b, :, i, j] for i in range(h) for j in range(w)) / (h * w)
            rows = slice(k * (C + 1), (k + 1) * (C + 1))
            flat.append(classifier.filters.weight[rows, :, 0, 0] @ embedding + classifier.filters.bias[rows])
        flat = torch.cat(flat)
        weight, bias = flat[: K * C].view(K, C), flat[K * C :]
        logits = torch.einsum('kc,cij->kij', weight, x[b]) + bias[:, None, None]
        torch.testing.assert_close(outputs['logits'][b], logits)
        torch.testing.assert_close(outputs['guidance'][b], guidance)


def test_conditional_classifier_is_independent_per_image():
    torch.manual_seed(0)
    classifier = ConditionalClassifier(6, 4, **F64)
    x = torch.randn(3, 6, 5, 3, **F64)
    together = classifier(x)['logits']
    alone = torch.cat([classifier(image[None])['logits'] for image in x])
    torch.testing.assert_close(together, alone)


@torch.no_grad()
def test_centroid_classifier_equals_loop():
    torch.manual_seed(0)
    classifier = CentroidClassifier(6, 4, sub_centroids=3, **F64)
    x = torch.randn(2, 6, 5, 3, **F64)
    logits = classifier(x)['logits']
    for b, i, j in ((0, 0, 0), (1, 4, 2), (1, 2, 1)):
        z = nn.functional.layer_norm(x[b, :, i, j], (6,))
        z = z / z.norm()
        scores = torch.stack([max(z @ (p / p.norm()) for p in centroids) for centroids in classifier.head.prototypes])
        torch.testing.assert_close(logits[b, :, i, j], nn.functional.layer_norm(scores, (4,)))


def test_centroids_are_updated_by_their_pixels():
    torch.manual_seed(0)
    classifier = CentroidClassifier(6, 4, **F64)
    with torch.no_grad():
        # Close to a centroid of class 0: only correctly classified pixels update the centroids.
        x = classifier.head.prototypes[0, 0].view(1, 6, 1, 1).expand(1, 6, 5, 3) + 0.01 * torch.randn(1, 6, 5, 3, **F64)
    before = classifier.head.prototypes.clone()
    classifier(x)
    labels = torch.zeros(1, 5, 3, dtype=torch.long)
    labels[0, 0] = 255  # ignored
    classifier.head.learn(labels)
    moved = (classifier.head.prototypes - before).abs().amax((1, 2)) > 1e-12
    assert moved.tolist() == [True, False, False, False]


def test_initial_region_proxy():
    """As in the authors' code: Kaiming for all convolutions, 0.02 for the classes, zero biases."""
    torch.manual_seed(0)
    head = RegionProxy([192, 256], 150)
    fan_out = 9 * 4 * 4  # of the last convolution, which has no ReLU
    weight = head.affinity[1].weight
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    assert weight.abs().max() > 3 * weight.std()  # normal, not uniform
    assert head.classifier.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not head.classifier.bias.any() and not head.affinity[1].bias.any()


@torch.no_grad()
def test_region_proxy_equals_loop():
    torch.manual_seed(0)
    B, D, K, h, w = 2, 8, 3, 4, 5
    head = RegionProxy((D, D), K, **F64).eval()
    nn.init.normal_(head.affinity[1].weight)
    early, last = torch.randn(B, D, h, w, **F64), torch.randn(B, D, h, w, **F64)
    logits = head([early, last])['logits']
    assert logits.shape == (B, K, 4 * h, 4 * w)
    affinity = head.affinity(early)
    tokens = torch.einsum('kc,bcij->bkij', head.classifier.weight, last) + head.classifier.bias.view(-1, 1, 1)
    for b in range(B):
        for y in range(4 * h):
            for x in range(4 * w):
                i, j, cell = y // 4, x // 4, 4 * (y % 4) + x % 4
                neighbors = [(n, i + n // 3 - 1, j + n % 3 - 1) for n in range(9)]
                neighbors = [(n, p, q) for n, p, q in neighbors if 0 <= p < h and 0 <= q < w]
                weights = torch.stack([affinity[b, 16 * n + cell, i, j] for n, _, _ in neighbors]).softmax(0)
                expected = sum(weight * tokens[b, :, p, q] for weight, (_, p, q) in zip(weights, neighbors))
                torch.testing.assert_close(logits[b, :, y, x], expected)


@pytest.mark.parametrize('classifier', [PlainClassifier, ConditionalClassifier, CentroidClassifier])
def test_half_precision(classifier):
    torch.manual_seed(0)
    module = classifier(16, 5)
    x = torch.randn(2, 16, 6, 6)
    full = module.eval()(x)['logits']
    with torch.autocast('cpu', torch.bfloat16):
        half = module(x)['logits']
    assert relative_error(half.float(), full) < 0.05


def test_conditional_classifier_does_not_overflow_in_float16():
    module = ConditionalClassifier(2, 1)
    x = torch.full((1, 2, 96, 96), 16.0)  # the sum overflows float16
    with torch.autocast('cpu', torch.float16):
        half = module(x)['logits']
    assert relative_error(half.float(), module(x)['logits']) < 0.05
