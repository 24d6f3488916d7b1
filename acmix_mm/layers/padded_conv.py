"""The arguments of the layers that replace a padded ``nn.Conv2d``."""

import inspect
from collections import Counter
from typing import Any, Callable, Optional, Union

from torch import nn

from acmix_mm.layers.base import check_odd, check_positive

Size = Union[int, tuple[int, int]]
# Attribute of the convolutions that layer_or_plain leaves plain; its value is the reason.
LEFT_PLAIN = 'left_plain'


class PaddedConvolution:
    """Mixin that checks the arguments of ``nn.Conv2d`` and stores them under the same names.

    OpenMMLab's ``ConvModule`` reads these attributes from a convolution.
    """

    def set_geometry(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size,
                     padding: Optional[Size], dilation: Size, groups: int) -> None:
        """Check and store the arguments.

        Raises:
            ValueError: ``kernel_size`` is even, a size is not square or not positive, ``groups`` is
                not 1, or ``padding`` is neither None nor ``dilation · (kernel_size // 2)``.
        """
        layer = type(self).__name__
        kernel = one_side('kernel_size', kernel_size)
        step, spacing = one_side('stride', stride), one_side('dilation', dilation)
        if groups != 1:
            raise ValueError(f'{layer} has no groups, got groups={groups}; allowed is 1.')
        check_odd('kernel_size', kernel)
        for name, value in (('in_channels', in_channels), ('out_channels', out_channels),
                            ('stride', step), ('dilation', spacing)):
            check_positive(name, value)
        keeps_size = spacing * (kernel // 2)
        if padding is not None and one_side('padding', padding) != keeps_size:
            raise ValueError(f'{layer} pads to keep the size: kernel_size={kernel} with '
                             f'dilation={spacing} allows padding={keeps_size}, got {padding}.')
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = (kernel,) * 2, (step,) * 2, (spacing,) * 2
        self.padding, self.output_padding = (keeps_size,) * 2, (0, 0)
        self.groups, self.transposed = groups, False

    def extra_repr(self) -> str:
        return (f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
                f'stride={self.stride}, dilation={self.dilation}')


def layer_or_plain(layer: Callable[..., nn.Module], in_channels: int, out_channels: int,
                   kernel_size: Size, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a layer, or ``nn.Conv2d`` without the layer's own options for a 1×1 kernel or groups.

    OpenMMLab's modules build all their convolutions from one ``conv_cfg``, 1×1 and grouped ones
    included.

    Args:
        layer: class of the layer.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel.
        args: further positional arguments of ``nn.Conv2d``.
        kwargs: further arguments of ``nn.Conv2d`` and of the layer.

    Raises:
        ValueError: an argument is invalid or unknown.
    """
    given = {**dict(zip(('stride', 'padding', 'dilation', 'groups'), args)), **kwargs}
    options = (inspect.signature(layer).parameters.keys()
               - inspect.signature(nn.Conv2d).parameters.keys())
    unknown = kwargs.keys() - options - inspect.signature(nn.Conv2d).parameters.keys()
    if unknown:
        raise ValueError(f'There is no option {", ".join(sorted(unknown))} of a convolution or of '
                         f'{getattr(layer, "__name__", layer)}, which takes '
                         f'{", ".join(sorted(options))}.')
    is_grouped = given.get('groups', 1) != 1
    if not is_grouped and one_side('kernel_size', kernel_size) != 1:
        return layer(in_channels, out_channels, kernel_size, *args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in options}
    plain = nn.Conv2d(in_channels, out_channels, kernel_size, *args, **kwargs)
    setattr(plain, LEFT_PLAIN, 'grouped' if is_grouped else '1×1')
    return plain


def count_convolutions(model: nn.Module) -> tuple[Counter[str], Counter[str]]:
    """Count what the convolution types of this package built in a model.

    Returns:
        The layers by the name of their class, and the convolutions that were left plain by reason,
        ``'1×1'`` or ``'grouped'``.
    """
    modules = list(model.modules())
    return (Counter(type(module).__name__ for module in modules
                    if isinstance(module, PaddedConvolution)),
            Counter(getattr(module, LEFT_PLAIN) for module in modules
                    if hasattr(module, LEFT_PLAIN)))


def one_side(name: str, size: Size) -> int:
    """Return the side of a square size.

    Raises:
        ValueError: the size is not square.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f'{name} must be the same along both axes, got {size}.')
    return sides.pop()
