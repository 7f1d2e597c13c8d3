"""`exporters.onnx.joining` as it was: today's functions under their former names."""

from exporters.onnx.branch_fusion import FusedBranch as JoinedBranch
from exporters.onnx.branch_fusion import fuse_branches as join_branches
from exporters.onnx.branch_fusion import fuses as joins

__all__ = ["JoinedBranch", "join_branches", "joins"]
