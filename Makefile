# Each target is the commands that a person would type. PYTHON names the interpreter that .venv is made from.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python

.PHONY: help demo test test-fast clean

help:
	@echo "make demo       a small GPT-2, trained on this CPU (or GPU) in minutes: data, training, plot, samples"
	@echo "make test       the whole test suite"
	@echo "make test-fast  the tests that take less than a few seconds each"

demo: $(VENV)/.core
	$(PY) prepare_text.py --demo --train_tokenizer 4096 --out data/demo
	$(PY) train.py --data_dir data/demo --log_dir logs/demo --n_layer 4 --n_head 4 --n_embd 256 --block_size 256 \
	    --total_batch_size 2048 --max_steps 600 --optimizer muon --max_lr 2e-3 --min_lr 0 --schedule wsd \
	    --eval_every 100 --val_tokens 65536 --hellaswag_every 0 --sample_every 200 --checkpoint_every 200
	$(PY) plot.py logs/demo
	$(PY) inference.py --checkpoint logs/demo/model_00600.pt --prompt "Return a new" --num_seq 3 --max_tokens 60
	@echo; echo "The curves: logs/demo/plot.png"

test: $(VENV)/.extras
	$(PY) -m pytest -n 2

test-fast: $(VENV)/.extras
	$(PY) -m pytest -n 2 -m "not slow"

# Reinstalled when its list changes; otherwise make finds the stamp and does nothing.
$(VENV)/.core: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.extras: requirements-extras.txt $(VENV)/.core
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-extras.txt
	touch $@

clean:
	rm -rf $(VENV) data/demo logs/demo
