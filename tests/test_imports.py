"""The direction of imports: no circles, lower packages do not know higher ones, models do not know argparse."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ('cluster_zoo', 'segmentation')

# A unit may import the units of the lines above it.
LEVELS = (
    {'cluster_zoo', 'cluster_zoo.errors', 'cluster_zoo.home'},  # the top level has the version
    {'cluster_zoo.files'},
    {'cluster_zoo.images', 'cluster_zoo.label_files', 'cluster_zoo.layers'},
    {'cluster_zoo.weights'},
    {'cluster_zoo.models'},
    {'cluster_zoo.readers'},
    {'cluster_zoo.datasets'},
    {'cluster_zoo.features'},
    {
        'cluster_zoo.explain',
        'cluster_zoo.export',
        'cluster_zoo.predict',
        'cluster_zoo.training',
        'cluster_zoo.transfer',
    },
    {'cluster_zoo.app', 'segmentation.data'},
    {'segmentation.models'},
    {'segmentation.engine'},
    {'segmentation.detection'},
    {'segmentation'},
    {'segmentation.train', 'segmentation.validate'},
    {'segmentation.detection.train', 'segmentation.detection.validate'},
    {'cluster_zoo.cli'},
)


def _modules() -> dict[str, Path]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob('*.py') if path.name != '__main__.py']
    names = ('.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for path in paths)
    return dict(zip(names, paths))


MODULES = _modules()


def imports(name: str) -> set[str]:
    """Modules that a module imports anywhere in its file, with absolute names."""
    path, found = MODULES[name], set()
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit('.', node.level - 1)[0] if node.level else ''
            source = '.'.join(filter(None, (base, node.module)))
            members = {f'{source}.{alias.name}' for alias in node.names}
            found |= (members & MODULES.keys()) or {source}
    return found


def unit(name: str) -> str:
    """The part of a name that `LEVELS` has."""
    known = (package for level in LEVELS for package in level)
    return max((package for package in known if f'{name}.'.startswith(f'{package}.')), key=len)


def test_no_circles():
    graph = {name: (imports(name) & MODULES.keys()) - {name, name.split('.')[0]} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_direction():
    level = {package: index for index, packages in enumerate(LEVELS) for package in packages}
    wrong = {
        (name, other)
        for name in MODULES.keys() - {'cluster_zoo'}  # which imports the models to register them
        for other in imports(name) & MODULES.keys()
        if unit(other) != unit(name) and level[unit(other)] >= level[unit(name)]
    }
    assert not wrong


def test_models_and_layers_do_not_import_argparse():
    checked = [name for name in MODULES if '.models' in name or '.layers' in name]
    assert len(checked) > 10 and not [name for name in checked if 'argparse' in imports(name)]


def test_import_reads_no_environment_and_asks_no_device():
    script = (
        'import os, timm, torch\n'
        'real = os.environ.get\n'
        'def get(name, *args):\n'
        "    assert not name.startswith('CLUSTER_ZOO'), name\n"
        '    return real(name, *args)\n'
        'os.environ.get = get\n'
        'def fail(*args): raise AssertionError("a device was asked for")\n'
        'torch.cuda.device_count = torch.cuda.is_available = torch.cuda.get_device_capability = fail\n'
        'import cluster_zoo, cluster_zoo.explain, cluster_zoo.training.tasks, segmentation\n'
    )
    run = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
