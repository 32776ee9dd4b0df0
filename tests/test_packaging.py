"""Contents and metadata of wheel and sdist, and an import without side effects."""

import configparser
import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cluster_zoo

ROOT = Path(__file__).parents[1]
PACKAGES = ('cluster_zoo', 'segmentation')
PACKAGE = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob('*') if path.is_file()}
PACKAGE = {name for name in PACKAGE if '__pycache__' not in name}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Folder of an sdist, built from a clean copy of the checkout, and of a wheel that was built from the sdist."""
    source, output = tmp_path_factory.mktemp('source') / 'cluster_zoo', tmp_path_factory.mktemp('dist')
    leftovers = shutil.ignore_patterns('.*', '*.egg-info', 'build', 'dist', '__pycache__', 'output', 'site')
    shutil.copytree(ROOT, source, ignore=leftovers)
    run = subprocess.run(
        [sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(output), str(source)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return output


def test_wheel_contains_only_the_packages(built):
    with zipfile.ZipFile(next(built.glob('*.whl'))) as wheel:
        names = {name for name in wheel.namelist() if '.dist-info/' not in name}
        entry_points = wheel.read(f'cluster_zoo-{cluster_zoo.__version__}.dist-info/entry_points.txt').decode()
    assert names == PACKAGE
    assert {'cluster_zoo/py.typed', 'cluster_zoo/assets/cifar10_sample.tar'} <= names
    assert 'segmentation/assets/semantic_fpn_coc_tiny.camvid/model.safetensors' in names
    assert 'cluster-zoo = cluster_zoo.cli:main' in entry_points


def test_sdist_contains_scripts_tests_and_docs(built):
    with tarfile.open(next(built.glob('*.tar.gz'))) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
    wanted = PACKAGE | {'train.py', 'validate.py', 'hubconf.py', 'LICENSE', 'README.md', 'CHANGELOG.md'}
    wanted |= {'CONTRIBUTING.md', 'CITATION.cff', 'mkdocs.yml'}
    for folder, pattern in (('tests', '*.py'), ('docs', '*.*'), ('results', '*.csv'), ('benchmarks', '*.py')):
        wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}
    assert wanted <= names


def test_metadata(built):
    with zipfile.ZipFile(next(built.glob('*.whl'))) as wheel:
        metadata = next(name for name in wheel.namelist() if name.endswith('/METADATA'))
        found = email.message_from_bytes(wheel.read(metadata))
    assert (found['Name'], found['Version']) == ('cluster_zoo', cluster_zoo.__version__)
    assert found['License-Expression'] == 'Apache-2.0' or found['License'] == 'Apache-2.0'
    assert found['Requires-Python'] == '>=3.10'
    assert {'test', 'docs', 'scatter', 'dev'} <= set(found.get_all('Provides-Extra'))
    urls = {url.partition(',')[0] for url in found.get_all('Project-URL')}
    assert {'Documentation', 'Source', 'Changelog', 'Issues'} <= urls
    required = [line for line in found.get_all('Requires-Dist') if 'extra ==' not in line]
    assert required and all('>=' in line and '<' not in line and '==' not in line for line in required)


def test_version_of_setup_cfg_is_that_of_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    assert config['metadata']['version'] == cluster_zoo.__version__


def test_import_prints_nothing_and_imports_no_further_packages():
    """`import cluster_zoo` imports only what `import timm` imports already."""
    script = (
        'import sys, timm; before = set(sys.modules); import cluster_zoo; '
        'print({name.split(".")[0] for name in set(sys.modules) - before}, file=sys.stderr)'
    )
    run = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == ''
    assert run.stderr.strip() == "{'cluster_zoo'}"
