"""Where replicas run: in this process, or in Ray cells. A scheme gives the same bits on either."""

from fnrl.executor.base import Executor
from fnrl.executor.inline import Inline
from fnrl.executor.ray import Ray, Resources
from fnrl.executor.recorded import Recorded

__all__ = ["Executor", "Inline", "Ray", "Recorded", "Resources"]
