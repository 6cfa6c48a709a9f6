# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of a network, held against its tensors.

A field that changes the result is used elsewhere (`num_attention_heads`, `layer_norm_eps`,
`image_size`, `patch_size`, `norm_pix_loss`, `mask_ratio`), or must be as the tensors and the code
here have it, or the weights are refused with its name. The others are in HARMLESS; a field that is
in neither is named to the user. A field that is absent has the value of its default.
"""

from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import rope
from ssl_jax.run import errors

# `model_type` of transformers whose code computes what is computed here.
KINDS = (
    *('vit', 'vit_mae', 'vit_msn', 'deit', 'dinov2', 'dinov2_with_registers', 'beit'),
    *('data2vec-vision', 'pixio', 'ijepa', 'dinov3_vit'),
)
EXACT_GELU = ('gelu', 'gelu_python')
USED = frozenset(
    (
        *('model_type', 'num_attention_heads', 'layer_norm_eps', 'image_size', 'patch_size'),
        *('decoder_num_attention_heads', 'norm_pix_loss', 'mask_ratio', 'layerscale_value'),
        *('layer_scale_init_value',),
    )
)
# Of training, of task heads and poolers, of feature maps for detectors, of the library itself.
HARMLESS = frozenset(
    (
        *('hidden_dropout_prob', 'attention_probs_dropout_prob', 'drop_path_rate'),
        *('initializer_range', 'encoder_stride', 'pooler_output_size', 'pooler_act'),
        *('apply_layernorm', 'reshape_hidden_states', 'out_features', 'out_indices'),
        *('_out_features', '_out_indices', 'stage_names', 'use_mask_token', 'vocab_size'),
        *('pool_scales', 'use_auxiliary_head', 'auxiliary_loss_weight', 'auxiliary_channels'),
        *('auxiliary_num_convs', 'auxiliary_concat_input', 'semantic_loss_ignore_index'),
        *('add_fpn', 'segmentation_indices', 'architectures', 'transformers_version'),
        *('torch_dtype', 'dtype', 'id2label', 'label2id', 'num_labels', 'problem_type'),
        *('return_dict', 'output_hidden_states', 'output_attentions'),
        *('chunk_size_feed_forward', 'is_encoder_decoder', 'tie_word_embeddings'),
        *('_name_or_path', 'name_or_path', 'attn_implementation', '_attn_implementation'),
        *('_commit_hash', 'auto_map', 'torchscript', 'use_cache', 'pruned_heads'),
        *('gradient_checkpointing', 'is_decoder', 'add_cross_attention'),
        *('cross_attention_hidden_size', 'finetuning_task', '_attn_implementation_internal'),
        *('experts_implementation', '_experts_implementation', 'attention_dropout'),
        *('pos_embed_shift', 'pos_embed_jitter', 'pos_embed_rescale', 'return_class_token'),
    )
)
# They matter only where the file has what they describe.
OPTIONAL = frozenset(
    (
        *('hidden_act', 'use_mean_pooling', 'decoder_hidden_size'),
        *('decoder_num_hidden_layers', 'decoder_intermediate_size'),
    )
)
# What the user says on the command line, in the same dict.
USER = frozenset((*('num_heads', 'decoder_num_heads', 'img_size', 'pos_resize'),))

# Architectures of timm whose networks differ from ours in ways that tensors do not show.
TIMM_FOREIGN = ('clip', 'siglip', 'quickgelu', 'aimv2')


def check(hints: dict, vit, decoder, have: dict, hf: bool) -> list[str]:
    """Sentences on fields that are unknown here.

    Args:
      hints: config.json, and what the user says.
      vit, decoder: what the tensors are recognised as; the second may be None.
      have: names -> shapes of the tensors.
      hf: whether the names are those of transformers.

    Raises:
      UserError: a field contradicts the tensors, or means a network that is not computed here.
    """
    if not hf:
        _check_timm(hints)
        return []
    want = _wanted(hints, vit, decoder, have)
    for name, values in want.items():
        if name in hints and hints[name] not in values:
            raise errors.UserError(
                f'config.json says {name}={hints[name]!r} and the network of these tensors, as it '
                f'is computed here, has {values[0]!r}; such weights are not read.'
            )
    kind = hints.get('model_type')
    lines = []
    if kind is not None and kind not in KINDS:
        lines = [f'model_type {kind} is not known here; it is read as what its tensors are like.']
    strange = sorted(set(hints) - USED - HARMLESS - OPTIONAL - USER - set(want))
    if kind is None or not strange:
        return lines
    return [
        *lines,
        f'config.json has fields that are unknown here and not read: {", ".join(strange)}.',
    ]


def _wanted(hints, vit, decoder, have):
    """{field: values that fit}, the first of them for the user."""
    dim, ratio, swiglu = vit.embed_dim, hints.get('mlp_ratio'), vit.ffn == 'swiglu'
    width = blocks_lib.swiglu_hidden if swiglu else lambda dim, ratio: int(dim * ratio)
    hidden = width(dim, vit.mlp_ratio)
    same = isinstance(ratio, int | float) and width(dim, ratio) == hidden
    found = dict(
        hidden_act=EXACT_GELU,
        num_channels=(3,),
        qkv_bias=(True, None),
        hidden_size=(dim,),
        num_hidden_layers=(vit.depth,),
        mlp_ratio=(ratio if same else vit.mlp_ratio,),
        intermediate_size=(hidden,),
        use_swiglu_ffn=(swiglu,),
        use_gated_mlp=(swiglu,),
        rope_theta=(rope.PERIOD,),
        query_bias=(any(k.endswith('.q_proj.bias') for k in have),),
        key_bias=(vit.key_bias,),
        value_bias=(any(k.endswith('.v_proj.bias') for k in have),),
        proj_bias=(True,),
        mlp_bias=(True,),
        num_register_tokens=(vit.num_register_tokens,),
        n_cls_tokens=(vit.num_cls_tokens,),
        use_absolute_position_embeddings=(vit.has_table,),
        use_relative_position_bias=(vit.rel_pos == 'layer',),
        use_shared_relative_position_bias=(vit.rel_pos == 'shared',),
        quantization_config=(None,),
    )
    if swiglu and vit.pos_embed == 'rope':
        found['hidden_act'] = ('silu',)
    elif swiglu:  # its activation is SiLU whatever that field says
        del found['hidden_act']
    # With the layer to words the norm is outside the encoder, where the field does not matter.
    if hints.get('model_type') == 'beit' and 'lm_head.weight' not in have:
        found['use_mean_pooling'] = (vit.pooled_norm,)
    if decoder is not None:
        found.update(
            decoder_hidden_size=(decoder.embed_dim,),
            decoder_num_hidden_layers=(decoder.depth,),
            decoder_intermediate_size=(int(decoder.embed_dim * decoder.mlp_ratio),),
        )
    return found


def _check_timm(hints):
    architecture, args = hints.get('architecture', ''), hints.get('model_args') or {}
    if foreign := [name for name in TIMM_FOREIGN if name in str(architecture)]:
        raise errors.UserError(
            f'config.json says architecture={architecture!r}: timm computes {foreign[0]} models in '
            f'another way than the tensors show; such weights are not read.'
        )
    act = args.get('act_layer', 'gelu')
    if act not in EXACT_GELU:
        raise errors.UserError(
            f'config.json says act_layer={act!r} and the networks here have gelu; such weights are '
            f'not read.'
        )


def pixel_loss(hints: dict) -> dict:
    """Fields of the method 'mae' that transformers' config of its decoder has."""
    found = {}
    if 'norm_pix_loss' in hints:
        found['norm_pix_loss'] = bool(hints['norm_pix_loss'])
    if 'mask_ratio' in hints:
        found['mask_ratio'] = float(hints['mask_ratio'])
    return found
