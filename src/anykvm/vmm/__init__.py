"""The policy half: boot protocols, machine, devices, console, monitor, images."""
