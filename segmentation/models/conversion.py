"""Converts the authors' dense checkpoints, which have the names of mmsegmentation."""

from torch import Tensor, nn

from cluster_zoo.weights.conversion import Names, context_cluster, renamed, swin

__all__ = ['convert_backbone', 'convert_segmenter']

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
# The authors number the norm of a Context Cluster stage like the stage itself: 0, 2, 4, 6.
_CONTEXT_CLUSTER_NORMS: Names = ((r'^norm([0246])\.', lambda m: f'norms.{int(m[1]) // 2}.'),)
_SWIN_NORMS: Names = ((r'^norm([0-3])\.', r'norms.\1.'),)


def convert_segmenter(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts a checkpoint of a whole segmentation model to the names of `Segmenter`.

    Args:
        state_dict: An authors' checkpoint, or one that has this package's names.
        model: The segmenter to load it into. Entries that it does not use are dropped: an auxiliary head with the norm
            of its level, and the plain classifier that mmsegmentation saves next to other classifiers.
    """
    if any(name.startswith('decode_head.') for name in state_dict):
        heads = {name: value for name, value in state_dict.items() if not name.startswith('backbone.')}
        backbone = {name.removeprefix('backbone.'): x for name, x in state_dict.items() if name.startswith('backbone.')}
        state_dict = renamed(heads, _HEADS)
        for name, value in convert_backbone(backbone).items():
            state_dict[f'backbone.{name}' if name.startswith('norms.') else f'backbone.model.{name}'] = value
    modules = dict(model.named_modules())
    unused = [name for name in ('auxiliary', 'head.classifier.conv') if modules.get(name) is None]
    unused += [name for name, module in modules.items() if 'norms.' in name and isinstance(module, nn.Identity)]
    prefixes = tuple(f'{name}.' for name in unused)
    return {name: value for name, value in state_dict.items() if not name.startswith(prefixes)}


def convert_backbone(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts by the kind of backbone, which an entry that no other kind has identifies."""
    if 'network.0.0.norm1.weight' in state_dict:
        return context_cluster(renamed(state_dict, _CONTEXT_CLUSTER_NORMS))
    if 'stages.0.blocks.0.attn.w_msa.qkv.weight' in state_dict:
        return renamed(swin(state_dict), _SWIN_NORMS)
    if 'layers.0.ln1.weight' in state_dict:
        return renamed(state_dict, _VISION_TRANSFORMER)
    if 'stem.0.weight' in state_dict:
        return renamed(state_dict, _RESNET)
    return state_dict
