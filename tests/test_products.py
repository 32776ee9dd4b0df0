"""Products that decide assignments: exact in spite of TF32 and autocast."""

import pytest
import torch

from cluster_zoo.layers.products import _bmm, ieee_bmm, ieee_linear

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def _factors(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(3, 20, 70, device=DEVICE).to(dtype), torch.randn(3, 70, 11, device=DEVICE).to(dtype)


@pytest.fixture(params=['ieee', 'tf32'])
def switch(request):
    """Both values of the switch, which the functions leave as it is."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield
    assert matmul.fp32_precision == request.param
    matmul.fp32_precision = before


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('function', [ieee_bmm, _bmm])
def test_float32(function, autocast, switch):
    a, b = _factors()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        value = function(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), a.double() @ b.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    a, b = _factors(dtype)
    wide, narrow = ieee_bmm(a, b, wide=True), ieee_bmm(a, b)
    assert wide.dtype == torch.float32 and narrow.dtype == dtype
    torch.testing.assert_close(wide.double(), a.double() @ b.double(), rtol=0, atol=2e-5)
    torch.testing.assert_close(narrow, wide.to(dtype), rtol=1e-2, atol=1e-2)


def test_float64_stays():
    a, b = (x.double() for x in _factors())
    assert torch.equal(ieee_bmm(a, b, wide=True), torch.bmm(a, b))


@pytest.mark.parametrize('function', [ieee_bmm, _bmm])
def test_gradients(function):
    inputs = [x.requires_grad_() for x in _factors()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    gradient = torch.randn(3, 20, 11, device=DEVICE)
    values = torch.autograd.grad(function(*inputs), inputs, gradient)
    for pair in zip(values, torch.autograd.grad(torch.bmm(*exact), exact, gradient.double())):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_operation_is_well_registered():
    a, b = (x.requires_grad_() for x in _factors())
    if DEVICE == 'cpu':
        a, b = a[:, :3, :5], b[:, :5, :4]
    torch.library.opcheck(_bmm, (a, b))


def test_switch_is_reset_after_an_error(switch):
    with pytest.raises(RuntimeError):
        _bmm(torch.randn(1, 2, 3, device=DEVICE), torch.randn(1, 4, 2, device=DEVICE))


def test_linear(switch):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, device=DEVICE) for shape in ((2, 9, 7), (5, 7), (5,)))
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(ieee_linear(x, weight, bias).double(), expected, rtol=0, atol=1e-5)
