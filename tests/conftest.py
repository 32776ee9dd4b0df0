"""Fixtures that several test files share: the training scripts, a few images, an empty cache."""

import os
import sys
import tempfile

if 'PYTEST_XDIST_WORKER' in os.environ:  # two processes share the cores; before anything imports PyTorch
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch
from parity_cases import save_released
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # before anything imports Triton, as timm does


# Tests do not use the cache of the user, nor the network.
os.environ['CLUSTER_ZOO_HOME'] = os.path.join(tempfile.gettempdir(), 'cluster_zoo-tests-have-no-cache')
os.environ['CLUSTER_ZOO_AUTHORS'] = '0'
os.environ.pop('CLUSTER_ZOO_HUB', None)


@pytest.fixture(autouse=True)
def _fast_norm_off():
    """Turns off timm's fast norm, a process-wide switch, after tests of ``--fast-norm``."""
    yield
    if timm := sys.modules.get('timm'):
        timm.layers.set_fast_norm(False)


@pytest.fixture(scope='session')
def train():
    from cluster_zoo.training import train

    return train


@pytest.fixture(scope='session')
def validate():
    from cluster_zoo.training import validate

    return validate


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv('CLUSTER_ZOO_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home'


@pytest.fixture(scope='session')
def published_file(tmp_path_factory):
    """Weights of coc_tiny in the format of the authors' file."""
    return save_released('coc_tiny', tmp_path_factory.mktemp('published') / 'model_best.pth.tar')


@pytest.fixture(scope='session')
def imported(published_file, tmp_path_factory):
    """A cache with these weights as coc_tiny.in1k."""
    from cluster_zoo.weights.importing import import_checkpoint

    root = tmp_path_factory.mktemp('cache')
    import_checkpoint(published_file, root / 'coc_tiny.in1k', 'coc_tiny')
    return root


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """Noisy images in three colors: 14 of each for training, 5 for validation."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 14), ('validation', 5)):
        for channel, name in enumerate(('red', 'green', 'blue')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 150, (40, 36, 3))
                pixels[..., channel] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{index}.png')
    return root
