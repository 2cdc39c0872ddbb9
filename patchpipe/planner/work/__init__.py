"""The work as the planner sees it: a model's blocks and a request's tokens, from figures or files."""
