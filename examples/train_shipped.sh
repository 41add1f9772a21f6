#!/bin/bash
# Train the shipped models, one a process: on one GPU both share it, on two each has its own.
#
#   bash examples/train_shipped.sh IDS OUT MINUTES [WORKERS]
#
# IDS is the folder written by `python -m statespan.training.vocabulary`, OUT receives one folder a model, MINUTES is the
# wall time of the training itself (measuring afterwards takes about one more), WORKERS the row-drawing processes a model.
set -u
ids=$1 out=$2 minutes=$3 workers=${4:-7}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
device=$([ "$gpus" -gt 0 ] && echo cuda || echo cpu)
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTORCH_ALLOC_CONF=expandable_segments:True
mkdir -p "$out"
index=0 started=()
for model in mamba1-5m mamba2-5m; do
    CUDA_VISIBLE_DEVICES=$((gpus ? index % gpus : 0)) python3 -m statespan.training run "$model" --ids "$ids" \
        --out "$out/$model" --device "$device" --minutes "$minutes" --workers "$workers" ${TRAIN_FLAGS:-} \
        >"$out/$model.log" 2>&1 &
    started+=($!) index=$((index + 1))
done
status=0
for process in "${started[@]}"; do wait "$process" || status=1; done
for model in mamba1-5m mamba2-5m; do
    rm -f "$out/$model/tokenizer.json"  # the same as in IDS
    tail -n 4 "$out/$model.log"
done
exit $status
