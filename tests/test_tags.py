"""cluster_zoo.tags: what is known of the weights behind a name."""

import pytest
import timm
from timm.models import get_pretrained_cfg

from cluster_zoo import authors, tags

BUNDLED = 'coc_tiny_plain.cifar10'


def test_published_results_are_tags_with_their_facts():
    names = {'coc_tiny.in1k', 'coc_tiny_plain.in1k', 'coc_small.in1k', 'coc_medium.in1k'}
    assert set(timm.list_pretrained('coc*')) == names | {BUNDLED}
    assert set(timm.list_pretrained('fec*')) == {'fec_small.in1k', 'fec_base.in1k', 'fec_large.in1k'}
    assert not timm.list_pretrained('dnc*')  # their authors published none
    for name in timm.list_pretrained(['coc*', 'fec*']):
        cfg = get_pretrained_cfg(name)
        assert cfg.paper_ids.startswith('arXiv:') and cfg.interpolation == 'bicubic' and cfg.std[0] > 0.2
        assert tags.is_published(name) and len(tags.label_names(cfg.to_dict())) == cfg.num_classes
        if name != BUNDLED:
            assert (cfg.crop_pct, cfg.input_size, cfg.num_classes) == (0.9, (3, 224, 224), 1000)
            assert authors.publication(name) == cfg.url and cfg.origin_url.startswith('https://github.com/')
    # Context Cluster's repository states a licence, FEC's none.
    licences = [get_pretrained_cfg(name).license for name in ('coc_small.in1k', 'fec_small.in1k')]
    assert licences == ['apache-2.0', None]
    assert [tags.facts(f'coc_{size}.in1k').published_top1 for size in ('tiny', 'tiny_plain', 'small', 'medium')] == [
        73.2, 73.8, 78.1, 81.2,
    ]  # fmt: skip


def test_a_name_without_a_tag_stands_for_imagenet():
    assert get_pretrained_cfg('coc_tiny_plain').num_classes == 1000
    assert tags.label_names(get_pretrained_cfg('coc_tiny_plain').to_dict())[0] == 'tench, Tinca tinca'


@pytest.mark.parametrize(
    ('cfg', 'expected'),
    [
        (dict(label_names=['a', 'b'], num_classes=2), ['a', 'b']),
        (dict(label_names={'0': 'a', '1': 'b'}, num_classes=2), ['a', 'b']),
        (dict(label_names=['n1', 'n2'], label_descriptions=dict(n1='one'), num_classes=2), ['one', 'n2']),
        (dict(label_names='ab', num_classes=2), None),
        (dict(label_names=['a', 'b'], num_classes=3), None),
        (dict(tag='a1_in1k', num_classes=10), None),
        (dict(num_classes=1000), None),
    ],
)
def test_label_names(cfg, expected):
    assert tags.label_names(cfg) == expected
