"""The part of the batch script that is the same for every job, in bash.

One task a device through one `srun`; a warning before the time limit becomes a stop of all ranks; when they have
saved, the job goes back to the queue. It reads the `ldm_` variables that `launch.slurm` writes above it, and nothing
of the config stands in its text.
"""

BODY = """\
# From here on the text is the same for every job: what differs stands in the variables above.
# They carry ldm_ because the setup lines run in this shell and may set names of their own.
ldm_stop_asked=0 ldm_interrupted=0 ldm_forwarded=0 ldm_step=
forward_stop() {
  # Once: a rank on its way out no longer catches the signal, and would die of a second one.
  [[ -z $ldm_step || $ldm_forwarded == 1 ]] && return
  ldm_forwarded=1
  sleep 1  # a child of bash that has not become srun yet would lose the signal
  kill -USR2 "$ldm_step" 2>/dev/null
}
ask_stop() {
  ldm_stop_asked=1 ldm_interrupted=1
  forward_stop
}
# Slurm sends CONT along with every signal: bash, in `wait` with traps on both, loses the other one.
trap ask_stop USR2 TERM

say() { echo "ldm job $SLURM_JOB_ID: $1" >&2; }
fail() { say "$1"; exit 1; }

cd -- "$SLURM_SUBMIT_DIR" || fail "the folder it was submitted from is not on this node: $SLURM_SUBMIT_DIR"
for ldm_line in "${ldm_setup[@]}"; do
  eval "$ldm_line" || fail "cluster.setup failed: $ldm_line"
done
set +eu

# A rank of a shell that exported these would believe them more than Slurm.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID OMPI_COMM_WORLD_RANK
restart=${SLURM_RESTART_COUNT:-0}
# Asked here, because scontrol is missing inside of containers. Without an answer no rank may guess localhost.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[[ -n ${hosts[0]:-} ]] || fail "scontrol names no host in $SLURM_JOB_NODELIST"
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((ldm_first_port + (ldm_port_stride * SLURM_JOB_ID + restart) % ldm_ports))
export LDM_ATTEMPT=$SLURM_JOB_ID.$restart
# Lines come at once by PYTHONUNBUFFERED: srun --unbuffered would give ranks a pseudo terminal and cut their lines.
export OMP_NUM_THREADS=$ldm_threads PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
# Local to the node and new for each attempt: a lock that a killed job left there hangs every later one for ever.
export TORCH_EXTENSIONS_DIR=/tmp/ldm-$UID-$LDM_ATTEMPT
# Private: what lies in this folder is loaded as code, so one that somebody else made there is refused.
in_rank='mkdir -m 700 "$TORCH_EXTENSIONS_DIR" 2>/dev/null
[[ -O $TORCH_EXTENSIONS_DIR && ! -L $TORCH_EXTENSIONS_DIR ]] || { echo "not ours: $TORCH_EXTENSIONS_DIR" >&2; exit 1; }
exec "$@"'

# kill-on-bad-exit=0: the first rank that leaves after saving must not end those that still save; wait=60 bounds them.
srun --export=ALL --kill-on-bad-exit=0 --wait=60 --distribution=block --cpus-per-task="$SLURM_CPUS_PER_TASK" \\
  --label --open-mode=append --output="$ldm_log/node-%n.txt" \\
  bash -c "$in_rank" rank "${ldm_command[@]}" </dev/null &
ldm_step=$!
((ldm_stop_asked)) && forward_stop
# A signal ends `wait` early with a code of its own: asked again, it gives srun's, also when srun is gone by then.
while :; do
  ldm_interrupted=0
  wait "$ldm_step"
  code=$?
  ((ldm_interrupted)) || break
done

job=$SLURM_JOB_ID
[[ -n ${SLURM_ARRAY_JOB_ID:-} ]] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
state=" $(scontrol --oneliner show job "$job") "
[[ $state == *" PreemptTime="[0-9]* ]] && ldm_stop_asked=1
# A rank that Slurm or this script told to stop before it could listen dies of the signal itself.
died_of_stop=$((ldm_stop_asked && (code == 128 + $(kill -l USR2) || code == 128 + $(kill -l TERM))))
if ((code != ldm_stopped_code && ! died_of_stop)); then
  ((code == 0)) || say "ended with exit code $code; see $ldm_log"
  exit "$code"
fi
# scancel sends the same TERM, and a requeue would bring the cancelled job back. Told by USR2 or in the grace before
# a preemption the job is still RUNNING.
if [[ $state != *" JobState=RUNNING "* && $state != *" Reason=TimeLimit "* ]]; then
  say "stopped and not requeued: it was cancelled"
  exit "$code"
fi
# The requeue ends this script by a TERM, at once or soon.
trap '' USR2 TERM
say "stopped with exit code $code; back to the queue to go on from the newest checkpoint"
scontrol requeue "$job" || say "Slurm refused the requeue: submit it again to go on"
exit "$code"
"""
