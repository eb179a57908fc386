"""Where a run runs: the job that Slurm is asked for, and what is special about the site."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Positive, Section

# What a site may set for the network. None of them names a library to load or a file to write: those would be code.
NCCL_SETTINGS = frozenset(
    "NCCL_SOCKET_IFNAME NCCL_SOCKET_FAMILY NCCL_SOCKET_NTHREADS NCCL_NSOCKS_PERTHREAD NCCL_NET NCCL_CROSS_NIC NCCL_ALGO "
    "NCCL_PROTO NCCL_BUFFSIZE NCCL_NTHREADS NCCL_MIN_NCHANNELS NCCL_MAX_NCHANNELS NCCL_NVLS_ENABLE NCCL_SHM_DISABLE "
    "NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_NET_GDR_LEVEL NCCL_NET_GDR_READ NCCL_IGNORE_CPU_AFFINITY NCCL_DEBUG "
    "NCCL_DEBUG_SUBSYS NCCL_IB_DISABLE NCCL_IB_HCA NCCL_IB_GID_INDEX NCCL_IB_TC NCCL_IB_SL NCCL_IB_TIMEOUT "
    "NCCL_IB_RETRY_CNT NCCL_IB_QPS_PER_CONNECTION NCCL_IB_SPLIT_DATA_ON_QPS NCCL_IB_ADAPTIVE_ROUTING "
    "NCCL_IB_PCI_RELAXED_ORDERING "
    "TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_TRACE_BUFFER_SIZE GLOO_SOCKET_IFNAME FI_PROVIDER FI_EFA_USE_DEVICE_RDMA".split()
)


class ContainerConfig(Section):
    """What the ranks run in; the batch script itself stays outside, where Slurm's commands are."""

    kind: Literal["none", "apptainer", "pyxis"] = "none"
    image: str | None = Field(
        None, description="apptainer: a .sif file; pyxis: a .sqsh file or REGISTRY#NAME:TAG"
    )
    mounts: tuple[str, ...] = Field(
        (), description="folders seen inside, FOLDER or FOLDER:INSIDE[:ro]; the run and the clone always are"
    )

    @model_validator(mode="after")
    def _image_goes_with_kind(self) -> Self:
        if self.kind != "none" and not self.image:
            raise ValueError(f"kind {self.kind} needs an image")
        if self.kind == "none" and (self.image or self.mounts):
            raise ValueError("kind none has neither image nor mounts; give kind: apptainer or pyxis")
        return self


class ClusterConfig(Section):
    """The Slurm job of this run; a site file such as configs/cluster/slurm-h100.yaml holds what is the same for all runs."""

    scheduler: Literal["slurm", "none"] = Field(
        "slurm", description="none: `ldm submit` runs the stages here"
    )
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = Field(None, description="features that nodes must have, e.g. h100|a100")
    nodes: Positive = 1
    spares: Count = Field(
        0, description="more nodes, idle until one is lost: the job goes on without a new place in the queue"
    )
    encode_nodes: Positive = Field(
        1, description="elements of the encode stage's array, a node each; they share the shards"
    )
    tasks_per_node: Positive = Field(1, description="one task a device")
    gpus_per_node: Count = 0
    gpu_memory_gib: Count = Field(0, description="of one GPU, for the check before submission; 0 = unknown")
    cpus_per_task: Positive = 1
    memory_gib_per_node: Count = Field(0, description="0 = all of the node's memory")
    time: str = Field(
        "24:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$", description="[days-]hours:minutes:seconds"
    )
    signal_lead_seconds: Positive = Field(
        300, description="warning before the time limit: at least two saves"
    )
    requeue: bool = Field(True, description="false where the site forbids it: a new job goes on instead")
    exclude: tuple[str, ...] = Field((), description="nodes known to be bad, e.g. gpu-[07,11]")
    setup: tuple[str, ...] = Field(
        (), description="shell lines run before the job, for modules and environments"
    )
    nccl: dict[str, str] = Field({}, description="settings of the network, e.g. {NCCL_SOCKET_IFNAME: ib0}")
    container: ContainerConfig = ContainerConfig()

    @model_validator(mode="after")
    def _container_needs_slurm(self) -> Self:
        if self.scheduler == "none" and self.container.kind != "none":
            raise ValueError(
                "container: without Slurm nothing starts it; run `ldm` inside of the image instead"
            )
        return self

    @field_validator("nccl")
    @classmethod
    def _only_known_settings(cls, nccl: dict[str, str]) -> dict[str, str]:
        unknown = sorted(nccl.keys() - NCCL_SETTINGS)
        if unknown:
            raise ValueError(
                f"may not hold {', '.join(unknown)}; allowed: {', '.join(sorted(NCCL_SETTINGS))}"
            )
        return nccl
