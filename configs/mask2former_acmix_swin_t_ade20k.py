# Baseline: mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py
_base_ = ['./_base_/acmix_mm.py',
          'mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py']
custom_imports = dict(imports=['mmdet.models', 'acmix_mm'])
model = dict(backbone=dict(type='ACmixSwinTransformer'))
# The baseline trains the backbone at a tenth of the learning rate. The convolution paths and the
# rates, which the checkpoint of a plain Swin lacks, train at the full one.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'attn.w_msa.fc': dict(lr_mult=1.),
            'attn.w_msa.dep_conv': dict(lr_mult=1.),
            'attn.w_msa.rate': dict(lr_mult=1., decay_mult=0.)
        }))
