"""The scheduler in simulated time: arrivals, groups of devices, the paper's set-up, figures and a drawing."""

from __future__ import annotations
