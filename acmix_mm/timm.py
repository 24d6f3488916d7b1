"""The backbones as timm models: importing this module registers them with timm.

Each model is the OpenMMLab backbone itself with a classifier after its last stage. Parameters have
the names that they have in the backbone; the classifier adds ``head.fc``, and in PVT a final
``norm``. Weights that were trained with timm therefore load into a detector through ``init_cfg``.

``timm.create_model`` accepts ``num_classes``, ``in_chans``, ``global_pool``, ``drop_rate`` (before
the classifier), ``drop_path_rate``, and all other arguments of the backbone under their own names.
In Swin and PVT, ``img_size`` is the backbone's ``pretrain_img_size`` (other image sizes work, too),
and ``proj_drop_rate`` the backbone's ``drop_rate``. There are no pretrained weights:
``pretrained=True`` raises timm's error.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

from mmcv.cnn.bricks import DropPath
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from acmix_mm.backbones.base import BACKBONES, ACmixBackbone, PaperNetwork, norm_channels
from acmix_mm.layers.base import OperatorLayer


class Classifier(nn.Module):
    """Mixin that turns a backbone, the next base class, into a timm classifier.

    Stages are numbered as in the backbone's ``out_indices``, also in ``features_only`` and
    :meth:`forward_intermediates`. Their maps are the outputs of the backbone, except that Swin's
    are taken before the output norms, which a classifier lacks except for the last one.

    Args:
        num_classes: number of classes; with 0 the model returns pooled features.
        in_chans: channels of the image.
        global_pool: timm's name of the pooling, or ``''`` for none.
        drop_rate: dropout rate before the classifier.
        device: device of the parameters.
        dtype: type of the parameters.
        backbone: arguments of the backbone.

    Attributes:
        feature_info: channels, stride and module name of each stage.
        num_features: channels of the last stage.
        last_norm: name of the norm after the last stage, or None.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = 'avg',
                 drop_rate: float = 0., device: Any = None, dtype: Any = None,
                 **backbone: Any) -> None:
        for name, own_name in self.timm_arguments.items():
            if name in backbone:
                backbone[own_name] = backbone.pop(name)
        host = BACKBONES[self.checkpoints.host]
        arguments = host.arguments(backbone)
        last = len(host.stage_blocks_of(arguments)) - 1
        # Detectors keep the statistics of batch norms, but timm trains them.
        norm_eval = dict(norm_eval=False) if 'norm_eval' in host.arguments({}) else {}
        super().__init__(in_channels=in_chans, out_indices=(last,), init_cfg=None, **norm_eval,
                         **backbone)
        self.feature_info = [
            dict(num_chs=stage.channels, reduction=stage.reduction, module=stage.module)
            for stage in self.stage_info]
        self.in_chans = in_chans
        self.num_features = self.stage_info[last].channels
        self.last_norm = self.output_norm and self.output_norm.format(last)
        if self.classifier_norm:
            self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
            self.last_norm = 'norm'
        self.add_head(num_classes, global_pool, drop_rate)
        self.init_from_scratch()
        self.to(device=device, dtype=dtype)

    @property
    def last_stage(self) -> int:
        """Index of the last stage; :meth:`prune_intermediate_layers` lowers it."""
        return len(self.stage_info) - 1

    def add_head(self, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Build ``head``, replacing an existing one."""
        self.num_classes = num_classes
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool,
                                   drop_rate=drop_rate)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classifier; an identity if there are no classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, and the pooling if one is given."""
        like = next(self.parameters())
        if global_pool is None:
            global_pool = self.head.global_pool.pool_type
        self.add_head(num_classes, global_pool, self.head.drop.p)
        self.head.to(like).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, in_chans, H, W) to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the normalised map of the last stage, (batch, num_features, h, w)."""
        return self.norm_features(self.forward_stages(x, (self.last_stage,))[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the output of :meth:`forward_features` to logits, or to pooled features."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(self, x: Tensor, indices: Union[int, Sequence[int], None] = None,
                              norm: bool = False, stop_early: bool = False,
                              output_fmt: str = 'NCHW', intermediates_only: bool = False,
                              ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """Compute the maps (batch, channels, h, w) of some stages, and the last features.

        Args:
            x: images (batch, in_chans, H, W).
            indices: indices of the stages, negative ones from the end; an int n selects the last n
                stages, None all.
            norm: whether to apply the norm after the last stage to its map.
            stop_early: skip the stages after the last selected one.
            output_fmt: ``'NCHW'``.
            intermediates_only: return only the maps.

        Raises:
            ValueError: ``output_fmt`` is not ``'NCHW'``.
        """
        if output_fmt != 'NCHW':
            raise ValueError("Maps are channels first: output_fmt must be 'NCHW', got "
                             f'{output_fmt!r}.')
        indices, last = feature_take_indices(self.last_stage + 1, indices)
        if not (stop_early or intermediates_only):
            last = self.last_stage
        maps = dict(zip(sorted({*indices, last}), self.forward_stages(x, (*indices, last))))
        features = maps[last]
        if last == self.last_stage:
            features = self.norm_features(features)
            if norm:
                maps[last] = features
        intermediates = [maps[index] for index in sorted(set(indices))]
        return intermediates if intermediates_only else (features, intermediates)

    def norm_features(self, x: Tensor) -> Tensor:
        """Apply the norm after the last stage, if there is one."""
        return x if self.last_norm is None else norm_channels(getattr(self, self.last_norm), x)

    def prune_intermediate_layers(self, indices: Union[int, Sequence[int]] = 1,
                                  prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Remove everything that the maps of some stages do not need.

        Args:
            indices: as in :meth:`forward_intermediates`.
            prune_norm: whether to remove the norm after the last stage as well.
            prune_head: whether to remove the classifier as well.

        Returns:
            Indices of the selected stages.
        """
        indices, last = feature_take_indices(self.last_stage + 1, indices)
        is_shorter = last < self.last_stage
        if is_shorter:
            self.remove_stages(last + 1)
            del self.stage_info[last + 1:]
            self.num_features = self.feature_info[last]['num_chs']
        if self.last_norm is not None and (prune_norm or is_shorter):
            delattr(self, self.last_norm)
            self.last_norm = None
        if prune_head or is_shorter:
            self.reset_classifier(0, '')
        return indices

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether to recompute the blocks in the backward pass to save memory."""
        for module in self.modules():
            if hasattr(module, 'with_cp'):
                module.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay besides those that timm exempts itself
        (norms and biases): rates and position tables.
        """
        exempt = ('rate1', 'rate2', *self.position_tables)
        return {name for name, _ in self.named_parameters()
                if name.rpartition('.')[2] in exempt}


def register(host: type[ACmixBackbone]) -> None:
    """Define the classifier class of a host, and register the networks of the paper with timm."""
    name = f'ACmix{host.checkpoints.host}Classifier'
    classifier = type(name, (Classifier, host), dict(
        __module__=__name__, __doc__=f':class:`{host.__name__}` with a classifier.'))
    # Pickled models name their class.
    globals()[name] = classifier
    for module in host.fx_leaves:
        register_notrace_module(module)
    for network in host.paper_networks:
        globals()[network.timm_name] = register_model(entry_point(classifier, network))


def entry_point(classifier: type[Classifier], network: PaperNetwork) -> Callable[..., nn.Module]:
    """The function that timm calls to build a network."""
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if kwargs.get('feature_cls', 'getter') not in ('getter', FeatureGetterNet):
            raise ValueError('Maps come from forward_intermediates: feature_cls must be '
                             f"'getter' or be omitted, got {kwargs['feature_cls']!r}.")
        return build_model_with_cfg(
            classifier, network.timm_name, pretrained,
            feature_cfg=dict(feature_cls='getter', out_indices=4), **network.arguments | kwargs)

    create.__name__ = create.__qualname__ = network.timm_name
    create.__doc__ = f"""Build {network.name}; with ``features_only`` its last four maps.

    Raises:
        ValueError: ``feature_cls`` is not timm's ``'getter'``; other extractors change the model.
    """
    return create


default_cfgs = generate_default_cfgs({
    network.timm_name: dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD, classifier='head.fc', **host.timm_cfg)
    for host in BACKBONES.values() for network in host.paper_networks})

# torch.fx cannot trace modules whose control flow depends on the size of the map.
for each in (OperatorLayer, DropPath):
    register_notrace_module(each)
for each in BACKBONES.values():
    register(each)
