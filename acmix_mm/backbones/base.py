"""The base class of the backbones, and the base class of their blocks."""

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar, NamedTuple, Optional, Union

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from acmix_mm.checkpoints.host import HostCheckpoints
from acmix_mm.checkpoints.recognition import Pretrained, read_pretrained

# The backbones by host, in the order of the paper's results.
BACKBONES: dict[str, type['ACmixBackbone']] = {}
# In a group matcher: timm's suffix that adds a match to the group of the block before it.
WITH_PREVIOUS = (99999,)


class PaperNetwork(NamedTuple):
    """A network from the table of ImageNet results in arXiv 2111.14556.

    Attributes:
        name: name in the paper, ``'ACmix-Swin-T'``.
        timm_name: name of the timm model.
        arguments: constructor arguments of the backbone.
        parameters: published parameters, in millions.
        multiply_adds: published multiply-adds at 224×224, in billions.
        code_parameters: parameters counted on the authors' code, in millions; None if they
            published none.
    """

    name: str
    timm_name: str
    arguments: dict[str, Any]
    parameters: float
    multiply_adds: float
    code_parameters: Optional[float] = None


class Stage(NamedTuple):
    """A stage of a backbone.

    Attributes:
        channels: channels of its output.
        reduction: stride of its output, relative to the image.
        module: name of its module.
    """

    channels: int
    reduction: int
    module: str


class ACmixBackbone(BaseModule):
    """Base class of the backbones: loading, freezing, the forward pass, and declarations.

    A host defines the class attributes and the abstract methods. Its constructor appends a
    :class:`Stage` to ``stage_info`` for each stage, and ends with ``self.freeze_stages()``.
    Everything else that depends on the host (conversion, counting, comparison, timm models) reads
    these declarations. A subclass that defines ``checkpoints`` itself is added to ``BACKBONES``.

    Args:
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` or None.
        pretrained: deprecated in favour of ``init_cfg``; path or URL of a checkpoint.

    Attributes:
        checkpoints: what is known of the host's checkpoints.
        mixers: for each token mixer that the backbone supports, the arguments that select it.
        plain_arguments: arguments that turn the backbone into its plain host.
        fixed_arguments: arguments that a variant of a host sets itself; its constructor passes
            all others on to that of the host as ``**arguments``.
        width_argument: argument that the channels of all stages are proportional to.
        blocks_argument: argument with the number of blocks in each stage.
        paper_networks: networks of the paper.
        counts_elementwise: whether the published multiply-adds include elementwise operations.
        stage_info: stages that were built, from the image to the last.
        out_indices: stages whose outputs :meth:`forward` returns.
        frozen_stages: the stem (0) and that many stages are frozen; -1 freezes nothing.
        norm_eval: whether batch norms keep their running statistics in training.
        output_norm: name of the norms that only outputs pass, with braces for the index of the
            stage; None if there are none.
        classifier_norm: whether a classifier needs an additional norm after the last stage.
        timm_arguments: arguments of the backbone by the names that timm models use.
        timm_cfg: ``first_conv``, ``crop_pct`` and ``interpolation`` of timm's default configs.
        position_tables: names of the parameters that are exempt from weight decay, in addition to
            the rates.
        fx_leaves: modules that ``torch.fx`` must not trace, because their control flow depends on
            the size of the map.

    Raises:
        ValueError: both ``init_cfg`` and ``pretrained`` are given, or the one that is given names
            no checkpoint.
    """

    checkpoints: ClassVar[HostCheckpoints]
    mixers: ClassVar[dict[str, dict[str, Any]]]
    plain_arguments: ClassVar[dict[str, Any]]
    fixed_arguments: ClassVar[dict[str, Any]] = {}
    width_argument: ClassVar[str]
    blocks_argument: ClassVar[str]
    paper_networks: ClassVar[tuple[PaperNetwork, ...]] = ()
    counts_elementwise: ClassVar[bool] = False

    output_norm: ClassVar[Optional[str]] = None
    classifier_norm: ClassVar[bool] = False
    timm_arguments: ClassVar[dict[str, str]] = {}
    timm_cfg: ClassVar[dict[str, Any]]
    position_tables: ClassVar[tuple[str, ...]] = ()
    fx_leaves: ClassVar[tuple[type[nn.Module], ...]] = ()

    out_indices: Sequence[int]
    frozen_stages: int = -1
    norm_eval: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if 'checkpoints' in cls.__dict__:
            BACKBONES[cls.checkpoints.host] = cls

    def __init__(self, init_cfg: Optional[dict] = None, pretrained: Optional[str] = None) -> None:
        if pretrained is not None:
            if not isinstance(pretrained, str):
                raise ValueError(f'pretrained must be the path or URL of a checkpoint, got '
                                 f'{pretrained!r}.')
            if init_cfg is not None:
                raise ValueError('init_cfg and pretrained both name a checkpoint; give one.')
            warnings.warn('pretrained is deprecated, use init_cfg=dict(type="Pretrained", '
                          'checkpoint=...) instead', DeprecationWarning, stacklevel=3)
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        if init_cfg is not None and not (
                isinstance(init_cfg, Mapping)
                and isinstance(init_cfg.get('checkpoint'), (str, PathLike))):
            raise ValueError('ACmix backbones take init_cfg=dict(type="Pretrained", '
                             f'checkpoint=...) or None, got {init_cfg!r}.')
        super().__init__(init_cfg=init_cfg)
        self.stage_info: list[Stage] = []

    @classmethod
    def arguments(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """All constructor arguments: the given ones, and the defaults of the others."""
        defaults: dict[str, Any] = {}
        for each in cls.__mro__:
            parameters = inspect.signature(each).parameters.values()
            named = [each for each in parameters if each.kind is not each.VAR_KEYWORD]
            defaults = {**{each.name: each.default for each in named}, **defaults}
            # A variant of a host passes **arguments on to the next class.
            if len(named) == len(parameters):
                break
        return {**defaults, **cls.fixed_arguments, **given}

    @classmethod
    def stage_blocks_of(cls, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """Blocks of each stage.

        Args:
            arguments: all constructor arguments, as :meth:`arguments` returns them.
        """
        return tuple(arguments[cls.blocks_argument])

    @classmethod
    def width_step(cls, arguments: Mapping[str, Any]) -> int:
        """The number that the width must be a multiple of.

        Args:
            arguments: all constructor arguments, as :meth:`arguments` returns them.
        """
        return 1

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """Compute the outputs of the stages in ``out_indices``.

        Args:
            x: images (batch, in_channels, H, W).

        Returns:
            For each stage a map (batch, channels, h, w), in ascending order of the stages.
        """
        maps = self.forward_stages(x, self.out_indices)
        if self.output_norm is None:
            return maps
        return [norm_channels(getattr(self, self.output_norm.format(index)), out)
                for index, out in zip(sorted(self.out_indices), maps)]

    @abstractmethod
    def forward_stages(self, x: Tensor, indices: Sequence[int]) -> Sequence[Tensor]:
        """Compute the maps of some stages, before any output norm. Later stages do not run.

        Args:
            x: images (batch, in_channels, H, W).
            indices: indices of the stages.

        Returns:
            For each stage a map (batch, channels, h, w), in ascending order of the stages.
        """

    def train(self, mode: bool = True) -> 'ACmixBackbone':
        """Set the training mode; frozen stages, and with ``norm_eval`` all batch norms, stay in
        evaluation mode.
        """
        super().train(mode)
        self.freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def freeze_stages(self) -> None:
        """Put what ``frozen_stages`` covers in evaluation mode, without gradients."""
        for module in self.frozen_modules():
            module.requires_grad_(False)
            if isinstance(module, nn.Module):
                module.eval()

    def frozen_modules(self) -> Sequence[Union[nn.Module, nn.Parameter]]:
        """Modules, and parameters outside of them, that ``frozen_stages`` covers."""
        return []

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, or initialise from scratch.

        Raises:
            CheckpointError: the checkpoint cannot be read or does not fit.
        """
        if self.init_cfg is not None:
            source = self.init_cfg['checkpoint']
            self.load_pretrained(read_pretrained(source, self.checkpoints.host))
            return
        print_log(f'{type(self).__name__} starts from scratch: no checkpoint in init_cfg.',
                  logger='current')
        self.init_from_scratch()

    @abstractmethod
    def init_from_scratch(self) -> None:
        """Initialise as the host does. Shift kernels and rates keep their own initial values."""

    @abstractmethod
    def load_pretrained(self, found: Pretrained) -> None:
        """Load a checkpoint of the ACmix network or of its plain host.

        Raises:
            CheckpointError: the checkpoint does not fit.
        """

    def replaced_convolutions(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """The mixers that replace a convolution of the host, by block, each with the norm that
        follows it.
        """
        return {}

    @abstractmethod
    def remove_stages(self, first: int) -> None:
        """Delete the stages from index ``first`` on."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group the parameters by depth, as timm's models define them.

        Args:
            coarse: group by stage instead of by block.
        """


class Block(nn.Module):
    """A block that can be recomputed in the backward pass to save memory.

    Attributes:
        with_cp: whether to recompute it.
        adds_shortcut: whether the block adds its input to its output, which some published counts
            include.
    """

    adds_shortcut: ClassVar[bool] = False

    def __init__(self, with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Run :meth:`compute`, through activation checkpointing if ``with_cp``."""
        if self.with_cp and x.requires_grad:
            return checkpoint(self.compute, x, *context, use_reentrant=False)
        return self.compute(x, *context)

    def compute(self, x: Tensor, *context: Any) -> Tensor:
        """The forward pass of the block."""
        raise NotImplementedError


def stochastic_depth(rate: float, stage_blocks: Sequence[int]) -> list[list[float]]:
    """Drop path rates that rise linearly from 0 to ``rate``, by stage and block."""
    rates = torch.linspace(0, rate, sum(stage_blocks), device='cpu').split(tuple(stage_blocks))
    return [each.tolist() for each in rates]


def norm_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm over the last axis to the channels of a map (batch, channels, h, w)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
