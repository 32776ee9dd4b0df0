"""cluster_zoo.model_card: facts kept apart and nothing invented, front matter as the Hub reads it, strings as data."""

import json
import re

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import save_for_hf

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.model_card import model_card
from cluster_zoo.tags import Facts, Measured, facts

HOSTILE = 'x"\'\n---\nlicense: mit\n---\n# Injected\n\n<script>alert(1)</script> | `` [a](b) ``` : {y}\u202e *z*'


def _config(name, folder, **kwargs):
    """What a model folder has, written by timm itself."""
    save_for_hf(timm.create_model(name, depths=(1, 1, 1, 1), **kwargs), folder, safe_serialization=True)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    del config['model_args']['num_classes']
    return dict(config, sha256='0123456789abcdef' * 4, source={'url': 'https://example.org/a', 'member': 'a.pth'})


def _front_matter(card):
    """By the Hub's own reader and by hand, which have to agree."""
    by_hand = yaml.safe_load(card.split('---\n')[1])
    assert card.startswith('---\n') and ModelCard(card).data.to_dict() == by_hand
    return by_hand


def _section(card, title):
    return re.search(rf'^## {title}\n\n(.*?)(?=^## |\Z)', card, re.MULTILINE | re.DOTALL)[1]


def test_published_tag(tmp_path):
    card = model_card(_config('coc_tiny', tmp_path), facts('coc_tiny.in1k'), 'my-lab/coc_tiny.in1k')
    assert _front_matter(card) == dict(
        license='apache-2.0',
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'transformers', 'cluster_zoo'],
        datasets=['imagenet-1k'],
    )
    results = _section(card, 'Results')
    assert 'Published by the authors: 73.2 % top-1' in results and 'nothing yet' in results
    assert '[Image as Set of Points](https://arxiv.org/abs/2303.01494)' in card
    assert '3 x 224 x 224' in card and '0.485, 0.456, 0.406' in card and 'bicubic' in card
    assert 'First install cluster_zoo as its README says' in card.partition('```python')[0]
    assert "timm.create_model('hf-hub:my-lab/coc_tiny.in1k', pretrained=True)" in card
    assert "pipeline('image-classification', model='my-lab/coc_tiny.in1k')" in card
    assert '`tench, Tinca tinca`' in card and ' and 980 more.' in card
    origin = _section(card, 'Origin')
    assert '- Source url: `https://example.org/a`' in origin and f'`{"0123456789abcdef" * 4}`' in origin
    assert 'Image as Set of Points' in _section(card, 'Citation')


def test_what_is_not_known_is_said_and_not_invented(tmp_path):
    config = _config('fec_small', tmp_path)
    del config['sha256'], config['source']
    card = model_card(config, facts('fec_small.in1k'))
    assert _front_matter(card)['license'] == 'unknown'
    assert 'Not known' in _section(card, 'Licence') and 'apache' not in card.lower()
    assert 'no figure is known' in _section(card, 'Results') and '%' not in _section(card, 'Results')
    assert 'not known' in _section(card, 'Origin') and 'SHA-256' not in card


def test_own_tag_with_next_to_no_facts():
    for known in (None, Facts()):
        card = model_card({'architecture': 'coc_tiny', 'num_classes': 3, 'pretrained_cfg': {'tag': 'mine'}}, known)
        assert _front_matter(card)['license'] == 'unknown' and 'datasets' not in _front_matter(card)
        assert '# coc_tiny.mine\n' in card and '| Trained on | not known |' in card and 'Citation' not in card
        assert 'names of the classes are not known' in card and 'None' not in card
    features = model_card({'architecture': 'coc_tiny', 'num_classes': 0}, None)
    assert _front_matter(features)['pipeline_tag'] == 'image-feature-extraction'
    assert 'softmax' not in features and '## Classes' not in features


def test_measured_figures_come_with_how_they_were_measured():
    measured = Measured(81.25, '5,000 images', 'python validate.py --model a|b', 'a laptop', '2026-01-02')
    card = model_card({'architecture': 'coc_tiny', 'num_classes': 3}, Facts(published_top1=73.2, measured=(measured,)))
    published, table = _section(card, 'Results').split('Measured with cluster_zoo:')
    assert '73.2' in published and '81.25' not in published and '73.2' not in table
    *_, row = table.strip().splitlines()
    assert row == (r'| 81.25 % | 5,000 images | <code>python validate.py --model a\|b</code> | a laptop | 2026-01-02 |')
    own = model_card({'architecture': 'coc_tiny', 'num_classes': 3}, Facts(measured=(measured,)))
    assert '81.25 %' in own and 'authors' not in _section(own, 'Results')


@pytest.mark.parametrize(
    ('stated', 'expected'),
    [
        ('apache-2.0', dict(license='apache-2.0')),
        ('MIT', dict(license='mit')),
        ('for my friends: only', dict(license='other', license_name='for my friends: only')),
        (None, dict(license='unknown')),
    ],
)
def test_licence(stated, expected):
    card = model_card({'architecture': 'coc_tiny', 'num_classes': 3, 'pretrained_cfg': {'license': stated}}, None)
    found = _front_matter(card)
    assert {key: found[key] for key in found if key.startswith('license')} == expected


def test_strings_from_elsewhere_are_data():
    cfg = dict(tag=HOSTILE, license=HOSTILE, description=HOSTILE, paper_name=HOSTILE, paper_ids=HOSTILE)
    config = dict(
        architecture=HOSTILE, num_classes=2, label_names=[HOSTILE, 'b'], source={HOSTILE: HOSTILE, 'list': [HOSTILE]},
        sha256=HOSTILE, model_args={'act_layer': HOSTILE}, pretrained_cfg=dict(cfg, interpolation=HOSTILE),
    )  # fmt: skip
    measured = Measured(1.0, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    card = model_card(config, Facts(data=HOSTILE, measured=(measured,)), f'org/{HOSTILE}')
    found = _front_matter(card)
    assert set(found) == {'license', 'license_name', 'library_name', 'pipeline_tag', 'tags'}
    assert found['license'] == 'other' and found['license_name'].startswith('x"\' --- license: mit --- # Injected')
    assert not re.search('^(# Injected|license: mit|<script)', card, re.MULTILINE) and '\u202e' not in card
    assert card.count('\n---\n') == 1  # the end of the front matter

    # As a reader of Markdown sees it: no element but the card's own
    markdown = pytest.importorskip('markdown_it', reason='markdown-it-py renders the card')
    page = markdown.MarkdownIt('gfm-like', {'linkify': False}).render(card.split('---\n', 2)[2])
    assert '<script' not in page and 'href="b"' not in page and '<em>' not in page
    assert page.count('<h1>') == 1 and page.count('<h2>') == 6 and page.count('<li>') == 3
    assert {row.count('<td>') for row in re.findall(r'<tr>\n<td>.*?</tr>', page, re.DOTALL)} == {2, 5}


def test_the_example_runs(tmp_path, monkeypatch):
    model = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    card = model_card(config, facts('coc_tiny_plain.cifar10'))
    assert "pipeline('image-classification'" not in card and 'transformers' not in _front_matter(card)['tags']
    assert '`airplane`, `automobile`' in card and f'{facts("coc_tiny_plain.cifar10").measured[0].value:.2f} %' in card

    monkeypatch.chdir(tmp_path)
    Image.effect_noise((80, 70), 90).save('image.jpg')
    (example,) = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    variables = {}
    exec(example, variables)
    with torch.inference_mode():
        torch.testing.assert_close(variables['probabilities'], model(variables['images']).softmax(-1))
