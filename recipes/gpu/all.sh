#!/usr/bin/env bash
# All that a GPU is needed for, in the order of what matters most, unattended, on a machine without a network.
#
#   bash recipes/gpu/all.sh rows.jsonl                     # all parts
#   bash recipes/gpu/all.sh rows.jsonl correct             # one part, or several: "correct speed"
#   bash recipes/gpu/all.sh correct                        # the same into gpu.jsonl
#   DEVICE=cpu TINY=--tiny bash recipes/gpu/all.sh /tmp/rows.jsonl       # small shapes, to try it: minutes
#
# The parts and the seconds after which each is ended: correct 150, speed 420, attention 120, decode 150, demo 180,
# train 360, compile 120; 1500 in all, which are 25 minutes, and the start of Python before the first, some seconds.
# None takes 10 minutes, so they can be called one by one where a call may not take longer. LIMIT=600 gives each that
# many seconds instead (600 at most; then all of them together may take longer than 25 minutes). Every finding is a line
# of the file as soon as it is known; a part that fails or is ended does not stop the others. The status is 0 if all went
# well, 1 if a part failed, was ended or found something wrong, 2 if there is no device or a package is missing.
#
# torch, transformers, peft and lightning must be installed. What else the package needs must be installed or lie in the
# folder EXTRA. Where there is a network, with the same Python on the same kind of machine, this makes it:
#
#   pip install --target extra --no-deps -r recipes/gpu/extra.txt -c constraints.txt
#   koff fetch smollm2 --out extra           # weights for `train`, which else takes random ones
#
# and then, where the GPU is:
#
#   EXTRA=extra SMOLLM2=extra/SmolLM2-135M-Instruct.Q4_1.gguf bash recipes/gpu/all.sh rows.jsonl
set -u
known="correct speed attention decode demo train compile"
out=gpu.jsonl
if [ $# -gt 0 ] && [[ " $known " != *" ${1%% *} "* ]]; then
  out=$1
  shift
fi
parts=${*:-$known}
out=$(realpath -m "$out")
[ -z "${SMOLLM2:-}" ] || SMOLLM2=$(realpath -m "$SMOLLM2")
extra=${EXTRA:+$(realpath -m "$EXTRA")}
cd "$(dirname "$0")/../.." || exit 2
export SMOLLM2=${SMOLLM2:-} PYTHONPATH="$PWD/src:$extra:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
device=${DEVICE:-cuda}
needed="torch transformers peft lightning torchmetrics lm_eval jsonargparse docstring_parser typeshed_client datasets
gguf matplotlib scipy pandas pyarrow sklearn statsmodels tensorboard"
missing=$(python -c 'import sys; from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if not find_spec(name)))' $needed) || exit 2
if [ -n "$missing" ]; then
  echo "all.sh: neither installed nor in EXTRA: $missing; the head of this file says what makes that folder" >&2
  exit 2
fi
if [ "$device" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "all.sh: no CUDA device is here; DEVICE=cpu TINY=--tiny tries everything on the CPU with small shapes" >&2
  exit 2
fi
status=0
for part in $parts; do
  case $part in
    correct | decode) limit=150 ;;
    speed) limit=420 ;;
    attention | compile) limit=120 ;;
    demo) limit=180 ;;
    train) limit=360 ;;
    *)
      echo "all.sh: there is no part $part; known: $known" >&2
      exit 2 ;;
  esac
  limit=${LIMIT:-$limit}
  [ "$limit" -le 600 ] || limit=600
  echo "== $part, $limit seconds at most"
  timeout -k 5 "$limit" python recipes/gpu/parts.py "$part" --device="$device" --out="$out" \
    --seconds=$((limit - 10)) ${TINY:-}
  ended=$?
  [ $ended = 124 ] && echo "all.sh: $part was ended after $limit seconds; its rows so far are in $out" >&2
  [ $ended = 0 ] || status=1
done
exit $status
