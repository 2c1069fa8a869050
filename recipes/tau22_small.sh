#!/usr/bin/env bash
# AuM-Small on TAU22 with the scripts' defaults: the general model, then one model per device.
#
#     bash recipes/tau22_small.sh /data/TAU22 --accelerator gpu --precision bf16-mixed
#
# Flags after the folder go to both scripts. PROJECT names the folder of the runs. The same command resumes what was
# interrupted. AuM-Small is far over the challenge's limits; recipes/tau22_nano.sh is for the challenge.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: bash recipes/tau22_small.sh /data/TAU22 [FLAGS]}
shift
source recipes/run.sh

run train_base.py small-general --dataset_dir "$data" --experiment_name AUM_Small_Scratch \
    --model aum_small "$@"
run train_device_specific.py small-devices --dataset_dir "$data" --experiment_name AUM_Small_DeviceSpecific \
    --ckpt_id small-general --n_epochs 50 "$@"
