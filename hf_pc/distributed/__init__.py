"""One model over several processes: `SplitPCModel`, see docs/distributed.md."""

from hf_pc.distributed.split import SplitPCModel

__all__ = ["SplitPCModel"]
