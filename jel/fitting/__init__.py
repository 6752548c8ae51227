"""`jel.fit`: learn a schedule for a training loop of one's own from short episodes of it, without doing harm."""

from jel.fitting.base import Base
from jel.fitting.fit import fit
from jel.fitting.plan import FitConfig
from jel.fitting.result import FitResult

__all__ = ["Base", "FitConfig", "FitResult", "fit"]
