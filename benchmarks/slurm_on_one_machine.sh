#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# A Slurm of one node on this machine, to try jobs on: Debian's packages, no systemd, as root.
#
#   apt-get install slurm-wlm munge
#   benchmarks/slurm_on_one_machine.sh start FOLDER    # then: export SLURM_CONF=FOLDER/slurm.conf
#   benchmarks/slurm_on_one_machine.sh stop FOLDER
#
# FOLDER receives configuration, state and logs. There is no accounting (sacct), no cgroup and no
# GPU. Jobs in the partition "urgent" preempt those in "debug", which is the default.
set -eu

usage() { sed -n 's/^#   //p' "$0" >&2; exit 2; }
[ $# = 2 ] || usage
mkdir -p "$2"
folder=$(realpath "$2")
host=$(hostname -s)

configure() {
    cat > "$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: 2 minutes by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
}

start() {
    mkdir -p "$folder/state" "$folder/spool"
    configure
    chmod 755 "$folder"
    (umask 077; [ -s "$folder/munge.key" ] || head -c 128 /dev/urandom > "$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    slurmctld -f "$folder/slurm.conf"
    slurmd -f "$folder/slurm.conf"
    export SLURM_CONF="$folder/slurm.conf"
    for _ in $(seq 60); do
        sinfo --noheader --format=%T | grep -q idle && { sinfo; return; }
        sleep 1
    done
    echo "the node did not become idle within a minute; see $folder/slurmctld.log, slurmd.log" >&2
    exit 1
}

stop() {
    for daemon in slurmd slurmctld munged; do
        if [ -s "$folder/$daemon.pid" ]; then
            kill "$(cat "$folder/$daemon.pid")" || true
        fi
    done
}

case $1 in
    start) start ;;
    stop) stop ;;
    *) usage ;;
esac
