#!/usr/bin/env bash
# Runs Slurm on two simulated nodes of this machine and submits jobs with `nesso-tune launch` or `sweep --slurm … --submit`:
#
#   1. a chain in containers: the data on CPUs, SFT on two nodes, DPO on one, each after the one before;
#   2. a job that gets Slurm's signal, saves a checkpoint, is queued again and completes;
#   3. a job that loses a node, is queued again when the node is back, resumes and completes;
#   4. a sweep as a job array: a signal requeues one of its two tasks, and the page compares both runs;
#   5. `launch doctor` with one bad node, which fails and names it.
#
#   sudo apt-get install slurmctld slurmd slurm-client munge iproute2 bubblewrap
#   sudo scripts/slurm_rehearsal.sh [FOLDER [PART...]]      # needs root; output of the last run: docs/slurm-rehearsal.txt
#
# Parts: chain, signalled, lost_node, array, bad_node.
#
# Each node is a network namespace with its own host name; a veth pair connects them. No GPU is used. A stand-in for
# apptainer starts commands with bubblewrap, in a mount namespace with a /tmp of its own and the folders of --bind.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD PYTHON=$PWD/.venv/bin/python
WORK=$(realpath -m "${1:-/var/tmp/nesso-slurm}")
A=nessoslurm1 B=nessoslurm2
export HF_HUB_OFFLINE=1 HF_HOME=$WORK/hf NESSO_TUNE_CACHE=$WORK/cache PYTHONPATH=$ROOT PATH=$WORK/bin:$PATH

stop() {
  for file in "$WORK"/*.pid "$WORK"/munge/pid; do [ ! -f "$file" ] || kill "$(cat "$file")" 2>/dev/null || true; done
  for node in $A $B; do
    ip netns pids "$node" 2>/dev/null | xargs -r kill -9 || true
    ip netns del "$node" 2>/dev/null || true
    rm -rf "/etc/netns/$node"
  done
}

nodes() {  # two connected network namespaces
  for node in $A $B; do
    ip netns add "$node"
    mkdir -p "/etc/netns/$node"
    printf '127.0.0.1 localhost\n10.98.0.1 %s\n10.98.0.2 %s\n' $A $B > "/etc/netns/$node/hosts"
    ip -n "$node" link set lo up
  done
  ip link add cable netns $A type veth peer name cable netns $B
  ip -n $A addr add 10.98.0.1/24 dev cable; ip -n $A link set cable up
  ip -n $B addr add 10.98.0.2/24 dev cable; ip -n $B link set cable up
}

on() {  # NODE COMMAND…: runs the command on that node
  local node=$1; shift
  # shellcheck disable=SC2016
  ip netns exec "$node" unshare -u sh -c 'hostname "$0" && exec "$@"' "$node" "$@"
}

daemons() {
  mkdir -p "$WORK"/{state,spool-$A,spool-$B,munge}
  dd if=/dev/urandom of="$WORK/munge/key" bs=1024 count=1 status=none; chmod 400 "$WORK/munge/key"
  cat > "$WORK/slurm.conf" <<CONF
ClusterName=nesso
SlurmctldHost=$A(10.98.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$WORK/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
KillWait=10
SlurmdParameters=config_overrides
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool-%n
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd-%n.pid
SlurmctldLogFile=$WORK/slurmctld.log
SlurmdLogFile=$WORK/slurmd-%n.log
NodeName=$A NodeAddr=10.98.0.1 CPUs=8 Gres=gpu:1
NodeName=$B NodeAddr=10.98.0.2 CPUs=8 Gres=gpu:1
PartitionName=boost Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  echo "CgroupPlugin=cgroup/v1" > "$WORK/cgroup.conf"
  printf 'NodeName=%s,%s Name=gpu File=/dev/null\n' $A $B > "$WORK/gres.conf"
  munged --force --key-file="$WORK/munge/key" --socket="$WORK/munge/socket" --pid-file="$WORK/munge/pid" \
    --log-file="$WORK/munge/log" --seed-file="$WORK/munge/seed"
  export SLURM_CONF=$WORK/slurm.conf
  on $A slurmctld -f "$WORK/slurm.conf"
  for node in $A $B; do on "$node" slurmd -f "$WORK/slurm.conf" -N "$node"; done
  wait_until_idle
}

wait_until_idle() {
  for _ in $(seq 120); do
    [ "$(on $A sinfo -h -t idle -o %D)" = 2 ] && return
    sleep 1
  done
  echo "the nodes did not become idle:" >&2; on $A sinfo >&2; exit 1
}

apptainer() {  # writes the stand-in
  mkdir -p "$WORK/bin"
  cat > "$WORK/bin/apptainer" <<'STANDIN'
#!/bin/bash
shift  # exec
binds=()
while [[ $1 == -* ]]; do
  case $1 in
    --bind)
      IFS=, read -ra mounts <<< "$2"
      for mount in "${mounts[@]}"; do binds+=(--bind "${mount%%:*}" "${mount#*:}"); done
      shift 2 ;;
    --pwd) folder=$2; shift 2 ;;
    *) shift ;;
  esac
done
shift  # the image: the system folders of this machine stand for it
exec bwrap --ro-bind /usr /usr --ro-bind /etc /etc --symlink usr/bin /bin --symlink usr/sbin /sbin \
  --symlink usr/lib /lib --symlink usr/lib64 /lib64 --proc /proc --dev /dev --tmpfs /tmp --setenv IN_CONTAINER yes \
  "${binds[@]}" --chdir "$folder" "$@"
STANDIN
  chmod +x "$WORK/bin/apptainer"
  touch "$WORK/image.sif"
}

recipe() {  # NAME METHOD DATA NODES STEPS BASE [CONTAINER]: a small model, one process per node
  cat > "$WORK/$1.yaml" <<YAML
method: $2
output_dir: $WORK/runs/$1
model: {base: $6, dtype: float32}
data: {sequence_len: 256, sources: [{path: $ROOT/recipes/quickstart/data/$3}]}
train: {max_steps: $5, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-3}
distributed: {fsdp: none, timeout_s: 180}
evaluation: null
logging: {every_steps: 20}
checkpoint: {every_steps: 20}
cluster:
  nodes: $4
  gpus_per_node: 1
  cpus_per_gpu: 1
  gpu_option: gres
  partition: boost
  time: 00:30:00
  setup: ['echo "site: \$NOT_SET"']
  container: ${7:-null}
  prepare: {cpus: 1}
  python: $PYTHON
  env: {GLOO_SOCKET_IFNAME: cable, PYTHONPATH: $ROOT, NESSO_TUNE_CACHE: $NESSO_TUNE_CACHE}
YAML
}

random_base() { sed -i 's/dtype: float32/dtype: float32, random_init: true/' "$WORK/$1.yaml"; }

submit() {  # FILE.sbatch ARGUMENTS…: shows the output of launch (or of VERB) on stderr and prints the job ids
  local output file=$1; shift
  output=$(cd "$WORK" && on $A "$PYTHON" -m nesso_tune "${VERB:-launch}" "$@" --slurm "$file" --submit)
  echo "$output" >&2
  sed -n 's/^Submitted batch job //p' <<< "$output"
}

state_of() {
  on $A scontrol show job "$1" | sed -n 's/.*JobState=\(\S*\).*/\1/p;s/.*Restarts=\(\S*\).*/restarts \1/p;s/.*ExitCode=\(\S*\).*/exit \1/p' | paste -sd ' '
}

wait_for() {  # JOB STATE [SECONDS]: waits for a state; with START=now, a job that is queued again need not wait two minutes
  local state last=
  for _ in $(seq "${3:-1200}"); do
    state=$(state_of "$1")
    [ "$state" = "$last" ] || { echo "job $1: $state"; last=$state; }
    case $state in
      $2*) return ;;
      PENDING*) [ -z "${START:-}" ] || on $A scontrol update JobId="$1" StartTime=now 2>/dev/null || true ;;
      FAILED* | TIMEOUT* | CANCELLED* | NODE_FAIL* | COMPLETED*) break ;;
    esac
    sleep 1
  done
  echo "job $1 did not reach $2" >&2; cat "$WORK"/*-"$1".log >&2; exit 1
}

wait_for_step() {  # RUN STEP: waits until the metrics of a run have a step
  for _ in $(seq 600); do
    [ -d "$WORK/runs/$1/checkpoint-$2" ] && return
    sleep 0.5
  done
  echo "$1 did not reach step $2" >&2; cat "$WORK"/"$1"-*.log >&2; exit 1
}

show_log() { grep -v -e "tok/s" -e "hostname of the client socket" "$WORK/$1"; }

chain() {
  echo "# 1. a chain in containers: data on CPUs, SFT on two nodes, DPO on one"
  recipe sft sft conversations.jsonl 2 40 "$BASE" "$IN_CONTAINER"; random_base sft
  recipe dpo dpo pairs.jsonl 1 10 "$WORK/runs/sft/final" "$IN_CONTAINER"
  mapfile -t jobs < <(submit chain.sbatch sft.yaml dpo.yaml --prepare)
  on $A squeue -h -o 'job %i %j: %T %E' -j "$(IFS=,; echo "${jobs[*]}")"
  for job in "${jobs[@]}"; do wait_for "$job" COMPLETED; done
  names=(prepare sft dpo)
  for i in 0 1 2; do echo "## ${names[i]}"; show_log "${names[i]}-${jobs[i]}.log"; done
  test -f "$WORK/runs/dpo/final/model.safetensors"
}

signalled() {
  echo "# 2. a job that is signalled as ahead of its time limit, saves, is queued again, and completes"
  recipe signal sft conversations.jsonl 2 400 "$BASE" "$IN_CONTAINER"; random_base signal
  job=$(submit signal.sbatch signal.yaml); wait_for "$job" RUNNING; wait_for_step signal 40
  on $A scancel --signal=USR1 "$job"
  wait_for "$job" PENDING 120; START=now wait_for "$job" COMPLETED
  show_log signal-"$job".log
  grep -c '"event": "resumed"' "$WORK/runs/signal/metrics.jsonl"
}

lost_node() {
  echo "# 3. a job that loses a node, is queued again, and completes when the node is back"
  recipe lost sft conversations.jsonl 2 400 "$BASE"; random_base lost
  job=$(submit lost.sbatch lost.yaml); wait_for "$job" RUNNING; wait_for_step lost 40
  echo "power cut of $B"
  ip -n $B link set cable down; ip netns pids $B | xargs -r kill -9
  wait_for "$job" PENDING 400
  echo "$B is back"
  ip -n $B link set cable up; on $B slurmd -f "$WORK/slurm.conf" -N $B
  wait_for "$job" COMPLETED  # not with START=now: what Slurm still sends to end the first start would end the second one
  show_log lost-"$job".log
  grep -c '"event": "resumed"' "$WORK/runs/lost/metrics.jsonl"
}

array() {
  echo "# 4. a sweep as a job array; the second of two tasks is signalled, queued again, and completes"
  recipe sweep sft conversations.jsonl 1 200 "$BASE"; random_base sweep
  job=$(VERB=sweep submit sweep.sbatch sweep.yaml --grid train.learning_rate=1e-3,1e-4)
  wait_for_step sweep/learning_rate=0.0001 40
  on $A scancel --signal=USR1 "${job}_1"
  wait_for "${job}_1" PENDING 120
  for task in 0 1; do START=now wait_for "${job}_$task" COMPLETED; done
  for task in 0 1; do echo "## task $task"; show_log sweep-"$job"-$task.log; done
  ls "$WORK/runs/sweep"
  grep -c '"event": "resumed"' "$WORK/runs/sweep/learning_rate=0.0001/metrics.jsonl"
}

bad_node() {
  echo "# 5. doctor: on $B, the output folder is a small disk of its own"
  kill "$(cat "$WORK/slurmd-$B.pid")"; sleep 2
  on $B unshare -m sh -c "mount -t tmpfs -o size=30m tmpfs '$WORK/scratch' && exec slurmd -f '$WORK/slurm.conf' -N $B"
  wait_until_idle
  recipe check sft conversations.jsonl 2 10 "$BASE"; random_base check
  sed -i "s|output_dir: .*|output_dir: $WORK/scratch/run|" "$WORK/check.yaml"
  job=$(submit doctor.sbatch doctor check.yaml); wait_for "$job" FAILED
  show_log doctor-"$job".log
}

trap stop EXIT
stop; rm -rf "$WORK"; mkdir -p "$WORK/runs" "$WORK/scratch"
nodes; daemons; apptainer
on $A sinfo -N -o '%N %T %c CPUs %G'
BASE=$ROOT/recipes/quickstart/base
IN_CONTAINER="{image: $WORK/image.sif, runtime: apptainer}"
shift || true
for part in "${@:-chain signalled lost_node array bad_node}"; do
  for name in $part; do echo; $name; done
done
echo; echo "all as expected"
