"""Control of runs on a federation's server: submit, watch, resubmit, stop."""
