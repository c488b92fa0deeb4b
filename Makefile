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
	@echo "make bench-gpu  the benchmarks on one GPU (bench/README.md says what it needs)"
	@echo "make run-gpu    GPT-2 124M on 48M tokens of Wikipedia, 4 epochs, on one GPU (likewise)"
	@echo "make run-gpu-shakespeare   GPT-2 124M learns tinyshakespeare by heart (likewise)"
	@echo "make clean      remove .venv and the demo"

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

bench: $(VENV)/.extras
	$(PY) -m bench.tokenize
	$(PY) -m bench.loader
	$(PY) -m bench.checkpoint
	$(PY) -m bench.train_step
	$(VENV)/bin/torchrun --nproc_per_node=2 -m bench.train_step --peers ours,apart --total_batch_size 2048
	$(PY) -m bench.generate
	test ! -f data/hellaswag/hellaswag_val.jsonl || $(PY) -m bench.hellaswag
	test ! -d data/wikipedia_48m || $(PY) -m bench.muon
	$(PY) -m bench.table

# On a GPU machine with its own torch: no .venv. data/packed: see bench/README.md.
GPU_STEP := --model gpt2 --block_size 1024 --micro_batch_size 64 --total_batch_size 524288

bench-gpu: data/unpacked
	$(PYTHON) -m bench.train_step $(GPU_STEP) --rounds 3 --steps 2
	$(PYTHON) -m bench.train_step --model gpt2-medium --block_size 1024 --micro_batch_size 32 \
	    --total_batch_size 524288 --peers ours --rounds 2 --steps 1
	$(PYTHON) -m bench.train_step --model gpt2-xl --block_size 1024 --micro_batch_size 16 \
	    --total_batch_size 131072 --peers ours --rounds 2 --steps 1
	$(PYTHON) -m bench.generate
	$(PYTHON) -m bench.hellaswag --repeats 1 --tokenizer data/wikipedia_48m
	$(PYTHON) -m bench.table

run-gpu: data/unpacked
	$(PYTHON) train.py --data_dir data/wikipedia_48m --log_dir logs/wikipedia_124m --num_epochs 4 --warmup_steps 40 \
	    --eval_every 60 --val_tokens 983040 --hellaswag_every 179 --sample_every 60 --checkpoint_every 179
	$(PYTHON) plot.py logs/wikipedia_124m

run-gpu-shakespeare: data/unpacked
	$(PYTHON) train.py --data_dir data/tinyshakespeare --log_dir logs/shakespeare_124m --block_size 64 \
	    --total_batch_size 4096 --micro_batch_size 16 --max_steps 10000 --stop_loss 0.09 --eval_every 250 \
	    --val_tokens 16384 --hellaswag_every 0 --sample_every 500
	$(PYTHON) plot.py logs/shakespeare_124m

data/unpacked: data/packed
	$(PYTHON) data/packed/unpack.py data
	cp data/packed/vocab.bpe data/packed/encoder.json data/wikipedia_48m/
	cp -r data/packed/tinyshakespeare data/
	touch $@

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
