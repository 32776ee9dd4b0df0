"""Norms, MLPs and residual connections of channels_last maps on a GPU, here on the device of the tests."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GroupNorm1, Mlp

from cluster_zoo.layers import channels_last
from cluster_zoo.layers.channels_last import GroupNorm, PointMlp, add_scaled, group_norm

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def _applied(monkeypatch):
    """Any device takes the paths that are for CUDA."""

    def is_applicable(x):
        return x.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling()

    monkeypatch.setattr(channels_last, '_is_applicable', is_applicable)


def _map(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def _check(function, plain, inputs, tolerance):
    """Result and gradients against float64."""
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = function(*inputs), plain(*exact)
    gradient = _map(*out.shape, dtype=out.dtype, seed=9)
    gradients = torch.autograd.grad(out, inputs, gradient)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for value, wanted, x in zip(
        (out, *gradients),
        (expected, *torch.autograd.grad(expected, exact, gradient.double())),
        (out, *inputs),
    ):
        assert value.dtype == x.dtype
        assert (value.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    return out


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize('shift', [0, 10])
def test_group_norm(dtype, tolerance, shift):
    inputs = [3 * _map(2, 6, 5, 7) + shift, _map(6, 1, 1, 1).flatten(), _map(6, 1, 1, 1, seed=1).flatten()]
    if dtype == torch.bfloat16 and shift:
        tolerance = 8e-2  # x itself has three digits
    inputs[0] = inputs[0].to(dtype).contiguous(memory_format=torch.channels_last)
    out = _check(
        lambda x, w, b: group_norm(x, w, b, 1e-5), lambda x, w, b: F.group_norm(x, 1, w, b, 1e-5), inputs, tolerance
    )
    assert out.dtype == dtype


def test_group_norm_under_autocast():
    """The input stays float32, and only the result is rounded."""
    norm, x = GroupNorm(6).to(DEVICE), _map(2, 6, 5, 7)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.group_norm(x.double(), 1).bfloat16())
    out.sum().backward()
    assert norm.weight.grad.dtype == torch.float32


def test_second_derivatives():
    def penalty(function, *inputs):
        (gradient,) = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), inputs)

    x, w, b = _map(2, 3, 4, 4), _map(3, 1, 1, 1).flatten() + 2, _map(3, 1, 1, 1, seed=1).flatten()
    for function, plain, inputs in (
        (lambda *x: group_norm(*x, 1e-5), lambda x, w, b: F.group_norm(x, 1, w, b), (x, w, b)),
        (add_scaled, lambda x, y, g: x + y * g.view(-1, 1, 1), (x, _map(2, 3, 4, 4, seed=2), w)),
    ):
        values = penalty(function, *(x.detach().requires_grad_() for x in inputs))
        wanted = penalty(plain, *(x.detach().double().requires_grad_() for x in inputs))
        for pair in zip(values, wanted):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize('branch', [torch.float32, torch.bfloat16])
def test_add_scaled(branch):
    inputs = [_map(2, 6, 5, 7), _map(2, 6, 5, 7, dtype=branch, seed=1), _map(6, 1, 1, 1, seed=2).flatten()]
    tolerance = 1e-6 if branch == torch.float32 else 1e-2
    out = _check(add_scaled, lambda x, y, gamma: x + y * gamma.view(-1, 1, 1), inputs, tolerance)
    assert out.dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(add_scaled(*inputs), out)


def test_mlp_is_that_of_timm():
    torch.manual_seed(0)
    mlp, other = PointMlp(6, 12).to(DEVICE), Mlp(6, 12, use_conv=True).to(DEVICE)
    other.load_state_dict(mlp.state_dict())
    _check(mlp, other.double(), [_map(2, 6, 5, 7)], 1e-5)
    calls = []
    mlp.fc1.register_forward_hook(lambda *args: calls.append(args))  # then its weights do not define its output
    torch.testing.assert_close(mlp(_map(2, 6, 5, 7)), other(_map(2, 6, 5, 7).double()).float())
    assert len(calls) == 1


@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small'])
def test_models(name, monkeypatch):
    """Logits and all gradients are those of the layers of timm."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).to(DEVICE)
    for module in model.modules():
        if hasattr(module, 'gamma'):
            torch.nn.init.constant_(module.gamma, 0.3)
    assert isinstance(model.norm, GroupNorm1)
    images, results = _map(2, 3, 64, 64), []
    for applied in (True, False):
        if not applied:
            monkeypatch.setattr(channels_last, '_is_applicable', lambda x: False)
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        results.append({'logits': logits} | {key: p.grad for key, p in model.named_parameters()})
    for key, wanted in results[1].items():
        error = (results[0][key] - wanted).abs().max()
        assert error <= 1e-3 * wanted.abs().max() + 1e-6, key
