"""Swin Transformer with ACmix in every block (arXiv 2103.14030 and 2111.14556)."""

from collections.abc import Sequence
from typing import Optional, Union

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import FFN, PatchEmbed, PatchMerging, build_dropout
from mmengine.logging import print_log
from mmengine.model import BaseModule, ModuleList
from mmengine.model.weight_init import constant_init, trunc_normal_, trunc_normal_init
from mmengine.registry import MODELS
from mmengine.utils import to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from acmix_mm.backbones.mixer import build_mixer, check_one_mixer, has_other_names
from acmix_mm.backbones.position_tables import resize_grid
from acmix_mm.checkpoints.loading import load_with_report, pretrained_init_cfg, start_as_plain
from acmix_mm.checkpoints.recognition import Pretrained, read_pretrained
from acmix_mm.layers import WindowACmix


class ShiftWindowACmix(nn.Module):
    """:class:`WindowACmix` on a token sequence, then drop path.

    ``w_msa`` is where MMDetection's Swin keeps these parameters, so that its names fit.
    """

    def __init__(self, drop_path_rate: float, **window_acmix) -> None:
        super().__init__()
        self.w_msa = WindowACmix(**window_acmix)
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        out = self.w_msa(x.unflatten(1, hw_shape))
        return self.drop(out.flatten(1, 2))


class ConvolutionMixer(nn.Module):
    """A convolution on a token sequence, a linear layer as it follows attention, then drop path.

    Nothing is shifted: a convolution has no windows.
    """

    def __init__(self, embed_dims: int, mixer: dict, drop_rate: float,
                 drop_path_rate: float) -> None:
        super().__init__()
        self.conv = build_mixer(mixer, embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(drop_rate)
        self.drop = build_dropout(dict(type='DropPath', drop_prob=drop_path_rate))

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        maps = self.conv(x.unflatten(1, hw_shape).permute(0, 3, 1, 2))
        out = self.proj_drop(self.proj(maps.permute(0, 2, 3, 1)))
        return self.drop(out.flatten(1, 2))


class ACmixSwinBlock(nn.Module):
    """x + ACmix(norm(x)), then x + FFN(norm(x)), on (batch, height · width, embed_dims).

    ``mixer`` is another operator in the place of ACmix, or None.
    """

    def __init__(self, embed_dims: int, num_heads: int, feedforward_channels: int,
                 window_size: int, shift: bool, qkv_bias: bool, qk_scale: Optional[float],
                 drop_rate: float, attn_drop_rate: float, drop_path_rate: float, act_cfg: dict,
                 norm_cfg: dict, with_cp: bool, acmix: dict,
                 mixer: Optional[dict] = None) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = build_norm_layer(norm_cfg, embed_dims)[1]
        if mixer is None:
            self.attn = ShiftWindowACmix(
                drop_path_rate,
                embed_dims=embed_dims,
                num_heads=num_heads,
                window_size=window_size,
                shift_size=window_size // 2 if shift else 0,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                attn_drop_rate=attn_drop_rate,
                proj_drop_rate=drop_rate,
                **acmix)
        else:
            self.attn = ConvolutionMixer(embed_dims, mixer, drop_rate, drop_path_rate)
        self.norm2 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.ffn = FFN(
            embed_dims=embed_dims,
            feedforward_channels=feedforward_channels,
            ffn_drop=drop_rate,
            dropout_layer=dict(type='DropPath', drop_prob=drop_path_rate),
            act_cfg=act_cfg)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        if self.with_cp and x.requires_grad:
            return recompute(self.mix_and_feed_forward, x, hw_shape, use_reentrant=False)
        return self.mix_and_feed_forward(x, hw_shape)

    def mix_and_feed_forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), hw_shape)
        return self.ffn(self.norm2(x), identity=x)


class ACmixSwinStage(nn.Module):
    """Blocks that shift their windows in turn, then patch merging (none in the last stage)."""

    def __init__(self, depth: int, drop_path_rates: Sequence[float],
                 downsample: Optional[PatchMerging], **block) -> None:
        super().__init__()
        self.blocks = ModuleList(
            ACmixSwinBlock(shift=index % 2 == 1, drop_path_rate=drop_path_rates[index], **block)
            for index in range(depth))
        self.downsample = downsample

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        for block in self.blocks:
            x = block(x, hw_shape)
        return x


@MODELS.register_module()
class ACmixSwinTransformer(BaseModule):
    """Swin Transformer whose blocks mix windowed attention with convolution.

    Takes the arguments of MMDetection's and MMSegmentation's ``SwinTransformer`` with the same
    meaning, ``mix`` and ``mixer``. Parameter names are MMDetection's, with the authors' names for
    what ACmix adds under ``attn.w_msa``. Images of any size from 1×1 up.

    Args:
        pretrain_img_size: image size that the absolute position embedding is made for, in
            pixels; at other sizes it is interpolated.
        in_channels: channels of the image.
        embed_dims: channels of the first stage; each stage doubles them.
        patch_size: side of a patch, in pixels; equals ``strides[0]``.
        window_size: side of a window, in patches.
        mlp_ratio: hidden channels of the feed-forward layers over their input's.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        strides: strides of the patch embedding and of the patch mergings.
        out_indices: stages that give an output.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: factor of the attention logits; ``head_dims ** -0.5`` if None.
        patch_norm: whether patch embedding and patch merging have a norm.
        drop_rate: dropout after the embedding, the mix, and in the feed-forward layers.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        use_abs_pos_embed: whether to add an absolute position embedding.
        act_cfg: activation of the feed-forward layers.
        norm_cfg: norm of the blocks and of the outputs.
        with_cp: recompute the blocks in the backward pass to save memory.
        pretrained: deprecated in favour of ``init_cfg``; path or URL of a checkpoint.
        convert_weights: says that the checkpoint is in Microsoft's naming. Accepted for the
            configs that have it; the naming is recognised from the keys either way.
        frozen_stages: freeze the patch embedding (0) and that many stages; -1 freezes nothing.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` with the authors' ACmix-Swin,
            Microsoft's Swin, or MMDetection's Swin, or None. A plain Swin starts with rate1 = 1
            and rate2 = 0: the network computes at first what the plain one did.
        mix: ``'acmix'``, or ``'attn'`` or ``'conv'`` to leave out the other path altogether.
        acmix_cfg: further options of the ACmix layers, of ``combine``, ``shift`` and
            ``shift_groups``; see :class:`acmix_mm.layers.WindowACmix`.
        mixer: an OpenMMLab convolution type in the place of ACmix and its shifted windows:
            ``dict(type='Involution', kernel_size=7)``. It sees the map channels first, and a linear
            layer follows, as behind attention. Where it does not say, its ``kernel_size`` is 3, and
            ``bias`` is False. Of a checkpoint with another mixer, or of a plain Swin, all else is
            loaded.

    Raises:
        ValueError: an argument is outside of what is said above.
        CheckpointError: in ``init_weights``, the checkpoint cannot be read or does not fit.
    """

    def __init__(self,
                 pretrain_img_size: Union[int, Sequence[int]] = 224,
                 in_channels: int = 3,
                 embed_dims: int = 96,
                 patch_size: int = 4,
                 window_size: int = 7,
                 mlp_ratio: float = 4,
                 depths: Sequence[int] = (2, 2, 6, 2),
                 num_heads: Sequence[int] = (3, 6, 12, 24),
                 strides: Sequence[int] = (4, 2, 2, 2),
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 qkv_bias: bool = True,
                 qk_scale: Optional[float] = None,
                 patch_norm: bool = True,
                 drop_rate: float = 0.,
                 attn_drop_rate: float = 0.,
                 drop_path_rate: float = 0.1,
                 use_abs_pos_embed: bool = False,
                 act_cfg: dict = dict(type='GELU'),
                 norm_cfg: dict = dict(type='LN'),
                 with_cp: bool = False,
                 pretrained: Optional[str] = None,
                 convert_weights: bool = False,
                 frozen_stages: int = -1,
                 init_cfg: Optional[dict] = None,
                 mix: str = 'acmix',
                 acmix_cfg: Optional[dict] = None,
                 mixer: Optional[dict] = None) -> None:
        if strides[0] != patch_size:
            raise ValueError('Patches do not overlap: patch_size must equal strides[0], got '
                             f'{patch_size} and {strides[0]}.')
        check_one_mixer(mixer, mix, acmix_cfg)
        super().__init__(init_cfg=pretrained_init_cfg(init_cfg, pretrained))
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.mix = mix
        self.mixer = mixer
        self.num_features = [int(embed_dims * 2**stage) for stage in range(len(depths))]
        merging_norm_cfg = norm_cfg if patch_norm else None

        self.patch_embed = PatchEmbed(
            in_channels=in_channels,
            embed_dims=embed_dims,
            kernel_size=patch_size,
            stride=strides[0],
            norm_cfg=merging_norm_cfg)
        if use_abs_pos_embed:
            height, width = to_2tuple(pretrain_img_size)
            self.patch_grid = (height // patch_size, width // patch_size)
            self.absolute_pos_embed = nn.Parameter(
                torch.zeros(1, self.patch_grid[0] * self.patch_grid[1], embed_dims))
        else:
            self.absolute_pos_embed = None
        self.drop_after_pos = nn.Dropout(drop_rate)

        drop_path_rates = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').split(
            tuple(depths))
        self.stages = ModuleList()
        for stage, (depth, channels) in enumerate(zip(depths, self.num_features)):
            is_last = stage == len(depths) - 1
            self.stages.append(ACmixSwinStage(
                depth=depth,
                drop_path_rates=drop_path_rates[stage].tolist(),
                downsample=None if is_last else PatchMerging(
                    in_channels=channels,
                    out_channels=2 * channels,
                    stride=strides[stage + 1],
                    norm_cfg=merging_norm_cfg),
                embed_dims=channels,
                num_heads=num_heads[stage],
                feedforward_channels=int(mlp_ratio * channels),
                window_size=window_size,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop_rate=drop_rate,
                attn_drop_rate=attn_drop_rate,
                act_cfg=act_cfg,
                norm_cfg=norm_cfg,
                with_cp=with_cp,
                acmix=dict(mix=mix, **(acmix_cfg or {})),
                mixer=mixer))
        for index in out_indices:
            self.add_module(f'norm{index}', build_norm_layer(norm_cfg, self.num_features[index])[1])
        self.freeze_stages()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (batch, in_channels, H, W) to one (batch, channels, h, w) per out index."""
        maps = self.forward_stages(x, self.out_indices)
        return [norm_channels(getattr(self, f'norm{index}'), out)
                for index, out in zip(sorted(self.out_indices), maps)]

    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps (batch, channels, h, w) behind the stages ``indices``, in ascending order.

        They have not passed their output norms, and later stages do not run.
        """
        x, hw_shape = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + self.position_embedding(hw_shape)
        x = self.drop_after_pos(x)

        maps, last = [], max(indices)
        for index in range(last + 1):
            stage = self.stages[index]
            x = stage(x, hw_shape)
            if index in indices:
                maps.append(x.unflatten(1, hw_shape).permute(0, 3, 1, 2))
            if index < last:
                x, hw_shape = stage.downsample(x, hw_shape)
        return maps

    def position_embedding(self, hw_shape: tuple[int, int]) -> Tensor:
        """The absolute position embedding for a grid of patches, (1, height · width, channels)."""
        return resize_grid(self.absolute_pos_embed, self.patch_grid, hw_shape, 'bicubic')

    def train(self, mode: bool = True) -> 'ACmixSwinTransformer':
        """Switch the mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self.freeze_stages()
        return self

    def freeze_stages(self) -> None:
        """Stop gradients and training behaviour in what ``frozen_stages`` covers."""
        frozen = []
        if self.frozen_stages >= 0:
            frozen += [self.patch_embed, self.drop_after_pos]
            if self.absolute_pos_embed is not None:
                self.absolute_pos_embed.requires_grad_(False)
        for index in range(self.frozen_stages):
            frozen.append(self.stages[index])
            if index in self.out_indices:
                frozen.append(getattr(self, f'norm{index}'))
        for module in frozen:
            module.eval().requires_grad_(False)

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, or initialise as Swin does."""
        if self.init_cfg is not None:
            self.load_pretrained(read_pretrained(self.init_cfg['checkpoint'], 'Swin'))
            return
        print_log(f'{type(self).__name__} starts from scratch: no checkpoint in init_cfg.',
                  logger='current')
        self.init_from_scratch()

    def init_from_scratch(self) -> None:
        """Initialise as Swin does; rates and shift kernels go to their start."""
        if self.absolute_pos_embed is not None:
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=0.02, bias=0.)
            elif isinstance(module, nn.LayerNorm):
                constant_init(module, 1.0)
            elif isinstance(module, WindowACmix):
                module.reset_parameters()

    def load_pretrained(self, found: Pretrained) -> None:
        """Load a Swin or ACmix-Swin checkpoint, whichever of the known namings it is in.

        Raises:
            CheckpointError: they do not fit.
        """
        is_acmix, state_dict = found.is_acmix, dict(found.state_dict)
        if is_acmix and self.mix != 'acmix':
            state_dict = fold_rate(state_dict, self.mix)
        self.fit_position_tables(state_dict)

        mixing = r'\.w_msa\.(fc\.|dep_conv\.|rate[12]$)'
        attending = r'\.w_msa\.(proj\.|relative_position_bias_table$|rate[12]$)'
        replaced = [] if self.mixer is None else [
            name for name, mixer in self.named_modules() if isinstance(mixer, ConvolutionMixer)
            and has_other_names(mixer, f'{name}.', state_dict)]
        own_tables = r'^norm\d\.|^absolute_pos_embed$'
        load_with_report(
            self, state_dict, source=found.source,
            recognised=str(found),
            may_lack=own_tables if is_acmix else f'{own_tables}|{mixing}',
            may_drop=r'^head\.|^norm\d?\.|attn_mask$|relative_position_index$' +
            {'acmix': '', 'attn': f'|{mixing}', 'conv': f'|{attending}'}[self.mix],
            leave='|'.join(rf'^{name}\.' for name in replaced))
        if not is_acmix and self.mix == 'acmix' and self.mixer is None:
            start_as_plain(self, 'Swin')

    def fit_position_tables(self, state_dict: dict[str, Tensor]) -> None:
        """Resize, in place, the position tables of other window or image sizes."""
        own = self.state_dict()
        state_dict.update({key: value for key, value in own.items()
                           if key.endswith('relative_position_index')})
        for key, table in state_dict.items():
            if key not in own or table.shape == own[key].shape:
                continue
            if key.endswith('relative_position_bias_table'):
                old, new = (int(rows.shape[0]**0.5) for rows in (table, own[key]))
                state_dict[key] = resize_grid(table[None], (old, old), (new, new), 'bicubic')[0]
            elif key == 'absolute_pos_embed':
                side = int(table.shape[1]**0.5)
                state_dict[key] = resize_grid(table, (side, side), self.patch_grid,
                                              'bicubic')


def norm_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm of the last axis to the channels of a map (batch, channels, h, w)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def fold_rate(state_dict: dict[str, Tensor], mix: str) -> dict[str, Tensor]:
    """Multiply the rate of the one path that is kept into its last linear layer."""
    ends = {'attn': ('proj.weight', 'proj.bias'), 'conv': ('dep_conv.weight',)}[mix]
    folded = dict(state_dict)
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition('.w_msa.')
        rate = state_dict.get(f'{prefix}.w_msa.rate1')
        if rate is not None and mix == 'conv':
            # There is one rate where the other is the rest of it.
            rate = state_dict.get(f'{prefix}.w_msa.rate2', 1 - rate)
        if prefix and name in ends and rate is not None:
            folded[key] = value * rate
    return folded
