#!/usr/bin/env bash
# Runs Slurm on two simulated nodes of this machine and submits two jobs with `nesso-tune launch --slurm … --submit`:
# one that completes, and one that is signalled before its time limit, saves a checkpoint, is requeued and completes.
#
#   sudo apt-get install slurmctld slurmd slurm-client munge iproute2
#   sudo scripts/slurm_rehearsal.sh [FOLDER]          # needs root; output of the last run: docs/slurm-rehearsal.txt
#
# Each node is a network namespace with its own host name; a veth pair connects them. No GPU is used.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD PYTHON=$PWD/.venv/bin/python
WORK=$(realpath -m "${1:-/tmp/nesso-slurm}")
A=nessoslurm1 B=nessoslurm2
export HF_HUB_OFFLINE=1 NESSO_TUNE_CACHE=$WORK/cache PYTHONPATH=$ROOT

stop() {
  for daemon in slurmd slurmctld munged; do pkill -f "$daemon.*$WORK" 2>/dev/null || true; done
  for node in $A $B; do ip netns del $node 2>/dev/null || true; rm -rf /etc/netns/$node; done
}

nodes() {  # two connected network namespaces
  for node in $A $B; do
    ip netns add $node
    mkdir -p /etc/netns/$node
    printf '127.0.0.1 localhost\n10.98.0.1 %s\n10.98.0.2 %s\n' $A $B > /etc/netns/$node/hosts
    ip -n $node link set lo up
  done
  ip link add cable netns $A type veth peer name cable netns $B
  ip -n $A addr add 10.98.0.1/24 dev cable; ip -n $A link set cable up
  ip -n $B addr add 10.98.0.2/24 dev cable; ip -n $B link set cable up
}

on() {  # NODE COMMAND…: runs the command on that node
  local node=$1; shift
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
  for node in $A $B; do on $node slurmd -f "$WORK/slurm.conf" -N $node; done
  for _ in $(seq 30); do
    [ "$(on $A sinfo -h -t idle -o %D)" = 2 ] && return
    sleep 1
  done
  echo "the nodes did not become idle:" >&2; on $A sinfo >&2; exit 1
}

recipe() {  # NAME STEPS [TIME SAVE_BEFORE_S]: a small model with random weights, one process per node
  cat > "$WORK/$1.yaml" <<YAML
method: sft
output_dir: $WORK/$1
model: {base: $ROOT/recipes/quickstart/base, random_init: true, dtype: float32}
data: {sequence_len: 256, sources: [{path: $ROOT/recipes/quickstart/data/conversations.jsonl}]}
train: {max_steps: $2, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-3}
distributed: {fsdp: none, timeout_s: 60}
evaluation: null
logging: {every_steps: 50}
cluster:
  nodes: 2
  gpus_per_node: 1
  cpus_per_gpu: 1
  partition: boost
  time: ${3:-00:10:00}
  save_before_s: ${4:-300}
  python: $PYTHON
  env: {GLOO_SOCKET_IFNAME: cable, PYTHONPATH: $ROOT, NESSO_TUNE_CACHE: $NESSO_TUNE_CACHE}
YAML
}

submit() {  # NAME: shows the output of launch on stderr and prints the job id
  local output
  output=$(cd "$WORK" && on $A "$PYTHON" -m nesso_tune launch "$1.yaml" --slurm "$1.sbatch" --submit)
  echo "$output" >&2
  sed -n 's/^Submitted batch job //p' <<< "$output"
}

wait_for() {  # JOB: waits for the end; a requeued job starts immediately instead of after two minutes
  local state last=
  for _ in $(seq 600); do
    state=$(on $A scontrol show job "$1" | sed -n 's/.*JobState=\(\S*\).*/\1/p;s/.*Restarts=\(\S*\).*/restarts \1/p;s/.*ExitCode=\(\S*\).*/exit \1/p' | paste -sd ' ')
    [ "$state" = "$last" ] || { echo "job $1: $state"; last=$state; }
    case $state in
      PENDING*) on $A scontrol update JobId="$1" StartTime=now 2>/dev/null || true ;;
      COMPLETED*) return ;;
      FAILED* | TIMEOUT* | CANCELLED* | NODE_FAIL*) cat "$WORK"/*"$1".log >&2; exit 1 ;;
    esac
    sleep 1
  done
  echo "job $1 did not end" >&2; exit 1
}

trap stop EXIT
stop; rm -rf "$WORK"; mkdir -p "$WORK"
nodes; daemons
on $A sinfo -N -o '%N %T %c CPUs %G'

echo; echo "# a job that completes"
recipe short 60
job=$(submit short); wait_for "$job"
grep -v "tok/s" "$WORK"/short-"$job".log
test -f "$WORK/short/final/model.safetensors"

echo; echo "# a job that is signalled ahead of its time limit, saves, is queued again, and completes"
recipe long 2500 00:02:00 60
job=$(submit long); wait_for "$job"
grep -v "tok/s" "$WORK"/long-"$job".log
grep -c '"event": "resumed"' "$WORK/long/metrics.jsonl"
test -f "$WORK/long/final/model.safetensors"
echo; echo "both completed"
