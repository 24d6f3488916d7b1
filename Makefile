# make demo   train and evaluate a small Mask R-CNN with an ACmix-Swin backbone
# make test   ruff and the test suite
# Both make the environment first, where it is missing. VENV=dir uses another one than .venv.

VENV ?= .venv
PYTHON ?= python3.11
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt

TORCH_VERSION := $(RUN) -c 'import torch; print(torch.__version__)' 2>/dev/null

SHAPES := data/shapes
DEMO := work_dirs/demo
DEMO_CONFIG := configs/shapes/maskrcnn_acmix_swin.py
DEMO_CHECKPOINT := $(DEMO)/epoch_10.pth

# This checkout, not another one that a shared environment may have installed.
export PYTHONPATH := $(CURDIR)

.PHONY: env demo test
.DELETE_ON_ERROR:

demo: env $(DEMO_CHECKPOINT)
	$(RUN) tools/test.py $(DEMO_CONFIG) $(DEMO_CHECKPOINT) --work-dir $(DEMO) --show-dir $(DEMO)/pictures
	@echo "Pictures, ground truth left and predictions right: $(DEMO)/pictures"

test: env
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

env: $(VENV)/.acmix-mm-stack
	@$(RUN) -m acmix_mm.environment

# torch comes first and mmcv is built against it: built in isolation it would lack its operators,
# and pip's cache would hand out one that was built for another torch, as would an environment
# whose torch this changes.
# The headless OpenCV replaces the files of the other one, which needs libGL.
# The stamp names the torch that mmcv was built for; acmix_mm.environment compares.
$(VENV)/.acmix-mm-stack: constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@before=$$($(TORCH_VERSION)); \
	$(INSTALL) torch torchvision setuptools wheel ninja psutil && \
	if [ "$$before" != "$$($(TORCH_VERSION))" ]; then $(RUN) -m pip uninstall -q -y mmcv; fi
	@echo "Installing mmcv; where it has to be compiled, that takes some six minutes on two cores."
	$(INSTALL) --no-build-isolation --no-cache-dir mmcv
	$(INSTALL) mmengine mmdet mmsegmentation timm ftfy regex onnx onnxruntime onnxscript \
		tensorboard pytest pytest-xdist hypothesis ruff
	$(INSTALL) --no-deps --force-reinstall opencv-python-headless
	$(if $(filter .venv,$(VENV)),$(INSTALL) --no-deps --no-build-isolation -e .)
	$(TORCH_VERSION) > $@

$(SHAPES)/annotations/instances_val2017.json: | env
	$(RUN) tools/make_shapes.py $(SHAPES)

$(DEMO_CHECKPOINT): $(SHAPES)/annotations/instances_val2017.json | env
	$(RUN) tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO) --resume
