#!/usr/bin/env bash
# Upcycling at equal active compute: every MLP of a tiny pretrained Llama becomes four experts, of which one works on
# each token, and trains on domains that the model does not know: English verse, French plays, tunes in ABC notation.
# Beside it the dense model trains its MLPs for as many steps on the same batches.
#
# The tokens' ids choose (Roller et al. 2021): no expert waits for a router to find its tokens. A router that learns
# (ROUTER=top_k NOISE=0.05) has not paid for itself in so few steps.
#
# Usage: scripts/moe_upcycle.sh <data folder> [output folder]
#   <data folder> has models/stories260K/hf and corpora/{tinyshakespeare,tinymoliere,nottingham_abc}.txt
# STEPS (default 300), EXPERTS (4), ROUTER (hash), NOISE (0.0), WINDOWS (2000 of each corpus), SEED (0) change what is done.
set -euo pipefail
data="${1:?usage: scripts/moe_upcycle.sh <data folder> [output folder]}"
data="$(cd "$data" && pwd)"
cd "$(dirname "$0")/.."
out="${2:-outputs/moe-upcycle}"
mole="${MOLE:-${MOLE_VENV:-.venv}/bin/mole}"
[ -x "$mole" ] || scripts/setup.sh plot
steps="${STEPS:-300}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Heads of 8 numbers: plain attention is faster there than the fused one.
words=(backbone=pretrained "backbone.path=$data/models/stories260K/hf" backbone.device=cpu backbone.attention=eager)
declare -A corpus=([shakespeare]=tinyshakespeare.txt [moliere]=tinymoliere.txt [abc]=nottingham_abc.txt)
for domain in shakespeare moliere abc; do
  words+=("+dataset@datasets.$domain=text" "datasets.$domain.path=$data/corpora/${corpus[$domain]}")
  words+=("datasets.$domain.task=$domain" "datasets.$domain.window=128" "datasets.$domain.limit=${WINDOWS:-2000}")
  words+=("datasets.$domain.validation=0.05" "datasets.$domain.held_out_limit=32")
done
words+=(training.max_steps="$steps" training.epochs=null training.batch_size=16 training.learning_rate=3e-3)
words+=(training.evaluate_every=100 training.checkpoint_every=null training.log_every=10 launcher.num_processes=1)
words+=('moe.pattern=model\.layers\.\d+\.mlp' "seed=${SEED:-0}")

# One expert, which works on every token: the dense model, its MLPs trained by the same loop.
"$mole" moefy "${words[@]}" moe.num_experts=1 moe.init_noise=0.0 log_every=null log_examples=0 statistics_every=null \
  name=dense "run.folder=$out/dense"
"$mole" moefy "${words[@]}" moe.num_experts="${EXPERTS:-4}" \
  "moe.router.name=${ROUTER:-hash}" moe.init_noise="${NOISE:-0.0}" name=moe "run.folder=$out/moe"
"$mole" plot experts-load "$out/moe"
"$(dirname "$mole")/python" scripts/compare_runs.py "$out/dense" "$out/moe"
