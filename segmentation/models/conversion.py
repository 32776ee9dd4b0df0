"""The names of the authors' dense checkpoints, those of mmsegmentation, as ours."""

from collections.abc import Callable

from torch import Tensor, nn

from cluster_zoo.weights.conversion import Names, context_cluster, renamed, swin

_HEADS: Names = (
    (r'^neck\.', 'head.decoder.'),
    (r'^head\.decoder\.(lateral|fpn)_convs\.(\d+)\.conv\.', r'head.decoder.\1_convs.\2.'),  # the neck has no norms
    (r'^decode_head\.scale_heads\.(\d+)\.(\d+)\.', lambda m: f'head.decoder.scale_heads.{m[1]}.{int(m[2]) // 2}.'),
    (r'^decode_head\.conv_seg\.', 'head.classifier.conv.'),
    (r'^decode_head\.guidance_project\.conv\.', 'head.classifier.guidance.'),
    (r'^decode_head\.filter_project\.conv\.', 'head.classifier.filters.'),
    (r'^decode_head\.(prototypes$|feat_norm\.|mask_norm\.)', r'head.classifier.head.\1'),
    (r'^decode_head\.mlp\.0\.0\.', 'head.classifier.'),
    (r'^decode_head\.affinity_head\.1\.conv\.', 'head.affinity.1.'),
    (r'^decode_head\.affinity_head\.', 'head.affinity.'),
    (r'^decode_head\.', 'head.decoder.'),
    (r'^auxiliary_head\.conv_seg\.', 'auxiliary.classifier.conv.'),
    (r'^auxiliary_head\.', 'auxiliary.decoder.'),
)
_VISION_TRANSFORMER: Names = (
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^layers\.', 'blocks.'),
    (r'\.ln([12])\.', r'.norm\1.'),
    (r'\.attn\.attn\.in_proj_(weight|bias)$', r'.attn.qkv.\1'),
    (r'\.attn\.attn\.out_proj\.', '.attn.proj.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
    (r'^ln1\.', 'norm.'),
)
_RESNET: Names = (
    (r'^stem\.7\.', 'bn1.'),  # the last norm of the deep stem
    (r'^stem\.', 'conv1.'),
)


def segmenter(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A dense checkpoint of the authors, backbone and head, under the names of `Segmenter`.

    Args:
        state_dict: The checkpoint, or one that has this package's names already.
        model: The segmenter that it is for. Without an auxiliary head, that of the checkpoint is left out with the norm
            of its level; and so is the plain classifier that frameworks put beside a conditional or a nearest-centroid
            one.
    """
    if any(name.startswith('decode_head.') for name in state_dict):
        heads = {name: value for name, value in state_dict.items() if not name.startswith('backbone.')}
        backbone = {name.removeprefix('backbone.'): x for name, x in state_dict.items() if name.startswith('backbone.')}
        backbone = {f'backbone.{name}': value for name, value in _backbone(backbone).items()}
        state_dict = renamed(heads, _HEADS) | backbone
    modules = dict(model.named_modules())
    unused = [name for name in ('auxiliary', 'head.classifier.conv') if modules.get(name) is None]
    # Norms of levels that the heads do not read
    unused += [name for name, module in modules.items() if 'norms.' in name and isinstance(module, nn.Identity)]
    prefixes = tuple(f'{name}.' for name in unused)
    return {name: value for name, value in state_dict.items() if not name.startswith(prefixes)}


def _backbone(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    names: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        'network.0.0.norm1.weight': _context_cluster,
        'stages.0.blocks.0.attn.w_msa.qkv.weight': _swin,
        'layers.0.ln1.weight': lambda x: renamed(x, _VISION_TRANSFORMER),
        'stem.0.weight': lambda x: renamed(x, _RESNET),
    }
    convert = next((convert for name, convert in names.items() if name in state_dict), None)
    if convert is not None:
        state_dict = convert(state_dict)
    return {name if name.startswith('norms.') else f'model.{name}': value for name, value in state_dict.items()}


def _context_cluster(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    # The authors number a stage's norm as the stage itself: 0, 2, 4, 6.
    state_dict = renamed(state_dict, ((r'^norm([0246])\.', lambda m: f'norms.{int(m[1]) // 2}.'),))
    return context_cluster(state_dict)


def _swin(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(swin(state_dict), ((r'^norm([0-3])\.', r'norms.\1.'),))
