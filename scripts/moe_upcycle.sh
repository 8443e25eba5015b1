#!/usr/bin/env bash
# Upcycling at equal active compute: every MLP of a tiny pretrained Llama becomes four experts, of which one works on each
# token, and trains on two domains that it does not know; beside it the dense model trains its MLPs as long, on the same.
# Usage: scripts/moe_upcycle.sh <data folder> [output folder]
#   <data folder> has models/stories260K/hf and corpora/{tinyshakespeare,tinymoliere}.txt
# STEPS (default 600), EXPERTS (4), WINDOWS (2000 of each corpus) and SEED (0) change how much is done.
set -euo pipefail
data="${1:?usage: scripts/moe_upcycle.sh <data folder> [output folder]}"
data="$(cd "$data" && pwd)"
cd "$(dirname "$0")/.."
out="${2:-outputs/moe-upcycle}"
mole="${MOLE:-${MOLE_VENV:-.venv}/bin/mole}"
[ -x "$mole" ] || scripts/setup.sh plot
steps="${STEPS:-600}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Heads of 8 numbers: plain attention is faster there than the fused one.
words=(backbone=pretrained "backbone.path=$data/models/stories260K/hf" backbone.device=cpu backbone.attention=eager)
for domain in shakespeare moliere; do
  words+=("+dataset@datasets.$domain=text" "datasets.$domain.path=$data/corpora/tiny$domain.txt")
  words+=("datasets.$domain.task=$domain" "datasets.$domain.window=128" "datasets.$domain.limit=${WINDOWS:-2000}")
  words+=("datasets.$domain.validation=0.05" "datasets.$domain.held_out_limit=48")
done
words+=(training.max_steps="$steps" training.epochs=null training.batch_size=16 training.learning_rate=3e-3)
words+=(training.evaluate_every=100 training.checkpoint_every=null training.log_every=10 launcher.num_processes=1)
words+=('moe.pattern=model\.layers\.\d+\.mlp' "seed=${SEED:-0}")

# One expert, which works on every token: the dense model, its MLPs trained by the same loop.
"$mole" moefy "${words[@]}" moe.num_experts=1 moe.init_noise=0.0 log_every=null log_examples=0 statistics_every=null \
  name=dense "run.folder=$out/dense"
"$mole" moefy "${words[@]}" moe.num_experts="${EXPERTS:-4}" name=moe "run.folder=$out/moe"
"$mole" plot experts-load "$out/moe"
"$(dirname "$mole")/python" scripts/compare_runs.py "$out/dense" "$out/moe"
