"""Export a segmentor, a detector or a backbone to ONNX, verified with ONNX Runtime.

A segmentor takes normalised images and returns the class of each pixel, (batch, 1, height, width),
like MMDeploy's exports; a backbone returns its feature maps. Batch, height and width are dynamic;
height and width have a minimum, which depends on the backbone: for Swin every map must be larger
than a window (225 at stride 32 with 7×7 windows), for PVT at least two cells wide (64), for ResNet
and SAN at least two positions (33).

A detector takes one normalised image or, with --with-preprocessing, one raw uint8 BGR image
(height, width, 3), of any size, and returns boxes (n, 4), scores, labels and masks (n, 28, 28). The
graph has standard operators only. RetinaNet, Faster, Mask and Cascade Mask R-CNN, YOLOX and RTMDet
are supported.

The outputs are compared with torch's at three sizes, and the file is kept only if they agree.
Without a checkpoint the weights are random.

Examples: %(prog)s upernet_acmix_swin_t iter_160000.pth upernet.onnx
          %(prog)s maskrcnn_acmix_r50 epoch_12.pth maskrcnn.onnx --with-preprocessing
          %(prog)s maskrcnn_acmix_r50 epoch_12.pth r50.onnx \\
              --backbone-only --shape 800 1344
"""

import argparse

from acmix_mm.analysis.complexity import padded_image_size
from acmix_mm.commands import positive_int
from acmix_mm.engine.cli import CONFIG_HELP, add_cfg_options
from acmix_mm.engine.config import load_config, set_data_root
from acmix_mm.environment import check_mmcv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file')
    parser.add_argument('out', help='ONNX file to write')
    parser.add_argument('--backbone-only', action='store_true', help='leave out neck and heads')
    parser.add_argument('--shape', nargs=2, type=positive_int, metavar=('H', 'W'),
                        help='height and width of the images to verify with (default: the size '
                        'that a segmentation config pads to, 800 1344 for detection)')
    parser.add_argument('--fixed-size', action='store_true',
                        help='take one image of exactly this shape, which may be of any size')
    parser.add_argument('--with-preprocessing', action='store_true',
                        help='take raw images of a detector: resize, normalise and pad them in the '
                        'graph')
    parser.add_argument('--int8-images', type=positive_int, metavar='N',
                        help='quantise weights and activations to 8 bits, calibrated on N images '
                        'of the training set')
    parser.add_argument('--data-root', metavar='DIR',
                        help="read the training set from DIR, which has the layout of the config's "
                        'data_root')
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    check_mmcv()
    # Imported here because it is slow and --help does not need it.
    from acmix_mm.deploy.onnx import export_onnx, network_of, normalisation
    cfg = load_config(args.config, args.cfg_options)
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    network = network_of(cfg, args.checkpoint, args.backbone_only)
    shape = tuple(args.shape or padded_image_size(cfg))
    print(export_onnx(network, args.out, shape, args.fixed_size, cfg, args.with_preprocessing,
                      args.int8_images))
    if not args.with_preprocessing:
        print(f'  input: {normalisation(cfg)}')
