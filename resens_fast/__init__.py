"""Lesion and reordering studies of residual networks: thousands of variants of a trained network in one call.

    import resens_fast as rf

    net = rf.wrap(model)
    sweep = rf.sweeps.delete_random(net, k=range(1, 21), samples=50, seed=0)
    study = rf.evaluate(net, sweep, loader)
    study.frame

Only torch and numpy are needed to import the package; pandas, pyarrow, scipy and matplotlib are imported when a study
needs them.
"""

from . import data, engines, errors, highway, models, paths, sweeps, training
from .evaluate import evaluate, logits
from .gradient_plan import GradientPlan, gradient_plan
from .gradients import gate_gradients, input_gradients, path_gradients
from .network import ResidualNetwork
from .plan import Plan, plan
from .study import Study, open_study
from .sweep import Configuration, Sweep
from .version import __version__
from .wrap import wrap

__all__ = [
    "Configuration",
    "GradientPlan",
    "Plan",
    "ResidualNetwork",
    "Study",
    "Sweep",
    "__version__",
    "data",
    "engines",
    "errors",
    "evaluate",
    "gate_gradients",
    "gradient_plan",
    "highway",
    "input_gradients",
    "logits",
    "models",
    "open_study",
    "path_gradients",
    "paths",
    "plan",
    "sweeps",
    "training",
    "wrap",
]
