#!/usr/bin/env bash
# AuM-Nano in 8 bits for the challenge: two teachers, the student, one model per device, the test of what is stored.
#
#     bash recipes/tau22_nano.sh /data/TAU22 /data/MicIRP
#
# The second folder holds impulse responses of devices, as MicIRP's. docs/challenge.md says what each step is for.
# Flags after the folders go to the training scripts. PROJECT names the folder of the runs. The same command resumes what
# was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
usage='usage: bash recipes/tau22_nano.sh /data/TAU22 /data/MicIRP [FLAGS]'
data=${1:?$usage} responses=${2:?$usage}
shift 2
source recipes/run.sh

# Teachers: any models, the more different the better. They train on the student's clips.
run train_base.py teacher-small --dataset_dir "$data" --model aum_small --dir_path "$responses" --n_epochs 150 "$@"
run train_base.py teacher-mobile --dataset_dir "$data" --model cp_mobile --dir_path "$responses" --n_epochs 150 \
    --batch_size 256 --lr 0.005 --warmup_steps 2000 --mixstyle_p 0.4 --mixstyle_alpha 0.3 --timem 0 "$@"

# The student learns from both, and trains with rounded weights in the last epochs.
run train_base.py nano-student --dataset_dir "$data" --model aum_nano_8bit --dir_path "$responses" --n_epochs 150 \
    --lr 0.005 --mixstyle_p 0.4 --mixstyle_alpha 0.3 --timem 8 --ema_decay 0.999 \
    --teacher teacher-small,teacher-mobile --weight_bits 8 --qat_epochs 10 "$@"

# One model per device, each stored like the general one.
run train_device_specific.py nano-devices --dataset_dir "$data" --ckpt_id nano-student --finetune lora \
    --lr_choices 0.0003,0.001 --n_epochs 50 "$@"

# Test the stored files once more, and count their bytes and MACs.
python test_only.py --dataset_dir "$data" --ckpt_path "$project/nano-devices/stored" --project_name "$project"
python -m dcase.complexity --model aum_nano_8bit --weight_bits 8 --enforce
