"""vhostmp: a vhost back-end as a small set of Linux processes.

This module stays thin: every worker process imports it, so it must not load the control plane.
"""

__version__ = "0.1.0"
