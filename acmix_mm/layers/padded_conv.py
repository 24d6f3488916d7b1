"""What all layers have in common that stand in for a padded convolution."""

from typing import Optional, Union

from torch import nn

Size = Union[int, tuple[int, int]]


class PaddedConvolution(nn.Module):
    """The arguments of ``nn.Conv2d`` that such a layer takes, checked and kept under their names.

    OpenMMLab's ``ConvModule`` reads them off a convolution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel, odd.
        stride: distance of output positions, the same along both axes.
        padding: None, or ``dilation · (kernel_size // 2)``, what keeps the size at stride 1.
        dilation: distance of taps.
        groups: 1; the argument is there because builders of convolutions pass it.

    Raises:
        ValueError: an argument is outside of what is said above.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size,
                 padding: Optional[Size], dilation: Size, groups: int) -> None:
        super().__init__()
        layer = type(self).__name__
        kernel = one_side('kernel_size', kernel_size)
        step, spread = one_side('stride', stride), one_side('dilation', dilation)
        if groups != 1:
            raise ValueError(f'{layer} has no groups, got groups={groups}; allowed is 1.')
        check_odd('kernel_size', kernel)
        keeps_size = spread * (kernel // 2)
        if padding is not None and one_side('padding', padding) != keeps_size:
            raise ValueError(f'{layer} pads to keep the size: kernel_size={kernel} with '
                             f'dilation={spread} allows padding={keeps_size}, got {padding}.')
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = (kernel,) * 2, (step,) * 2, (spread,) * 2
        self.padding, self.output_padding = (keeps_size,) * 2, (0, 0)
        self.groups, self.transposed = groups, False

    def extra_repr(self) -> str:
        return (f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
                f'stride={self.stride}, dilation={self.dilation}')


def one_side(name: str, size: Size) -> int:
    """The one number of a square size.

    Raises:
        ValueError: the size is not square.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f'{name} must be the same along both axes, got {size}.')
    return sides.pop()


def check_odd(name: str, size: int) -> None:
    """Raise ValueError unless ``size`` is odd."""
    if size % 2 == 0:
        raise ValueError(f'{name} must be odd, got {size}.')
