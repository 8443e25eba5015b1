#!/usr/bin/env bash
# The main job on real input: five experts on five corpora over a real pretrained Llama, and an X-LoRA router that
# learns from the mixed data, without task labels, which expert each token needs.
# Usage: scripts/domains.sh <data folder> [output folder]
#   <data folder> has models/stories260K/hf and corpora/{tinystories_sample,tinyshakespeare,tinymoliere,nottingham_abc}.txt
#   and corpora/wikitext-2/{valid,test}.txt
# EXPERT_STEPS and ROUTER_STEPS (default 120 and 2800) change how long it trains, PROCESSES (2) on how many processes of
# one thread each.
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
# Heads of 8 numbers: plain attention is faster there than the fused one.
backbone=(backbone=pretrained "backbone.path=$data/models/stories260K/hf" backbone.device=cpu backbone.attention=eager)
# The last twentieth of each corpus tests, the one before it chooses weights; of both a sample, evenly spread.
held_out=(validation=0.05 test=0.05 held_out_limit=48)

mixed() { # words for all five corpora in windows of $1 tokens, at most $2 of them to train on
  for domain in "${domains[@]}"; do
    echo "+dataset@datasets.$domain=text"
    for setting in "path=$data/corpora/${corpus[$domain]}" "task=$domain" "window=$1" "limit=$2" "${held_out[@]}"; do
      echo "datasets.$domain.$setting"
    done
  done
}

expert() { # trains the expert of corpus $1, in one process of one thread
  OMP_NUM_THREADS=1 "$mole" train-expert "${backbone[@]}" dataset=text "dataset.path=$data/corpora/${corpus[$1]}" \
    "dataset.task=$1" dataset.window=256 "${held_out[@]/#/dataset.}" adapter=lora adapter.rank=16 adapter.alpha=32 \
    training.max_steps="${EXPERT_STEPS:-120}" training.epochs=null training.batch_size=8 training.learning_rate=3e-3 \
    training.evaluate_every=60 training.checkpoint_every=60 launcher.num_processes=1 \
    name="$1" library=local "library.url=$out/library" "run.folder=$out/$1" run.resume=auto
}

# As many experts at once as there are processes: they share nothing.
running=0
for domain in "${domains[@]}"; do
  if [ "$running" -ge "${PROCESSES:-2}" ]; then wait -n; else running=$((running + 1)); fi
  expert "$domain" &
done
for _ in $(seq "$running"); do wait -n; done

# Each corpus alike, in short windows: the router sees more different tokens in the same time.
mapfile -t words < <(mixed 128 3000)
"$mole" xlora-train "${backbone[@]}" library=local "library.url=$out/library" "${words[@]}" \
  router.depth=3 router.size=512 router.dropout=0.0 keep_hidden_states=float32 \
  training.max_steps="${ROUTER_STEPS:-2800}" training.epochs=null training.batch_size=16 training.learning_rate=4e-3 \
  training.evaluate_every=1400 training.checkpoint_every=700 launcher.num_processes="${PROCESSES:-2}" name=domains "run.folder=$out/mixture" run.resume=auto

mapfile -t words < <(mixed 256 1)
rm -rf "$out/evaluation" "$out/again" "$out/library-alone" "$out/text"
export OMP_NUM_THREADS=1
"$mole" evaluate "${backbone[@]}" "${words[@]}" model="$out/mixture" metric=loss "run.folder=$out/evaluation"
# The mixture and the library, each loaded again by a new process, give these figures to the last digit.
"$mole" evaluate "${backbone[@]}" "${words[@]}" model="$out/mixture" 'rows=[mixture]' "run.folder=$out/again" &
"$mole" evaluate "${backbone[@]}" "${words[@]}" model="$out/library" 'rows=[experts]' "run.folder=$out/library-alone"
wait -n
"$(dirname "$mole")/python" scripts/same_figures.py "$out/evaluation" "$out/again" "$out/library-alone"
"$mole" generate "${backbone[@]}" model="$out/mixture" prompt="Once upon a time" log=true "run.folder=$out/text"
"$mole" plot "$out/mixture"
"$mole" plot "$out/text"
