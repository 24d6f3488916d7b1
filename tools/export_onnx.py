"""Write a segmentor, or a backbone alone, as an ONNX file, checked against ONNX Runtime.

A segmentor takes normalised pictures and gives the class of each pixel, (batch, 1, height, width),
as MMDeploy's exports do; a backbone gives its feature maps. Batch, height and width stay open, the
last two from a size on at which every map is larger than one window (Swin: from 225 at stride 32
and windows of 7), holds two cells each way (PVT: 64) or two positions (ResNet, SAN: 33). The file
is compared with torch at three sizes, and kept if they agree. Without a checkpoint the weights are
random. Heads of detectors are not exported: that is MMDeploy's work.

Examples: python tools/export_onnx.py configs/upernet_acmix_swin_t.py iter_160000.pth upernet.onnx
          python tools/export_onnx.py configs/maskrcnn_acmix_r50.py epoch_12.pth r50.onnx \\
              --backbone-only --shape 800 1344
"""

import argparse

from acmix_mm.analysis.complexity import padded_image_size
from acmix_mm.engine.cli import KeyValue, positive_int, run_tool
from acmix_mm.engine.config import load_config
from acmix_mm.environment import check_mmcv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file')
    parser.add_argument('out', help='ONNX file to write')
    parser.add_argument('--backbone-only', action='store_true', help='leave out neck and heads')
    parser.add_argument('--shape', nargs=2, type=positive_int, metavar=('H', 'W'),
                        help='height and width of the pictures that the file is made for (default: '
                        'what a segmentation config pads to, 800 1344 for detection)')
    parser.add_argument('--fixed-size', action='store_true',
                        help='take one picture of exactly this shape, which may be of any size')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValue, metavar='KEY=VALUE',
                        help='override settings of the config')
    args = parser.parse_args()

    check_mmcv()
    # Slow to import, and of no use for --help.
    from acmix_mm.deploy.onnx import export_onnx, network_of, normalisation
    cfg = load_config(args.config, args.cfg_options)
    network = network_of(cfg, args.checkpoint, args.backbone_only)
    size = tuple(args.shape or padded_image_size(cfg))
    print(export_onnx(network, args.out, size, args.fixed_size))
    print(f'  input is {normalisation(cfg)}')


if __name__ == '__main__':
    run_tool(main)
