"""The command line: one module for each command, and what they share."""

from __future__ import annotations

from patchpipe.cli.app import app
from patchpipe.cli.check import command as check
from patchpipe.cli.commands import demo, explain, generate, info, models, plan, profile, quality, serve, simulate, trace

__all__ = ["app"]

app.command(epilog=generate.EPILOG)(generate.generate)
app.command(epilog=demo.EPILOG)(demo.demo)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=profile.EPILOG)(profile.profile)
app.command(epilog=quality.EPILOG)(quality.quality)
app.command(epilog=simulate.EPILOG)(simulate.simulate)
app.command(epilog=info.EPILOG)(info.info)
app.command(epilog=check.EPILOG)(check.check)
app.command(epilog=explain.EPILOG)(explain.explain)
app.command(epilog=trace.EPILOG)(trace.trace)
app.command(epilog=models.EPILOG)(models.models)
app.command(epilog=serve.EPILOG)(serve.serve)
