"""Figures of the measurements in this package; nothing is computed here.

All functions return matplotlib figures created without pyplot, which would open windows.
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
from matplotlib.patches import Patch, Polygon, Rectangle
from matplotlib.patheffects import Normal, Stroke

from acmix_mm.analysis.rates import Rates, stage_of
from acmix_mm.analysis.receptive_field import ENERGY_SHARE, ReceptiveField
from acmix_mm.datasets.shapes import Task
from acmix_mm.layers.base import PointAttention
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import UsageError
from acmix_mm.utils.output_paths import file_to_write

# Colour map, marker and label of each path in plots of rates.
PATHS = {'attention': ('Blues', 'o', '|α|, attention (rate1)'),
         'convolution': ('Oranges', 's', '|β|, convolution (rate2)')}
# Dots per inch of the files.
DPI = 120
# Colours of the classes of a generated dataset.
CLASS_COLOURS = ('#ffd700', '#00e5ff', '#ff4fd8', '#7dff5a', '#ff8c1a', '#ffffff')
OUTLINED = [Stroke(linewidth=3.5, foreground='black'), Normal()]
# Lower end of the colour scale of receptive fields, relative to the largest gradient.
FAINTEST = 1e-3


def save(figure: Figure, path: str) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        UsageError: the file name does not end in ``.png``, or the file cannot be written.
    """
    check_png(path)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def check_png(path: str) -> None:
    """Raise UsageError unless ``path`` is a ``.png`` file that can be written."""
    if Path(path).suffix != '.png':
        raise UsageError(f'Figures are written as .png files, got {path}.')
    file_to_write(path)


def draw_rates(columns: Sequence[Sequence[Rates]]) -> Figure:
    """Plot |α| and |β| against depth, and log|α/β| below, one column per checkpoint or run.

    The checkpoints of a run are overlaid, from light (first) to dark (last). Where a rate is zero,
    a triangle at the edge marks the infinite logarithm.
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
            finite = np.where(np.isfinite(rates.log_ratio), rates.log_ratio, np.nan)
            below.plot(depths, finite, marker='D', markersize=5,
                       color=colormaps['Greys'](0.2 + 0.7 * shade), label='log|α/β|' + name)
        mark_infinite(below, history[-1].log_ratio)
        mark_stages((above, below), history[0].layers)
        above.set_title(f'{history[-1].network}, {len(depths)} layers\n{source_title(history)}')
        for axes in (above, below):
            axes.grid(axis='y', alpha=0.3)
    for row in rows:
        # Leave space for the legends above the lines.
        low, high = row[0].get_ylim()
        row[0].set_ylim(low, high + 0.25 * (high - low))
        for axes, history in zip(row, columns):
            add_legend(axes, len(history))
    rows[0, 0].set_ylabel('absolute rate')
    rows[1, 0].set_ylabel('log|α/β|\n← convolution    attention →')
    return figure


def mark_infinite(axes: Axes, log_ratio: np.ndarray) -> None:
    """Draw triangles at the upper edge where β is zero, and at the lower edge where α is zero."""
    axes.axhline(0, color='black', linewidth=0.8)
    for sign, marker, height, label in ((1, '^', 0.97, 'β = 0'), (-1, 'v', 0.03, 'α = 0')):
        depths = np.flatnonzero(log_ratio == sign * np.inf) + 1
        if len(depths):
            axes.plot(depths, np.full(len(depths), height), marker, color='crimson', label=label,
                      transform=axes.get_xaxis_transform())


def mark_stages(panels: Sequence[Axes], layers: Sequence[str]) -> None:
    """Label the stages on the x axis, and draw a vertical line after each."""
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
    bottom.set_xlabel('layer (input to output)')


def add_legend(axes: Axes, num_checkpoints: int) -> None:
    """Add a legend; for more than two checkpoints it lists only the first and the last."""
    handles, labels = axes.get_legend_handles_labels()
    if num_checkpoints > 2:
        per_checkpoint = 2 if len(handles) >= 2 * num_checkpoints else 1
        last = per_checkpoint * (num_checkpoints - 1)
        kept = [*range(per_checkpoint), *range(last, len(handles))]
        handles, labels = [handles[index] for index in kept], [labels[index] for index in kept]
    axes.legend(handles, labels, fontsize='small', ncols=2)


def source_title(history: Sequence[Rates]) -> str:
    """Return the end of a checkpoint's path, or the folder of a run and its checkpoints."""
    first, last = Path(history[0].source), Path(history[-1].source)
    if len(history) == 1:
        return '/'.join(last.parts[-2:])
    return f'{last.parent.name}: {first.stem} (light) to {last.stem} (dark)'


def draw_predictions(image: np.ndarray, drawn: np.ndarray, title: str,
                     legend: Mapping[str, Sequence[int]]) -> Figure:
    """Show an image next to the predictions of a model.

    Args:
        image: (height, width, 3), RGB, uint8.
        drawn: the image with the predictions drawn on it.
        title: title of the predictions.
        legend: colour of each class in the legend, RGB from 0 to 255.
    """
    height, width = image.shape[:2]
    figure = Figure(figsize=(10, 1.2 + 4.7 * min(height / width, 2)), layout='constrained')
    for axes, pixels, name in zip(figure.subplots(1, 2), (image, drawn), ('image', title)):
        show_image(axes, pixels, name)
    if legend:
        figure.legend(loc='outside lower center', ncols=6, handles=[
            Patch(color=np.asarray(colour) / 255, label=name) for name, colour in legend.items()])
    return figure


def show_image(axes: Axes, image: np.ndarray, title: str) -> None:
    """Show an image on axes whose unit is one pixel."""
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    axes.set(xlabel='x (pixels)', ylabel='y (pixels)', title=title)


def draw_attention(image: np.ndarray, point: tuple[int, int], attention: PointAttention,
                   spacing: tuple[float, float], title: str) -> Figure:
    """Show the attention weights of one query point for each head, around the point.

    Args:
        image: (height, width, 3), RGB, uint8.
        point: (x, y) of the query, in pixels.
        attention: attention weights of the query.
        spacing: distance between neighbouring weights along x and y, in pixels of the image.
        title: title of the figure.
    """
    weights = attention.weights.cpu().numpy()
    attended = attended_positions(weights)
    (left, right), (top, bottom) = (
        (step * positions[0], step * (positions[-1] + 1))
        for step, positions in zip(spacing, (np.flatnonzero(attended.any(0)),
                                             np.flatnonzero(attended.any(1)))))
    columns = min(len(weights) + 1, 6)
    rows = -(-(len(weights) + 1) // columns)
    figure = Figure(figsize=(1.2 + 2.5 * columns, 1.4 + 2.4 * rows), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False).flat
    overview = next(panels)
    show_image(overview, image, 'neighbourhood')
    overview.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False,
                                 edgecolor='magenta', linewidth=2))
    mark_point(overview, point)

    shown_weights = weights[:, attended]
    bound = np.abs(shown_weights).max()
    scale = (dict(cmap='inferno', vmin=shown_weights.min(), vmax=bound) if attention.is_softmax
             else dict(cmap='RdBu_r', vmin=-bound, vmax=bound))
    extent = (0, spacing[0] * weights.shape[2], spacing[1] * weights.shape[1], 0)
    kind, line = ('head', 'white') if attention.is_softmax else ('group', 'black')
    for head, axes in enumerate(panels):
        if head >= len(weights):
            axes.set_visible(False)
            continue
        shown = axes.imshow(weights[head], extent=extent, **scale)
        axes.contour(*brightness(image), levels=3, colors=line, linewidths=0.6, alpha=0.7)
        mark_point(axes, point)
        axes.set(xlim=(left, right), ylim=(bottom, top), title=f'{kind} {head}')
        axes.tick_params(labelsize='small')
    bar = figure.colorbar(shown, ax=figure.axes, label=(
        'weight (sums to 1 per head)' if attention.is_softmax else 'weight (no softmax)'))
    handles = [
        Line2D([], [], color='cyan', marker='+', linestyle='', markersize=10, markeredgewidth=3,
               label=f'query point, x = {point[0]}, y = {point[1]}'),
        Patch(fill=False, edgecolor='magenta', label='neighbourhood of the query'),
        Line2D([], [], color=line, linewidth=1, label='contours of the image',
               path_effects=[Stroke(linewidth=2, foreground='grey'), Normal()])]
    if attention.is_softmax:
        uniform = 1 / attention.num_positions
        bar.ax.axhline(uniform, color='cyan', linewidth=2)
        handles.append(Line2D([], [], color='cyan', linewidth=2,
                              label=f'uniform attention, {uniform:.2g}'))
    if attention.num_positions > attended.sum():
        title += '\nreflection padding: weights of repeated positions are summed'
    figure.suptitle(title)
    figure.legend(loc='outside lower center', ncols=2, handles=handles)
    return figure


def attended_positions(weights: np.ndarray) -> np.ndarray:
    """Mask of the positions with a weight in any head of (heads, rows, columns).

    The softmax leaves masked positions a weight that is tiny, but not always zero.
    """
    return np.abs(weights).max(0) > 1e-20


def brightness(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x and y of the pixel centres, and the smoothed brightness, for contours."""
    height, width = image.shape[:2]
    smoothed = cv2.GaussianBlur(image.mean(2), (0, 0), max(height, width) / 100)
    return np.arange(width) + 0.5, np.arange(height) + 0.5, smoothed


def mark_point(axes: Axes, point: tuple[int, int]) -> None:
    """Draw a cross at the centre of a pixel."""
    axes.plot(point[0] + 0.5, point[1] + 0.5, '+', color='cyan', markersize=12, markeredgewidth=2,
              path_effects=[Stroke(linewidth=4, foreground='black'), Normal()])


def draw_energies(image: np.ndarray, energies: Mapping[str, np.ndarray],
                  spacings: Mapping[str, tuple[float, float]], title: str) -> Figure:
    """Show how much each path contributes to the output of a layer, at each position.

    Args:
        image: (height, width, 3), RGB, uint8.
        energies: for each layer (2, rows, columns), of attention and convolution.
        spacings: for each layer the distance between neighbouring positions along x and y, in
            pixels of the image.
        title: title of the figure.
    """
    height, width = image.shape[:2]
    figure = Figure(figsize=(1 + 3 * (len(energies) + 1), 2 + 5 * min(height / width, 2)),
                    layout='constrained')
    rows = figure.subplots(2, len(energies) + 1, squeeze=False)
    show_image(rows[0, 0], image, 'image')
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
                        label='RMS over channels')
    rows[0, 1].set_ylabel('y (pixels)')
    for axes in rows[1, 1:]:
        axes.set_xlabel('x (pixels)')
    figure.suptitle(title)
    return figure


def draw_receptive_fields(columns: Sequence[tuple[str, Sequence[ReceptiveField]]]) -> Figure:
    """Show effective receptive fields, one column per network with its label, one row per stage.

    The colour is the RMS gradient relative to the maximum of the panel, on one logarithmic scale
    for all panels. The square is the smallest that contains ``ENERGY_SHARE`` of the energy.
    """
    num_rows = max(len(fields) for _, fields in columns)
    # At least as wide as the legend.
    figure = Figure(figsize=(max(1.6 + 2.9 * len(columns), 6), 1.2 + 2.9 * num_rows),
                    layout='constrained')
    rows = figure.subplots(num_rows, len(columns), squeeze=False)
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
        axes.set_xlabel('input x (pixels)')
    for axes in rows[:, 0]:
        axes.set_ylabel('input y (pixels)')
    figure.colorbar(shown, ax=rows, shrink=0.6, extend='min',
                    label='gradient of the central position,\nrelative to its maximum')
    figure.legend(loc='outside lower center', handles=[
        Patch(fill=False, edgecolor='cyan', label=(
            f'smallest square containing {ENERGY_SHARE:.0%} of the gradient energy'))])
    return figure


def draw_task(task: Task, name: str, image_size: int, seed: int, num_images: int = 3) -> Figure:
    """Show the first images of a generated dataset, and what the classes in them follow from.

    Each annotated shape is outlined in the colour of its class. Lines lead from there to what the
    class follows from.

    Args:
        task: what the images show.
        name: name of the task.
        image_size: height and width of an image.
        seed: seed of the dataset.
        num_images: number of images.
    """
    rng = np.random.default_rng(seed)
    # Whole dots per pixel: sharp, and a small file.
    side, gap, text = image_size * max(288 // image_size, 1), 12, 42
    size = np.array([num_images * (side + gap) + gap, side + 2 * text])
    figure = Figure(figsize=size / DPI)
    for number in range(num_images):
        left_bottom = gap + number * (side + gap), text
        axes = figure.add_axes((*left_bottom / size, *side / size))
        scene = task.draw(image_size, rng)
        axes.imshow(scene.image[..., ::-1], interpolation='nearest',
                    extent=(0, image_size, image_size, 0))
        axes.set(xticks=[], yticks=[])
        for index, shape in enumerate(scene.shapes):
            colour = CLASS_COLOURS[shape.label]
            axes.add_patch(Polygon(shape.corners, fill=False, edgecolor=colour, linewidth=2,
                                   path_effects=OUTLINED))
            center = shape.corners.mean(0)
            for clue in scene.clues[index] if scene.clues else ():
                axes.plot(*np.stack([center, clue], 1), color=colour, linewidth=1.5,
                          path_effects=OUTLINED)
    figure.suptitle(f'{name}: {task.question}')
    figure.legend(loc='lower center', ncols=len(task.classes), handles=[
        Patch(facecolor=colour, edgecolor='black', label=label)
        for label, colour in zip(task.classes, CLASS_COLOURS)])
    return figure
