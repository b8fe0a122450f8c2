from privtrain.api import Run, attack, configure, export, open_run, plan, preview, resume, train, verify

__version__: str
__all__ = ["Run", "attack", "configure", "export", "open_run", "plan", "preview", "resume", "train", "verify"]
