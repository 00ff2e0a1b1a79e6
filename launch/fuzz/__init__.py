"""Random cases without end, as commands: `python -m cpattn.launch.fuzz planner|ranks|options|parse|soak`."""
