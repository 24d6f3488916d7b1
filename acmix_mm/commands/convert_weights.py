"""Convert a checkpoint of an ACmix network or of its plain host into weights of an ACmix backbone.

Accepts ACmix checkpoints of the paper's authors and of this project, and plain Swin (Microsoft,
timm, OpenMMLab), PVT v1 (its authors, OpenMMLab), SAN (its authors) and ResNet (torchvision, timm,
OpenMMLab), including whole detectors and averaged weights. A config that names the checkpoint in
init_cfg loads the same weights without a conversion.

Examples: %(prog)s swin_tiny_patch4_window7_224.pth acmix_swin_t.pth
          %(prog)s timm://resnet50.a1_in1k acmix_r50.pth --arch resnet-50
"""

import argparse

from acmix_mm.engine.convert import ARCHS, convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('source', help='a .pth or .safetensors file, a URL, timm://MODEL, or '
                        'hf-hub:OWNER/NAME')
    parser.add_argument('destination', help='the .pth or .safetensors file to write')
    parser.add_argument('--arch', choices=ARCHS, help='build this network and refuse weights of '
                        'any other (default: infer the architecture from the weights)')


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    print(convert(args.source, args.destination, args.arch))
