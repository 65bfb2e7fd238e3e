#!/usr/bin/env bash
# Everything that waits for a GPU, in pieces of at most ten minutes: `benchmarks/gpu.sh pooled|study|math|fisher|...`.
#
# They need torch with Triton, scikit-learn, safetensors, matplotlib, pydantic and rich. `math` needs pytest-xdist,
# `fisher` has one more row with backpack-for-pytorch, `study` also needs typer, omegaconf, optuna and jinja2. The
# federations (`digits`, `federated` and `memorised`, which need no Ray, `federation`, `scaling`) need all that
# fedunlearn depends on. `study`, `federated` and `memorised` are to be called again until they answer 0 (3: time was
# up). IMAGES is the path of CIFAR-10's images as files or as an archive of files; without it CIFAR-10 itself is
# downloaded.
#
# On an H200 `math`, `fisher` of width 64, `epoch` and `digits` (every strategy once) take one to two minutes each. A
# round of `federated` takes 6 s, and 2.5 s with four processes (MPS): base and retrained model of all 200 rounds, and
# ten rounds of a strategy, are 35 minutes. `memorised` is the laptop preset at the paper's width, 10,000 images without
# crops and flips: a fifth of that a round, five minutes by estimate.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
share_gpu() { # kernels of several processes run beside each other, where there is MPS
  command -v nvidia-cuda-mps-control >/dev/null || return 0
  pgrep -f nvidia-cuda-mps-control >/dev/null || nvidia-cuda-mps-control -d || true
}
case "${1:-}" in
  math) OMP_NUM_THREADS=2 python3 -m pytest -q -n 8 -c /dev/null --rootdir . -p no:cacheprovider --noconftest tests/test_fisher_triton.py \
          tests/test_sgd.py tests/test_schedule.py tests/test_fisher.py tests/test_losses.py tests/test_dampening.py \
          tests/test_batch_norm.py tests/test_pruning.py tests/test_model.py tests/test_evaluate.py \
          tests/test_study_training.py tests/test_study_finetuning.py ;;
  fisher) for width in 64 16; do python3 -m benchmarks.fisher --width "$width" --batch 128 --repeats 7; done ;;
  layers) python3 -m benchmarks.fisher_layers ;;
  sweep) python3 -m benchmarks.fisher_layers --sweep ;;
  epoch) python3 -m benchmarks.epoch --images 12800 --repeats 7 ;;
  pooled) for width in 64 16; do python3 -m benchmarks.pooled --width "$width" --images 12880 --repeats 7 --compile; done ;;
  study) python3 -m fedunlearn study paper dataset=cifar10 scale=full study.minutes=9 'study.seeds=[0]' \
           ${IMAGES:+data.name=folder "data.root=$IMAGES"} "${@:2}" ;;
  federated) share_gpu
             python3 -m fedunlearn study federated dataset=cifar10 scale=full study.minutes=9 study.workers=4 \
               'study.seeds=[0]' ${IMAGES:+data.name=folder "data.root=$IMAGES"} "${@:2}" ;;
  memorised) exec bash benchmarks/gpu.sh federated study.name=memorised rounds=40 data.limit=10000 train.crop_padding=0 \
               train.flip=false 'study.after=[0,1,3,10]' 'study.strategies=[subset,leave,ssd]' 'study.scenarios=[single]' \
               'study.pipelines=[ce_dl]' "${@:2}" ;;
  pipeline) exec bash benchmarks/gpu.sh federated scale=laptop study.name=pipeline data.limit=5000 train.precision=fp32 \
              'study.after=[0,1,3,10,30,100]' 'study.scenarios=[single,everyone,sequential]' 'study.retrained_seeds=[1]' \
              'study.strategies=[subset,leave]' "${@:2}" ;;
  digits) share_gpu
          python3 -m fedunlearn study federated dataset=digits study.name=gpu-digits study.workers=3 'study.seeds=[0]' \
            'study.after=[0,1]' 'study.scenarios=[single]' 'study.pipelines=[ce_dl]' "${@:2}" ;;
  federation) python3 -m benchmarks.federation --images 20000 --rounds 4 --gpus 0.5 ;;
  scaling) python3 -m fedunlearn scale name=gpu 'clients=[10,100]' 'actors=[1,2,4]' 'gpus=[0.25]' \
             'overrides="data.limit=20000 model.width=64"' ;;
  *) echo "usage: $0 pooled|study|federated|memorised|pipeline|digits|math|fisher|layers|sweep|epoch|federation|scaling" >&2; exit 2 ;;
esac
