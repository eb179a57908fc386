"""The part of the batch script that is the same for every job, in bash: it prepares the shell and hands over.

What a job does with signals, ends and nodes is Python's (`launch.supervisor`): bash in `wait`, with a trap, loses one
of two signals that come at once, as Slurm's do. The text reads the `ldm_` variables that `launch.slurm` writes above
it, and nothing of the config stands in it.
"""

BODY = """\
# From here on the text is the same for every job: what differs stands in the variables above.
# They carry ldm_ because the setup lines run in this shell and may set names of their own.
fail() { echo "ldm job $SLURM_JOB_ID: $1" >&2; exit 1; }

cd -- "$SLURM_SUBMIT_DIR" || fail "the folder it was submitted from is not on this node: $SLURM_SUBMIT_DIR"
# A warning that comes while the lines below run is noted.
export LDM_JOB_STOP=
trap 'LDM_JOB_STOP=1' USR2 TERM
for ldm_line in "${ldm_setup[@]}"; do
  eval "$ldm_line" || fail "cluster.setup failed: $ldm_line"
done
set +eu
export LDM_JOB_STAGE=$ldm_stage LDM_JOB_RUN=$ldm_run LDM_JOB_LOG=$ldm_log LDM_JOB_THREADS=$ldm_threads
# Ignored until the supervisor listens, a moment later: the default would end the job without a word.
trap '' USR2 TERM
# exec: Slurm's warning goes to this process alone.
exec "$ldm_python" -m launch.supervisor "${ldm_srun[@]}" -- "${ldm_command[@]}" </dev/null
"""
