"""hubconf.py, in a new process that has not imported the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from parity_cases import recipe, save_released

import cluster_zoo  # noqa: F401
from cluster_zoo.weights.importing import import_checkpoint

ROOT = Path(__file__).parents[1]

SCRIPT = """
import json, sys
import torch
assert 'cluster_zoo' not in sys.modules
root, cached = sys.argv[1:]
found = dict(
    names=torch.hub.list(cached, trust_repo=True, verbose=False),
    help=torch.hub.help(cached, 'coc_small', trust_repo=True),
)
# As in a process that starts with load: the models are not registered yet.
for name in [name for name in sys.modules if name.split('.')[0] in ('cluster_zoo', 'timm')]:
    del sys.modules[name]
model = torch.hub.load(root, 'fec_small', source='local', num_classes=7, in_chans=1, drop_rate=0.25)
found |= dict(
    shape=list(model(torch.zeros(2, 1, 32, 40)).shape),
    drop_rate=model.drop_rate,
    features=type(torch.hub.load(root, 'coc_tiny', source='local', features_only=True)).__name__,
    file=sys.modules['cluster_zoo'].__file__,
    bundled=torch.hub.load(root, 'coc_tiny_plain.cifar10', source='local', pretrained=True).num_classes,
    stored=torch.hub.load(root, 'coc_tiny', source='local', pretrained=True).norm.weight.tolist(),
    segmenter=torch.hub.load(root, 'segmenter', 'fcn', 'coc_tiny', 4, source='local').num_classes,
    own=sys.modules['timm'].create_model('local-dir:own', pretrained=True).norm.weight.tolist(),
)
try:
    torch.hub.load(root, 'coc_small', source='local', pretrained=True)
except RuntimeError as error:
    found['nowhere'] = str(error)
try:
    torch.hub.load(root, 'coc_tiny', source='local', pretrained=True, pretrained_cfg='no_such_tag')
except RuntimeError as error:
    found['tag'] = str(error)
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    # torch.hub.list and help take the name of a GitHub repository, which is not downloaded if it is in the cache.
    home = tmp_path_factory.mktemp('home')
    (home / 'hub').mkdir()
    (home / 'hub' / 'owner_cluster_zoo_main').symlink_to(ROOT, target_is_directory=True)
    # The default location of the cache
    released = save_released('coc_tiny', home / 'model_best.pth.tar')
    import_checkpoint(released, home / 'hub' / 'cluster_zoo' / 'coc_tiny.in1k')
    import_checkpoint(released, home / 'own')
    run = subprocess.run(
        [sys.executable, '-c', SCRIPT, str(ROOT), 'owner/cluster_zoo:main'],
        cwd=home,
        env=dict(TORCH_HOME=str(home), OMP_NUM_THREADS='1', CLUSTER_ZOO_AUTHORS='0'),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _ours(names):
    return {name for name in names if timm.models.model_entrypoint(name.split('.')[0]).__module__.startswith('cluster')}


def test_list_contains_all_models_and_weights(found):
    assert len(found['names']) == len(set(found['names']))
    assert set(found['names']) == _ours(timm.list_models()) | _ours(timm.list_pretrained()) | {'segmenter'}
    assert {'coc_tiny', 'fec_large', 'dnc_resnet50', 'dnc_coc_medium'} <= set(found['names'])


def test_help_returns_the_docstring(found):
    assert found['help'] == timm.models.model_entrypoint('coc_small').__doc__


def test_load_passes_keywords_to_create_model(found):
    assert found['shape'] == [2, 7]
    assert found['drop_rate'] == 0.25
    assert found['features'] == 'FeatureListNet'


def test_the_package_beside_hubconf_is_used(found):
    assert Path(found['file']).resolve() == ROOT / 'cluster_zoo' / '__init__.py'


def test_a_segmenter(found):
    assert found['segmenter'] == 4


def test_tag_reaches_timm(found):
    assert 'no_such_tag' in found['tag']


def test_pretrained_weights_come_from_the_same_sources(found):
    assert found['bundled'] == 10
    assert found['stored'] == found['own'] == recipe.state_dict('coc_tiny')['norm.weight'].float().tolist()
    assert 'cluster-zoo import FILE --as coc_small.in1k' in found['nowhere']
