#!/usr/bin/env bash
# All that a GPU is needed for, in the order of what matters most, unattended. At most 25 minutes in calls of 10.
#
#   bash recipes/gpu/all.sh rows.jsonl            # all parts
#   bash recipes/gpu/all.sh rows.jsonl correct    # one part
#   DEVICE=cpu TINY=--tiny STEPS=2 bash recipes/gpu/all.sh rows.jsonl "all run"    # small shapes, parts.py once for all
#
# Every finding is in the file as soon as it is known. A part that fails or runs out of time does not stop the others.
# torch, transformers, peft and lightning must be installed; what else the package needs lies in $EXTRA, a folder that
# `pip install --target` filled, if it is not installed either. Nothing is fetched.
set -u
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-gpu.jsonl}")
parts=${2:-correct step attention run decode}
export PYTHONPATH="$PWD/src:${EXTRA:-}:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
device=${DEVICE:-cuda}
[ "$device" = cuda ] && accelerator=gpu || accelerator=cpu
small=  # rows and texts that take no time
if [ -n "${TINY:-}" ]; then
  small="--data.domains={\"de\":\"bundled:de\",\"python\":\"bundled:python\"} --data.batch_size=2"
  small="$small --data.seq_len=64 --data.max_train_bytes=20000 --data.max_heldout_bytes=1500"
fi
status=0
for part in $parts; do
  echo "== $part"
  case $part in
    run)  # a whole run on the device: train, cut, and prove the cut model in a fresh process, in fp32 and bf16
      for precision in 32-true bf16-mixed; do
        timeout "${LIMIT:-300}" python -m koff_lightning fit demo.yaml --trainer.accelerator=$accelerator \
          --trainer.precision=$precision --trainer.max_steps="${STEPS:-200}" \
          --trainer.default_root_dir="$out.run-$precision" $small || status=1
      done ;;
    decode)  # prefill and decode of cut backbones beside the dense one
      timeout "${LIMIT:-300}" python -m koff_lightning bench serve --device="$device" || status=1 ;;
    *)
      timeout "${LIMIT:-600}" python recipes/gpu/parts.py "$part" --device="$device" --out="$out" ${TINY:-} || status=1 ;;
  esac
done
exit $status
