"""cluster-zoo app in a headless Chromium: upload, sliders, pointer, two models, errors, nothing left behind."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cluster_zoo.cli import main
from cluster_zoo.cli.arguments import PHOTO

pytest.importorskip('gradio', reason='the extra app is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.fixture(scope='module')
def app(tmp_path_factory):
    """Address of a running app, and the folder for its temporary files."""
    folder = tmp_path_factory.mktemp('app')
    command = [sys.executable, '-m', 'cluster_zoo', 'app', '--port', '0', '--device', 'cpu']
    environment = os.environ | dict(TMPDIR=str(folder), OMP_NUM_THREADS='2')
    environment |= dict(PYTHONPATH=os.pathsep.join(filter(None, ['.', os.environ.get('PYTHONPATH')])))
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith('http://'):
            break
    assert lines and lines[-1].startswith('http://127.0.0.1:'), ''.join(lines)
    yield lines[-1].split()[0], folder
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not list(folder.iterdir())  # nothing is left


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
    if CHROMIUM is None:
        pytest.skip('Chromium is not installed')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def page(app, browser):
    page = browser.new_page(viewport=dict(width=1400, height=1200))
    page.problems = []
    page.on('pageerror', lambda error: page.problems.append(str(error)))
    page.on('request', lambda request: check_local(page, request.url))
    page.goto(app[0])
    viewer(page).wait_for()
    yield page
    assert not page.problems
    page.close()


def check_local(page, url):
    if not url.startswith(('http://127.0.0.1:', 'data:', 'blob:', 'about:', 'ws://127.0.0.1:')):
        page.problems.append(f'request to {url}')


def viewer(page, position=0):
    return page.frame_locator('iframe').nth(position).locator('article[data-ready]')


def image_of(part):
    """What a canvas shows, as a data URL."""
    return part.locator('.left > canvas').evaluate('canvas => canvas.toDataURL()')


def slide(part, name, value):
    part.locator(f'input[aria-label={name}]').evaluate(
        '(input, value) => { input.value = value; input.dispatchEvent(new Event("input")); }', str(value)
    )


def test_sliders_pointer_and_classes(page):
    part = viewer(page)
    pictures = {image_of(part)}
    for name, value in [('stage', 2), ('block', 0), ('head', 3), ('opacity', 0.2), ('segments', 5)]:
        slide(part, name, value)
        pictures.add(image_of(part))
    assert len(pictures) == 6  # each slider changes the picture
    part.locator('input[value=clusters]').check()
    box = part.locator('.left > canvas').bounding_box()
    page.mouse.move(box['x'] + 0.6 * box['width'], box['y'] + 0.5 * box['height'])
    note = part.locator('.note').inner_text()
    found = re.match(
        r'Center (\d+) \(region 0\) with (\d+) of (\d+) points\. Similarity of this point: (\d\.\d+)', note
    )
    assert found and 0 < int(found[2]) <= int(found[3])
    pictures.add(image_of(part))
    assert len(pictures) == 7
    part.locator('button.bar').nth(1).click()
    note = part.locator('.note').inner_text()
    numbers = [float(number.replace('\u2212', '-')) for number in re.findall('[+\u2212]\\d+\\.\\d+', note)]
    logit = float(re.search(r'Logit of .+?: (-?\d+\.\d+) =', note)[1])
    assert sum(numbers) == pytest.approx(logit, abs=0.05)


def test_upload_two_models_and_errors(page, app, tmp_path):
    frame = page.locator('iframe').first
    before = frame.get_attribute('srcdoc')
    shutil.copy(PHOTO.parents[2] / 'docs/figures/camvid-1.jpg', tmp_path / 'street.jpg')
    page.locator('input[type=file]').set_input_files(tmp_path / 'street.jpg')
    page.wait_for_function('before => document.querySelector("iframe").srcdoc !== before', arg=before)
    viewer(page).wait_for()

    page.get_by_label('beside it').click()
    page.get_by_role('option').last.click()
    viewer(page, 1).wait_for()
    assert page.locator('iframe').count() == 2

    (tmp_path / 'text.png').write_text('text')
    page.get_by_label('Remove').or_(page.get_by_label('Clear')).first.click()
    page.locator('input[type=file]').set_input_files(tmp_path / 'text.png')
    page.get_by_text('This image cannot be explained: not an image').first.wait_for()


def test_other_users_see_the_bundled_photograph(page, browser, app, tmp_path):
    shutil.copy(PHOTO.parents[2] / 'docs/figures/camvid-1.jpg', tmp_path / 'street.jpg')
    frame = page.locator('iframe').first
    before = frame.get_attribute('srcdoc')
    page.locator('input[type=file]').set_input_files(tmp_path / 'street.jpg')
    page.wait_for_function('before => document.querySelector("iframe").srcdoc !== before', arg=before)
    other = browser.new_page()
    other.goto(app[0])
    viewer(other).wait_for()
    assert other.locator('iframe').first.get_attribute('srcdoc') == before
    other.close()


def test_only_this_machine_is_served_and_only_its_files(app):
    assert app[0].startswith('http://127.0.0.1:')
    with (
        pytest.raises(urllib.error.HTTPError),
        contextlib.closing(urllib.request.urlopen(f'{app[0]}gradio_api/file=/etc/passwd')),
    ):
        pass


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--port', '70000'], '70000 is not a port'),
        (['--model', 'resnet'], 'has no clusters and no centroids'),
        (['--model', 'coc_tinny'], 'did you mean coc_tiny'),
    ],
)
def test_wrong_options(argv, message, tmp_path, monkeypatch, capsys):
    import timm

    from cluster_zoo.weights.importing import write_folder

    monkeypatch.chdir(tmp_path)
    (tmp_path / 'resnet').mkdir()
    write_folder(timm.create_model('test_resnet', num_classes=2), tmp_path / 'resnet', 'resnet', {})
    try:
        status = main(['app', *argv, '--device', 'cpu'])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


def test_port_in_use(app, capsys):
    port = app[0].rstrip('/').rpartition(':')[2]
    assert main(['app', '--port', port, '--device', 'cpu']) == 2
    assert f'--port {port}: ' in capsys.readouterr().err


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert main(['app', '--device', 'cpu']) == 2
    assert "pip install 'cluster_zoo[app]'" in capsys.readouterr().err
