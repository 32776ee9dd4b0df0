"""README.md, docs/ and examples/: the examples run, the commands parse, and the tables agree with the models and with
results/.

Each page is one session: its Python blocks share their names, its commands share a folder with a few images. A block
after ``<!-- not run: reason -->`` is only compiled or parsed. To save minutes, training runs for one epoch, and exports
are TorchScript; tests/test_cli_export.py writes all formats.
"""

import argparse
import configparser
import csv
import functools
import json
import re
import runpy
import shlex
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image

import cluster_zoo
from cluster_zoo import cli
from cluster_zoo.datasets import create_dataset
from cluster_zoo.weights import metadata

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'results'
README = (ROOT / 'README.md').read_text(encoding='utf-8')
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'docs').rglob('*.md'))
PAGES = ['README.md', 'CONTRIBUTING.md', 'results/README.md', 'examples/getting_started.ipynb', *DOCS]
TINY_IMAGENET = ROOT.parent / 'shared' / 'data' / 'tiny_imagenet_100' / 'train.tar'
ANIMALS = dict(bee='n02206856', goldfish='n01443537', ladybug='n02165456', lion='n02129165', retriever='n02099601')
GARDENS = ['garden;robin', '', 'wren', 'robin', 'garden', 'wren;garden', 'robin', '']
EXTRAS = configparser.ConfigParser()
EXTRAS.read(ROOT / 'setup.cfg')
NEEDED = {
    'segmentation_models_pytorch': 'docs/segmentation.md',
    'faster_coco_eval': 'docs/detection.md',
}  # packages that one page needs


def read(page):
    return (ROOT / page).read_text(encoding='utf-8')


@dataclass
class Block:
    language: str
    code: str
    reason: str | None  # why it does not run
    line: int


def blocks(page):
    """The code blocks of a page, or the cells of a notebook."""
    if page.endswith('.ipynb'):
        cells = [''.join(cell['source']) for cell in json.loads(read(page))['cells'] if cell['cell_type'] == 'code']
        kinds = ['bash' if cell.startswith('!') else 'python' for cell in cells]
        return [Block(kind, cell.lstrip('!'), None, line) for line, (kind, cell) in enumerate(zip(kinds, cells))]
    found, reason = [], None
    for token in MarkdownIt('commonmark').parse(read(page)):
        if token.type == 'fence':
            found.append(Block(token.info, token.content, reason, token.map[0] + 1))
            reason = None
        elif token.nesting >= 0:
            assert reason is None, f'{page}: no code block follows the comment "not run: {reason}"'
            marked = token.type == 'html_block' and token.content.startswith('<!--')
            reason = re.fullmatch(r'<!-- not run: (\S.+) -->', token.content.strip())[1] if marked else None
    return found


# --- Commands ---------------------------------------------------------------------------------------------------------


def commands(code):
    """The commands of a bash block, as lists of words that start with a program."""
    for line in code.replace('\\\n', ' ').splitlines():
        for part in re.split(r' && | \| ', line):
            words = shlex.split(re.sub(r'\$\(|\)$', '', part), comments=True)  # without the $( ) around a command
            if words:
                yield words


class Parsed(BaseException):
    """The command line is valid."""


def parse_only(run, *args):
    """Runs a program until it has parsed its command line."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise Parsed

    with patch.object(argparse.ArgumentParser, 'parse_args', parse_and_stop), pytest.raises(Parsed):
        run(*args)


SCRIPTS = {
    'train.py': ['train'],
    'validate.py': ['validate'],
    'segmentation/train.py': ['segment', 'train'],
    'segmentation/validate.py': ['segment', 'validate'],
}


def check_command(words, run):
    """Runs a command of this package, or parses it; of other commands, checks that files and extras exist."""
    program, *rest = (Path(words[0]).name, *words[1:])
    if program == 'srun':
        return check_command(rest, run)
    if program in ('torchrun', 'python', 'python3') and rest[:2] not in (['-m', 'venv'], ['-m', 'pytest']):
        rest = rest[2:] if rest[:2] == ['-m', 'torch.distributed.launch'] else rest
        while rest[0].startswith('-') and rest[0] != '-m':  # options of the launcher
            rest = rest[1:]
        name, *argv = rest[1:] if rest[0] == '-m' else rest
        if name != 'cluster_zoo' and name not in SCRIPTS:
            assert not run, f'{name}: mark the block as not run'
            return check_script(name, argv)
        program, rest = 'cluster-zoo', [*SCRIPTS.get(name, []), *argv]
    if program == 'cluster-zoo' and run:
        rest += dict(train=['--epochs', '1', '--workers', '0'], export=['--to', 'torchscript']).get(rest[0], [])
        assert cli.main(rest) == 0, words
    elif program == 'cluster-zoo':
        parse_only(cli.main, rest)
    else:
        assert not run, f'{program} is not a command of this package: mark the block as not run'
        for extras in re.findall(r'\.\[(.*?)\]', ' '.join(rest)):
            assert set(extras.split(',')) <= set(EXTRAS['options.extras_require']), extras
        assert program != 'bash' or (ROOT / rest[0]).is_file(), rest


def check_script(name, argv):
    """Parses the command line of another script of the checkout."""
    script = ROOT / name
    assert script.is_file(), name
    path = [str(script.parent), *sys.path]  # as for a script that Python starts
    with patch.object(sys, 'argv', [name, *argv]), patch.object(sys, 'path', path):
        if argv:
            parse_only(functools.partial(runpy.run_path, run_name='__main__'), str(script))


def _write_photographs():
    """Five classes of Tiny ImageNet if it is there, else of the bundled sample: 25 images each."""
    if TINY_IMAGENET.is_file():
        with tarfile.open(TINY_IMAGENET) as archive:
            for name, synset in ANIMALS.items():
                Path('photographs', name).mkdir(parents=True)
                for index in range(25):
                    member = archive.extractfile(f'{synset}/{synset}_{index}.JPEG')
                    Path('photographs', name, f'{index}.JPEG').write_bytes(member.read())
        return
    sample = create_dataset('cluster_zoo/cifar10_sample')
    for label, name in enumerate(ANIMALS):
        Path('photographs', name).mkdir(parents=True)
        for index in range(25):
            sample[100 * label + index][0].resize((64, 64)).save(Path('photographs', name, f'{index}.webp'))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with the files that the pages name: photographs, a dataset of birds, one of streets, a model folder."""
    folder = tmp_path_factory.mktemp('files')
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        _write_files()
    return folder


@pytest.fixture
def workplace(files, tmp_path, monkeypatch):
    """A copy of the files as the current folder."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CLUSTER_ZOO_DEBUG', '1')
    return tmp_path


def _write_files():
    sample = create_dataset('cluster_zoo/cifar10_sample')
    birds = (sample[index][0].resize((48, 40)) for index in range(200, 232))
    for split, count in (('train', 8), ('val', 2)):
        for name in ('robin', 'wren'):
            folder = Path('birds', split, name)
            folder.mkdir(parents=True)
            for index in range(count):
                next(birds).save(folder / f'{index}.jpg')
        for index in range(4):
            image = Image.effect_noise((96, 64), 50)
            for kind, pixels in (('images', image.convert('RGB')), ('masks', image.point(lambda value: value // 86))):
                Path('streets', split, kind).mkdir(parents=True, exist_ok=True)
                pixels.save(Path('streets', split, kind, f'{index}.png'))
    _write_photographs()
    _write_cells()
    rows = [f'{split}/{index}.jpg,{labels}' for split in ('train', 'val') for index, labels in enumerate(GARDENS)]
    Path('gardens.csv').write_text('\n'.join(['file,labels', *rows]))
    for row in rows:
        path = Path('gardens', row.partition(',')[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        sample[200 + len(row)][0].save(path)
    Path('photos').mkdir()
    next(birds).save('photos/robin.jpg')
    next(birds).resize((96, 64)).save('photo.jpg')
    Path('docs/figures').mkdir(parents=True)
    shutil.copy(ROOT / 'docs/figures/street.jpg', 'docs/figures')
    Path('birds-model').mkdir()
    Path('birds-model/config.json').write_text('{}')


def _write_cells():
    """A dataset in the format of COCO: four images with two cells each."""
    for split in ('train', 'val'):
        images = [dict(id=index, file_name=f'{index}.png', width=96, height=64) for index in range(4)]
        corners = [(8, 8), (50, 30)]
        boxes = [dict(bbox=[x, y, 24, 20], segmentation=[[x, y, x + 24, y, x, y + 20]]) for x, y in corners]
        pairs = [(image, box) for image in images for box in boxes]
        annotations = [dict(box, id=i, image_id=image['id'], category_id=1) for i, (image, box) in enumerate(pairs)]
        content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='cell')])
        Path('cells', split).mkdir(parents=True)
        Path('cells', 'annotations').mkdir(exist_ok=True)
        Path('cells', 'annotations', f'instances_{split}.json').write_text(json.dumps(content))
        for image in images:
            Image.effect_noise((96, 64), 50).save(Path('cells', split, image['file_name']))


# --- Examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page)])
def test_examples(page, workplace):
    for package, needed_by in NEEDED.items():
        if page.endswith(needed_by):
            pytest.importorskip(package)
    names = {'__name__': 'docs'}
    for block in blocks(page):
        where = f'{page}:{block.line}'
        if block.language == 'python':
            code = compile('\n' * block.line + block.code, page, 'exec')
            if block.reason is None:
                exec(code, names)
        elif block.language == 'bash':
            for words in commands(block.code):
                print(where, *words)
                check_command(words, run=block.reason is None)
        else:
            assert block.language in ('text', 'bibtex'), f'{where}: what language is this block?'


def test_a_wrong_flag_and_a_missing_reason_are_found(tmp_path, monkeypatch, workplace):
    """The checks above fail where they should."""
    with pytest.raises(SystemExit):
        check_command(shlex.split('cluster-zoo train --data-dir birds --modle coc_tiny'), run=False)
    with pytest.raises(SystemExit):
        check_command(shlex.split('torchrun --nproc-per-node=8 segmentation/train.py DATA --crop x'), run=False)
    with pytest.raises(SystemExit):
        check_command(shlex.split('python benchmarks/throughput.py --rounds x'), run=False)
    monkeypatch.setattr(f'{__name__}.ROOT', tmp_path)
    Path('page.md').write_text('<!-- not run: -->\n```bash\ncluster-zoo demo\n```\n')
    with pytest.raises(TypeError):
        blocks('page.md')
    Path('page.md').write_text('<!-- not run: a reason -->\n\nText.\n')
    with pytest.raises(AssertionError, match='a reason'):
        blocks('page.md')


def test_links_of_the_readme():
    for link in re.findall(r'\]\((?!https?:)(.*?)\)', README + read('CONTRIBUTING.md') + read('results/README.md')):
        path, _, anchor = link.partition('#')
        path = next((folder / path for folder in (ROOT, RESULTS) if (folder / path).exists()), None)
        assert path, link
        headings = re.findall(r'^#+ (.*)$', path.read_text(encoding='utf-8'), re.MULTILINE) if anchor else []
        slugs = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]
        assert not anchor or anchor in slugs, link


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


# --- Tables -----------------------------------------------------------------------------------------------------------


def table(text, heading):
    """Rows of the first table after a heading, as lists of cells without backquotes."""
    rows = re.search(r'(^\|.*\n)+', text[text.index(f'\n{heading}\n') :], re.MULTILINE).group().splitlines()[2:]
    return [[cell.strip().strip('`') for cell in row.strip('|').split('|')] for row in rows]


def results(name):
    """Rows of a file of results/, by model."""
    with open(RESULTS / name, newline='') as file:
        return {row['model']: row for row in csv.DictReader(file)}


@functools.cache
def parameters(name):
    """Parameters of a model in millions, as text."""
    with torch.device('meta'):
        model = timm.create_model(name)
    return f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}'


def test_models_of_the_readme():
    rows = {name: (count, top1) for name, count, top1, _ in table(README, '## Models')}
    assert sorted(rows) == sorted(metadata.package_models())
    published = results('results-imagenet.csv')
    for name, (count, top1) in rows.items():
        assert count == parameters(name), name
        assert top1 == published.get(f'{name}.in1k', dict(top1=''))['top1'], name


def test_models_of_the_docs():
    page = read('docs/models.md')
    released = {name: (count, top1) for name, count, top1 in table(page, '## Classifiers')}
    published = results('results-imagenet.csv')
    assert released == {name: (row['param_count'], row['top1']) for name, row in published.items()}
    others = {name: count for name, count, _ in table(page, 'Other registered models have no released weights for it:')}
    assert others == {name: parameters(name) for name in others}
    documented = {name.partition('.')[0] for name in (*released, *others)}
    assert documented == set(metadata.package_models())


def test_published_results_are_those_of_the_package():
    published = results('results-imagenet.csv')
    assert set(published) == {name for name in metadata.package_tags() if name.endswith('.in1k')}
    for name, row in published.items():
        top1, cfg = metadata.release(name).published_top1, timm.get_pretrained_cfg(name)
        stated = (float(row['top1']), float(row['top1_err'])) if row['top1'] else (None, None)
        assert stated == (top1, None if top1 is None else pytest.approx(100 - top1)), name
        assert row['param_count'] == parameters(name)
        found = (int(row['img_size']), float(row['crop_pct']), row['interpolation'])
        assert found == (cfg.input_size[-1], cfg.crop_pct, cfg.interpolation), name


def test_speed_is_that_of_the_benchmark_files():
    infer = results('benchmark-infer-fp32-nchw-pt215-cpu-epyc-2core.csv')
    train = results('benchmark-train-fp32-nchw-pt215-cpu-epyc-2core.csv')
    rows = table(read('docs/performance.md'), "## Speed and memory beside timm's models")
    assert {row[0] for row in rows} == set(infer) == set(train)
    published = runpy.run_path(str(ROOT / 'benchmarks/throughput.py'))['PUBLISHED']
    for name, count, gflops, infer_speed, train_speed, infer_memory, train_memory, top1 in rows:
        one, other = infer[name], train[name]
        assert count == one['param_count'] == other['param_count'], name
        assert float(gflops) == pytest.approx(2 * float(one['infer_gmacs'])), name
        assert (infer_speed, train_speed) == (one['infer_samples_per_sec'], other['train_samples_per_sec']), name
        assert (infer_memory, train_memory) == (one['infer_peak_mb'], other['train_peak_mb']), name
        assert top1 == str(published.get(name, [''])[0]), name
        for row, kind in ((one, 'infer'), (other, 'train')):
            step = 1000 * int(row[f'{kind}_batch_size']) / float(row[f'{kind}_samples_per_sec'])
            assert float(row[f'{kind}_step_time']) == pytest.approx(step, abs=0.06), name


def test_segmentation_systems_of_the_docs():
    from segmentation.__main__ import markdown_table

    assert markdown_table() in read('docs/segmentation.md')


# --- Version and citation ---------------------------------------------------------------------------------------------


def test_version():
    assert re.search(r'^## \[(.+?)\]', read('CHANGELOG.md'), re.MULTILINE).group(1) == cluster_zoo.__version__
    assert yaml.safe_load(read('CITATION.cff'))['version'] == cluster_zoo.__version__


def test_citation_has_every_paper_of_the_docs():
    citation = yaml.safe_load(read('CITATION.cff'))
    assert citation['cff-version'] == '1.2.0' and citation['type'] == 'software'
    assert {'message', 'title', 'authors', 'license'} <= set(citation)
    titles = {paper['title'] for paper in citation['references']}
    assert titles == set(re.findall(r'^ *title *= \{(.*)\},$', read('docs/models.md'), re.MULTILINE))
    for paper in citation['references']:
        assert paper['authors'] and paper['year'] and (paper.get('journal') or paper['conference']['name'])


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r'^ *- (?:Home: )?(\S+\.md)$', read('mkdocs.yml'), re.MULTILINE)
    assert sorted(f'docs/{page}' for page in navigation) == DOCS


def test_the_notebook_has_the_commands_of_the_page():
    page = [block.code for block in blocks('docs/getting-started.md') if block.language == 'bash']
    notebook = [block.code for block in blocks('examples/getting_started.ipynb') if block.language == 'bash']
    assert len(notebook) == 6  # seven with the installation
    assert 'import cluster_zoo' in read('examples/getting_started.ipynb')  # here it is imported anyway
    assert [list(commands(code)) for code in notebook] == [list(commands(code)) for code in page[1:7]]
