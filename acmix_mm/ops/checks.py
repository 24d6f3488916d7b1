"""Argument checks shared by the operators."""


def check_odd_kernel(operator: str, kernel_size: int) -> None:
    """Raise ValueError unless ``kernel_size`` is odd."""
    if kernel_size % 2 == 0:
        raise ValueError(f'{operator} takes odd kernels, got one of {kernel_size}.')
