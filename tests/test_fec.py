"""FEC: results of the authors' code, cluster pooling against loops, and its parameters without gradient."""

import math

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from parity_cases import save_released, worst_error
from reference import cluster_pool

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.models.fec import ClusterPool
from cluster_zoo.weights import load_checkpoint

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), head_dim=4, num_classes=5)


@pytest.mark.parametrize('case', ['fec_small', 'fec_base'])
def test_equals_the_authors_code(case, tmp_path):
    model = timm.create_model(case).double().eval()
    load_checkpoint(model, save_released(case, tmp_path / 'checkpoint.pth.tar'))
    assert worst_error(model, case) < 1e-9


@pytest.mark.parametrize('name, millions', [('fec_small', 5.73), ('fec_base', 15.09), ('fec_large', 29.72)])
def test_number_of_parameters(name, millions):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize('size', [(4, 6), (5, 6), (7, 3), (1, 1), (2, 1)])
@pytest.mark.parametrize('regions', [1, 2])
def test_pool_matches_loops_on_any_size(size, regions):
    torch.manual_seed(0)
    pool = ClusterPool(3, 4, regions).double().requires_grad_(False)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    out = pool(x)
    assert out.shape == (2, 4, math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    for b in range(2):
        grouped = cluster_pool(pool.f(x)[b], pool.v(x)[b], regions)
        expected = pool.skip(x)[b] + F.group_norm(grouped[None], 1, pool.norm.weight, pool.norm.bias)[0]
        torch.testing.assert_close(out[b], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('size', [(32, 32), (33, 50), (64, 47)])
def test_any_size(size):
    model = timm.create_model('fec_small', **TINY).eval()
    features, stages = model.forward_intermediates(torch.randn(2, 3, *size))
    for stage, stride in zip(stages, (4, 8, 16, 32)):
        assert stage.shape[2:] == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert torch.isfinite(model.forward_head(features)).all()


def test_f_of_the_pool_has_zero_gradient_and_no_weight_decay():
    model = timm.create_model('fec_small', **TINY)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    pools = [m for m in model.modules() if isinstance(m, ClusterPool)]
    assert len(pools) == 3
    before = []
    for pool in pools:
        assert (pool.f.weight.grad == 0).all() and (pool.f.bias.grad == 0).all()
        assert pool.v.weight.grad.abs().sum() > 0
        before.append(pool.f.weight.clone())
    timm.optim.create_optimizer_v2(model, opt='adamw', lr=0.1, weight_decay=0.5).step()
    assert all(torch.equal(pool.f.weight, weight) for pool, weight in zip(pools, before))


def test_pool_regions():
    model = timm.create_model('fec_small', **TINY, pool_regions=(4, 2, 1))
    assert [m.regions for m in model.modules() if isinstance(m, ClusterPool)] == [4, 2, 1]
    with pytest.raises(ValueError, match='pool_regions'):
        timm.create_model('fec_small', pool_regions=(1, 1))
