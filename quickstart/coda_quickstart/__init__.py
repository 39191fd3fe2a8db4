"""Data makers and the report of the small loop that `quickstart.sh` runs. Rooms are only called by command line."""
