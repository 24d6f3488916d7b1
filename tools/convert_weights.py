"""Convert a checkpoint of an ACmix network or of its plain host into weights of an ACmix backbone.

Accepts ACmix checkpoints of the paper's authors and of this project, and plain Swin (Microsoft,
timm, OpenMMLab), PVT v1 (its authors, OpenMMLab), SAN (its authors) and ResNet (torchvision, timm,
OpenMMLab), including whole detectors and averaged weights. A config that names the checkpoint in
init_cfg loads the same weights without a conversion.

Examples: python tools/convert_weights.py swin_tiny_patch4_window7_224.pth acmix_swin_t.pth
          python tools/convert_weights.py timm://resnet50.a1_in1k acmix_r50.pth --arch resnet-50
"""

import argparse

from acmix_mm.engine.cli import run_tool
from acmix_mm.engine.convert import ARCHS, convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='a .pth or .safetensors file, a URL, timm://MODEL, or '
                        'hf-hub:OWNER/NAME')
    parser.add_argument('destination', help='the .pth or .safetensors file to write')
    parser.add_argument('--arch', choices=ARCHS, help='build this network and refuse weights of '
                        'any other (default: infer the architecture from the weights)')
    args = parser.parse_args()
    print(convert(args.source, args.destination, args.arch))


if __name__ == '__main__':
    run_tool(main)
