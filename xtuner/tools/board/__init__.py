"""`xtuner board`: a local page with the curves of runs.

work_dirs   finds runs and follows their files as they grow
curves      what the page draws: a run's curves, reduced to the pixels of a screen
server      serves the page and its data; export writes both to one file
page/, uplot/   the page; the charting library that it uses
"""
