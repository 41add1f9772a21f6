#!/bin/bash
# Train ReMamba's adapters of the shipped models and their fair baselines, four processes that share one GPU.
#
#   bash examples/train_adapters.sh IDS OUT MINUTES [WORKERS]
#
# IDS is the folder written by `python -m statespan.training.vocabulary`; OUT receives MODEL-remamba.safetensors and
# MODEL-remamba-baseline.safetensors, to be put into statespan/checkpoints/MODEL/artifacts/ as remamba.safetensors and
# remamba-baseline.safetensors; MINUTES is the wall time of each training, WORKERS its row-drawing processes.
set -u
ids=$1 out=$2 minutes=$3 workers=${4:-3}
device=$(python3 -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTORCH_ALLOC_CONF=expandable_segments:True
mkdir -p "$out"
lora=$(python3 -c 'import importlib.util; print("peft" if importlib.util.find_spec("peft") else "torch")')
echo "LoRA by $lora on $device"
started=()
for model in mamba1-5m mamba2-5m; do
    for kind in remamba remamba-baseline; do
        python3 -m statespan.commands.train "$model" --method remamba --ids "$ids" --device "$device" --minutes "$minutes" \
            --out "$out/$model-$kind.safetensors" --workers "$workers" --lora "$lora" \
            $([ "$kind" = remamba-baseline ] && echo --baseline) ${TRAIN_FLAGS:-} >"$out/$model-$kind.log" 2>&1 &
        started+=($!)
    done
done
status=0
for process in "${started[@]}"; do wait "$process" || status=1; done
tail -n 3 "$out"/*.log
exit $status
