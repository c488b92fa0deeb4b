# Each target is the commands that a person would type. PYTHON names the interpreter that .venv is made from.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python

.PHONY: help demo test test-fast bench bench-gpu run-gpu run-gpu-shakespeare clean

help:
	@echo "make demo       a small GPT-2, trained on this CPU (or GPU) in minutes: data, training, plot, samples"
	@echo "make test       the whole test suite"
	@echo "make test-fast  the tests that take less than three seconds each"
	@echo "make bench      the benchmarks at CPU size, into bench/results"
	@echo "make bench-gpu  everything worth measuring on one GPU, in 30 minutes (bench/README.md says what it needs)"
	@echo "make run-gpu    of that, GPT-2 124M trained on 48M tokens of Wikipedia"
	@echo "make run-gpu-shakespeare   GPT-2 124M learns tinyshakespeare by heart"
	@echo "make clean      remove .venv and the demo"

demo: $(VENV)/.core
	$(PY) prepare_text.py --demo --train_tokenizer 4096 --out data/demo
	$(PY) train.py --data_dir data/demo --log_dir logs/demo --n_layer 4 --n_head 4 --n_embd 256 --block_size 256 \
	    --total_batch_size 2048 --max_steps 600 --optimizer muon --max_lr 2e-3 --min_lr 0 --schedule wsd \
	    --eval_every 100 --val_tokens 65536 --sample_every 200 --checkpoint_every 200
	$(PY) plot.py logs/demo
	$(PY) inference.py --checkpoint logs/demo/model_00600.pt --prompt "Return a new" --num_seq 3 --max_tokens 60
	@echo; echo "The curves: logs/demo/plot.png"

test: $(VENV)/.extras
	$(PY) -m pytest -n 2

test-fast: $(VENV)/.extras
	$(PY) -m pytest -n 2 -m "not slow"

bench: $(VENV)/.extras
	$(PY) -m bench.tokenize
	$(PY) -m bench.loader
	$(PY) -m bench.checkpoint
	$(PY) -m bench.train_step
	$(VENV)/bin/torchrun --nproc_per_node=2 -m bench.train_step --peers ours,apart --total_batch_size 2048
	$(PY) -m bench.generate
	test ! -f data/hellaswag/hellaswag_val.jsonl || $(PY) -m bench.hellaswag
	test ! -f data/hellaswag/hellaswag_val.jsonl || $(PY) -m bench.evaluate
	$(PY) -m bench.seeds
	$(PY) -m bench.error_bars
	test ! -d data/wikipedia_48m || $(PY) -m bench.muon
	$(PY) -m bench.table

# On a GPU machine with its own torch: no .venv.
bench-gpu:
	$(PYTHON) -m bench.gpu

run-gpu:
	$(PYTHON) -m bench.gpu --minutes 12 --only unpack,run,plot,samples

run-gpu-shakespeare:
	$(PYTHON) -m bench.gpu --minutes 12 --only unpack,shakespeare

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
