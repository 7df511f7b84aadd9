"""Everything that knows Ray: where a run's processes are, who watches them, and what the user sees meanwhile."""
