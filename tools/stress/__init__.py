"""`vhostmp stress`: a vhost-user front-end that is careful, odd or hostile, and says what a back-end gets wrong."""
