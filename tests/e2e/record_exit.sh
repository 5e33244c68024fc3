#!/usr/bin/env bash
# record_exit.sh DIR PROGRAM [ARGUMENTS]: runs the program; DIR/pid.RANK and DIR/exit.RANK tell its
# process, its exit code and when it ended. Started by mpirun, one a rank.
directory=$1
shift
rank=${OMPI_COMM_WORLD_RANK:-0}
"$@" &
child=$!
# mpirun's signals go to the whole group: the program answers them, this only waits. Only what bash
# itself can do from here on: other programs would be ended.
trap : TERM INT USR1
echo "$child" >"$directory/pid.$rank"
while
  wait "$child"
  kill -0 "$child" 2>/dev/null
do :; done
# A signal may have come in the moment of the end: bash still knows how it was.
wait "$child"
code=$?
echo "$code $EPOCHREALTIME" >"$directory/exit.$rank"
exit "$code"
