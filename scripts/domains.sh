#!/usr/bin/env bash
# The main job on real input: five experts on five corpora over a real pretrained Llama, and an X-LoRA router that
# learns from the mixed data, without task labels, which expert each token needs.
# Usage: scripts/domains.sh <data folder> [output folder]
#   <data folder> has models/stories260K/hf and corpora/{tinystories_sample,tinyshakespeare,tinymoliere,nottingham_abc}.txt
#   and corpora/wikitext-2/{valid,test}.txt
# EXPERT_STEPS and ROUTER_STEPS (default 120 and 150) change how long it trains. About 8 minutes on 2 cores.
set -euo pipefail
data="${1:?usage: scripts/domains.sh <data folder> [output folder]}"
data="$(cd "$data" && pwd)"
cd "$(dirname "$0")/.."
out="${2:-outputs/domains}"
mole="${MOLE:-${MOLE_VENV:-.venv}/bin/mole}"
[ -x "$mole" ] || scripts/setup.sh plot

declare -A corpus=(
  [stories]=tinystories_sample.txt [shakespeare]=tinyshakespeare.txt [moliere]=tinymoliere.txt
  [wiki]=wikitext-2/valid.txt [abc]=nottingham_abc.txt
)
domains=(stories shakespeare moliere wiki abc)
backbone=(backbone=pretrained "backbone.path=$data/models/stories260K/hf" backbone.device=cpu)
# Windows of 256 tokens; the last tenth of each corpus is held out, half of it to choose weights, half to test.
mixed=()
for domain in "${domains[@]}"; do
  mixed+=("+dataset@datasets.$domain=text" "datasets.$domain.path=$data/corpora/${corpus[$domain]}"
    "datasets.$domain.task=$domain" "datasets.$domain.window=256" "datasets.$domain.limit=600"
    "datasets.$domain.validation=16" "datasets.$domain.test=64")
done

for domain in "${domains[@]}"; do
  "$mole" train-expert "${backbone[@]}" dataset=text "dataset.path=$data/corpora/${corpus[$domain]}" \
    "dataset.task=$domain" dataset.window=256 dataset.limit=600 dataset.validation=16 dataset.test=64 \
    adapter=lora adapter.rank=16 adapter.alpha=32 training.max_steps="${EXPERT_STEPS:-120}" training.epochs=null \
    training.batch_size=8 training.learning_rate=5e-3 training.evaluate_every=60 training.checkpoint_every=60 \
    name="$domain" library=local "library.url=$out/library" "run.folder=$out/$domain" run.resume=auto
done

"$mole" xlora-train "${backbone[@]}" library=local "library.url=$out/library" "${mixed[@]}" \
  router.depth=2 router.size=256 router.dropout=0.0 \
  training.max_steps="${ROUTER_STEPS:-150}" training.epochs=null training.batch_size=8 training.learning_rate=5e-3 \
  training.evaluate_every=50 training.checkpoint_every=50 name=domains "run.folder=$out/mixture" run.resume=auto

rm -rf "$out/evaluation" "$out/text"
"$mole" evaluate "${backbone[@]}" "${mixed[@]}" model="$out/mixture" metric=loss "run.folder=$out/evaluation"
"$mole" generate "${backbone[@]}" model="$out/mixture" prompt="Once upon a time" log=true "run.folder=$out/text"
"$mole" plot "$out/mixture"
"$mole" plot "$out/text"
