"""Measure latency, memory and file size of exported networks against torch; run by hand.

PyTorch eager, torch.compile, ONNX Runtime, and ONNX Runtime with 8-bit integers run interleaved in
one process, with two threads; the peak memory of each is that of a process of its own. Weights are
random, and so are the images that the integers are calibrated on. Usage:

    PYTHONPATH=.:tests python tests/deploy/measure_cost.py maskrcnn_acmix_swin_t --shape 800 1344
    PYTHONPATH=.:tests python tests/deploy/measure_cost.py upernet_acmix_r50 --shape 512 512
"""

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path

import torch

from acmix_mm.benchmark import PeakMemory, interleaved_seconds
from acmix_mm.deploy.onnx import export_onnx, inputs_of, network_of, session_options
from acmix_mm.deploy.quantization import quantize
from acmix_mm.engine.config import load_config
from acmix_mm.utils import markdown

THREADS = 2
IMPLEMENTATIONS = ('PyTorch eager', 'torch.compile', 'ONNX Runtime', 'ONNX Runtime, int8')
CALIBRATION_IMAGES = 4


def network_for(config, threshold):
    cfg = load_config(config, {'model.backbone.init_cfg': None})
    torch.manual_seed(0)
    if threshold is not None:
        cfg.model.test_cfg.rcnn.score_thr = threshold
    return cfg, network_of(cfg, None, backbone_only=False).eval()


def image_of(shape, seed=0):
    return torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(seed))


def implementation(name, config, threshold, folder):
    """A function that takes images."""
    if name.startswith('ONNX'):
        import onnxruntime
        options = session_options()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(file_of(name, folder), options,
                                               providers=['CPUExecutionProvider'])
        given, = session.get_inputs()
        return lambda image: session.run(None, {given.name: image.numpy()})
    _, network = network_for(config, threshold)
    run = torch.compile(network) if name == 'torch.compile' else network

    def predict(image):
        with torch.no_grad():
            return run(*inputs_of(network, image))
    return predict


def file_of(name, folder):
    return str(Path(folder) / ('int8.onnx' if name.endswith('int8') else 'float.onnx'))


def export(config, threshold, shape, folder):
    cfg, network = network_for(config, threshold)
    path = Path(file_of('ONNX Runtime', folder))
    if not path.exists():
        print(export_onnx(network, str(path), shape, fixed_size=False, cfg=cfg))
    integers = Path(file_of(IMPLEMENTATIONS[-1], folder))
    if not integers.exists():
        integers.write_bytes(path.read_bytes())
        quantize(str(integers), [image_of(shape, seed).numpy()
                                 for seed in range(CALIBRATION_IMAGES)])


def report_peak(name, config, threshold, shape, folder):
    """Print by how many MiB two images of a size raise the memory of this process."""
    run = implementation(name, config, threshold, folder)
    image = image_of(shape)
    if not name.startswith('ONNX'):
        # The first call also loads code. ONNX Runtime, though, keeps the memory of its first call.
        run(image)
    peak = PeakMemory('cpu')
    run(image)
    run(image)
    print(peak.mebibytes())


def peak_of(name, arguments):
    command = [sys.executable, __file__, arguments.config, '--shape', *map(str, arguments.shape),
               '--folder', arguments.folder, '--peak', name]
    if arguments.threshold is not None:
        command += ['--threshold', str(arguments.threshold)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--shape', nargs=2, type=int, required=True)
    parser.add_argument('--threshold', type=float, help='smallest score of a detection, so that '
                        'random weights detect objects')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--folder', default='work_dirs/cost', help='keeps exported files')
    parser.add_argument('--peak', choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    given = arguments.config, arguments.threshold
    if arguments.peak:
        return report_peak(arguments.peak, *given, arguments.shape, arguments.folder)
    os.makedirs(arguments.folder, exist_ok=True)
    export(*given, tuple(arguments.shape), arguments.folder)
    image = image_of(arguments.shape)
    runs = {name: functools.partial(implementation(name, *given, arguments.folder), image)
            for name in IMPLEMENTATIONS}
    for name, run in runs.items():
        found = run()
        print(name, [tuple(each.shape) for each in found][:4], flush=True)
    seconds = interleaved_seconds(runs, 'cpu', arguments.repeats)
    base = seconds[IMPLEMENTATIONS[0]]
    rows = [['implementation', 'milliseconds', 'ratio', 'peak MiB', 'file MB']]
    for name in IMPLEMENTATIONS:
        size = os.path.getsize(file_of(name, arguments.folder)) / 1e6 if 'ONNX' in name else None
        rows.append([name, f'{1000 * seconds[name]:.0f}', f'{seconds[name] / base:.2f}',
                     f'{peak_of(name, arguments):.0f}', '' if size is None else f'{size:.0f}'])
    print(markdown.table(rows))


if __name__ == '__main__':
    main()
