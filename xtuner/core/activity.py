"""What this process is doing. The heartbeat reports the last activity of a rank that makes no progress."""

current_activity = ""
num_activities = 0  # recorded so far; a rank whose number grows makes progress


def record_progress(activity: str) -> None:
    """Record the start of a step of work, such as a collective or a file of a checkpoint."""
    global current_activity, num_activities
    current_activity, num_activities = activity, num_activities + 1
