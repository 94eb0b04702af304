"""Pictures, a file each: `sepjax picture kept|pareto|curves`."""
