"""The CPU functions against the plain functions."""

import pytest
import torch

from cluster_zoo.layers import clustering, kernels


def _inputs(dtype):
    torch.manual_seed(0)
    shapes = ((2, 42, 5), (8, 5), (8,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize('contiguous', [False, True])
def test_feature_norms_and_their_gradients(contiguous):
    points, weight, bias = inputs = _inputs(torch.float64)
    gradient = torch.randn(2, 2, 42, dtype=torch.float64)
    results = []
    for function in (kernels.feature_norms, clustering.feature_norms):
        given = points if contiguous else points.transpose(1, 2).contiguous().transpose(1, 2)
        norms = function(given, weight, bias, 2)
        results.append([norms, *torch.autograd.grad(norms, inputs, gradient)])
    for value, expected in zip(*results):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *args: kernels.feature_norms(*args, 2), inputs)
    with torch.no_grad():
        torch.testing.assert_close(kernels.feature_norms(*inputs, 2), norms, rtol=1e-12, atol=1e-12)


def test_gradient_of_the_weight_alone():
    x, weight, bias = _inputs(torch.float64)
    norms = kernels.feature_norms(x.detach(), weight, bias.detach(), 2)
    expected = clustering.feature_norms(x.detach(), weight, bias.detach(), 2)
    (gradient,) = torch.autograd.grad(norms.square().sum(), weight)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected.square().sum(), weight)[0], rtol=1e-12, atol=1e-12
    )


def test_gradients_of_gradients():
    inputs = [value.double().requires_grad_() for value in _inputs(torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *args: kernels.feature_norms(*args, 2), inputs)


def test_feature_norms_under_autocast():
    x, weight, bias = _inputs(torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        norms = kernels.feature_norms(x, weight, bias, 2)
    assert norms.dtype == torch.float32
    gradients = torch.autograd.grad(norms.sum(), (x, weight, bias))
    exact = torch.autograd.grad(clustering.feature_norms(x, weight, bias, 2).sum(), (x, weight, bias))
    for value, expected in zip(gradients, exact):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0.05, atol=0.05)


def test_environment_variable_selects_the_plain_functions(monkeypatch):
    inputs = _inputs(torch.float32)
    assert 'FeatureNorms' in str(kernels.feature_norms(*inputs, 2).grad_fn)
    monkeypatch.setenv('CLUSTER_ZOO_KERNELS', 'plain')
    assert 'FeatureNorms' not in str(kernels.feature_norms(*inputs, 2).grad_fn)


@pytest.mark.parametrize('sets, points', [(1, 48), (1, 17), (3, 32)])
def test_nearest_center(sets, points):
    torch.manual_seed(0)
    x, query, offset = torch.randn(sets, points, 4), torch.randn(sets, 9, 4), torch.randn(sets, 9, 1)
    mask = torch.rand(sets, 9) > 0.3
    for center_mask in (None, mask):
        expected = clustering.nearest_center(x, query, offset, center_mask)
        assert torch.equal(kernels.nearest_center(x, query, offset, center_mask), expected)
        assert center_mask is None or center_mask.gather(1, expected).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('points', [64, 48, 17, 0])
def test_products(points, dtype):
    torch.manual_seed(0)
    x, others = torch.randn(points, 40, dtype=dtype), torch.randn(9, 2, 40, dtype=dtype)[:, 1]
    expected = (x.double() @ others.double().T).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-13}[dtype]
    value = kernels.products(x, others)
    assert value.dtype == dtype
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
