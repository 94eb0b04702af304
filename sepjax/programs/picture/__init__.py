"""Pictures, a file each: `sepjax picture kept|pareto|curves|mask|slots|kinds`."""
