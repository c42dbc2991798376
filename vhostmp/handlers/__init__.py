"""What each vhost-user message does: functions by topic, in the table of `registry.py`."""
