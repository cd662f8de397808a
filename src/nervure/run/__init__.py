"""Floor 6: plans, jobs and executors."""
