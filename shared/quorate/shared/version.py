"""The release. Both wheels, `quorate` and `quorate-client`, take their version from here.

Read from the code, not from the metadata of an installed distribution: which of the two is installed has no
say in it, and what is told to the coordinator is the release of the code that runs.
"""

VERSION = "0.1.0"
