"""Base classes of the layers: :class:`OperatorLayer`, which reports its cost, and
:class:`TwoPathLayer`, which adds attention and convolution.
"""

from typing import ClassVar, Optional, overload

import torch
from torch import Tensor, nn

from acmix_mm.layers.point_attention import PointAttention
from acmix_mm.layers.shift_path import FullyConnected, Shifts
from acmix_mm.ops import compose_paths, linear, projected_shift_conv, shift_conv, shift_sum
from acmix_mm.ops.path_weights import PathWeights
from acmix_mm.ops.projected_shift_conv import composition

# Torch has the first since 2.4.
torch_autocast_dtype = getattr(torch, 'get_autocast_dtype',
                               lambda device: torch.get_autocast_gpu_dtype())
OPERATOR_CLASSES = PROJECTIONS, ATTENTION, CONVOLUTION, REST = (
    'projections', 'attention', 'convolution path', 'rest')
MIXES = ('acmix', 'attn', 'conv')
COMBINATIONS = ('rates', 'convex', 'sum')


class OperatorLayer(nn.Module):
    """A layer that reports its cost and geometry, for analysis and export.

    The cost follows from the papers' equations, because backends may mask, pad or merge steps.

    Attributes:
        channels_last: whether maps are (batch, height, width, channels) rather than (batch,
            channels, height, width).
        parameter_classes: the operator class of each parameter, by the first part of its name;
            parameters not listed belong to ``REST``.
    """

    channels_last: ClassVar[bool] = False
    parameter_classes: ClassVar[dict[str, str]] = {}

    def multiply_adds(self, x: Tensor, out: Tensor) -> dict[str, int]:
        """Count the multiply-adds of one call, by operator class.

        Args:
            x: the input. Only the shapes are read, so it may be on ``meta``.
            out: the output.
        """
        raise NotImplementedError

    def elementwise_operations(self, x: Tensor, out: Tensor) -> int:
        """Count the elementwise operations of one call as the SAN authors' tool does.

        These are the norms, activations and biases that are computed outside of submodules.
        """
        return 0

    def map_size(self, x: Tensor) -> tuple[int, int]:
        """The (height, width) of a map."""
        height, width = x.shape[1:3] if self.channels_last else x.shape[2:4]
        return height, width

    @property
    def min_dynamic_size(self) -> int:
        """The height and width from which all maps take the same code path, for export."""
        return 2


class TwoPathLayer(OperatorLayer):
    """Local attention and convolution on the same projections, added with learned rates.

    Paper: arXiv 2111.14556, section 4; the ablations are in section 5.4.

    A subclass implements :meth:`project`, :meth:`attend` and :meth:`convolve`. In its constructor
    it builds ``fc`` and ``dep_conv`` (see :mod:`acmix_mm.layers.shift_path`) if it convolves, and
    calls :meth:`add_rates` after all other parameters.

    Args:
        mix: ``'acmix'`` for both paths; ``'attn'`` or ``'conv'`` for one path alone, without rates
            and without the parameters of the other path.
        combine: how both paths are added. ``'rates'``: rate1 · attention + rate2 · convolution with
            learned rates; ``'convex'``: rate1 · attention + (1 − rate1) · convolution; ``'sum'``:
            attention + convolution. Learned rates start at one half.

    Raises:
        ValueError: ``mix`` or ``combine`` is invalid.
    """

    parameter_classes: ClassVar[dict[str, str]] = {'fc': CONVOLUTION, 'dep_conv': CONVOLUTION}
    fc: FullyConnected
    dep_conv: Shifts

    def __init__(self, mix: str = 'acmix', combine: str = 'rates') -> None:
        super().__init__()
        for name, value, allowed in (('mix', mix, MIXES), ('combine', combine, COMBINATIONS)):
            if value not in allowed:
                raise ValueError(f'{name} must be one of {", ".join(allowed)}, got {value!r}.')
        self.mix = mix
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(autocast_dtype(x))
        if not self.convolves:
            out = self.attend(*self.project(x))
        elif not self.attends:
            out = self.convolution(x)
        else:
            projected = self.project(x)
            out = self.combine_paths(self.attend(*projected), self.convolution(x, projected))
        return self.finish(out, x)

    def convolution(self, x: Tensor, projected: Optional[tuple] = None) -> Tensor:
        """Compute the convolution path from the input or its projections, whichever is cheaper.

        Args:
            x: the input of the layer.
            projected: from :meth:`project`, if it has been called.
        """
        out = self.convolve_input(x)
        if out is None:
            out = self.convolve(*(self.project(x) if projected is None else projected))
        return out

    def convolve_input(self, x: Tensor) -> Optional[Tensor]:
        """Compute the convolution path without projecting the input, if that is cheaper.

        Returns:
            The same as :meth:`convolve`, or None if that is cheaper; see :meth:`composition`.
        """
        return None

    def project(self, x: Tensor) -> tuple:
        """Project the input to queries, keys and values.

        Returns:
            The arguments of both :meth:`attend` and :meth:`convolve`.
        """
        raise NotImplementedError

    def attend(self, *projected: Tensor) -> Tensor:
        """Compute the attention path, scaled by its rate."""
        raise NotImplementedError

    def convolve(self, *projected: Tensor) -> Tensor:
        """Compute the convolution path, scaled by its rate; see :meth:`shift_and_sum`."""
        raise NotImplementedError

    def combine_paths(self, attention: Tensor, convolution: Tensor) -> Tensor:
        """Add the two paths. May overwrite ``convolution``."""
        return attention + convolution

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """Turn the sum of the paths into the output; linear except for dropout.

        Args:
            out: the sum, or one of the paths.
            x: the input of the layer.
        """
        return out

    @property
    def attends(self) -> bool:
        """Whether the layer has the attention path."""
        return self.mix != 'conv'

    @property
    def convolves(self) -> bool:
        """Whether the layer has the convolution path."""
        return self.mix != 'attn'

    def add_rates(self) -> None:
        """Register the learned rates."""
        names = {'rates': ('rate1', 'rate2'), 'convex': ('rate1',), 'sum': ()}[self.combine]
        for name in names if self.mix == 'acmix' else ():
            self.register_parameter(name, nn.Parameter(torch.empty(1)))
        self.reset_rates()

    def reset_rates(self) -> None:
        """Set the learned rates to one half."""
        for name in ('rate1', 'rate2'):
            if hasattr(self, name):
                nn.init.constant_(getattr(self, name), 0.5)

    def reset_convolution(self) -> None:
        """Reset the convolution path and the rates to their initial values."""
        if self.convolves:
            self.fc.reset_parameters()
            self.dep_conv.reset_parameters()
        self.reset_rates()

    @property
    def attention_rate(self) -> Optional[Tensor]:
        """The factor of the attention path, (1,), α in the paper; None for one."""
        return getattr(self, 'rate1', None)

    @property
    def convolution_rate(self) -> Optional[Tensor]:
        """The factor of the convolution path, (1,), β in the paper; None for one."""
        rate = self.attention_rate
        if rate is not None and self.combine == 'convex':
            return 1 - rate
        return getattr(self, 'rate2', None)

    @property
    def can_stand_in(self) -> bool:
        """Whether some parameters make the layer its convolution path alone, with any kernels."""
        can_convolve_alone = self.mix == 'conv' or (self.mix == 'acmix' and self.combine != 'sum')
        return can_convolve_alone and self.dep_conv.is_learned and not self.dep_conv.is_shared

    def shift_and_sum(self, maps: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        """Compute the convolution path from its maps, scaled by its rate.

        Args:
            maps: queries, keys and values, (batch, num_maps, head_dims, height, width).
            stride: see :func:`acmix_mm.ops.shift_conv`.
            dilation: see there.

        Returns:
            (batch, channels, out height, out width).
        """
        # Scaling the small weights is cheaper than scaling the map.
        rate, kernels = self.convolution_rate, self.dep_conv.kernels
        if kernels is None:
            out = shift_sum(maps, scaled(rate, self.fc.matrix), scaled(rate, self.fc.bias),
                            stride=stride, dilation=dilation)
            return out.repeat_interleave(self.dep_conv.num_heads, 1)
        return shift_conv(maps, self.fc.matrix, scaled(rate, kernels), self.fc.bias,
                          stride=stride, dilation=dilation)

    def composition(self, x: Tensor, in_channels: int, stride: int = 1) -> Optional[str]:
        """How weights are composed if the convolution path had better read the input of the
        projections; see :func:`acmix_mm.ops.projected_shift_conv.composition`.
        """
        if not self.convolves or self.dep_conv.shift == 'tensor':
            return None
        num_maps, kernel_size = self.fc.weight.shape[1], self.dep_conv.weight.shape[-1]
        return composition(x, in_channels, self.dep_conv.head_dims, self.dep_conv.num_heads,
                           num_maps, kernel_size, stride)

    def compose(self, composition: str, weight: Tensor, bias: Optional[Tensor], dtype: torch.dtype,
                attention_bias: Optional[Tensor] = None) -> PathWeights:
        """Compose the weights of both paths, scaled by their rates.

        Args:
            composition: from :meth:`composition`.
            weight: of the projections, (3 · channels, in_channels).
            bias: of the projections, (3 · channels,), or None.
            dtype: of the map.
            attention_bias: added to attention before its rate, (channels,), or None.
        """
        kernels = self.dep_conv.kernels
        assert kernels is not None
        return compose_paths(weight, bias, self.fc.matrix, kernels, self.fc.bias,
                             self.attention_rate, self.convolution_rate, attention_bias, dtype,
                             is_grouped=composition == 'grouped')

    def project_shift_and_sum(self, x: Tensor, weight: Tensor, bias: Optional[Tensor],
                              stride: int = 1, dilation: int = 1) -> Tensor:
        """Compute the convolution path from the input of its projections, scaled by its rate.

        Args:
            x: (batch, in_channels, height, width).
            weight: of the projections, (num_maps · head_dims, in_channels).
            bias: of the projections, (num_maps · head_dims,), or None.
            stride: see :func:`acmix_mm.ops.projected_shift_conv`.
            dilation: see there.

        Returns:
            (batch, channels, out height, out width).
        """
        kernels = self.dep_conv.kernels
        assert kernels is not None
        return projected_shift_conv(x, weight, bias, self.fc.matrix,
                                    scaled(self.convolution_rate, kernels), self.fc.bias,
                                    stride=stride, dilation=dilation)

    def shift_multiply_adds(self, channels: int, outputs: int) -> int:
        """Count the multiply-adds of fc and shifts; moving maps without kernels costs none.

        Args:
            channels: channels of queries, keys and values together, summed over the positions that
                the fc mixes.
            outputs: number of output positions.
        """
        num_shifts = len(self.fc.matrix)
        kernels = self.dep_conv.kernels
        shifts = 0 if kernels is None else num_shifts**2 * len(kernels) * outputs
        return num_shifts * channels + shifts

    @torch.no_grad()
    def path_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what each path contributes to the output.

        Args:
            x: the input of the layer, which should be in evaluation mode.

        Returns:
            Attention and convolution, each scaled by its rate and in the shape of the output; their
            sum is the output.

        Raises:
            ValueError: the layer has one path only.
        """
        if self.mix != 'acmix':
            raise ValueError(f'{type(self).__name__} with mix={self.mix!r} has one path only.')
        convolution = self.finish(self.convolution(x), x)
        return self(x) - convolution, convolution

    @torch.no_grad()
    def attention_of_point(self, x: Tensor, row: int, column: int) -> PointAttention:
        """Compute the attention weights of one position.

        Args:
            x: the input of the layer for one image, with a batch of one. The layer should be in
                evaluation mode.
            row: row of the position in ``x``. A layer with a stride computes no output at some of
                the positions.
            column: its column.

        Raises:
            ValueError: the layer does not attend.
        """
        if not self.attends:
            raise ValueError(f'{type(self).__name__} with mix={self.mix!r} does not attend.')
        return self.point_attention(x, row, column)

    def point_attention(self, x: Tensor, row: int, column: int) -> PointAttention:
        """Implement :meth:`attention_of_point` for a layer that attends."""
        raise NotImplementedError


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to convert a map to, once, on a GPU; autocast would convert it for each path."""
    if not x.is_cuda or x.dtype != torch.float32 or not torch.is_autocast_enabled():
        return x.dtype
    return torch_autocast_dtype('cuda')


@overload
def scaled(rate: Optional[Tensor], weight: Tensor) -> Tensor: ...
@overload
def scaled(rate: Optional[Tensor], weight: Optional[Tensor]) -> Optional[Tensor]: ...
def scaled(rate: Optional[Tensor], weight: Optional[Tensor]) -> Optional[Tensor]:
    """Multiply a weight by a rate. No rate stands for one, and no weight stays None."""
    return weight if rate is None or weight is None else rate * weight


def scaled_linear(rate: Optional[Tensor], x: Tensor, layer: nn.Linear) -> Tensor:
    """Compute rate · layer(x) by scaling the small weight instead of the map."""
    return linear(x, scaled(rate, layer.weight), scaled(rate, layer.bias))


def split_heads(name: str, channels: int, num_heads: int) -> int:
    """Return the channels of a head.

    Raises:
        ValueError: ``num_heads`` is not positive, or does not divide ``channels``, the argument
            called ``name``.
    """
    check_positive('num_heads', num_heads)
    if channels % num_heads:
        raise ValueError(f'num_heads must divide {name}, got {num_heads} heads for {channels} '
                         'channels.')
    return channels // num_heads


def check_positive(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is a positive integer."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f'{name} must be a positive integer, got {value!r}.')


def check_odd(name: str, size: int) -> None:
    """Raise ValueError unless ``size`` is positive and odd."""
    check_positive(name, size)
    if size % 2 == 0:
        raise ValueError(f'{name} must be odd, got {size}.')
