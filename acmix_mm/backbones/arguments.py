"""Checks of the constructor arguments that several backbones share."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

# Arguments of the ACmix layers that ``acmix_cfg`` may contain.
ACMIX_OPTIONS = ('combine', 'shift', 'shift_groups')


def check_positive(**values: Any) -> None:
    """Raise ValueError unless all values are positive integers."""
    for name, value in values.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f'{name} must be a positive integer, got {value!r}.')


def check_per_stage(num_stages: int, **values: Any) -> None:
    """Raise ValueError unless each value is a sequence of one positive integer per stage."""
    for name, numbers in values.items():
        if not is_sequence(numbers) or len(numbers) != num_stages or not all(
                is_integer(number) and number > 0 for number in numbers):
            raise ValueError(f'{name} needs one number for each of the {num_stages} stages, all '
                             f'positive integers, got {shown(numbers)}.')


def stage_count(name: str, values: Any) -> int:
    """Return the length of a sequence with one value per stage.

    Raises:
        ValueError: it is no sequence, or empty.
    """
    if not is_sequence(values) or not values:
        raise ValueError(f'{name} needs one number for each stage, got {shown(values)}.')
    return len(values)


def check_rates(**rates: Any) -> None:
    """Raise ValueError unless all dropout rates lie in [0, 1)."""
    for name, rate in rates.items():
        if not is_number(rate) or not 0 <= rate < 1:
            raise ValueError(f'{name} must lie in [0, 1), got {rate!r}.')


def check_stage_indices(num_stages: int, **indices: Any) -> None:
    """Raise ValueError unless each value is a sequence of different indices of stages."""
    for name, each in indices.items():
        if not is_sequence(each) or len(set(each)) != len(each) or not all(
                is_integer(index) and 0 <= index < num_stages for index in each):
            raise ValueError(f'{name} must lie in [0, {num_stages}) and differ from each other, '
                             f'got {shown(each)}.')


def check_outputs(out_indices: Any, frozen_stages: int, num_stages: int) -> None:
    """Raise ValueError unless there are outputs, and they and the frozen stages are built."""
    check_stage_indices(num_stages, out_indices=out_indices)
    if not out_indices:
        raise ValueError('out_indices names no stage; name at least one.')
    if not is_integer(frozen_stages) or not -1 <= frozen_stages <= num_stages:
        raise ValueError(f'frozen_stages must lie in [-1, {num_stages}], got {frozen_stages!r}.')


def check_image_size(name: str, size: Any) -> None:
    """Raise ValueError unless ``size`` is a positive integer or two of them."""
    sizes = tuple(size) if is_sequence(size) else (size, size)
    if len(sizes) != 2 or not all(is_integer(each) and each > 0 for each in sizes):
        raise ValueError(f'{name} must be one positive integer or two, height and width, got '
                         f'{size!r}.')


def check_options(acmix_cfg: Optional[Mapping[str, Any]]) -> None:
    """Raise ValueError unless ``acmix_cfg`` is None or has only options of ACmix layers."""
    if acmix_cfg is None:
        return
    unknown = [*acmix_cfg] if isinstance(acmix_cfg, Mapping) else [repr(acmix_cfg)]
    unknown = [name for name in unknown if name not in ACMIX_OPTIONS]
    if unknown:
        raise ValueError(f'acmix_cfg takes a dict of {", ".join(ACMIX_OPTIONS)}, got '
                         f'{", ".join(unknown)}.')


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is an integer or a float."""
    return isinstance(value, float) or is_integer(value)


def is_sequence(value: Any) -> bool:
    """Whether ``value`` is a sequence other than a string."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def shown(value: Any) -> Union[tuple, str]:
    """A value as messages show it, lists as tuples."""
    return tuple(value) if is_sequence(value) else repr(value)
