"""Export every detector config with random weights and compare detections; run by hand.

Prints a Markdown table. Usage, for all configs or those named:

    PYTHONPATH=.:tests python tests/deploy/export_all.py [NAME …]
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from helpers import ROOT
from helpers.detectors import differing_mask_pixels, predict, responsive
from helpers.tools import tool_environment

from acmix_mm.deploy.onnx import matching_detections, open_session
from acmix_mm.engine.config import build_model, load_config
from acmix_mm.utils.markdown import table

SHAPE = ('192', '256')
# Sizes to compare at; nothing divides the last two.
SIZES = ((160, 224), (301, 143), (70, 45))


def export_all(names):
    """Export the detector configs of these names, or all, and print a table."""
    rows = [('config', 'CPU seconds', 'MB', 'nodes', 'detections that match',
             'mask pixels that differ')]
    for path in sorted((ROOT / 'configs').glob('*.py')):
        cfg = load_config(str(path))
        if cfg.default_scope == 'mmdet' and (not names or path.stem in names):
            with tempfile.TemporaryDirectory() as folder:
                rows.append((path.stem, *export(cfg, path, Path(folder))))
            print(*rows[-1], sep=' | ', file=sys.stderr, flush=True)
    print(table(rows))


def export(cfg, path, folder):
    """Export one config as a user would; return the other cells of its row."""
    torch.manual_seed(0)
    model = responsive(build_model(cfg)).eval()
    checkpoint, file = folder / 'random.pth', folder / 'detector.onnx'
    torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
    before = os.times()
    done = subprocess.run(
        [sys.executable, 'tools/export_onnx.py', path, checkpoint, file, '--shape', *SHAPE],
        cwd=ROOT, env=tool_environment(), text=True, capture_output=True, check=False)
    after = os.times()
    seconds = (after.children_user + after.children_system - before.children_user -
               before.children_system)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1], '', '', '', ''
    nodes = len(onnx.load(file).graph.node)
    return (f'{seconds:.0f}', f'{file.stat().st_size / 1e6:.0f}', str(nodes),
            *compare(model, open_session(str(file))))


def compare(model, session):
    """Compare an exported detector with MMDetection's on images of random pixels.

    Returns:
        How many of MMDetection's detections the file has within 0.1 pixel, and the largest share of
        mask pixels that differ.
    """
    matching, confident, differing = 0, 0, []
    for size in SIZES:
        image = torch.randn(1, 3, *size)
        expected = predict(model, image)
        outputs = session.run(None, dict(input=image.numpy()))
        boxes, scores, labels, *masks = map(torch.from_numpy, outputs)
        found, total = matching_detections(
            (boxes, scores, labels), (expected.bboxes, expected.scores, expected.labels),
            min_score=0.)
        matching, confident = matching + found, confident + total
        if masks and len(boxes) and len(expected):
            differing.append(differing_mask_pixels(boxes, labels, masks[0], expected))
    return f'{matching} of {confident}', f'{max(differing):.1e}' if differing else ''


if __name__ == '__main__':
    export_all(sys.argv[1:])
