"""Fixtures of the script tests: the scripts as modules, and a few small images to run them on."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # before anything imports Triton, as timm does

ROOT = Path(__file__).parents[1]


def _script(name):
    """A script from the top of the checkout, which need not be on the import path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='session')
def train():
    return _script('train')


@pytest.fixture(scope='session')
def validate():
    return _script('validate')


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """Noisy images in three colours: 14 of each to train on, 5 to validate."""
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
