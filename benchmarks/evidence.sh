#!/usr/bin/env bash
# Runs of protocol small on a machine that is lent for minutes: seeds one after the other, and what has finished as one archive.
#
#     SECONDS_LEFT=540 OUT=out benchmarks/evidence.sh cifar100-small.npz.xz 0 1 2
#
# The first argument is the data set that `codistill reproduce` writes (runs/reproduce/cifar100-small.npz), packed by xz or not. Back at home, before src/
# changes, so that the commit is known by the digest of the sources:
#
#     mkdir -p runs/reproduce/small && tar xzf out/runs.tgz -C runs/reproduce/small
#     codistill reproduce methods --protocol small --collect --record && python benchmarks/ledger.py
set -euo pipefail
data=$1; shift
out=${OUT:-out}; work=${WORK:-/tmp/evidence}; late=$((SECONDS + ${SECONDS_LEFT:-540}))
mkdir -p "$out" "$work"
case $data in *.xz) xz --decompress --keep --stdout "$data" > "$work/small.npz" ;; *) cp "$data" "$work/small.npz" ;; esac
for seed in "$@"; do
  left=$((late - SECONDS))
  [ "$left" -gt 0 ] || break
  # SIGTERM has the runs save: the same command resumes them where the folder is kept.
  timeout --signal TERM --kill-after 60 "$left" "${PYTHON:-python}" -m codistill reproduce methods --protocol small --data packed --data-dir "$work/small.npz" \
    --seeds "$seed" --out "$work/runs" --ledger "$work/ledger.jsonl" ${SLOTS:+--slots "$SLOTS"} || echo "seed $seed: ended with status $?"
  tar czf "$out/runs.tgz" --exclude checkpoints --exclude tensorboard --exclude '*.html' --exclude '*.npz' -C "$work/runs/small" .
done
