"""pointfuse: convolution, batch norm and activation as one unit, with PyTorch's own answers."""

import pointfuse.ops  # noqa: F401  registers torch.ops.pointfuse
from pointfuse._version import __version__
from pointfuse.backends import BackendStatus, FallbackWarning, backends, use_backend
from pointfuse.convert import NewShapeWarning, Plan, VerificationError, convert, freeze, plan, revert
from pointfuse.functional import conv_bn_act
from pointfuse.modules import ConvBNAct2d

__all__ = [
    "BackendStatus",
    "ConvBNAct2d",
    "FallbackWarning",
    "NewShapeWarning",
    "Plan",
    "VerificationError",
    "__version__",
    "backends",
    "conv_bn_act",
    "convert",
    "freeze",
    "plan",
    "revert",
    "use_backend",
]
