"""Figures of what the other files of this package measure; no number is made here.

They are matplotlib figures of their own, without pyplot and its windows.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import Normal, Stroke

from acmix_mm.analysis.rates import Rates, stage_of
from acmix_mm.analysis.receptive_field import SHARE, Field
from acmix_mm.layers.base import PointAttention
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import UsageError

# A path has its colour in all figures; in a history it goes from light to dark.
PATHS = {'attention': ('Blues', 'o', '|α|, attention (rate1)'),
         'convolution': ('Oranges', 's', '|β|, convolution (rate2)')}
# Where the scale of receptive fields ends, of the largest gradient.
FAINTEST = 1e-3


def save(figure: Figure, path: str) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        UsageError: the name is not a PNG's, or the file system does not take it.
    """
    check_png(path)
    with atomic_write(path) as beside:
        figure.savefig(beside, dpi=120)


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
    for row in rows:
        # Room for the legends above the lines.
        low, high = row[0].get_ylim()
        row[0].set_ylim(low, high + 0.25 * (high - low))
        for axes, history in zip(row, columns):
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
    axes.legend(handles, labels, fontsize='small', ncols=2)


def short(history: Sequence[Rates]) -> str:
    """The last parts of the path of a checkpoint, or of the folder of a run and what it holds."""
    first, last = Path(history[0].source), Path(history[-1].source)
    if len(history) == 1:
        return '/'.join(last.parts[-2:])
    return f'{last.parent.name}: {first.stem} (light) to {last.stem} (dark)'


def draw_predictions(picture: np.ndarray, drawn: np.ndarray, title: str,
                     legend: Mapping[str, Sequence[int]]) -> Figure:
    """A picture beside what a model sees in it.

    Args:
        picture: (height, width, 3), RGB, uint8.
        drawn: the same with the predictions drawn into it.
        title: what they are.
        legend: a colour, RGB from 0 to 255, for each class that is to be explained.
    """
    height, width = picture.shape[:2]
    figure = Figure(figsize=(10, 1.2 + 4.7 * min(height / width, 2)), layout='constrained')
    for axes, image, name in zip(figure.subplots(1, 2), (picture, drawn), ('picture', title)):
        show_picture(axes, image, name)
    if legend:
        figure.legend(loc='outside lower center', ncols=6, handles=[
            Patch(color=np.asarray(colour) / 255, label=name) for name, colour in legend.items()])
    return figure


def show_picture(axes: Axes, picture: np.ndarray, title: str) -> None:
    """Show a picture on axes in its pixels."""
    height, width = picture.shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0))
    axes.set(xlabel='x (pixels)', ylabel='y (pixels)', title=title)


def draw_attention(picture: np.ndarray, point: tuple[int, int], attention: PointAttention,
                   spacing: tuple[float, float], title: str) -> Figure:
    """What one point attends to, head by head, over the part of the picture that it can see.

    Args:
        picture: (height, width, 3), RGB, uint8.
        point: x and y of the point, in pixels.
        attention: its weights.
        spacing: pixels of the picture from one of the weights to the next, along x and y.
        title: which layer it is.
    """
    weights = attention.weights.cpu().numpy()
    (left, right), (top, bottom) = (
        (step * first, step * (last + 1))
        for step, (first, last) in zip(spacing, neighbourhood(weights)))
    columns = min(len(weights) + 1, 6)
    rows = -(-(len(weights) + 1) // columns)
    figure = Figure(figsize=(1.2 + 2.5 * columns, 1.4 + 2.4 * rows), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False).flat
    overview = next(panels)
    show_picture(overview, picture, 'neighbourhood')
    overview.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False,
                                 edgecolor='magenta', linewidth=2))
    mark_point(overview, point)

    seen = weights[np.broadcast_to(neighbours(weights), weights.shape)]
    bound = np.abs(seen).max()
    scale = dict(cmap='inferno', vmin=seen.min(), vmax=bound) if attention.is_softmax else dict(
        cmap='RdBu_r', vmin=-bound, vmax=bound)
    extent = (0, spacing[0] * weights.shape[2], spacing[1] * weights.shape[1], 0)
    kind, line = ('head', 'white') if attention.is_softmax else ('group', 'black')
    for head, axes in enumerate(panels):
        if head >= len(weights):
            axes.set_visible(False)
            continue
        shown = axes.imshow(weights[head], extent=extent, **scale)
        axes.contour(*outlines(picture), levels=3, colors=line, linewidths=0.6, alpha=0.7)
        mark_point(axes, point)
        axes.set(xlim=(left, right), ylim=(bottom, top), title=f'{kind} {head}')
        axes.tick_params(labelsize='small')
    bar = figure.colorbar(shown, ax=figure.axes, label=(
        'weight (head sums to 1)' if attention.is_softmax else 'weight (without softmax)'))
    handles = [
        Line2D([], [], color='cyan', marker='+', linestyle='', markersize=10, markeredgewidth=3,
               label=f'query point, x = {point[0]}, y = {point[1]}'),
        Patch(fill=False, edgecolor='magenta', label='its neighbourhood'),
        Line2D([], [], color=line, linewidth=1, label='outlines of the picture',
               path_effects=[Stroke(linewidth=2, foreground='grey'), Normal()])]
    if attention.is_softmax:
        uniform = 1 / attention.count
        bar.ax.axhline(uniform, color='cyan', linewidth=2)
        handles.append(Line2D([], [], color='cyan', linewidth=2,
                              label=f'all weights alike, {uniform:.2g}'))
    if attention.count > neighbours(weights).sum():
        title += '\nmirrored at the edge: what is seen twice has both weights'
    figure.suptitle(title)
    figure.legend(loc='outside lower center', ncols=2, handles=handles)
    return figure


def neighbours(weights: np.ndarray) -> np.ndarray:
    """Where (heads, rows, columns) have a weight in any head; what is masked is next to none."""
    return np.abs(weights).max(0) > 1e-20


def neighbourhood(weights: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last column, and row, that have a weight."""
    seen = neighbours(weights)
    columns, rows = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
    return (columns[0], columns[-1]), (rows[0], rows[-1])


def outlines(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y of the pixels' centres, and their brightness without its noise, for contours."""
    height, width = picture.shape[:2]
    brightness = cv2.GaussianBlur(picture.mean(2), (0, 0), max(height, width) / 100)
    return np.arange(width) + 0.5, np.arange(height) + 0.5, brightness


def mark_point(axes: Axes, point: tuple[int, int]) -> None:
    """A cross at the centre of a pixel."""
    axes.plot(point[0] + 0.5, point[1] + 0.5, '+', color='cyan', markersize=12, markeredgewidth=2,
              path_effects=[Stroke(linewidth=4, foreground='black'), Normal()])


def draw_energies(picture: np.ndarray, energies: Mapping[str, np.ndarray],
                  spacings: Mapping[str, tuple[float, float]], title: str) -> Figure:
    """How much either path adds to the output of a layer, at each position.

    Args:
        picture: (height, width, 3), RGB, uint8.
        energies: for each layer (2, rows, columns), of attention and convolution.
        spacings: for each, pixels of the picture from one position to the next, along x and y.
        title: what they are of.
    """
    height, width = picture.shape[:2]
    figure = Figure(figsize=(1 + 3 * (len(energies) + 1), 2 + 5 * min(height / width, 2)),
                    layout='constrained')
    rows = figure.subplots(2, len(energies) + 1, squeeze=False)
    show_picture(rows[0, 0], picture, 'picture')
    rows[1, 0].set_visible(False)
    for (name, pair), upper, lower in zip(energies.items(), rows[0, 1:], rows[1, 1:]):
        step = spacings[name]
        extent = (0, step[0] * pair.shape[2], step[1] * pair.shape[1], 0)
        for axes, energy, path in zip((upper, lower), pair,
                                      ('α · attention', 'β · convolution')):
            shown = axes.imshow(energy, extent=extent, cmap='viridis', vmin=0, vmax=pair.max())
            axes.set(xlim=(0, width), ylim=(height, 0), title=f'{name}\n{path}')
            axes.tick_params(labelsize='small')
        figure.colorbar(shown, ax=[upper, lower], orientation='horizontal', shrink=0.9,
                        label='root mean square of channels')
    rows[0, 1].set_ylabel('y (pixels)')
    for axes in rows[1, 1:]:
        axes.set_xlabel('x (pixels)')
    figure.suptitle(title)
    return figure


def draw_receptive_fields(columns: Sequence[tuple[str, Sequence[Field]]]) -> Figure:
    """The effective receptive fields of networks, a column each under its name, stage by stage.

    The colour is the root mean square gradient, relative to the largest of its panel, on one
    logarithmic scale for all; the square is the smallest that holds ``SHARE`` of the energy.
    """
    count = max(len(fields) for _, fields in columns)
    # As wide as the legend at least.
    figure = Figure(figsize=(max(1.6 + 2.9 * len(columns), 6), 1.2 + 2.9 * count),
                    layout='constrained')
    rows = figure.subplots(count, len(columns), squeeze=False)
    for index, (name, fields) in enumerate(columns):
        for axes in rows[len(fields):, index]:
            axes.set_visible(False)
        for axes, field in zip(rows[:, index], fields):
            height, width = field.energy.shape
            relative = np.sqrt(field.energy / field.energy.max())
            shown = axes.imshow(np.maximum(relative, 1e-12), cmap='magma',
                                norm=LogNorm(FAINTEST, 1), extent=(0, width, height, 0))
            axes.add_patch(Rectangle((field.left, field.top), field.side, field.side, fill=False,
                                     edgecolor='cyan', linewidth=1.5))
            heading = name.replace(', ', '\n') + '\n' if axes is rows[0, index] else ''
            axes.set_title(f'{heading}{field.stage}, stride {field.stride}: {field.side} px',
                           fontsize='medium')
            axes.tick_params(labelsize='small')
        axes.set_xlabel('x of the input (pixels)')
    for axes in rows[:, 0]:
        axes.set_ylabel('y of the input (pixels)')
    figure.colorbar(shown, ax=rows, shrink=0.6, extend='min',
                    label='gradient of the central position, relative to its largest')
    figure.legend(loc='outside lower center', handles=[
        Patch(fill=False, edgecolor='cyan', label=(
            f'smallest square with {SHARE:.0%} of the energy (squared gradient)'))])
    return figure
