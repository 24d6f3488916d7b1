"""Figures of what the other files of this package measure; no number is made here.

They are matplotlib figures of their own, without pyplot and its windows.
"""

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from acmix_mm.errors import UsageError

from .rates import Rates, stage_of

# A path has its colour in all figures; in a history it goes from light to dark.
PATHS = {'attention': ('Blues', 'o', '|α|, attention (rate1)'),
         'convolution': ('Oranges', 's', '|β|, convolution (rate2)')}


def save(figure: Figure, path: str) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        UsageError: the name is not a PNG's, or the file system does not take it.
    """
    target = Path(path)
    check_png(path)
    partial = target.with_name(f'.{target.name}.partial')
    try:
        figure.savefig(partial, format='png', dpi=120)
        os.replace(partial, target)
    except OSError as error:
        raise UsageError(f'{path} cannot be written ({error.strerror}).') from error
    finally:
        partial.unlink(missing_ok=True)


def check_png(path: str) -> None:
    """Raise UsageError unless ``path`` can be a picture: a ``.png`` in a folder that exists."""
    if Path(path).suffix != '.png':
        raise UsageError(f'Pictures are written as .png; {path} is not one.')
    if not Path(path).parent.is_dir():
        raise UsageError(f'The folder {Path(path).parent} does not exist; make it, or name '
                         'another.')


def draw_rates(columns: Sequence[Sequence[Rates]]) -> Figure:
    """|α| and |β| against depth, and below them log|α/β|: a column for each checkpoint or run.

    The checkpoints of a run lie over each other, the first one lightest. Where a rate is zero, a
    triangle at the edge stands for the infinite logarithm.
    """
    figure = Figure(figsize=(1.5 + 5 * len(columns), 6.5), layout='constrained')
    rows = figure.subplots(2, len(columns), squeeze=False, sharex='col', sharey='row')
    for history, above, below in zip(columns, *rows):
        depths = np.arange(1, len(history[0].layers) + 1)
        shades = np.linspace(1, 0.35, len(history))[::-1]
        for rates, shade in zip(history, shades):
            name = '' if len(history) == 1 else f', {Path(rates.source).stem}'
            for path, (colours, marker, label) in PATHS.items():
                above.plot(depths, np.abs(getattr(rates, path)), marker=marker, markersize=5,
                           color=colormaps[colours](0.2 + 0.6 * shade), label=label + name)
            below.plot(depths, np.where(np.isfinite(rates.bias), rates.bias, np.nan), marker='D',
                       markersize=5, color=colormaps['Greys'](0.2 + 0.7 * shade),
                       label='log|α/β|' + name)
        mark_infinite(below, history[-1].bias)
        mark_stages((above, below), history[0].layers)
        above.set_title(f'{history[-1].network}, {len(depths)} layers\n{short(history)}')
        for axes in (above, below):
            axes.grid(axis='y', alpha=0.3)
            few_entries(axes, len(history))
    below_first = rows[1, 0]
    rows[0, 0].set_ylabel('|rate| of the path')
    below_first.set_ylabel('log|α/β|\n← convolution    attention →')
    return figure


def mark_infinite(axes: Axes, bias: np.ndarray) -> None:
    """Triangles at the upper edge where β is zero, at the lower one where α is."""
    axes.axhline(0, color='black', linewidth=0.8)
    for sign, marker, height, label in ((1, '^', 0.97, 'β = 0'), (-1, 'v', 0.03, 'α = 0')):
        depths = np.flatnonzero(bias == sign * np.inf) + 1
        if len(depths):
            axes.plot(depths, np.full(len(depths), height), marker, color='crimson', label=label,
                      transform=axes.get_xaxis_transform())


def mark_stages(panels: Sequence[Axes], layers: Sequence[str]) -> None:
    """Ticks for the layers, and for each stage its name and a line behind it."""
    centres, names, end = [], [], 0.5
    for name, group in groupby(layers, stage_of):
        start, end = end, end + len(list(group))
        centres.append((start + end) / 2)
        names.append(name)
        for axes in panels:
            axes.tick_params(axis='x', which='major', length=0, pad=6)
            if end < len(layers):
                axes.axvline(end, color='black', linewidth=0.8, linestyle=':')
    bottom = panels[-1]
    bottom.set_xlim(0.5, len(layers) + 0.5)
    bottom.set_xticks(range(1, len(layers) + 1), minor=True)
    crowded = sum(map(len, names)) > 60
    bottom.set_xticks(centres, names, rotation=30 if crowded else 0,
                      horizontalalignment='right' if crowded else 'center')
    bottom.set_xlabel('layer, from the input to the output')


def few_entries(axes: Axes, history: int) -> None:
    """A legend; of a long history it has the first and the last checkpoint."""
    handles, labels = axes.get_legend_handles_labels()
    if history > 2:
        per_checkpoint = 2 if len(handles) >= 2 * history else 1
        last = per_checkpoint * (history - 1)
        kept = [*range(per_checkpoint), *range(last, len(handles))]
        handles, labels = [handles[index] for index in kept], [labels[index] for index in kept]
    axes.legend(handles, labels, fontsize='small')


def short(history: Sequence[Rates]) -> str:
    """The last parts of the path of a checkpoint, or of the folder of a run and what it holds."""
    first, last = Path(history[0].source), Path(history[-1].source)
    if len(history) == 1:
        return '/'.join(last.parts[-2:])
    return f'{last.parent.name}: {first.stem} (light) to {last.stem} (dark)'
