"""What a run will cost, before it is paid: memory, time, data, storage and money, worked out without torch."""

from pipeline.plan.published import predict

__all__ = ["predict"]
