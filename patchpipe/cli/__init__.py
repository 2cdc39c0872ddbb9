"""The command line: ``patchpipe generate``, ``plan``, ``profile``, ``info``, ``explain``, ``trace`` and ``models``."""

from __future__ import annotations

from patchpipe.cli import explain, generate, info, models, plan, profile, trace
from patchpipe.cli.app import app

__all__ = ["app"]

app.command(epilog=generate.EPILOG)(generate.generate)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=profile.EPILOG)(profile.profile)
app.command(epilog=info.EPILOG)(info.info)
app.command(epilog=explain.EPILOG)(explain.explain)
app.command(epilog=trace.EPILOG)(trace.trace)
app.command(epilog=models.EPILOG)(models.models)
