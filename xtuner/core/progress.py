"""What this process is doing, read by the heartbeat: a rank that makes no progress is reported with its last step."""

current_activity = ""
num_activities = 0  # so far: a rank whose number grows is alive


def record_progress(activity: str) -> None:
    """A step of work has begun, such as a collective or a file of a checkpoint."""
    global current_activity, num_activities
    current_activity, num_activities = activity, num_activities + 1
