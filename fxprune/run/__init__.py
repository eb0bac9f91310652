"""The main job, from what is asked for to the files that come out."""
