#!/usr/bin/env bash
# record_exit.sh DIR PROGRAM [ARGUMENTS]: runs the program; DIR/pid.RANK and DIR/exit.RANK tell its
# process, its exit code and when it ended. Started by mpirun, one a rank.
directory=$1
shift
rank=${OMPI_COMM_WORLD_RANK:-0}
"$@" &
child=$!
# mpirun's signals go to the whole group: the program answers them, this only waits. Ignored, not
# caught: a caught one ends a wait, with its own number for the program's code.
trap '' TERM INT USR1
echo "$child" >"$directory/pid.$rank"
wait "$child"
code=$?
echo "$code $EPOCHREALTIME" >"$directory/exit.$rank"
exit "$code"
