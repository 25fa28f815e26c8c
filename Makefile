# make demo   export the embedded demos, self-test the bundles, classify digits, draw boxes and label maps, compare latencies
# make quick  ruff, mypy, and the tests without compilers, browsers, JVM, sshd and networks of real size: the first line
# make test   ruff, mypy, every test
# make docs   the documentation site in dist/site, every link and anchor checked
# make coverage, make sbom   how much of the package the tests run; what the run-only install consists of
# Both set themselves up from nothing: a virtual environment in .venv with everything they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# packages of others, for tests: without their dependencies, which are CUDA's; as in tests/toolchains.py
MAMBAS := opensr-mamba==0.0.1 mambapy==1.2.0 bidirectional-mamba==0.2.0 timm==1.0.31 einops==0.8.2
COCO := pycocotools==2.0.11
TRITON := tritonclient==2.73.0
DEAR := compiler or browser or jvm or ssh or cross or valgrind or slow

# Sources of the package and of the tests are compiled once, also where the environment forbids it: each process would
# compile all of them again, 3 CPU seconds for pytest.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo quick first-line test every-test check docs bench coverage sbom setup clean
setup: $(VENV)/.ready

# --no-compile: of the dependencies' modules a run imports a fraction, and Python compiles that when it is imported. Compiling all of
# them took more than half of the set-up.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile

$(VENV)/.ready: pyproject.toml constraints.txt $(wildcard native/*/* native/CMakeLists.txt native/kernels.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt scikit-build-core -e '.[dev]'
	$(INSTALL) --no-deps $(MAMBAS) $(COCO) $(TRITON)
	touch $@

demo: setup
	$(BIN)/evm-export --target onnx,openvino,coreml --out dist --force
	$(BIN)/evm-run dist/evm_digits-onnx-fp32-64x64 --selftest
	$(BIN)/python -m evm_deploy.demo dist/evm_digits-onnx-fp32-64x64
	$(BIN)/evm-run dist/evm_digits-openvino-fp32-64x64 --selftest
	$(BIN)/evm-run dist/evm_digits-coreml-fp16-64x64 --selftest
	$(BIN)/python -m evm_deploy.demo.scenes dist/scenes --count 6
	$(BIN)/evm-export demo:detector --target onnx --out dist --force
	$(BIN)/evm-run dist/evm_scenes_detector-onnx-fp32-128x128 dist/scenes/images --save dist/boxes
	$(BIN)/python -m evm_deploy.demo dist/evm_scenes_detector-onnx-fp32-128x128
	$(BIN)/evm-export demo:segmenter --target onnx --out dist --force
	$(BIN)/evm-run dist/evm_scenes_segmenter-onnx-fp32-128x128 dist/scenes/images --save dist/maps
	$(BIN)/python -m evm_deploy.demo dist/evm_scenes_segmenter-onnx-fp32-128x128
	$(BIN)/evm-bench --matrix --threads 1 --limit 20 -o dist/bench

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: setup
	$(MAKE) --no-print-directory --jobs=2 check first-line

first-line: setup
	$(BIN)/python -m pytest -n 2 -p no:randomly -m "not ($(DEAR))"

test: setup
	rm -rf .pytest_cache/d/hub-graphs # every graph is traced anew
	$(MAKE) --no-print-directory --jobs=2 check every-test

every-test: setup
	$(BIN)/python -m pytest -n 2

docs: setup
	$(INSTALL) -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	$(BIN)/python docs/site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

coverage: setup
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

sbom: setup
	$(PYTHON) -m venv --clear dist/sbom
	dist/sbom/bin/python -m pip install --quiet '.[run-onnx,sign]'
	$(BIN)/python -m pip install --quiet cyclonedx-bom
	$(BIN)/cyclonedx-py environment dist/sbom/bin/python --pyproject pyproject.toml --output-reproducible -o dist/evm-deploy.cdx.json

bench: setup
	$(BIN)/python benchmarks/whole_model.py

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
