"""The machine as the planner sees it: devices, links, and profiles of them, measured or nominal."""
