"""Everything that talks to Slurm from the login node: the text of a job, its submission, and what became of it."""

from launch.slurm.render import Stage, job_options, quoted, render_job
from launch.slurm.sbatch import refusal_of, submission_environment
from launch.slurm.submission import SubmittedJob, submit_job

__all__ = [
    "Stage",
    "SubmittedJob",
    "job_options",
    "quoted",
    "refusal_of",
    "render_job",
    "submission_environment",
    "submit_job",
]
