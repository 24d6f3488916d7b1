# make demo   train and evaluate a small Mask R-CNN with an ACmix-Swin backbone
# make test   ruff, mypy and the test suite
# make dist   build the wheel and the sdist, and check them
# make docs   build the documentation into site/; DOCS_EXECUTE=false does not run its notebook
# Each creates the environment first if it does not exist. VENV=dir uses another one than .venv.
# STACK=name uses the versions in constraints/name.txt, and its own environment; noxfile.py runs the
# test suite and the demo on every stack.

STACK ?= pinned
VENV ?= .venv$(if $(OTHER_STACK),-$(STACK))
PYTHON ?= python3.11
OTHER_STACK := $(filter-out pinned,$(STACK))
CONSTRAINTS := constraints/$(STACK).txt
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check -q
INSTALL := $(PIP) install -c $(CONSTRAINTS)

TORCH_VERSION := $(RUN) -c 'import torch; print(torch.__version__)' 2>/dev/null

DOCS_EXECUTE ?= true

SHAPES := data/shapes
DEMO := work_dirs/demo$(if $(OTHER_STACK),-$(STACK))
DEMO_CONFIG := configs/shapes/maskrcnn_acmix_swin.py
DEMO_CHECKPOINT := $(DEMO)/epoch_10.pth

# mmcv without debug information compiles in 60 % of the time. Under setuptools 80 CFLAGS replaces
# Python's own flags, so all of them are given.
MMCV_FLAGS := CFLAGS="-g0 -O2 -DNDEBUG" CXXFLAGS="-g0 -O2 -DNDEBUG"

# OpenMMLab's packages or, if the constraints name them, those of the maintained forks.
ifneq ($(shell grep '^onedl-mmcv==' $(CONSTRAINTS)),)
MMCV := onedl-mmcv
OPENMMLAB := onedl-mmengine onedl-mmdetection onedl-mmsegmentation
else
MMCV := mmcv
OPENMMLAB := mmengine mmdet mmsegmentation
endif

# This checkout, not another one that a shared environment may have installed.
export PYTHONPATH := $(CURDIR)

.PHONY: env demo test suite dist docs
.DELETE_ON_ERROR:

demo: env $(DEMO_CHECKPOINT)
	$(RUN) tools/test.py $(DEMO_CONFIG) $(DEMO_CHECKPOINT) --work-dir $(DEMO) --show-dir $(DEMO)/pictures
	@echo "Images, ground truth on the left and predictions on the right: $(DEMO)/pictures"

test: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(MAKE) suite

suite: env
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

dist: env
	$(INSTALL) build twine
	rm -rf dist
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*

docs: env
	$(INSTALL) mkdocs-material mkdocstrings-python mkdocs-include-markdown-plugin mkdocs-jupyter \
		ipykernel
	DOCS_EXECUTE=$(DOCS_EXECUTE) NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(RUN) -m mkdocs build --strict

env: $(VENV)/.acmix-mm-stack
	@$(RUN) -m acmix_mm.environment

# torch comes first because mmcv is built against it. Built in isolation, mmcv would lack its
# operators; pip's cache, or an environment whose torch changes here, could provide a build for
# another torch. torch 2.14 and later require C++20 instead of the C++17 that mmcv's setup.py asks for.
# The headless OpenCV replaces the files of opencv-python, which needs libGL.
# The stamp names the torch that mmcv was built for; acmix_mm.environment compares the two.
$(VENV)/.acmix-mm-stack: $(CONSTRAINTS)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@before=$$($(TORCH_VERSION)); \
	$(INSTALL) torch torchvision setuptools wheel ninja psutil && \
	if [ "$$before" != "$$($(TORCH_VERSION))" ]; then $(PIP) uninstall -y $(MMCV); fi
	@echo "Installing $(MMCV); if it has to be compiled, this takes a few minutes on two cores."
	@mmcv=$(MMCV); \
	case $$($(TORCH_VERSION)) in 2.1[4-9].*|2.[2-9][0-9].*) \
		mmcv=$(VENV)/mmcv-source; rm -rf $$mmcv; \
		$(PIP) download -c $(CONSTRAINTS) --no-deps --no-binary $(MMCV) --no-build-isolation \
			-d $$mmcv $(MMCV) && \
		tar -xzf $$mmcv/*.tar.gz -C $$mmcv --strip-components 1 && \
		sed -i s/c++17/c++20/ $$mmcv/setup.py || exit 1;; \
	esac; \
	$(MMCV_FLAGS) $(INSTALL) --no-build-isolation --no-cache-dir $$mmcv
	$(INSTALL) $(OPENMMLAB) timm ftfy regex onnx onnxruntime onnxscript \
		tensorboard openmim submitit pytest pytest-xdist hypothesis ruff mypy
	$(INSTALL) --no-deps --force-reinstall opencv-python-headless
	$(if $(filter .venv,$(VENV)),$(INSTALL) --no-deps --no-build-isolation -e .)
	$(TORCH_VERSION) > $@

$(SHAPES)/annotations/instances_val2017.json: | env
	$(RUN) tools/make_shapes.py $(SHAPES)

$(DEMO_CHECKPOINT): $(SHAPES)/annotations/instances_val2017.json | env
	$(RUN) tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO) --resume
