"""Readiness: what can be known before a run: doctor, forecast, rehearsal, preflight."""
