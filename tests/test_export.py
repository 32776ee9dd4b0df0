"""Export: logits, sizes and metadata of each format, the export check, and errors."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch

from cluster_zoo import export
from cluster_zoo.errors import ExportError
from cluster_zoo.export import export_model
from cluster_zoo.layers.cluster_mixer import ClusterMixer

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
# torch.export 2.11 cannot trace the pooling of a ResNet for dynamic sizes, 2.15 can.
on_a_resnet = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < (2, 15),
    reason='this version of torch.export traces a ResNet for one size only',
)
LABELS = ('red', 'green "G"', 'bläu')


def _model(name, side=32, scale=0.5, **kwargs):
    """A small model whose layer scales are set to ``scale``."""
    torch.manual_seed(0)
    overlay = dict(input_size=(3, side, side), label_names=LABELS, num_classes=3)
    model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=overlay, **{**NETWORKS[name], **kwargs})
    for key, parameter in model.named_parameters():
        if key.endswith('.gamma'):
            torch.nn.init.constant_(parameter, scale)
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
    """A Context Cluster whose first stage has regions, untrained, as ONNX."""
    pytest.importorskip('onnxruntime', reason='needs the extra `onnx`: onnx, onnxscript, onnxruntime')
    model = _model('coc_tiny', scale=1e-5)
    return model, export_model(model, tmp_path_factory.mktemp('onnx') / 'model.onnx')


def test_onnx_accepts_any_batch_and_multiples_of_the_grid(onnx_file):
    model, exported = onnx_file
    assert str(exported.sizes) == 'multiples of 8 from 32 px'
    assert exported.difference <= 1e-4 and exported.ties == 0 and exported.raised == 2
    assert {batch for batch, *_ in exported.checked} >= {1, 2, 3}
    assert any(height != width for _, height, width in exported.checked)
    run = _onnx(exported.path)
    _agree(model, run, (1, 32, 32), (5, 40, 64), (2, 128, 96))
    for size in ((36, 40), (40, 36), (33, 33)):
        with pytest.raises(Exception, match='Reshape'):
            run(_images(2, *size))
    assert [path.name for path in exported.path.parent.iterdir()] == ['model.onnx']  # one file, no leftovers


def test_onnx_metadata(onnx_file):
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
    assert metadata['sizes'] == 'multiples of 8 from 32 px' and metadata['architecture'] == 'coc_tiny'
    content = exported.path.read_bytes()
    assert str(ROOT).encode() not in content and b'site-packages' not in content


def test_fec_accepts_larger_images_than_those_of_the_trace(tmp_path):
    model = _model('fec_small', depths=(0, 0))
    exported = export_model(model, tmp_path / 'fec.onnx')
    assert max(height * width for _, height, width in exported.checked) < 160 * 256
    # The largest has 2,560 points and 640 centers, which the model computes in blocks and the graph at once
    _agree(model, _onnx(exported.path), (1, 32, 32), (3, 64, 32), (1, 160, 256))


@on_a_resnet
def test_dnc_on_a_resnet_accepts_any_size(tmp_path):
    model = _model('dnc_resnet18', side=40)
    exported = export_model(model, tmp_path / 'dnc.onnx')
    assert str(exported.sizes) == 'any from 33 px'
    _agree(model, _onnx(exported.path), (1, 33, 33), (4, 33, 71), (2, 100, 64))


def test_dnc_on_swin_accepts_one_size(tmp_path):
    model = _model('dnc_swin_tiny')
    exported = export_model(model, tmp_path / 'swin.onnx')
    assert str(exported.sizes) == '32 x 32 px'
    run = _onnx(exported.path)
    _agree(model, run, (1, 32, 32), (5, 32, 32))
    with pytest.raises(Exception, match='Got: 64 Expected: 32'):
        run(_images(1, 64, 64))
    with pytest.raises(ExportError, match='images of 32 x 32 px'):
        export_model(model, tmp_path / 'other.onnx', image_size=64)


def test_a_fixed_size_can_be_any_size(tmp_path):
    model = _model('fec_small', regions=2)
    exported = export_model(model, tmp_path / 'fixed.onnx', image_size=(37, 50), opset=20)
    assert str(exported.sizes) == '37 x 50 px'
    metadata = {entry.key: entry.value for entry in pytest.importorskip('onnx').load(exported.path).metadata_props}
    assert metadata['sizes'] == '37 x 50 px' and json.loads(metadata['input_size']) == [3, 37, 50]
    run = _onnx(exported.path)
    _agree(model, run, (1, 37, 50), (4, 37, 50))
    with pytest.raises(Exception, match='Got: 38 Expected: 37'):
        run(_images(1, 38, 50))


@pytest.mark.parametrize(('side', 'to'), [(32, 'torchscript'), (68, 'pt2')])
def test_an_input_size_that_is_no_multiple_is_fixed(side, to, tmp_path):
    model = _model('coc_tiny', side, proposals=8)  # from 64 px, and pt2 multiples of 8
    exported = export_model(model, tmp_path / 'model', to)
    assert str(exported.sizes) == f'{side} x {side} px'
    if to == 'torchscript':
        _agree(model, torch.jit.load(exported.path, _extra_files=(extra := {'cluster_zoo.json': ''})), (2, side, side))
        metadata = json.loads(extra['cluster_zoo.json'])
        assert metadata['sizes'] == '32 x 32 px' and json.loads(metadata['input_size']) == [3, side, side]


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


@pytest.mark.parametrize('name', ['dnc_coc_tiny', pytest.param('dnc_resnet18', marks=on_a_resnet)])
def test_pt2(name, tmp_path):
    model = _model(name, side=40)
    exported = export_model(model, tmp_path / 'model.pt2', to='pt2')
    multiple = 4 if 'coc' in name else 1
    assert (exported.sizes.multiple, exported.sizes.smallest) == (multiple, 32 if 'coc' in name else 33)
    extra = {'cluster_zoo.json': ''}
    program = torch.export.load(tmp_path / 'model.pt2', extra_files=extra)
    assert json.loads(extra['cluster_zoo.json'])['sizes'] == str(exported.sizes)
    _agree(model, program.module(), (1, 36, 36), (3, 40, 72))
    with pytest.raises(Exception, match='Guard failed'):
        program.module()(_images(1, 36, 31))


# ---- What the export check finds ----


def _without_clusters(model):
    for module in model.modules():
        if isinstance(module, ClusterMixer):
            torch.nn.init.zeros_(module.proj.weight)
            torch.nn.init.zeros_(module.proj.bias)


@pytest.mark.parametrize(
    ('name', 'scale', 'change', 'message'),
    [
        ('coc_tiny', 1e-5, _without_clusters, 'With layer scales of 0.5 the file gives other logits'),
        ('fec_small', 1e-5, _without_clusters, 'With layer scales of 0.5 the file gives other logits'),
        ('coc_tiny', 0.05, _without_clusters, 'The file gives other logits than the model: for .* 1 x 32 x 32 px'),
        ('coc_tiny', 0.5, lambda model: model.head.fc.bias.add_(2e-4), r'differ by 2\.0e-04, more than 1e-04'),
    ],
)
def test_a_file_with_other_logits_is_deleted(name, scale, change, message, monkeypatch, tmp_path):
    def write(model, *args):
        change(wrong := copy.deepcopy(model))
        original(wrong, *args)

    original = export._write
    monkeypatch.setattr(export, '_write', write)
    path = tmp_path / 'model.pt'
    path.write_text('mine')
    with pytest.raises(ExportError, match=message):
        export_model(_model(name, scale=scale), path, 'torchscript')
    assert path.read_text() == 'mine' and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def export_as(monkeypatch, tmp_path):
    """A function that calls `export_model` with a function of the images in place of the file."""

    def run(model, file):
        monkeypatch.setattr(export, '_open', lambda path, to: file)
        return export_model(model, tmp_path / 'model.pt', 'torchscript')

    return run


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda logits, images: logits * torch.nan, 'differ by nan'),
        (lambda logits, images: logits - torch.inf, 'differ by inf'),
        (lambda logits, images: logits + (images.shape[2] > images.shape[3]), '1 x 65 x 32 px .* 1.0e'),
        (lambda logits, images: logits + (torch.arange(len(images)) == 2).unsqueeze(1), '3 x 32 x 65 px .* 1.0e'),
        (lambda logits, images: logits[:1], r'gives \[1, 3\] for images of 3 x 32 x 65 px, the model \[3, 3\]'),
        (lambda logits, images: 1 / 0, 'does not run on images of 1 x 32 x 32 px: division by zero'),
    ],
)
def test_the_export_check_detects_wrong_logits(change, message, export_as, tmp_path):
    model = _model('coc_tiny')
    with pytest.raises(ExportError, match=message):
        export_as(model, lambda images: change(model(images), images))
    assert list(tmp_path.iterdir()) == []


class _Edge(torch.nn.Module):
    """A model with a jump where the first pixel crosses an edge."""

    def __init__(self, edge: float, inclusive: bool = False, step: float = 0.02):
        super().__init__()
        self.in_chans, self.num_classes, self.pretrained_cfg = 3, 2, dict(input_size=(3, 32, 32))
        self.edge, self.inclusive, self.step = edge, inclusive, step

    def forward(self, images):
        pixels = images[:, 0, 0, :1]
        above = pixels >= self.edge if self.inclusive else pixels > self.edge
        return torch.cat([self.step * above, images.mean((1, 2, 3)).unsqueeze(1)], 1)


@pytest.fixture
def pixel(export_as):
    """The first pixel of the third image in the export check."""
    seen = []
    export_as(_Edge(9.0), lambda images: (seen.extend(images[:, 0, 0, 0].tolist()), _Edge(9.0)(images))[1])
    return seen[2]


def test_a_difference_by_rounding_counts_as_a_tie(pixel, export_as):
    exported = export_as(_Edge(pixel), _Edge(pixel, inclusive=True))
    assert exported.ties == 1 and exported.difference == 0


@pytest.mark.parametrize('shift', [-1e-3, 1e-3])
def test_a_difference_larger_than_rounding_is_an_error(shift, pixel, export_as):
    with pytest.raises(ExportError, match=r'3 x 32 x 65 px they differ by 2\.0e-02'):
        export_as(_Edge(pixel - shift / 2), _Edge(pixel + shift / 2))


def test_a_tie_has_the_logits_of_one_of_the_two_sides(pixel, export_as):
    with pytest.raises(ExportError, match=r'differ by 1\.0e-02'):
        export_as(_Edge(pixel), _Edge(pixel, inclusive=True, step=0.01))


# ---- Errors before the export check ----


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_no_files(error, monkeypatch, tmp_path):
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
        (dict(to='tflite'), "no format 'tflite'.* onnx, torchscript, pt2"),
        (dict(opset=17), r'18 to \d+, got 17'),
        (dict(opset=99), r'18 to \d+, got 99'),
        (dict(image_size=16), 'at least 32 px, got 16'),
        (dict(image_size=(64, 64, 3)), 'a height and a width'),
        (dict(path='.'), 'is a folder'),
        (dict(path='nowhere/model.onnx'), 'There is no folder'),
        (dict(path='model.pt'), r"'model\.pt' has the suffix.*\.onnx"),
        (dict(path='model.onnx', to='pt2'), r"'model\.onnx' has the suffix.*\.pt2"),
    ],
)
def test_invalid_requests(options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=message):
        export_model(_model('coc_tiny'), **{'path': 'model.onnx', **options})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else find(name))
    with pytest.raises(ExportError, match=r"needs onnxruntime: pip install 'cluster_zoo\[onnx\]'"):
        export_model(_model('coc_tiny'), tmp_path / 'model.onnx')
    export_model(_model('coc_tiny'), tmp_path / 'model.pt', to='torchscript')  # needs none of them


def test_models_that_cannot_be_exported(tmp_path):
    features = timm.create_model('coc_tiny', features_only=True)
    with pytest.raises(ExportError, match='no classifier'):
        export_model(features, tmp_path / 'model.pt', to='torchscript')
    model = _model('coc_tiny')
    model.forward = lambda x: torch.zeros(len(x), int(x.sum()))
    for to in ('pt2', 'torchscript'):
        with pytest.raises(ExportError, match=f'can not be written as {to} for images of 32 x 32 px: '):
            export_model(model, tmp_path / 'model', to=to, image_size=32)
    assert list(tmp_path.iterdir()) == []


def test_the_model_stays_unchanged(tmp_path):
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
