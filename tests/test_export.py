"""cluster_zoo.export and its command: each format against the model, sizes, what is in the file, what fails."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch

from cluster_zoo import cli, export
from cluster_zoo.export import FORMATS, ExportError, export_model

pytestmark = pytest.mark.filterwarnings('ignore:.*torch.jit.*is deprecated')  # the test's own calls

ROOT = Path(__file__).parents[1]
SMALL = dict(depths=(1,), dims=(8,), mlp_ratios=(2,), num_heads=(2,), head_dim=8, proposals=2)
NETWORKS = {
    'coc_tiny': dict(SMALL, regions=2),
    'fec_small': dict(SMALL, depths=(0, 1), dims=(4, 8), mlp_ratios=(2, 2), num_heads=(1, 2)),
    'dnc_coc_tiny': dict(SMALL, regions=1),
    'dnc_resnet18': dict(layers=(1, 1, 1, 1)),
    'dnc_mobilenetv2_100': {},
    'dnc_swin_tiny': dict(img_size=32, window_size=4, depths=(1, 1), embed_dim=16, num_heads=(1, 1)),
}
LABELS = ('red', 'green "G"', 'bläu')


def _model(name, **kwargs):
    torch.manual_seed(0)
    overlay = dict(input_size=(3, 32, 32), label_names=LABELS, num_classes=3)
    model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=overlay, **{**NETWORKS[name], **kwargs})
    for key, parameter in model.named_parameters():
        if key.endswith('.gamma'):
            torch.nn.init.constant_(parameter, 0.5)  # residual branches that count
    return model.eval()


def _images(*shape):
    batch, *size = shape
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(7))


def _agree(model, run, *shapes):
    with torch.inference_mode():
        for shape in shapes:
            images = _images(*shape)
            torch.testing.assert_close(run(images), model(images), rtol=0, atol=1e-4)


def _onnx(path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs the extra `onnx`: onnx, onnxscript, onnxruntime')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options)
    return lambda images: torch.from_numpy(session.run(['logits'], {'image': images.numpy()})[0])


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory):
    """A Context Cluster whose first stage has regions, as ONNX."""
    pytest.importorskip('onnxruntime', reason='needs the extra `onnx`: onnx, onnxscript, onnxruntime')
    model = _model('coc_tiny')
    return model, export_model(model, tmp_path_factory.mktemp('onnx') / 'model.onnx')


def test_onnx_takes_any_batch_and_the_sizes_that_divide(onnx_file):
    model, exported = onnx_file
    assert str(exported.sizes) == 'multiples of 8 from 32 px'
    assert exported.difference <= 1e-4 and exported.images >= 7 and exported.undecided == 0
    assert {batch for batch, *_ in exported.checked} >= {1, 2, 3}
    assert any(height != width for _, height, width in exported.checked)
    run = _onnx(exported.path)
    _agree(model, run, (1, 32, 32), (5, 40, 64), (2, 128, 96))
    for size, side in (((36, 40), 'height'), ((40, 36), 'width'), ((33, 33), 'height')):
        with pytest.raises(Exception, match=f'image_{side}_is_a_multiple_of_8'):
            run(_images(2, *size))
    assert [path.name for path in exported.path.parent.iterdir()] == ['model.onnx']  # one file, no leftovers


def test_onnx_says_what_it_is(onnx_file):
    import onnx

    model, exported = onnx_file
    proto = onnx.load(exported.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [('', 18)]
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    assert axes == {'image': ['batch', 3, 'height', 'width'], 'logits': ['batch', 3]}
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata['label_names']) == list(LABELS)
    assert json.loads(metadata['mean']) == list(model.pretrained_cfg['mean'])
    assert json.loads(metadata['std']) == list(model.pretrained_cfg['std'])
    assert json.loads(metadata['input_size']) == [3, 32, 32] and metadata['crop_pct'] == '0.9'
    assert metadata['opset'] == '18' and metadata['sizes'] == 'multiples of 8 from 32 px'
    assert metadata['architecture'] == 'coc_tiny' and (metadata['input'], metadata['output']) == ('image', 'logits')
    content = exported.path.read_bytes()
    assert str(ROOT).encode() not in content and b'site-packages' not in content


def test_fec_pools_in_larger_images_than_it_was_traced_with(tmp_path):
    model = _model('fec_small')
    exported = export_model(model, tmp_path / 'fec.onnx')
    assert max(height * width for _, height, width in exported.checked) <= 128 * 128
    # In the largest 8,192 points meet 2,048 centers, which the model treats in blocks and the graph at once.
    _agree(model, _onnx(exported.path), (1, 32, 32), (3, 64, 32), (1, 256, 512))


def test_dnc_on_a_resnet_takes_any_size(tmp_path):
    model = _model('dnc_resnet18')
    exported = export_model(model, tmp_path / 'dnc.onnx')
    assert str(exported.sizes) == 'any from 32 px'
    _agree(model, _onnx(exported.path), (1, 32, 32), (4, 33, 71), (2, 100, 64))


def test_dnc_on_swin_takes_its_own_size(tmp_path):
    model = _model('dnc_swin_tiny')
    exported = export_model(model, tmp_path / 'swin.onnx')
    assert str(exported.sizes) == '32 x 32 px'
    run = _onnx(exported.path)
    _agree(model, run, (1, 32, 32), (5, 32, 32))
    with pytest.raises(Exception, match='Got: 64 Expected: 32'):
        run(_images(1, 64, 64))
    with pytest.raises(ExportError, match='32 x 32 px alone'):
        export_model(model, tmp_path / 'other.onnx', image_size=64)


def test_one_size_may_be_any(tmp_path):
    model = _model('fec_small', regions=2)
    exported = export_model(model, tmp_path / 'fixed.onnx', image_size=(37, 50), opset=20)
    assert str(exported.sizes) == '37 x 50 px'
    run = _onnx(exported.path)
    _agree(model, run, (1, 37, 50), (4, 37, 50))
    with pytest.raises(Exception, match='Got: 38 Expected: 37'):
        run(_images(1, 38, 50))


@pytest.mark.parametrize('name', NETWORKS)
def test_torchscript(name, tmp_path):
    model = _model(name)
    exported = export_model(model, tmp_path / 'model.pt', to='torchscript')
    extra = {'cluster_zoo.json': ''}
    scripted = torch.jit.load(tmp_path / 'model.pt', _extra_files=extra)
    metadata = json.loads(extra['cluster_zoo.json'])
    assert json.loads(metadata['label_names']) == list(LABELS) and metadata['architecture'] == name
    assert str(exported.sizes) == ('32 x 32 px' if 'swin' in name else 'any from 32 px')
    sizes = [(32, 32)] if 'swin' in name else [(32, 32), (33, 71), (64, 40)]
    _agree(model, scripted, *((batch, *size) for batch, size in zip((1, 3, 2), sizes)))


@pytest.mark.parametrize('name', ['dnc_coc_tiny', 'dnc_resnet18'])
def test_pt2(name, tmp_path):
    model = _model(name)
    exported = export_model(model, tmp_path / 'model.pt2', to='pt2')
    multiple = 4 if 'coc' in name else 1
    assert (exported.sizes.multiple, exported.sizes.smallest) == (multiple, 32 if 'coc' in name else 33)
    extra = {'cluster_zoo.json': ''}
    program = torch.export.load(tmp_path / 'model.pt2', extra_files=extra)
    assert json.loads(extra['cluster_zoo.json'])['sizes'] == str(exported.sizes)
    _agree(model, program.module(), (1, 36, 36), (3, 40, 72))
    with pytest.raises(Exception, match='Guard failed'):
        program.module()(_images(1, 36, 31))


# ---- What the comparison finds ----


@pytest.fixture
def tampered(monkeypatch):
    """Calls of `export_model` to TorchScript whose file is opened as if its outputs were others."""

    def run(model, path, change):
        load = FORMATS['torchscript'].load
        altered = dataclasses.replace(
            FORMATS['torchscript'], load=lambda file: lambda images: change(load(file)(images), images)
        )
        monkeypatch.setitem(FORMATS, 'torchscript', altered)
        try:
            return export_model(model, path, to='torchscript')
        finally:
            monkeypatch.undo()

    return run


def _nan(logits, images):
    logits[-1] = torch.nan
    return logits


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda logits, images: logits + 2e-4, 'differ by 2.0e-04, more than 1e-04'),
        (lambda logits, images: logits + (images.shape[2] > images.shape[3]), 'for 1 image of 69 x 32 px'),
        (lambda logits, images: logits + (torch.arange(len(images)) == 2).unsqueeze(1), 'for 3 images of 32 x 69 px'),
        (_nan, 'differ by inf'),
        (lambda logits, images: logits[:1], r'for 3 images of 32 x 69 px it gives \[1, 3\], the model \[3, 3\]'),
        (lambda logits, images: 1 / 0, 'does not run on 1 image of 32 x 32 px: division by zero'),
    ],
)
@pytest.mark.parametrize('name', ['coc_tiny', 'dnc_resnet18'])
def test_a_file_that_is_not_the_model_is_not_kept(name, change, message, tampered, tmp_path):
    path = tmp_path / 'model.pt'
    path.write_text('mine')
    with pytest.raises(ExportError, match=message):
        tampered(_model(name), path, change)
    assert path.read_text() == 'mine' and list(tmp_path.iterdir()) == [path]


def test_an_image_with_an_undecided_point_is_counted_and_no_error(tampered, tmp_path):
    seen = []

    def one_in_a_batch(logits, images):
        seen.append(len(images))
        logits[0] += 0.01 if len(seen) == 2 else 0
        return logits

    exported = tampered(_model('coc_tiny'), tmp_path / 'model.pt', one_in_a_batch)
    assert seen == [1, 3, 3, 2, 1] and exported.images == 10  # the second batch once more
    assert exported.undecided == 1 and exported.undecided_difference == pytest.approx(0.01, rel=1e-2)
    assert exported.difference <= 1e-4
    seen.clear()
    with pytest.raises(ExportError, match=r'1\.0e-02'):  # nothing to decide without centers among points
        tampered(_model('dnc_resnet18'), tmp_path / 'model.pt', one_in_a_batch)


# ---- What fails before that ----


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(error, monkeypatch, tmp_path):
    def fail(scripted, path, **kwargs):
        Path(path).write_bytes(b'half')
        raise error

    monkeypatch.setattr(torch.jit, 'save', fail)
    (tmp_path / 'model.pt').write_text('mine')
    with pytest.raises(type(error)):
        export_model(_model('coc_tiny'), tmp_path / 'model.pt', to='torchscript')
    assert [path.name for path in tmp_path.iterdir()] == ['model.pt']
    assert (tmp_path / 'model.pt').read_text() == 'mine'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(to='tflite'), "no format 'tflite': one of onnx, torchscript, pt2"),
        (dict(opset=17), r'18 to \d+, got 17'),
        (dict(opset=99), r'18 to \d+, got 99'),
        (dict(image_size=16), 'at least 32 px, got 16'),
        (dict(image_size=(64, 64, 3)), 'a height and a width'),
        (dict(path='.'), 'is a folder'),
        (dict(path='nowhere/model.onnx'), 'There is no folder'),
    ],
)
def test_wrong_requests(options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=message):
        export_model(_model('coc_tiny'), **{'path': 'model.onnx', **options})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else find(name))
    with pytest.raises(ExportError, match=r"needs onnxruntime: pip install 'cluster_zoo\[onnx\]'"):
        export_model(_model('coc_tiny'), tmp_path / 'model.onnx')
    export_model(_model('coc_tiny'), tmp_path / 'model.pt', to='torchscript')  # needs none of them


def test_what_is_no_classifier_or_cannot_be_traced_or_compiled(tmp_path):
    features = timm.create_model('coc_tiny', features_only=True)
    with pytest.raises(ExportError, match='no classifier'):
        export_model(features, tmp_path / 'model.pt', to='torchscript')
    model = _model('coc_tiny')
    model.forward = lambda x: torch.zeros(len(x), int(x.sum()))
    for to, message in (('pt2', 'can not be traced'), ('torchscript', 'can not compile')):
        with pytest.raises(ExportError, match=message):
            export_model(model, tmp_path / 'model', to=to, image_size=32)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was(tmp_path):
    model = _model('coc_tiny').train().half()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_model(model, tmp_path / 'model.pt', to='torchscript')
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float16 and torch.equal(value, before[name])
    assert torch.jit.load(tmp_path / 'model.pt')(_images(1, 32, 32)).dtype == torch.float32


def test_features_instead_of_logits(tmp_path):
    model = _model('coc_tiny')
    model.reset_classifier(0)
    export_model(model, tmp_path / 'model.pt', to='torchscript')
    _agree(model, torch.jit.load(tmp_path / 'model.pt'), (2, 32, 32))


# ---- The command ----


def test_command_with_the_bundled_weights(tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['export', 'coc_tiny_plain.cifar10', '--to', 'torchscript']) == 0
    out, err = capsys.readouterr()
    assert err == '' and not recwarn.list
    assert out.startswith('coc_tiny_plain.cifar10: 5.25 M parameters\ncoc_tiny_plain.cifar10.pt: 2')
    assert 'images: any from 64 px, in batches of any size' in out
    assert 'largest difference of a logit: ' in out and 'random' not in out
    model = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).eval()
    _agree(model, torch.jit.load('coc_tiny_plain.cifar10.pt'), (2, 64, 64))


def test_command_never_has_random_weights_unless_told(tmp_path, monkeypatch, capsys):
    for variable in ('CLUSTER_ZOO_HUB', 'CLUSTER_ZOO_AUTHORS'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv('CLUSTER_ZOO_HOME', str(tmp_path / 'store'))
    command = ['export', 'dnc_resnet18_cifar', '--to', 'torchscript', '--output', str(tmp_path / 'model.pt')]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('error: ') and 'Traceback' not in err
    assert not (tmp_path / 'model.pt').exists()

    assert cli.main([*command, '--untrained', '--num-classes', '3', '--json']) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown['path'] == str(tmp_path / 'model.pt') and shown['sizes'] == 'any from 32 px'
    assert shown['difference'] <= 1e-4 and len(shown['checked']) == 4


def test_command_with_a_checkpoint(tmp_path, capsys):
    model = timm.create_model('dnc_resnet18_cifar', num_classes=3).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    command = ['export', 'dnc_resnet18_cifar', '--checkpoint', str(tmp_path / 'last.pth.tar'), '--to', 'torchscript']
    command += ['--output', str(tmp_path / 'model.pt'), '--img-size', '40', '48']
    assert cli.main(command) == 2 and 'does not fit' in capsys.readouterr().err
    assert cli.main([*command, '--num-classes', '3']) == 0
    assert 'images: 40 x 48 px, in batches' in capsys.readouterr().out
    _agree(model, torch.jit.load(tmp_path / 'model.pt'), (1, 40, 48))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['no_such_model'], 'no_such_model'),
        (['coc_tiny', '--to', 'tflite'], 'tflite'),
        (['coc_tiny', '--untrained', '--checkpoint', 'x'], 'not allowed with'),
        (['coc_tiny', '--num-classes', '3'], '--num-classes is of --checkpoint or --untrained'),
        (['coc_tiny', '--img-size', '1', '2', '3'], '--img-size takes'),
    ],
)
def test_wrong_use_of_the_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(['export', *arguments])
    assert status.value.code == 2 and message in capsys.readouterr().err


def test_errors_of_the_command_are_one_message(tmp_path, capsys):
    command = ['export', 'coc_tiny', '--untrained', '--output', str(tmp_path / 'nowhere' / 'model.onnx')]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert 'px' not in out and err.startswith('error: There is no folder') and err.count('\n') == 1


def test_the_oldest_opset_is_the_default():
    assert export.OPSET == 18
