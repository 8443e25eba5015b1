#!/usr/bin/env bash
# Every router over one library, in one table and one picture: on the five real domains, or on the generated tasks.
# Usage: scripts/sweep_routers.sh <data folder>|generated [output folder]
#   <data folder> as for scripts/domains.sh; `generated` needs nothing but the package
# ROUTERS changes which (a comma list; each trains with its own file of conf/router), STEPS (200) how long the learned
# ones train, SEED (0) the start of every random stream, LIBRARY names a library to take the experts from.
set -euo pipefail
source_of="${1:?usage: scripts/sweep_routers.sh <data folder>|generated [output folder]}"
[ "$source_of" = generated ] || source_of="$(cd "$source_of" && pwd)"
cd "$(dirname "$0")/.."
mole="${MOLE:-${MOLE_VENV:-.venv}/bin/mole}"
[ -x "$mole" ] || scripts/setup.sh plot
steps="${STEPS:-200}" seed="${SEED:-0}"
routers="${ROUTERS:-uniform,hash,predictor,average_activation,phatgoose,arrow,spectral,static,top_k,smear,poly,rkhs,product_key,attention,xlora}"

if [ "$source_of" = generated ]; then
  out="${2:-outputs/sweep-generated}"
  tasks=(arithmetic reverse sorting shouting cipher)
  backbone=(backbone=tiny backbone.device=cpu)
  metric=exact_match
  expert_words() { echo "dataset=$1"; }
  mapfile -t words < <(IFS=,; echo "dataset=[${tasks[*]}]")
  fit=(training.max_steps=150 training.batch_size=32 training.learning_rate=3e-3)
  batch=(training.batch_size=32)
else
  out="${2:-outputs/sweep-domains}"
  declare -A corpus=(
    [stories]=tinystories_sample.txt [shakespeare]=tinyshakespeare.txt [moliere]=tinymoliere.txt
    [wiki]=wikitext-2/valid.txt [abc]=nottingham_abc.txt
  )
  tasks=(stories shakespeare moliere wiki abc)
  # Heads of 8 numbers: plain attention is faster there than the fused one.
  backbone=(backbone=pretrained "backbone.path=$source_of/models/stories260K/hf" backbone.device=cpu backbone.attention=eager)
  metric=loss
  expert_words() {
    printf '%s\n' dataset=text "dataset.path=$source_of/corpora/${corpus[$1]}" "dataset.task=$1" dataset.window=256 \
      dataset.validation=0.05 dataset.test=0.05 dataset.held_out_limit=48
  }
  mapfile -t words < <(for task in "${tasks[@]}"; do
    echo "+dataset@datasets.$task=text"
    printf "datasets.$task.%s\n" "path=$source_of/corpora/${corpus[$task]}" "task=$task" window=128 limit=1000 \
      validation=0.05 test=0.05 held_out_limit=48
  done)
  fit=(training.max_steps=120 training.batch_size=8 training.learning_rate=3e-3)
  batch=(training.batch_size=16)
fi
library="${LIBRARY:-$out/library}"

if [ ! -d "$library" ]; then
  for task in "${tasks[@]}"; do
    mapfile -t chosen < <(expert_words "$task")
    "$mole" train-expert "${backbone[@]}" "${chosen[@]}" adapter=lora adapter.rank=16 adapter.alpha=32 "${fit[@]}" \
      training.epochs=null training.evaluate_every=null name="$task" library=local "library.url=$library" seed="$seed" \
      "run.folder=$out/experts/$task"
  done
fi

IFS=, read -ra wanted <<< "$routers"
# What differs from conf/router: windows of plain text have no prompt to pool or read.
declare -A own=()
[ "$source_of" = generated ] || own=([smear]="router.pool=causal router.combine=outputs")
made=()
for router in "${wanted[@]}"; do
  "$mole" build-moe "${backbone[@]}" "${words[@]}" router="$router" ${own[$router]:-} training=router training.max_steps="$steps" \
    training.epochs=null training.evaluate_every=null training.checkpoint_every=null training.log_every=10 \
    "${batch[@]}" library=local "library.url=$library" log_every=null log_examples=8 seed="$seed" name="$router" \
    "run.folder=$out/$router" || { echo "$router: left out of the table" >&2; continue; }
  rows='[mixture]'
  [ "$router" = "${wanted[0]}" ] && rows=null
  [ "$router" = uniform ] && [ "$rows" = '[mixture]' ] && continue
  "$mole" evaluate "${backbone[@]}" "${words[@]}" model="$out/$router" metric="$metric" limit="${LIMIT:-48}" rows="$rows" \
    name="$router" "run.folder=$out/evaluated/$router"
  made+=("$out/evaluated/$router")
done
"$mole" compare "${made[@]}" to="$out"
