#!/usr/bin/env bash
# Everything that waits for a GPU, in pieces of at most ten minutes: `benchmarks/gpu.sh together|pooled|study|math|...`.
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
#
# `together MINUTES` does what results/ has of small models, all at once on 16 cores: the pipeline's study, then one of
# 10,000 images, beside other networks than ResNet-18 and requests about some images. IMAGES is a folder here,
# and runs and logs go to the folder PORTIONS (by default ./portions). Call it again to go on.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
share_gpu() { # kernels of several processes run beside each other, where there is MPS
  command -v nvidia-cuda-mps-control >/dev/null || return 0
  pgrep -f nvidia-cuda-mps-control >/dev/null || nvidia-cuda-mps-control -d || true
}
ends() { # runs a command for so many minutes at most
  timeout --kill-after=20 "$(awk "BEGIN { print int(60 * $1) }")" "${@:2}"
}
left() { awk "BEGIN { print ($DEADLINE - $(date +%s)) / 60 }"; } # minutes
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
              'study.after=[0,1,3,10,30,100]' 'study.scenarios=[everyone,sequential]' 'study.seeds=[0,1,2]' \
              'study.retrained_seeds=[3]' study.stages=[train,retrain,forget] \
              "study.only=base/* retrained/ce_dl/0/* forget/subset/*/seed0 retrained/*/seed[03] forget/*/at60/0/seed0 \
forget/leave/*/seed0 retrained/ce_dl/*/seed1 forget/subset/*/seed1 retrained/*/seed2 forget/subset/* \
forget/*/at60/0/* forget/leave/*" "${@:2}" ;;
  ten) exec bash benchmarks/gpu.sh pipeline study.name=ten data.limit=10000 'study.after=[0,1,3,10,30]' \
         'study.strategies=[subset,leave]' "${@:2}" ;;
  own) for seeds in 0 0,1 0,1,2; do
         python3 -m benchmarks.own_models --root "$IMAGES" --words data.limit=5000 "study.seeds=[$seeds]" \
           study.stages=[train,retrain,forget] study.workers=2 "${@:2}"
       done ;;
  portions) [ -f "$PORTIONS/clients.csv" ] || python3 -m benchmarks.patients "$IMAGES" "$PORTIONS/clients.csv"
            python3 -m benchmarks.portions --folder "$PORTIONS/$2" --app cifar10 --rounds 60 --images 100 --class 4 \
              --patients c0-airplane-{0,1,2} c0-automobile-{2,3,4,5} c0-deer-{10,11,12} -- data.name=folder \
              "data.root=$IMAGES" "partition.file=$PORTIONS/clients.csv" model.width=16 train.crop_padding=0 \
              train.flip=false forget.gate=false "seed=$2" "${@:3}" ;;
  together) share_gpu
            export DEADLINE=$(($(date +%s) + $(awk "BEGIN { print int(60 * $2) }"))) PORTIONS=${PORTIONS:-portions}
            mkdir -p "$PORTIONS"
            for seed in 0 1 2; do
              ends "$2" bash benchmarks/gpu.sh portions "$seed" &> "$PORTIONS/$seed.log" &
            done
            ends "$2" bash benchmarks/gpu.sh own "study.minutes=$2" &> "$PORTIONS/own.log" &
            bash benchmarks/gpu.sh pipeline study.workers=11 "study.minutes=$2" &> "$PORTIONS/pipeline.log" &&
              bash benchmarks/gpu.sh ten study.workers=11 "study.minutes=$(left)" &> "$PORTIONS/ten.log" || true
            wait ;;
  digits) share_gpu
          python3 -m fedunlearn study federated dataset=digits study.name=gpu-digits study.workers=3 'study.seeds=[0]' \
            'study.after=[0,1]' 'study.scenarios=[single]' 'study.pipelines=[ce_dl]' "${@:2}" ;;
  federation) python3 -m benchmarks.federation --images 20000 --rounds 4 --gpus 0.5 ;;
  scaling) python3 -m fedunlearn scale name=gpu 'clients=[10,100]' 'actors=[1,2,4]' 'gpus=[0.25]' \
             'overrides="data.limit=20000 model.width=64"' ;;
  *) echo "usage: $0 together|pooled|study|federated|memorised|pipeline|ten|own|portions|digits|math|fisher|layers|sweep|epoch|federation|scaling" >&2; exit 2 ;;
esac
