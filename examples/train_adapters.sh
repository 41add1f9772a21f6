#!/bin/bash
# Train ReMamba's adapters of the shipped models and their fair baselines, four processes that share one GPU; of two
# GPUs each model has its own.
#
#   bash examples/train_adapters.sh IDS OUT MINUTES [WORKERS]
#
# IDS is the folder written by `python -m statespan.training.vocabulary`; OUT receives MODEL-remamba.safetensors and
# MODEL-remamba-baseline.safetensors, to be put into statespan/checkpoints/MODEL/artifacts/ as remamba.safetensors and
# remamba-baseline.safetensors, each with its .json; MINUTES is the wall time of each training, WORKERS its row-drawing
# processes.
set -u
ids=$1 out=$2 minutes=$3 workers=${4:-3}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
device=$([ "$gpus" -gt 0 ] && echo cuda || echo cpu)
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTORCH_ALLOC_CONF=expandable_segments:True
mkdir -p "$out"
lora=$(python3 -c 'import importlib.util; print("peft" if importlib.util.find_spec("peft") else "torch")')
echo "LoRA by $lora on $gpus GPUs"
index=0 started=()
for model in mamba1-5m mamba2-5m; do
    for kind in remamba remamba-baseline; do
        CUDA_VISIBLE_DEVICES=$((gpus ? index % gpus : 0)) python3 -m statespan.commands.train "$model" --method remamba \
            --ids "$ids" --device "$device" --minutes "$minutes" --half \
            --out "$out/$model-$kind.safetensors" --workers "$workers" --lora "$lora" \
            $([ "$kind" = remamba-baseline ] && echo --baseline) ${TRAIN_FLAGS:-} >"$out/$model-$kind.log" 2>&1 &
        started+=($!)
    done
    index=$((index + 1))
done
status=0
for process in "${started[@]}"; do wait "$process" || status=1; done
tail -n 12 "$out"/*.log
exit $status
