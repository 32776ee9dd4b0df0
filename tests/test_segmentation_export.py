"""Export of segmenters: logits of files at other sizes than the traced one, metadata, and errors."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from cluster_zoo import export
from cluster_zoo.errors import ExportError
from cluster_zoo.export import export_model
from segmentation import Segmenter, create_segmenter
from segmentation.models.decoders import AdaptivePool

COC = dict(depths=(1, 0, 0, 1), dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), head_dim=8, proposals=2)
SYSTEMS = {
    'upernet_cond': ('upernet', 'coc_tiny', dict(COC, classifier='cond', channels=8)),
    'semantic_fpn_dnc': ('semantic_fpn', 'resnet10t', dict(classifier='dnc', channels=8, pyramid_channels=8)),
}
PROXY = ('region_proxy', 'vit_tiny_patch16_224', dict(depth=2, embed_dim=48, img_size=64))


def _model(head, backbone, options):
    """A small segmenter for images of 64 px, with logits that differ between pixels and layer scales that matter."""
    torch.manual_seed(0)
    model = create_segmenter(head, backbone, 4, **options)
    model.config['pretrained_cfg']['input_size'] = [3, 64, 64]
    for name, parameter in model.named_parameters():
        if name.endswith('.gamma'):
            nn.init.constant_(parameter, 0.5)
        elif 'classifier' in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize('bins', [1, 2, 3, 6])
def test_exported_pooling_is_adaptive_pooling_at_every_size(bins):
    dims = {axis: torch.export.Dim(name, min=1) for axis, name in ((2, 'h'), (3, 'w'))}
    program = torch.export.export(AdaptivePool(bins), (torch.zeros(2, 3, 5, 7),), dynamic_shapes=(dims,)).module()
    for size in ((5, 7), (1, 2), (2, 2), (6, 6), (13, 8), (17, 3)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(program(x), F.adaptive_avg_pool2d(x, bins))


@pytest.mark.parametrize('name', SYSTEMS)
def test_pt2_at_other_sizes(name, tmp_path):
    model = _model(*SYSTEMS[name])
    exported = export_model(model, tmp_path / 'model.pt2', 'pt2')
    assert str(exported.sizes) == 'multiples of 32 from 64 px' and len(exported.checked) == 4
    program = torch.export.load(tmp_path / 'model.pt2', extra_files=(extra := {'cluster_zoo.json': ''})).module()
    with torch.no_grad():
        for shape in ((1, 3, 96, 64), (2, 3, 160, 224)):
            images = torch.randn(shape)
            torch.testing.assert_close(program(images), model(images), rtol=0, atol=1e-4)
    metadata = json.loads(extra['cluster_zoo.json'])
    assert json.loads(metadata['label_colors'])[0] == [128, 0, 0] and json.loads(metadata['test']) == dict(mode='whole')
    assert metadata['architecture'] == '_'.join(SYSTEMS[name][:2]) and json.loads(metadata['label_names']) == [*'0123']


@pytest.mark.parametrize('system, multiple, shapes', [
    (('upernet', 'resnet10t', dict(channels=8)), 32, ((1, 64, 64), (3, 256, 96), (2, 192, 320))),
    (PROXY, 16, ((1, 48, 48), (3, 112, 64), (1, 192, 320))),
])  # fmt: skip
def test_onnx_at_other_sizes(system, multiple, shapes, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs the extra `onnx`: onnx, onnxscript, onnxruntime')
    model = _model(*system)
    exported = export_model(model, tmp_path / 'model.onnx')
    assert exported.difference <= 1e-4 and exported.sizes.multiple == multiple
    session = onnxruntime.InferenceSession(exported.path)
    for batch, *size in shapes:
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            expected = model(images)
        (found,) = session.run(['logits'], {'image': images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    with pytest.raises(Exception, match='Reshape'):
        session.run(None, {'image': torch.zeros(1, 3, 64, 72).numpy()})


@pytest.mark.parametrize(
    'system, to, formats', [(SYSTEMS['upernet_cond'], 'torchscript', 'onnx or pt2'), (PROXY, 'pt2', 'onnx')]
)
def test_formats_that_are_not_possible(system, to, formats, tmp_path):
    with pytest.raises(ExportError, match=f'This Segmenter cannot be written as {to}, only as {formats}'):
        export_model(_model(*system), tmp_path / 'model', to)


def test_a_backbone_of_one_size(tmp_path):
    swin = dict(img_size=64, window_size=4, depths=(1, 1, 1, 1), embed_dim=8, num_heads=(1, 1, 1, 1), channels=8)
    model = _model('fcn', 'swin_tiny_patch4_window7_224', swin)
    with pytest.raises(ExportError, match='for one image size only: name it'):
        export_model(model, tmp_path / 'model.pt2', 'pt2')
    exported = export_model(model, tmp_path / 'model.pt2', 'pt2', image_size=(64, 90))
    assert str(exported.sizes) == '64 x 90 px'


def test_the_tolerance_is_relative_to_large_logits(monkeypatch, tmp_path):
    model, error = _model('fcn', 'resnet10t', dict(channels=8)), 3e-5
    nn.init.normal_(model.head.classifier.conv.weight, std=1000)
    monkeypatch.setattr(export, '_write', lambda model, path, *args: path.touch())
    monkeypatch.setattr(export, '_open', lambda *args: lambda images: model(images) * (1 + error))
    assert 2e-5 < export_model(model, tmp_path / 'model.pt2', 'pt2').difference < 4e-5
    error = 3e-4
    with pytest.raises(ExportError, match='gives other logits than the model'):
        export_model(model, tmp_path / 'model.pt2', 'pt2')


def test_a_segmenter_of_parts_has_no_names():
    model = _model(*PROXY)
    parts = Segmenter(model.backbone, model.head, 4)
    assert parts.pretrained_cfg['architecture'] == '' and parts.in_chans == 3


def test_benchmark(monkeypatch, capsys):
    pytest.importorskip('onnxruntime', reason='needs the extra `onnx`: onnx, onnxscript, onnxruntime')
    path = Path(__file__).parents[1] / 'benchmarks' / 'segmenter_export.py'
    monkeypatch.setattr(sys, 'path', [str(path.parent), *sys.path])
    spec = importlib.util.spec_from_file_location('segmenter_export', path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert len(list(benchmark.rows())) == 37  # 4 heads, 3 backbones, 3 classifiers; region_proxy
    monkeypatch.setattr(torch, 'set_num_threads', lambda threads: None)
    *names, difference, largest = benchmark.measure('fcn:resnet10t:plain')
    assert names == ['fcn', 'resnet10t', 'plain'] and 0 < float(difference) < 1e-4 and float(largest) >= 1
    monkeypatch.setattr(sys, 'argv', ['segmenter_export.py', 'fcn:resnet10t'])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert 'there is no row fcn:resnet10t: choose from' in capsys.readouterr().err
