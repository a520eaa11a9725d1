"""The service: submit, follow, look, intervene. Optional; files are the truth, and outlive it.

jobs.py       a job's files in its run folder
queue.py      their index in SQLite: leases, so that no two workers hold one job
worker.py     runs jobs: one recipe command each, in a session of its own
runners.py    the same commands, handed to Slurm or SkyPilot
app.py        the HTTP API; pages.py what a browser sees; circuit_files.py of circuits, also huge ones
live_desk.py  the intervention desk; desk_command.py from a terminal; sessions.py loads its models
"""
