"""From a run file to running machines: the command line, provisioning and preflight."""
