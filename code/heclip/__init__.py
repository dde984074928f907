"""HECLIP: predict spatial gene expression from H&E images.

For notebooks: `predict_slide`, `predict` and `to_spatialdata` (see api.py). They are imported when
they are first used.
"""


def __getattr__(name):
    if name in ("predict", "predict_slide", "to_spatialdata"):
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
