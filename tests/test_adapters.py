"""Hooks, pruning, parametrizations and LoRA on the convolutions of cluster mixers and cluster pooling."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.layers.cluster_mixer import ClusterMixer, is_modified
from cluster_zoo.layers.grids import merge
from cluster_zoo.models.fec import ClusterPool

CONVOLUTIONS = [('mixer', 'f'), ('mixer', 'v'), ('mixer', 'proj'), ('pool', 'f'), ('pool', 'v')]
SIZES = [(8, 8), (7, 9), (1, 5)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _module(kind, regions=2, weighted=True):
    if kind == 'pool':
        return ClusterPool(6, 8, regions).double()
    mixer = ClusterMixer(6, 2, 4, proposals=2, regions=regions, weighted_mean=weighted).double()
    mixer.sim_alpha.data.fill_(2.5), mixer.sim_beta.data.fill_(-0.25)
    return mixer


def _images(*size):
    return torch.randn(2, 6, *size, dtype=torch.float64)


@pytest.mark.parametrize('name', ['coc_tiny', 'fec_small'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    """Of a model whose features are those of a hooked convolution."""
    model, images, results = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64), []
    for hooked in (False, True):
        for module in model.modules():
            if hooked and isinstance(module, ClusterMixer | ClusterPool):
                module.f.register_forward_hook(lambda *args: None)
        with torch.no_grad(), torch.autocast('cpu', dtype):
            results.append(model(images))
    assert results[1].dtype == dtype
    torch.testing.assert_close(*results, rtol=0.1, atol=0.1)


def _assert_close(value, expected, tolerance=1e-12):
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def _output_and_gradients(module, x):
    out = module(x)
    return out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])


@pytest.mark.parametrize('size', [*SIZES, (5, 4)])
@pytest.mark.parametrize('regions', [1, 2, 3])
@pytest.mark.parametrize('kind, weighted', [('mixer', True), ('mixer', False), ('pool', False)])
def test_calling_the_convolutions_gives_the_same(kind, weighted, regions, size):
    module, x = _module(kind, regions, weighted), _images(*size).requires_grad_()
    expected = _output_and_gradients(module, x)
    module.v.register_forward_hook(lambda *args: None)
    found = _output_and_gradients(module, x)
    _assert_close(found[0], expected[0])
    for value, reference in zip(found, expected):
        _assert_close(value, reference, 1e-10)


@pytest.mark.parametrize('name', ['coc_tiny', 'coc_tiny2', 'coc_tiny_plain', 'fec_small'])
def test_whole_models(name):
    model = timm.create_model(name, depths=(1, 1, 1, 1), init_values=0.5, num_classes=5).double().eval()
    hooked = copy.deepcopy(model)
    for module in hooked.modules():
        if isinstance(module, (ClusterMixer, ClusterPool)):
            module.f.register_forward_pre_hook(lambda *args: None)
    for size in ((128, 128), (120, 115)):  # at least as many points as centers: others have ties
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            _assert_close(hooked(x), model(x))


@pytest.mark.parametrize('kind, name', CONVOLUTIONS)
def test_forward_hooks_take_effect(kind, name):
    module, x = _module(kind), _images(7, 9)
    expected = copy.deepcopy(module)
    conv, seen = getattr(expected, name), []
    conv.weight.data.mul_(-2), conv.bias.data.mul_(-2)
    hook = getattr(module, name).register_forward_hook(lambda conv, x, output: seen.append(output) or -2 * output)
    _assert_close(module(x), expected(x))
    assert len(seen) == 1
    hook.remove()
    assert not is_modified(getattr(module, name))
    getattr(module, name).register_forward_pre_hook(lambda conv, inputs: (-2 * inputs[0],))
    conv.bias.data.div_(-2)
    _assert_close(module(x), expected(x))


@pytest.mark.parametrize('kind, name', CONVOLUTIONS)
def test_replaced_forward_methods_are_called(kind, name):
    """As libraries for offloading replace them."""
    module, x = _module(kind), _images(7, 9)
    hooked = copy.deepcopy(module)
    getattr(hooked, name).register_forward_hook(lambda conv, inputs, output: output.relu())
    conv = getattr(module, name)
    forward = conv.forward
    conv.forward = lambda x: forward(x).relu()
    _assert_close(module(x), hooked(x))


@pytest.mark.parametrize('size', SIZES[:2])
def test_assignment_uses_the_hooked_features(size):
    module, x = _module('mixer'), _images(*size)

    def joined():  # by the real points
        return merge(module.assign(x).transpose(1, 2), module.regions, size)

    expected = joined()
    module.f.register_forward_hook(lambda *args: None)
    assert torch.equal(joined(), expected)
    module.f.register_forward_hook(lambda conv, inputs, output: output * torch.linspace(-1, 1, 8).view(-1, 1, 1))
    assert not torch.equal(joined(), expected)


@pytest.mark.parametrize('name', ['f', 'v', 'proj'])
def test_backward_hooks_run(name):
    module, seen = _module('mixer'), []
    conv = getattr(module, name)
    conv.register_full_backward_hook(lambda conv, d_inputs, d_outputs: seen.append(d_outputs[0]))
    module(_images(8, 8).requires_grad_()).square().sum().backward()
    _assert_close(seen[0].sum((0, 2, 3)), conv.bias.grad)


@pytest.mark.parametrize('kind, name', CONVOLUTIONS)
def test_pruning(kind, name):
    module, x = _module(kind), _images(7, 9)
    expected = copy.deepcopy(module)
    conv = getattr(module, name)
    prune.ln_structured(conv, 'weight', amount=0.5, n=2, dim=0)
    getattr(expected, name).weight.data.mul_(conv.weight_mask)
    assert (conv.weight_mask == 0).any()
    _assert_close(module(x), expected(x))
    conv.weight_orig.data.add_(1.0)  # as an optimizer step does: the pruned weight is computed in each forward pass
    getattr(expected, name).weight.data.add_(1.0).mul_(conv.weight_mask)
    _assert_close(module(x), expected(x))
    prune.remove(conv, 'weight')
    assert not is_modified(conv)
    _assert_close(module(x), expected(x))


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize('kind, name', CONVOLUTIONS)
def test_parametrizations(kind, name):
    module, x = _module(kind), _images(7, 9)
    expected = copy.deepcopy(module)
    parametrize.register_parametrization(getattr(module, name), 'weight', _Doubled())
    getattr(expected, name).weight.data.mul_(2)
    _assert_close(module(x), expected(x))


class _NotAConvolution(nn.Module):
    """A replacement without ``weight`` and ``bias``."""

    def __init__(self, conv):
        super().__init__()
        self.inner = conv

    def forward(self, x):
        return self.inner(x).relu()


@pytest.mark.parametrize('kind, name', CONVOLUTIONS)
@pytest.mark.parametrize('size', SIZES)
def test_replaced_convolutions_are_called(kind, name, size):
    module, x = _module(kind), _images(*size)
    hooked = copy.deepcopy(module)
    setattr(module, name, _NotAConvolution(getattr(module, name)))
    getattr(hooked, name).register_forward_hook(lambda conv, inputs, output: output.relu())
    _assert_close(module(x), hooked(x))


@pytest.mark.parametrize('model_name', ['coc_tiny', 'fec_small'])
def test_lora(model_name):
    peft = pytest.importorskip('peft', reason='peft is not installed')
    model = timm.create_model(model_name, depths=(1, 1, 1, 1), init_values=0.5, num_classes=5).double().eval()
    x = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
    config = peft.LoraConfig(r=4, target_modules=['f', 'v', 'proj'], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).double().eval()
    logits = adapted(x)
    assert (logits - before).abs().max() > 1e-3  # the adapters are not ignored
    logits.square().sum().backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all('lora_' in name for name in trained)
    assert all(adapted.get_parameter(name).grad is not None for name in trained)
    merged = adapted.merge_and_unload()
    assert not any(is_modified(m.f) or is_modified(m.v) for m in merged.modules() if hasattr(m, 'f'))
    with torch.no_grad():
        _assert_close(merged(x), logits, 1e-10)


@pytest.mark.parametrize('kind', ['mixer', 'pool'])
def test_autocast_and_compile(kind):
    module, x = _module(kind).float(), _images(7, 9).float()
    expected = module(x)
    module.f.register_forward_hook(lambda *args: None)
    with torch.autocast('cpu', torch.bfloat16):
        low = module(x)
    assert torch.nn.functional.cosine_similarity(low.flatten().float(), expected.flatten(), 0) > 0.98
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
