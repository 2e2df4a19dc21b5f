#!/usr/bin/env bash
# Runs one polgrad command on every worker of a TPU VM or pod slice.
#
#   launch/tpu_vm.sh --name=grpo --zone=us-central2-b --type=v4-32 --bucket=gs://mine/runs -- \
#     --config=experiments/run.py:method=grpo,task=addition,model=tiny
#
# Steps: create (or reuse), copy, install, run, follow. The arguments after -- are passed to `python -m
# polgrad.train`, with --checkpoints=BUCKET/NAME, --workdir=~/runs/NAME and --distributed added. The run
# is detached: it outlives this shell. Started again with the same name, it resumes from the last
# checkpoint.
set -euo pipefail

usage() {
  cat >&2 <<'USAGE'
usage: launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE --bucket=gs://... [options] -- TRAIN FLAGS
       launch/tpu_vm.sh --name=NAME --zone=ZONE --follow | --stop | --delete
  --type=TYPE        accelerator type, such as v4-8, v5litepod-16, v6e-64
  --bucket=FOLDER    where checkpoints are kept; a folder that all workers reach (gs:// on a pod)
  --version=VERSION  runtime version            [tpu-ubuntu2204-base]
  --project=PROJECT  Google Cloud project       [gcloud's default]
  --spot             a preemptible slice
  --follow           only follow the log of worker 0
  --stop             only stop the run, which saves first
  --delete           only delete the slice
  --dry_run          print the commands instead of running them
USAGE
  exit 2
}

name='' zone='' type='' bucket='' version='tpu-ubuntu2204-base' project='' spot='' action='launch'
dry_run=''
while [[ $# -gt 0 ]]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --spot) spot=1 ;;
    --follow) action='follow' ;;
    --stop) action='stop' ;;
    --delete) action='delete' ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) echo "unknown option: $1" >&2; usage ;;
  esac
  shift
done
[[ -n $name && -n $zone ]] || { echo 'need --name and --zone' >&2; usage; }
if [[ $action == launch ]]; then
  [[ -n $type && -n $bucket ]] || { echo 'need --type and --bucket' >&2; usage; }
  [[ " $* " == *' --config='* ]] || { echo 'need --config=... after --' >&2; usage; }
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")

# Prints a command so that it can be pasted back, and runs it unless this is a dry run.
run() {
  printf '+ %s\n' "$(printf '%q ' "$@")" >&2
  [[ -n $dry_run ]] || "$@"
}

tpu() { run gcloud compute tpus tpu-vm "$@"; }

on_workers() {
  local workers="$1" command="$2"
  tpu ssh "$name" "${where[@]}" --worker="$workers" --command="$command"
}

exists() {
  [[ -z $dry_run ]] && gcloud compute tpus tpu-vm describe "$name" "${where[@]}" > /dev/null 2>&1
}

create() {
  if exists; then
    echo "reusing $name" >&2
    return
  fi
  local options=(--accelerator-type="$type" --version="$version")
  [[ -z $spot ]] || options+=(--spot)
  tpu create "$name" "${where[@]}" "${options[@]}"
}

copy() {
  local archive
  archive="$(mktemp --suffix=.tar.gz)"
  # The working tree as git sees it, uncommitted changes included: what runs is what you have here.
  # git also lists files that were deleted since; tar passes over them.
  run bash -c 'cd "$1" && git ls-files -z --cached --others --exclude-standard |
    tar --null --ignore-failed-read --files-from=- --create --gzip --file="$2"' bash "$root" "$archive"
  tpu scp "$archive" "$name:polgrad.tar.gz" "${where[@]}" --worker=all
  on_workers all 'rm -rf polgrad && mkdir polgrad && tar -xzf polgrad.tar.gz -C polgrad'
  rm -f "$archive"
}

install() {
  on_workers all "set -e
    command -v python3.11 > /dev/null || {
      sudo apt-get update -q
      sudo apt-get install -qy software-properties-common
      sudo add-apt-repository -y ppa:deadsnakes/ppa
      sudo apt-get install -qy python3.11 python3.11-venv
    }
    test -x venv/bin/python || python3.11 -m venv venv
    venv/bin/pip install -q -e './polgrad[tpu,tasks]'"
}

launch() {
  local flags
  flags="$(printf '%q ' "$@" --workdir="../runs/$name" \
    --checkpoints="${bucket%/}/$name" --distributed)"
  stop
  # setsid and nohup: the run belongs to no shell, so losing this one does not end it.
  on_workers all "cd polgrad && setsid nohup ../venv/bin/python -m polgrad.train $flags \
    > ../train.log 2>&1 < /dev/null & echo started"
}

# Waits until the old run has saved and is gone: two cannot hold the TPU. One that hangs is killed.
stop() {
  on_workers all "pkill -f '[p]olgrad.train' || true
    for _ in \$(seq 300); do
      pgrep -f '[p]olgrad.train' > /dev/null || exit 0
      sleep 1
    done
    pkill -KILL -f '[p]olgrad.train' || true"
}

follow() { on_workers 0 'tail -n 100 -F train.log'; }

case "$action" in
  launch) create; copy; install; launch "$@"; follow ;;
  follow) follow ;;
  stop) stop ;;
  delete) tpu delete "$name" "${where[@]}" --quiet ;;
esac
