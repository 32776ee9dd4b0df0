"""TimmWrapper of transformers loads model folders of this package after `import cluster_zoo`."""

import json

import pytest
import timm
import torch
from PIL import Image

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.weights.importing import write_folder

transformers = pytest.importorskip('transformers', minversion='5.0', reason='transformers is not installed')

SHALLOW = dict(depths=(1, 1, 1, 1))
MODELS = {
    'coc_tiny': SHALLOW,
    'fec_small': SHALLOW,
    'dnc_coc_tiny': dict(SHALLOW, sub_centroids=2),
    'dnc_resnet18': dict(layers=(1, 1, 1, 1)),
}
LABELS = ['red', 'green', 'blue']


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(transformers.utils.hub, 'is_offline_mode', lambda: True, raising=False)


def _folder(model, path, label_names=None):
    write_folder(model, path, 'a model', dict(file='a.pth'), label_names=label_names)
    return path


def _model(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=len(LABELS), **MODELS[name], **kwargs).eval()


@pytest.mark.parametrize('name', MODELS)
def test_classifier(name, tmp_path):
    model = _model(name)
    folder = _folder(model, tmp_path, label_names=LABELS)
    images = torch.randn(2, 3, 64, 96)
    for cls in (transformers.TimmWrapperForImageClassification, transformers.AutoModelForImageClassification):
        wrapped, report = cls.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())  # nothing is missing, unexpected or of another shape
        assert wrapped.config.id2label == dict(enumerate(LABELS)) and not wrapped.training
        with torch.inference_mode():
            torch.testing.assert_close(wrapped(images).logits, model(images))
            hidden = wrapped(images, output_hidden_states=True).hidden_states
            expected = model.forward_intermediates(images, intermediates_only=True)
            torch.testing.assert_close(list(hidden), expected)
    with torch.inference_mode():  # timm loads the folder, too
        torch.testing.assert_close(
            timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images), model(images)
        )


@pytest.mark.parametrize('name', ['coc_tiny', 'dnc_resnet18'])
def test_images_and_pipeline(name, tmp_path):
    model = _model(name)
    folder = _folder(model, tmp_path, label_names=LABELS)
    image = Image.effect_noise((90, 70), 90).convert('RGB')
    pixels = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image).unsqueeze(0)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    torch.testing.assert_close(processor(image)['pixel_values'], pixels)

    classify = transformers.pipeline('image-classification', model=str(folder))
    found = {entry['label']: entry['score'] for entry in classify(image)}
    with torch.inference_mode():
        expected = dict(zip(LABELS, model(pixels).softmax(-1)[0].tolist()))
    assert found == pytest.approx(expected, abs=1e-5)


def test_features(tmp_path):
    model = _model('coc_tiny')
    wrapped = transformers.AutoModel.from_pretrained(_folder(model, tmp_path)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(wrapped(images).pooler_output, expected)


def test_imagenet_labels_are_names(tmp_path):
    model = timm.create_model('coc_tiny', **SHALLOW)
    config = transformers.AutoConfig.from_pretrained(_folder(model, tmp_path))
    assert len(config.id2label) == 1000 and config.id2label[0].startswith('tench')


def test_training_step_and_saving(tmp_path):
    wrapped = transformers.TimmWrapperForImageClassification.from_pretrained(
        _folder(_model('fec_small'), tmp_path / 'a', label_names=LABELS)
    ).train()
    wrapped(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())
    torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
    wrapped.save_pretrained(tmp_path / 'b')
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / 'b')
    for name, value in wrapped.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)
    assert again.config.id2label == dict(enumerate(LABELS))
    model = timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True)
    torch.testing.assert_close(model.state_dict(), wrapped.timm_model.state_dict())


def test_without_the_package_the_architecture_is_unknown(tmp_path, monkeypatch):
    folder = _folder(_model('coc_tiny'), tmp_path, label_names=LABELS)
    monkeypatch.delitem(timm.models._registry._model_entrypoints, 'coc_tiny')  # as before `import cluster_zoo`
    with pytest.raises(ImportError, match="architecture 'coc_tiny' is not supported in your version of timm"):
        transformers.AutoModelForImageClassification.from_pretrained(folder)


def test_wrapper_fails_with_num_classes_in_model_args(tmp_path):
    """The reason that model folders omit it, although timm records it for every model."""
    folder = _folder(_model('coc_tiny'), tmp_path)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    config['model_args']['num_classes'] = len(LABELS)
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    with pytest.raises(TypeError, match='num_classes'):
        transformers.AutoModelForImageClassification.from_pretrained(folder)
