"""Studies: many runs of drover, kept, gathered and shown. launch/study.py is the way in.

errors     one kind of error, drover's exit codes
files      JSON and text that are whole or not there; the lock of a study's folder
jobs       one run of drover: its name, its folder, what came of it
folder     a study's folder: what is finished, what is left, runs here or through Slurm
figures    the numbers of one run and of repeated ones, and whether a difference is more than noise
grids      tensor × pipeline × data parallel for so many ranks
plots      matplotlib: every figure as SVG and PNG
tables     all runs as CSV and JSON
page       the HTML report's parts
scaling, actions, batch, qps    the studies themselves
"""
