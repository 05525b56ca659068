"""Many runs: search and tables."""
